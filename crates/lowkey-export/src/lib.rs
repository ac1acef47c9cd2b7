//! From a trained model to files that inference engines load, with the evidence that they hold the same model.

mod error;
pub mod gguf;

pub use error::{Error, Result};
