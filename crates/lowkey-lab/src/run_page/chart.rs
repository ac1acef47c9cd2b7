//! A chart of a run's page: curves over tokens, steps, FLOPs and time at once, of which the page shows one.
//!
//! The lab's plots are pictures of one size. These follow the reader's width, colours and choice of axis, which is why they are
//! written here; axes and palette are the same.

use std::collections::BTreeSet;
use std::fmt::Write;

use lowkey_train::run_dir::{Curve, Point};
use serde_json::{Value, json};

use super::scale::{Unit, X};
use crate::axis::Axis;
use crate::html::escaped;
use crate::looks::COLOURS;

/// Width and height of a chart, and what is left of it for the axes on its four sides, in its own pixels.
const SIZE: (f64, f64) = (420.0, 250.0);
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 40.0;

/// Parts of a curve of which a page shows the lowest and the highest point.
pub(super) const STRETCHES: usize = 200;

/// Parts of a noisy curve whose means are drawn as a line.
pub(super) const MEANS: usize = 50;

/// From so many points on the means are drawn.
const NOISY: usize = 120;

/// Noisy curves from which on their noise is hardly drawn.
const MANY: usize = 3;

/// Points up to which each has its mark.
const FEW: usize = 24;

/// What a chart shows.
pub(super) struct Chart {
    pub(super) title: String,
    /// The unit of its heights, or another word on them.
    pub(super) unit: String,
    /// Whether heights are on a logarithm where all are above 0.
    pub(super) log: bool,
    /// Heights that the axis holds in any case, to be compared with another chart.
    pub(super) also: Vec<f64>,
    /// Whether its curves are told apart by a legend of its own, not by that of the page.
    pub(super) own_legend: bool,
    pub(super) curves: Vec<Drawn>,
    /// What else a reader has to know.
    pub(super) note: String,
}

/// A curve of a chart.
pub(super) struct Drawn {
    pub(super) name: String,
    /// Index of colour, dashes and mark.
    pub(super) look: usize,
    /// The points that are drawn, each as it was written.
    points: Vec<Point>,
    means: Vec<Point>,
    breaks: BTreeSet<u64>,
    /// How many points there are.
    all: usize,
    flops_per_token: Option<f64>,
}

impl Drawn {
    /// A curve as a page shows it; none where nothing is to be seen.
    pub(super) fn new(name: &str, look: usize, curve: &Curve, flops_per_token: Option<f64>) -> Option<Self> {
        let points = curve.thin(STRETCHES);
        if points.is_empty() {
            return None;
        }
        let means = if curve.len() >= NOISY { means(curve) } else { Vec::new() };
        let breaks = curve.not_finite.clone();
        Some(Self { name: name.into(), look, points, means, breaks, all: curve.len(), flops_per_token })
    }

    pub(super) fn heights(&self) -> impl Iterator<Item = f64> {
        self.points.iter().map(|point| point.value)
    }

    fn x(&self, x: X, point: &Point) -> f64 {
        x.of(point, self.flops_per_token)
    }
}

/// Means of equal parts of a curve's steps.
fn means(curve: &Curve) -> Vec<Point> {
    let (Some(first), Some(last)) = (curve.points().next(), curve.last()) else { return Vec::new() };
    let length = ((last.step - first.step) as f64 / MEANS as f64).max(1.0);
    let mut sums: Vec<(f64, [f64; 4])> = vec![(0.0, [0.0; 4]); MEANS];
    for point in curve.points() {
        let at = (((point.step - first.step) as f64 / length) as usize).min(MEANS - 1);
        let (n, sum) = &mut sums[at];
        *n += 1.0;
        for (sum, x) in sum.iter_mut().zip([point.step as f64, point.tokens, point.time_s, point.value]) {
            *sum += x;
        }
    }
    let mean = |(n, [step, tokens, time, value]): (f64, [f64; 4])| Point {
        step: (step / n) as u64,
        tokens: tokens / n,
        time_s: time / n,
        value: value / n,
    };
    sums.into_iter().filter(|(n, _)| *n > 0.0).map(mean).collect()
}

/// A chart's axes on paper.
struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> Option<(f64, f64)> {
        let (across, up) = (self.x.share(x), self.y.share(y));
        let inside = across.is_finite() && up.is_finite();
        let wide = (SIZE.0 - LEFT - RIGHT, SIZE.1 - TOP - BOTTOM);
        inside.then_some((LEFT + across * wide.0, TOP + (1.0 - up) * wide.1))
    }
}

