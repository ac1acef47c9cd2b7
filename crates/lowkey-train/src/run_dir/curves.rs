//! The figures of `metrics.jsonl` as curves, however long the file is, and whatever it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::lines::{each_line, spread};
use crate::error::{Error, Result};

/// Bytes of a file that are read; of a longer one so many, in parts from its beginning to its end.
const MOST_BYTES: u64 = 256 << 20;

/// Points of all curves together that are held; where there are more, each curve is thinned.
const MOST_POINTS: usize = 1 << 21;

/// Curves that are told apart; figures of a file with more are left out.
const MOST_CURVES: usize = 512;

/// Characters of the longest name of a figure.
const LONGEST_NAME: usize = 100;

/// What says where a line belongs, rather than what was measured there.
const PLACES: [&str; 4] = ["step", "tokens", "time_s", "epoch"];

/// A figure at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Optimiser steps taken.
    pub step: u64,
    /// Training targets seen; not a number where the line does not say it.
    pub tokens: f64,
    /// Seconds of the run; not a number where the line does not say it.
    pub time_s: f64,
    /// The figure, which is finite.
    pub value: f64,
}

/// A figure over the steps of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    points: BTreeMap<u64, Point>,
    /// Whether points were left out to hold no more than fit.
    pub thinned: bool,
    /// Steps whose figure is `null`, as a number is written that is not finite.
    pub not_finite: BTreeSet<u64>,
}

impl Curve {
    /// The points by rising step, one a step.
    pub fn points(&self) -> impl DoubleEndedIterator<Item = &Point> + Clone {
        self.points.values()
    }

    /// The point of a step.
    pub fn at(&self, step: u64) -> Option<Point> {
        self.points.get(&step).copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// The last point.
    pub fn last(&self) -> Option<Point> {
        self.points.values().next_back().copied()
    }

    /// At most two points of each of `stretches` parts of equal length, the lowest and the highest, beside the first and the last one of
    /// all: what a curve of that many points would hide stays to be seen.
    pub fn thin(&self, stretches: usize) -> Vec<Point> {
        if self.len() <= 2 * stretches {
            return self.points().copied().collect();
        }
        let Some((first, last)) = self.points().next().zip(self.last()) else { return Vec::new() };
        let length = (last.step - first.step) as f64 / stretches as f64;
        let mut kept: BTreeMap<u64, Point> = [(first.step, *first), (last.step, last)].into();
        let mut keep = |extremes: Option<(Point, Point)>| {
            for point in extremes.into_iter().flat_map(|(low, high)| [low, high]) {
                kept.insert(point.step, point);
            }
        };
        let (mut stretch, mut extremes): (usize, Option<(Point, Point)>) = (0, None);
        for point in self.points() {
            let at = ((point.step - first.step) as f64 / length) as usize;
            if at != stretch {
                keep(extremes.take());
                stretch = at;
            }
            let (low, high) = extremes.get_or_insert((*point, *point));
            if point.value < low.value {
                *low = *point;
            }
            if point.value > high.value {
                *high = *point;
            }
        }
        keep(extremes);
        kept.into_values().collect()
    }
}

/// All curves of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// By key, such as `train_loss`, and by the key within its value, such as the class within `class_gap`, or the index within a list;
    /// that is empty where the value is a number.
    curves: BTreeMap<String, BTreeMap<String, Curve>>,
    /// How many there are.
    kinds: usize,
    /// Points in all curves.
    held: usize,
    /// The highest step so far.
    highest: u64,
    /// Lines that are steps.
    pub lines: u64,
    /// Lines of steps that were written again later; the later ones count.
    pub again: u64,
    /// Lines that are no steps, or too long to be one.
    pub unread: u64,
    /// Figures that were left out because there are too many.
    pub left_out: u64,
    /// Bytes of the file, and how many of them were read.
    pub bytes: (u64, u64),
    /// Step, tokens and seconds of the newest line.
    pub newest: Option<(u64, f64, f64)>,
}

