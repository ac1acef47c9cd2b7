//! How far a run is, from the end of its figures.

use serde::Serialize;
use serde_json::{Map, Value};

use super::lines::{each_line, end};
use super::{METRICS, RunDir};

/// Bytes from the end of `metrics.jsonl` that are read, and where they hold no held-out loss, once more.
const PARTS: [u64; 2] = [1 << 18, 1 << 26];

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Standing {
    /// Steps taken, by its newest line.
    pub step: Option<u64>,
    /// Steps that it is to take.
    pub steps: Option<u64>,
    /// Training loss of that step.
    pub train_loss: Option<f64>,
    /// The newest held-out loss.
    pub val_loss: Option<f64>,
    /// Seconds so far.
    pub time_s: Option<f64>,
    /// Seconds that the steps that are left will take at the pace of the last ones.
    pub left_s: Option<f64>,
}

impl Standing {
    /// How far the run in a folder is; nothing is known of a run whose figures cannot be read.
    pub fn of(run: &RunDir) -> Self {
        let mut found = Self::default();
        for part in PARTS {
            found = Self::by(run, part);
            if found.val_loss.is_some() {
                break;
            }
        }
        found
    }

    fn by(run: &RunDir, bytes: u64) -> Self {
        let mut found = Self { steps: run.steps(), ..Self::default() };
        // The first of the lines since steps were last taken again: step and seconds.
        let mut since: Option<(u64, f64)> = None;
        let read = each_line(&run.path.join(METRICS), |length| end(length, bytes), &mut |line| {
            let Ok(line) = serde_json::from_slice::<Map<String, Value>>(line.bytes) else { return };
            let Some(step) = line.get("step").and_then(Value::as_u64) else { return };
            let number = |key| line.get(key).and_then(Value::as_f64).filter(|x| x.is_finite());
            if found.step.is_some_and(|before| step <= before) {
                since = None;
            }
            (found.step, found.train_loss, found.time_s) = (Some(step), number("train_loss"), number("time_s"));
            found.val_loss = number("val_loss").or(found.val_loss);
            if since.is_none() {
                since = number("time_s").map(|time| (step, time));
            }
        });
        if read.is_err() {
            return Self { steps: found.steps, ..Self::default() };
        }
        found.left_s = found.left(since);
        found
    }

    fn left(&self, since: Option<(u64, f64)>) -> Option<f64> {
        let (step, steps, now) = (self.step?, self.steps?, self.time_s?);
        let pace = match since {
            Some((first, then)) if first < step => (now - then) / (step - first) as f64,
            _ => now / step.max(1) as f64,
        };
        let left = pace * steps.saturating_sub(step) as f64;
        (left.is_finite() && left >= 0.0).then_some(left)
    }
}
