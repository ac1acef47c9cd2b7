//! Axes of plots: what they span, and where they have their marks.

/// One axis, straight or logarithmic.
#[derive(Clone)]
pub(crate) struct Axis {
    pub(crate) low: f64,
    pub(crate) high: f64,
    log: bool,
    /// Where it has its marks.
    pub(crate) ticks: Vec<f64>,
}

impl Axis {
    /// An axis that holds `values`, with a little room around them, and with marks at `ticks`, or where round numbers fall if there are none.
    pub(crate) fn new(values: impl Iterator<Item = f64>, log: bool, ticks: &[f64]) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite() && (!log || *value > 0.0)) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = if log { (1.0, 10.0) } else { (0.0, 1.0) };
        }
        let room = if log {
            (high / low).ln().max(0.2) * 0.06
        } else if low == high {
            // One value: wide enough that the marks beside it can be told apart as they are written.
            (high.abs() * 0.05).max(1e-12)
        } else {
            (high - low).max(1e-9 * high.abs()) * 0.06
        };
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

    /// Where a value lies, from 0 at the low end to 1 at the high one.
    pub(crate) fn share(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }
}

impl Axis {
    /// What stands beside a mark, which no other one says.
    pub(crate) fn label(&self, tick: f64) -> String {
        let gaps = self.ticks.windows(2).map(|two| two[1] - two[0]);
        told_apart(tick, gaps.fold(f64::INFINITY, f64::min))
    }

    /// The same with three marks at least, which a logarithm of less than a decade may not have.
    pub(crate) fn with_enough_ticks(mut self) -> Self {
        if self.ticks.len() < 3 {
            self.ticks = round_ticks(self.low, self.high);
        }
        self
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
    told_apart(x, f64::INFINITY)
}

/// The same with as many digits as tell it from numbers that are so far away.
fn told_apart(x: f64, gap: f64) -> String {
    let power = |x: f64| x.abs().log10().floor().clamp(-300.0, 300.0) as i32;
    let plain = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if x == 0.0 {
        return "0".into();
    }
    if (1e-4..1e7).contains(&x.abs()) {
        return plain(&format!("{x:.*}", (3 - power(x)).clamp(0, 7).max(-power(gap)).min(12) as usize));
    }
    let text = format!("{x:.*e}", (power(x) - power(gap)).clamp(0, 12) as usize);
    // On a logarithmic axis the least gap is that of the smallest numbers.
    text.split_once('e').map_or_else(|| plain(&text), |(digits, power)| format!("{}e{power}", plain(digits)))
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
    fn no_two_marks_read_the_same() {
        for (value, other) in
            [(203.392, 203.392), (0.2754, 0.2754), (-3.0, -3.0), (1e6, 1e6), (44.3991, 44.4102), (3e9, 3.00001e9)]
        {
            let axis = Axis::new([value, other].into_iter(), false, &[]);
            let mut marks: Vec<_> = axis.ticks.iter().map(|tick| axis.label(*tick)).collect();
            let all = marks.len();
            marks.dedup();
            assert!(all > 1 && marks.len() == all, "{value}: {marks:?}");
            assert!(value != other || axis.share(value) > 0.4, "{value}");
        }
        assert!(Axis::new([0.0].into_iter(), false, &[]).share(0.0).is_finite());
        let decades = Axis::new([1e-6, 1e9].into_iter(), true, &[]);
        let marks: Vec<_> = [1e-5, 1e-3, 1.0, 1e4, 1e8].map(|tick| decades.label(tick)).into();
        assert_eq!(marks, ["1e-5", "0.001", "1", "10000", "1e8"]);
    }

    #[test]
    fn less_than_a_decade_has_marks_too() {
        let axis = Axis::new([1.2, 1.9].into_iter(), true, &[]).with_enough_ticks();
        assert!(axis.ticks.len() >= 3 && axis.ticks.iter().all(|tick| (0.0..=1.0).contains(&axis.share(*tick))));
    }
}
