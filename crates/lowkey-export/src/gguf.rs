//! GGUF, the file format of llama.cpp.
use crate::error::{Error, Result};
use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_model::CausalLm;
use std::path::Path;
/// t
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// f
    F32,
}
impl std::str::FromStr for TensorType {
    type Err = Error;
    fn from_str(_: &str) -> Result<Self> {
        Ok(Self::F32)
    }
}
/// w
pub fn write(_: &Path, _: &CausalLm, _: &Tokenizer, _: &Path, _: TensorType) -> Result<()> {
    Err(Error::unsupported("gguf", "later"))
}
/// r
pub fn read_model(_: &Path, _: &Device) -> Result<CausalLm> {
    Err(Error::unsupported("gguf", "later"))
}
/// s
pub fn as_stored(m: &CausalLm) -> Result<CausalLm> {
    Ok(m.clone())
}
