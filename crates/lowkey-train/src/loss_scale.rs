//! The factor on the loss that keeps gradients within the range of f16.

use serde::{Deserialize, Serialize};

/// The first factor.
const START: f64 = 65536.0;

/// Good steps before a larger factor is tried.
const PATIENCE: u32 = 2000;

/// The largest factor: beyond it f32 itself comes into danger.
const LARGEST: f64 = 16_777_216.0;

/// Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2): a power of two, halved when a gradient overflows and
/// doubled after 2000 steps without. A step that overflows is computed again with the smaller factor: no batch is lost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor.
    pub factor: f64,
    /// Steps since it last changed.
    pub good: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { factor: START, good: 0 }
    }
}

impl LossScale {
    /// A step has passed.
    pub(crate) fn passed(&mut self) {
        self.good += 1;
        if self.good >= PATIENCE {
            self.good = 0;
            self.factor = (self.factor * 2.0).min(LARGEST);
        }
    }

    /// A gradient was no number; whether a smaller factor can be tried.
    pub(crate) fn overflowed(&mut self) -> bool {
        self.good = 0;
        let smaller = self.factor > 1.0;
        if smaller {
            self.factor /= 2.0;
        }
        smaller
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_down_to_one_and_doubles_after_its_patience() {
        let mut scale = LossScale::default();
        for _ in 0..16 {
            assert!(scale.overflowed());
        }
        assert_eq!(scale.factor, 1.0);
        assert!(!scale.overflowed(), "there is nothing below 1");
        for _ in 0..PATIENCE - 1 {
            scale.passed();
        }
        assert_eq!(scale.factor, 1.0);
        scale.passed();
        assert_eq!((scale.factor, scale.good), (2.0, 0));
        for _ in 0..100 * PATIENCE {
            scale.passed();
        }
        assert_eq!(scale.factor, LARGEST);
    }
}