impl Chart {
    /// The figure as HTML, with its number on the page.
    pub(super) fn html(&self, number: usize) -> String {
        let mut out = format!(
            "<figure id=\"f{number}\"><h3>{} <small>{}</small></h3>\n",
            escaped(&self.title),
            escaped(&self.unit)
        );
        let label = self.curves.iter().map(|drawn| drawn.name.as_str()).collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            out,
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">",
            SIZE.0,
            SIZE.1,
            escaped(&format!("{}: {label}", self.title))
        );
        let y = self.y();
        out += &rows(&y);
        for x in X::ALL {
            let _ = write!(out, "<g class=\"by-{}\">", x.name());
            match self.x(x) {
                Some((axis, unit)) => out += &self.curves(x, &unit, &Frame { x: axis, y: y.clone() }),
                None => {
                    let _ = write!(out, "<text x=\"{LEFT}\" y=\"40\">not known over {}</text>", x.name());
                }
            }
            out += "</g>\n";
        }
        let (top, bottom) = (TOP, SIZE.1 - BOTTOM);
        let _ = writeln!(out, "<line class=\"hair\" x1=\"0\" x2=\"0\" y1=\"{top}\" y2=\"{bottom}\"/></svg>");
        out + &self.caption() + "</figure>\n"
    }

    /// The figures that the curves are drawn from, for the page's script and for other programs: `[step, tokens, seconds, figure]`.
    pub(super) fn figures(&self, number: usize) -> Value {
        let number_or_null = |x: f64| match x {
            // The same number, in fewer characters.
            x if x.fract() == 0.0 && x.abs() < 1e15 => json!(x as i64),
            x if x.is_finite() => json!(x),
            _ => Value::Null,
        };
        let span = |x: X| self.x(x).map(|(axis, unit)| json!([axis.low * unit.size, axis.high * unit.size]));
        let series = self.curves.iter().map(|drawn| {
            let points = drawn.points.iter().map(|point| {
                json!([point.step, number_or_null(point.tokens), number_or_null(point.time_s), point.value])
            });
            json!({
                "name": drawn.name,
                "flops": drawn.flops_per_token,
                "points": points.collect::<Vec<_>>(),
            })
        });
        json!({
            "id": format!("f{number}"),
            "title": self.title,
            "plot": [LEFT, SIZE.0 - LEFT - RIGHT],
            "x": X::ALL.iter().map(|x| (x.name().to_string(), json!(span(*x)))).collect::<serde_json::Map<_, _>>(),
            "series": series.collect::<Vec<_>>(),
        })
    }

    fn y(&self) -> Axis {
        let heights = || self.curves.iter().flat_map(Drawn::heights).chain(self.also.iter().copied());
        let log = self.log && heights().all(|height| height > 0.0);
        Axis::new(heights(), log, &[]).with_enough_ticks()
    }

    /// The axis below, in a unit that makes its numbers short; none where no point has a place on it.
    fn x(&self, x: X) -> Option<(Axis, Unit)> {
        let places = || self.curves.iter().flat_map(|drawn| drawn.points.iter().map(|point| drawn.x(x, point)));
        let highest = places().filter(|place| place.is_finite()).fold(f64::NEG_INFINITY, f64::max);
        let unit = x.unit(highest);
        highest.is_finite().then(|| (Axis::new(places().map(|place| place / unit.size), false, &[]), unit))
    }

    fn curves(&self, x: X, unit: &Unit, frame: &Frame) -> String {
        let mut out = columns(&frame.x, &unit.label);
        let noisy = || self.curves.iter().filter(|drawn| !drawn.means.is_empty());
        let many = if noisy().count() > MANY { " many" } else { "" };
        for drawn in noisy() {
            let at = |point: &Point| frame.at(drawn.x(x, point) / unit.size, point.value);
            let line = path(&drawn.points, &drawn.breaks, &at);
            let _ = write!(out, "<path class=\"faint{many} c{}\" d=\"{line}\"/>", Look(drawn.look).colour());
        }
        for drawn in &self.curves {
            let look = Look(drawn.look);
            let at = |point: &Point| frame.at(drawn.x(x, point) / unit.size, point.value);
            let bold = if drawn.means.is_empty() { &drawn.points } else { &drawn.means };
            let line = path(bold, &drawn.breaks, &at);
            let _ = write!(out, "<path class=\"curve c{} d{}\" d=\"{line}\"/>", look.colour(), look.dashes());
            let every = if bold.len() <= FEW { 1 } else { bold.len().div_ceil(6) };
            // Curves that lie on each other have their marks side by side.
            let first = if every > 1 { (drawn.look * 3) % every } else { 0 };
            let marks: String =
                bold.iter().skip(first).step_by(every).filter_map(|point| Some(look.mark(at(point)?))).collect();
            let _ = write!(out, "<path class=\"spot c{}{}\" d=\"{marks}\"/>", look.colour(), look.filling());
        }
        out
    }

    fn caption(&self) -> String {
        let mut out = String::from("<figcaption>");
        if self.own_legend {
            out += &self.curves.iter().map(|drawn| key(&drawn.name, drawn.look)).collect::<String>();
        }
        let cut: Vec<&Drawn> = self.curves.iter().filter(|drawn| drawn.points.len() < drawn.all).collect();
        if let Some(most) = cut.iter().map(|drawn| drawn.all).max() {
            let _ = write!(
                out,
                "Of up to {most} points the first, the last, and the lowest and highest of each of {STRETCHES} stretches. "
            );
        }
        if self.curves.iter().any(|drawn| !drawn.means.is_empty()) {
            let _ = write!(out, "Thin: the figures; thick: means of {MEANS} stretches. ");
        }
        let breaks: usize = self.curves.iter().map(|drawn| drawn.breaks.len()).sum();
        if breaks > 0 {
            let _ = write!(out, "{breaks} figures are no finite numbers: the curve is broken there. ");
        }
        out + &escaped(&self.note) + "</figcaption>"
    }
}

