//! Plots as SVG text: a few kinds of series over one pair of axes, in colours that colour-blind people tell apart and marks that
//! survive print in grey.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::element::DashedPathElement;
use plotters::prelude::*;

/// What is drawn.
pub(crate) struct Plot {
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) log_x: bool,
    pub(crate) log_y: bool,
    /// Where the x axis has its marks; empty: wherever round numbers fall.
    pub(crate) x_ticks: Vec<f64>,
    pub(crate) series: Vec<Series>,
}

/// Points of one kind.
pub(crate) struct Series {
    pub(crate) name: String,
    /// Index of colour and mark.
    pub(crate) look: usize,
    pub(crate) style: Style,
    pub(crate) points: Vec<Point>,
}

/// How points are drawn.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Style {
    Marks,
    /// Marks that are not filled.
    Hollow,
    Line,
    Dashed,
    /// A line with marks.
    Both,
}

/// A point with the interval of its height, if it has one.
#[derive(Clone, Copy)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) interval: Option<(f64, f64)>,
}

impl Point {
    pub(crate) fn new(x: f64, y: f64) -> Self {
        Self { x, y, interval: None }
    }
}

/// Okabe and Ito's palette, from the darkest, without its yellow, which paper swallows.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

const SIZE: (u32, u32) = (760, 420);

/// One axis, straight or logarithmic.
#[derive(Clone)]
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, log: bool, ticks: &[f64]) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite() && (!log || *value > 0.0)) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = if log { (1.0, 10.0) } else { (0.0, 1.0) };
        }
        let room =
            if log { (high / low).ln().max(0.2) * 0.06 } else { (high - low).max(1e-9 * high.abs()).max(1e-12) * 0.06 };
        let (low, high) = if log { (low * (-room).exp(), high * room.exp()) } else { (low - room, high + room) };
        let ticks = if !ticks.is_empty() {
            ticks.iter().copied().filter(|tick| (low..=high).contains(tick)).collect()
        } else if log {
            log_ticks(low, high)
        } else {
            round_ticks(low, high)
        };
        Self { low, high, log, ticks }
    }

    fn share(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }
}

fn round_ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= high).take(20).collect()
}

fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let steps: &[f64] = if high / low > 300.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
    all.filter(|tick| (low..=high).contains(tick)).collect()
}

/// A number as short as it can be read back at a glance.
pub(crate) fn short(x: f64) -> String {
    let magnitude = x.abs();
    if x == 0.0 {
        "0".into()
    } else if !(1e-4..1e7).contains(&magnitude) {
        format!("{x:.0e}")
    } else {
        let text = format!("{x:.*}", (3 - magnitude.log10().floor() as i32).clamp(0, 7) as usize);
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let place = f64::from(limit.0) + self.share(*value) * f64::from(limit.1 - limit.0);
        place.round().clamp(-1e6, 1e6) as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        short(*value)
    }
}

type Failure<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

/// Width of the legend beside the axes.
const LEGEND: i32 = 190;

/// One mark of a series, on axes or in a legend.
macro_rules! mark {
    ($area:expr, $at:expr, $look:expr, $style:expr) => {{
        let colour = COLOURS[$look % COLOURS.len()];
        let paint = if $style == Style::Hollow { colour.stroke_width(2) } else { colour.filled() };
        match $look % 4 {
            0 => $area.draw(&Circle::new($at, 4, paint)),
            1 => $area.draw(&(EmptyElement::at($at) + Rectangle::new([(-4, -4), (4, 4)], paint))),
            2 => $area.draw(&TriangleMarker::new($at, 6, paint)),
            _ => $area.draw(&Cross::new($at, 4, colour.stroke_width(2))),
        }
    }};
}

/// A line between pixels, broken or not.
macro_rules! stroke {
    ($area:expr, $path:expr, $look:expr, $style:expr) => {{
        let paint = COLOURS[$look % COLOURS.len()].stroke_width(2);
        match $style {
            Style::Line | Style::Both => $area.draw(&PathElement::new($path, paint)),
            Style::Dashed => $area.draw(&DashedPathElement::new($path, 7, 5, paint)),
            Style::Marks | Style::Hollow => Ok(()),
        }
    }};
}

