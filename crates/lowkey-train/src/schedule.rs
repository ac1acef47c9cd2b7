//! The learning rate as a pure function of the step.

use crate::run_config::{SchedulerKind, SchedulerSection};

impl SchedulerSection {
    /// Learning rate of step `step` (counted from 0) of `steps`, for the given peak.
    ///
    /// Warm-up rises linearly and reaches the peak at its last step; every decaying shape ends at
    /// `peak · min_lr_ratio` on the last step.
    pub fn rate(&self, step: u64, steps: u64, peak: f64) -> f64 {
        if step < self.warmup_steps {
            return peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let floor = self.min_lr_ratio;
        let progress = |from: u64| {
            let span = steps.saturating_sub(from + 1).max(1);
            (step.saturating_sub(from) as f64 / span as f64).min(1.0)
        };
        let factor = match self.kind {
            SchedulerKind::Constant => 1.0,
            SchedulerKind::Linear => 1.0 - (1.0 - floor) * progress(self.warmup_steps),
            SchedulerKind::Cosine => {
                let half_turn = (std::f64::consts::PI * progress(self.warmup_steps)).cos();
                floor + (1.0 - floor) * 0.5 * (1.0 + half_turn)
            }
            SchedulerKind::Wsd => {
                let decay = (steps as f64 * self.decay_fraction).round() as u64;
                let start = steps.saturating_sub(decay).max(self.warmup_steps);
                if step < start { 1.0 } else { 1.0 - (1.0 - floor) * progress(start) }
            }
        };
        peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: SchedulerKind) -> SchedulerSection {
        SchedulerSection { kind, warmup_steps: 10, decay_fraction: 0.2, min_lr_ratio: 0.1 }
    }

    #[test]
    fn every_shape_warms_up_to_the_peak_and_ends_at_its_floor() {
        for (kind, last) in [
            (SchedulerKind::Constant, 2.0),
            (SchedulerKind::Linear, 0.2),
            (SchedulerKind::Cosine, 0.2),
            (SchedulerKind::Wsd, 0.2),
        ] {
            let s = schedule(kind);
            assert!((s.rate(0, 100, 2.0) - 0.2).abs() < 1e-12, "{kind:?}");
            assert!((s.rate(9, 100, 2.0) - 2.0).abs() < 1e-12, "{kind:?}");
            assert!((s.rate(10, 100, 2.0) - 2.0).abs() < 1e-12, "{kind:?}");
            assert!((s.rate(99, 100, 2.0) - last).abs() < 1e-12, "{kind:?}");
            let rates: Vec<f64> = (10..100).map(|step| s.rate(step, 100, 2.0)).collect();
            assert!(rates.windows(2).all(|w| w[1] <= w[0] + 1e-12), "{kind:?} rises after the warm-up");
        }
    }

    #[test]
    fn wsd_stays_at_the_peak_until_its_decay() {
        let s = schedule(SchedulerKind::Wsd);
        assert_eq!(s.rate(79, 100, 1.0), 1.0);
        assert_eq!(s.rate(80, 100, 1.0), 1.0);
        assert!(s.rate(81, 100, 1.0) < 1.0);
    }

    #[test]
    fn the_cosine_is_half_way_in_the_middle() {
        let s = SchedulerSection { warmup_steps: 0, ..schedule(SchedulerKind::Cosine) };
        assert!((s.rate(50, 101, 1.0) - 0.55).abs() < 1e-12);
    }

    #[test]
    fn degenerate_lengths_stay_finite() {
        for kind in [SchedulerKind::Constant, SchedulerKind::Linear, SchedulerKind::Cosine, SchedulerKind::Wsd] {
            let s = SchedulerSection { kind, warmup_steps: 0, decay_fraction: 1.0, min_lr_ratio: 0.0 };
            assert!(s.rate(0, 1, 1.0).is_finite());
            assert!(SchedulerSection { warmup_steps: 1, ..s }.rate(0, 1, 1.0).is_finite());
        }
    }
}