/// The mesh's rows with their numbers.
fn rows(axis: &Axis) -> String {
    let (left, right, bottom) = (LEFT, SIZE.0 - RIGHT, SIZE.1 - BOTTOM);
    let mut out = format!("<path class=\"mesh\" d=\"M{left} {TOP}V{bottom}H{right}");
    let height = |tick: f64| TOP + (1.0 - axis.share(tick)) * (bottom - TOP);
    for tick in &axis.ticks {
        let _ = write!(out, "M{left} {:.1}H{right}", height(*tick));
    }
    out += "\"/>";
    for tick in &axis.ticks {
        let (x, y) = (left - 5.0, height(*tick) + 4.0);
        let _ = write!(out, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", axis.label(*tick));
    }
    out + "\n"
}

/// The marks of the axis below, and what it counts.
fn columns(axis: &Axis, label: &str) -> String {
    let bottom = SIZE.1 - BOTTOM;
    let middle = f64::midpoint(LEFT, SIZE.0 - RIGHT);
    let mut out = String::new();
    for tick in &axis.ticks {
        let x = LEFT + axis.share(*tick) * (SIZE.0 - LEFT - RIGHT);
        let _ = write!(
            out,
            "<path class=\"mesh\" d=\"M{x:.1} {bottom}v4\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            axis.label(*tick)
        );
    }
    let y = SIZE.1 - 7.0;
    let _ = write!(out, "<text x=\"{middle}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", escaped(label));
    out
}

/// A line through points, which is broken where a figure between two of them is no number.
fn path(points: &[Point], breaks: &BTreeSet<u64>, at: &dyn Fn(&Point) -> Option<(f64, f64)>) -> String {
    let mut out = String::new();
    let mut before: Option<u64> = None;
    for point in points {
        let Some((x, y)) = at(point) else {
            before = None;
            continue;
        };
        let joined =
            before.is_some_and(|before| before < point.step && breaks.range(before..point.step).next().is_none());
        let _ = write!(out, "{}{x:.1} {y:.1}", if joined { 'L' } else { 'M' });
        before = Some(point.step);
    }
    out
}

/// What tells a curve from the others: a colour, dashes and a mark.
struct Look(usize);

impl Look {
    /// The palette's black comes last: it is that of text.
    fn colour(&self) -> usize {
        (self.0 + 1) % COLOURS.len()
    }

    /// Another combination in each round through the colours.
    fn kind(&self) -> usize {
        (self.0 + self.0 / COLOURS.len()) % COLOURS.len()
    }

    fn dashes(&self) -> usize {
        self.kind()
    }

    /// The class of marks that are not filled.
    fn filling(&self) -> &'static str {
        if self.kind() >= 4 { " open" } else { "" }
    }

    fn mark(&self, (x, y): (f64, f64)) -> String {
        let start = |dx: f64, dy: f64| format!("M{:.1} {:.1}", x + dx, y + dy);
        match self.kind() {
            0 => start(-3.0, 0.0) + "a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
            1 => start(-2.7, -2.7) + "h5.4v5.4h-5.4z",
            2 => start(0.0, -3.6) + "l3.6 6.4h-7.2z",
            3 => start(0.0, -3.8) + "l3.8 3.8l-3.8 3.8l-3.8 -3.8z",
            4 => start(-3.0, -3.0) + "l6 6m0 -6l-6 6",
            5 => start(-3.6, 0.0) + "h7.2m-3.6 -3.6v7.2",
            _ => start(0.0, 3.6) + "l3.6 -6.4h-7.2z",
        }
    }
}

/// A name with what its curve looks like.
pub(super) fn key(name: &str, look: usize) -> String {
    let look = Look(look);
    format!(
        "<span class=\"key\"><svg viewBox=\"0 0 34 12\" aria-hidden=\"true\"><path class=\"curve c{0} d{1}\" d=\"M1 6H33\"/>\
         <path class=\"spot c{0}{2}\" d=\"{3}\"/></svg>{4}</span>",
        look.colour(),
        look.dashes(),
        look.filling(),
        look.mark((17.0, 6.0)),
        escaped(name)
    )
}