impl Plot {
    /// The plot as an SVG element; empty where nothing can be drawn, which a string as the target rules out.
    pub(crate) fn svg(&self) -> String {
        let mut out = String::new();
        if self.draw(&mut out).is_err() {
            return String::new();
        }
        out
    }

    fn draw<'a>(&self, out: &'a mut String) -> Result<(), Failure<'a>> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let heights = points().flat_map(|point| {
            let (low, high) = point.interval.unwrap_or((point.y, point.y));
            [low, point.y, high]
        });
        let x = Axis::new(points().map(|point| point.x), self.log_x, &self.x_ticks);
        let y = Axis::new(heights, self.log_y, &[]);
        let whole = SVGBackend::with_string(out, SIZE).into_drawing_area();
        whole.fill(&WHITE)?;
        let (area, legend) = whole.split_horizontally(SIZE.0 as i32 - LEGEND);
        let mut chart =
            ChartBuilder::on(&area).margin(12).x_label_area_size(46).y_label_area_size(70).build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .axis_desc_style(("sans-serif", 15))
            .label_style(("sans-serif", 13))
            .draw()?;
        let axes = chart.plotting_area();
        for (i, Series { name, look, style, points }) in self.series.iter().enumerate() {
            let thin = COLOURS[look % COLOURS.len()].stroke_width(1);
            stroke!(axes, points.iter().map(|point| (point.x, point.y)).collect::<Vec<_>>(), *look, *style)?;
            for point in points {
                if let Some((low, high)) = point.interval {
                    axes.draw(&PathElement::new(vec![(point.x, low), (point.x, high)], thin))?;
                    for end in [low, high] {
                        let cap = PathElement::new(vec![(-4, 0), (4, 0)], thin);
                        axes.draw(&(EmptyElement::at((point.x, end)) + cap))?;
                    }
                }
                if matches!(style, Style::Marks | Style::Hollow | Style::Both) {
                    mark!(axes, (point.x, point.y), *look, *style)?;
                }
            }
            let y = 24 + 20 * i as i32;
            stroke!(legend, vec![(4, y), (26, y)], *look, *style)?;
            if matches!(style, Style::Marks | Style::Hollow | Style::Both) {
                mark!(legend, (15, y), *look, *style)?;
            }
            legend.draw(&Text::new(name.clone(), (34, y - 7), ("sans-serif", 13)))?;
        }
        whole.present()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_numbers_short() {
        assert_eq!(round_ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(log_ticks(3.0, 60.0), [5.0, 10.0, 20.0, 50.0]);
        for (x, text) in [(0.0, "0"), (0.25, "0.25"), (16.0, "16"), (0.6000000000000001, "0.6"), (-1.5, "-1.5")] {
            assert_eq!(short(x), text);
        }
        assert_eq!(short(1e-9), "1e-9");
    }

    #[test]
    fn every_kind_of_series_is_drawn_and_named() {
        let styles = [Style::Marks, Style::Hollow, Style::Line, Style::Dashed, Style::Both];
        let series = styles.iter().enumerate().map(|(look, style)| Series {
            name: format!("series {look}"),
            look,
            style: *style,
            points: vec![
                Point { x: 1.0, y: 2.0, interval: Some((1.5, 2.5)) },
                Point::new(4.0, 3.0),
                Point::new(f64::NAN, 1.0),
            ],
        });
        let (x_label, y_label) = ("rank".into(), "loss".into());
        let mut plot =
            Plot { x_label, y_label, log_x: true, log_y: false, x_ticks: vec![1.0, 4.0], series: series.collect() };
        for log_y in [false, true] {
            plot.log_y = log_y;
            let svg = plot.svg();
            for text in ["<svg", "series 0", "series 4", "rank", "loss", "circle", "polyline", "</svg>"] {
                assert!(svg.contains(text), "{text}: {svg}");
            }
        }
        plot.series.clear();
        assert!(plot.svg().contains("</svg>"));
    }
}