impl Curves {
    /// Reads a `metrics.jsonl`; nothing where there is none. It may be written meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] where it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_parts(path, MOST_BYTES)
    }

    fn read_parts(path: &Path, most: u64) -> Result<Self> {
        let mut curves = Self::default();
        let read = each_line(path, |bytes| spread(bytes, most), &mut |line| match serde_json::from_slice::<
            Map<String, Value>,
        >(line.bytes)
        {
            Ok(line) if line.get("step").is_some_and(Value::is_u64) => curves.add(&line),
            _ if line.ended && !line.bytes.trim_ascii().is_empty() => curves.unread += 1,
            _ => {}
        });
        let extent = match read {
            Ok(extent) => extent,
            Err(Error::Io { reason, .. }) if reason.kind() == std::io::ErrorKind::NotFound => return Ok(curves),
            Err(e) => return Err(e),
        };
        curves.unread += extent.too_long;
        curves.bytes = (extent.bytes, extent.read);
        Ok(curves)
    }

    /// A figure's curve, where there is one.
    pub fn get(&self, name: &str) -> Option<&Curve> {
        self.curves.get(name)?.get("")
    }

    /// The curves of a figure that has parts, by part.
    pub fn parts(&self, name: &str) -> impl Iterator<Item = (&str, &Curve)> {
        let parts = self.curves.get(name).into_iter().flatten();
        parts.filter(|(part, _)| !part.is_empty()).map(|(part, curve)| (part.as_str(), curve))
    }

    /// All curves, by figure and part, which is empty for a figure that has none.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Curve)> {
        let parts =
            self.curves.iter().flat_map(|(name, parts)| parts.iter().map(move |(part, curve)| (name, part, curve)));
        parts.map(|(name, part, curve)| (name.as_str(), part.as_str(), curve))
    }

    fn add(&mut self, line: &Map<String, Value>) {
        let number = |key| line.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
        let (tokens, time_s) = (number("tokens"), number("time_s"));
        if self.lines > 0 && step <= self.highest {
            let mut was = false;
            for curve in self.curves.values_mut().flat_map(BTreeMap::values_mut) {
                let gone = curve.points.remove(&step).is_some();
                self.held -= usize::from(gone);
                was |= gone | curve.not_finite.remove(&step);
            }
            self.again += u64::from(was);
        }
        self.lines += 1;
        self.highest = self.highest.max(step);
        self.newest = Some((step, tokens, time_s));
        let at = |value| Point { step, tokens, time_s, value };
        for (name, value) in line.iter().filter(|(name, _)| !PLACES.contains(&name.as_str())) {
            match value {
                Value::Object(parts) => {
                    parts.iter().for_each(|(part, value)| self.put(name, part, step, value, at));
                }
                Value::Array(parts) => {
                    parts.iter().enumerate().for_each(|(i, value)| self.put(name, &i.to_string(), step, value, at));
                }
                value => self.put(name, "", step, value, at),
            }
        }
        if self.held > MOST_POINTS {
            self.make_room();
        }
    }

    fn put(&mut self, name: &str, part: &str, step: u64, value: &Value, at: impl Fn(f64) -> Point) {
        if !(value.is_number() || value.is_null()) {
            return;
        }
        let known = self.curves.get_mut(name).and_then(|parts| parts.get_mut(part));
        let curve = match known {
            Some(curve) => curve,
            None if name.len() > LONGEST_NAME || part.len() > LONGEST_NAME || self.kinds >= MOST_CURVES => {
                self.left_out += 1;
                return;
            }
            None => {
                self.kinds += 1;
                self.curves.entry(name.into()).or_default().entry(part.into()).or_default()
            }
        };
        match value.as_f64().filter(|value| value.is_finite()) {
            Some(value) => {
                curve.points.insert(step, at(value));
                self.held += 1;
            }
            None => {
                curve.not_finite.insert(step);
                self.held += 1;
            }
        }
    }

    fn make_room(&mut self) {
        let stretches = (MOST_POINTS / 8 / self.kinds.max(1)).max(16);
        self.held = 0;
        for curve in self.curves.values_mut().flat_map(BTreeMap::values_mut) {
            let kept = curve.thin(stretches);
            curve.thinned |= kept.len() < curve.points.len();
            curve.points = kept.into_iter().map(|point| (point.step, point)).collect();
            while curve.not_finite.len() > 2 * stretches {
                curve.not_finite.pop_first();
            }
            self.held += curve.points.len() + curve.not_finite.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Curves {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        Curves::read(&path).unwrap()
    }

    fn values(curve: &Curve) -> Vec<(u64, f64)> {
        curve.points().map(|point| (point.step, point.value)).collect()
    }

    #[test]
    fn the_newest_line_of_a_step_counts_with_all_that_it_says_and_does_not_say() {
        let curves = read(
            "{\"step\":1,\"tokens\":8,\"time_s\":0.5,\"train_loss\":3.0}\n\
             {\"step\":2,\"tokens\":16,\"time_s\":1.0,\"train_loss\":2.0,\"val_loss\":2.5}\n\
             {\"step\":3,\"tokens\":24,\"time_s\":1.5,\"train_loss\":1.0}\n\
             {\"step\":2,\"tokens\":16,\"time_s\":2.0,\"train_loss\":2.25}\n",
        );
        assert_eq!(values(curves.get("train_loss").unwrap()), [(1, 3.0), (2, 2.25), (3, 1.0)]);
        assert!(curves.get("val_loss").unwrap().is_empty());
        assert_eq!((curves.lines, curves.again, curves.newest), (4, 1, Some((2, 16.0, 2.0))));
    }

    #[test]
    fn what_is_no_figure_is_counted_or_passed_over() {
        let curves = read(
            "{\"step\":1,\"tokens\":null,\"train_loss\":3.0,\"note\":\"x\",\"class_gap\":{\"name\":0.5,\"fact\":null},\"latent_effective_rank\":[2.5,7]}\n\
             not json\n{\"step\":-1}\n\n[1]\n{\"step\":2,\"train_loss\":null,\"rewards/margins\":0.25}\n{\"step\":3,\"trai",
        );
        assert_eq!((curves.lines, curves.unread), (2, 3));
        let loss = curves.get("train_loss").unwrap();
        assert_eq!((values(loss), loss.not_finite.len()), (vec![(1, 3.0)], 1));
        assert!(loss.last().unwrap().tokens.is_nan());
        let ranks: Vec<(&str, f64)> =
            curves.parts("latent_effective_rank").map(|(part, curve)| (part, curve.last().unwrap().value)).collect();
        assert_eq!(ranks, [("0", 2.5), ("1", 7.0)]);
        assert_eq!(
            curves.parts("class_gap").map(|(part, curve)| (part, curve.len())).collect::<Vec<_>>(),
            [("fact", 0), ("name", 1)]
        );
        assert_eq!(values(curves.get("rewards/margins").unwrap()), [(2, 0.25)]);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Curves::read(&dir.path().join("none")).unwrap(), Curves::default());
        assert!(Curves::read(dir.path()).is_err());
    }

    #[test]
    fn a_thinned_curve_keeps_its_ends_and_its_extremes_as_they_were_written() {
        let text: String = (1..=10_000)
            .map(|step: u64| {
                let loss = if step == 5003 { 99.0 } else { 1.0 + (step * 7919 % 1000) as f64 / 1000.0 };
                format!("{{\"step\":{step},\"tokens\":{step},\"time_s\":1,\"train_loss\":{loss}}}\n")
            })
            .collect();
        let curves = read(&text);
        let curve = curves.get("train_loss").unwrap();
        let thin = curve.thin(100);
        assert!((150..=202).contains(&thin.len()), "{}", thin.len());
        assert!(thin.windows(2).all(|pair| pair[0].step < pair[1].step));
        assert_eq!((thin[0].step, thin[thin.len() - 1].step), (1, 10_000));
        assert!(thin.iter().any(|point| (point.step, point.value) == (5003, 99.0)));
        assert!(thin.iter().all(|point| curve.points.get(&point.step) == Some(point)));
    }

    #[test]
    fn figures_without_end_take_no_memory_without_end() {
        let line = |step: u64| {
            let figures: String = (0..400).map(|i| format!(",\"f{}\":1.5", step * 400 + i)).collect();
            format!("{{\"step\":{step}{figures}}}\n")
        };
        let curves = read((0..4).map(line).collect::<String>());
        assert_eq!((curves.iter().count(), curves.left_out), (MOST_CURVES, 4 * 400 - MOST_CURVES as u64));
        // A long file is read in parts, and thinned while it is read.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let text: String = (1..=100_000).map(|step| format!("{{\"step\":{step},\"train_loss\":{step}.5}}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let mut curves = Curves::read_parts(&path, 1 << 18).unwrap();
        let curve = curves.get("train_loss").unwrap();
        assert!(curves.bytes.1 <= 1 << 18 && curves.bytes.0 > 1 << 20 && curve.len() > 1000);
        assert_eq!((curve.points().next().unwrap().step, curve.last().unwrap().value), (1, 100_000.5));
        curves.make_room();
        assert!(curves.held <= MOST_POINTS / 4);
    }
}
