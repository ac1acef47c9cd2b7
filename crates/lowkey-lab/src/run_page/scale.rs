//! What a chart's curves are drawn over.

use lowkey_train::run_dir::Point;

/// An axis to draw curves over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum X {
    Tokens,
    Steps,
    Flops,
    Time,
}

/// What an axis counts in.
pub(super) struct Unit {
    /// How many of the smallest unit it is.
    pub(super) size: f64,
    pub(super) label: String,
}

impl X {
    pub(super) const ALL: [Self; 4] = [Self::Tokens, Self::Steps, Self::Flops, Self::Time];

    /// As the page's style and its script call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Steps => "steps",
            Self::Flops => "flops",
            Self::Time => "time",
        }
    }

    /// As a reader chooses it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Steps => "steps",
            Self::Flops => "FLOPs",
            Self::Time => "time",
        }
    }

    /// Where a point lies: in tokens, steps, floating-point operations or seconds; not a number where that is not known.
    pub(super) fn of(self, point: &Point, flops_per_token: Option<f64>) -> f64 {
        match self {
            Self::Tokens => point.tokens,
            Self::Steps => point.step as f64,
            Self::Flops => point.tokens * flops_per_token.unwrap_or(f64::NAN),
            Self::Time => point.time_s,
        }
    }

    /// The unit in which an axis up to `highest` has short numbers.
    pub(super) fn unit(self, highest: f64) -> Unit {
        let of = |units: &[(f64, &str)]| {
            let found = units.iter().rev().find(|(size, _)| highest >= 2.0 * size).or(units.first());
            let (size, label) = found.copied().unwrap_or((1.0, ""));
            Unit { size, label: label.to_string() }
        };
        match self {
            Self::Tokens => of(&[
                (1.0, "tokens"),
                (1e3, "thousand tokens"),
                (1e6, "million tokens"),
                (1e9, "billion tokens"),
                (1e12, "trillion tokens"),
            ]),
            Self::Steps => of(&[(1.0, "steps"), (1e5, "hundred thousand steps"), (1e6, "million steps")]),
            Self::Flops => of(&[
                (1.0, "FLOP"),
                (1e6, "MFLOP"),
                (1e9, "GFLOP"),
                (1e12, "TFLOP"),
                (1e15, "PFLOP"),
                (1e18, "EFLOP"),
                (1e21, "ZFLOP"),
            ]),
            Self::Time => of(&[(1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86_400.0, "days")]),
        }
    }
}
