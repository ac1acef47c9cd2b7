//! Experiments: many runs of one question, and an answer with error bars.

mod error;
mod study;

pub use error::{Error, Result};
pub use study::{Arm, Rule, RunResult, Study, Theory};
