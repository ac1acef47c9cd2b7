//! Plots as SVG text: a few kinds of series over one pair of axes, in colours that colour-blind people tell apart and marks that
//! survive print in grey.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::axis::{Axis, short};
use crate::looks::COLOURS;

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

const fn colour(i: usize) -> RGBColor {
    let [red, green, blue] = COLOURS[i % COLOURS.len()];
    RGBColor(red, green, blue)
}

const SIZE: (u32, u32) = (760, 420);

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
        let colour = colour($look);
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
        let paint = colour($look).stroke_width(2);
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
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(x.clone(), y.clone())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .x_label_formatter(&|tick| x.label(*tick))
            .y_label_formatter(&|tick| y.label(*tick))
            .axis_desc_style(("sans-serif", 15))
            .label_style(("sans-serif", 13))
            .draw()?;
        let axes = chart.plotting_area();
        for (i, Series { name, look, style, points }) in self.series.iter().enumerate() {
            let thin = colour(*look).stroke_width(1);
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
