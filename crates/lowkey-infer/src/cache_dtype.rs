//! The number formats of a cache.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How a cache stores its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheDtype {
    /// As they are computed: 4 bytes each, or 8 where the model is in f64.
    #[default]
    F32,
    /// 2 bytes each: 8 significant bits, and the range of f32.
    Bf16,
    /// 2 bytes each: 11 significant bits, and magnitudes up to 65,504; larger ones become infinite.
    F16,
    /// 1 byte each, and 4 for a scale: symmetric integers −127 to 127. Per token and layer the latent has one scale and the
    /// rotated shared key another (MLA), or each head's key and each head's value has one (MHA, GQA, MQA). See
    /// [`lowkey_model::attention::Stored::Int8`].
    Int8,
}

impl CacheDtype {
    /// All formats, widest first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::F16, Self::Int8];
}

impl fmt::Display for CacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for CacheDtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.to_string() == name)
            .ok_or_else(|| Error::setting("cache dtype", &format!("{name:?}"), "f32, bf16, f16 or int8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_reads_back_from_its_name() {
        for dtype in CacheDtype::ALL {
            assert_eq!(dtype.to_string().parse::<CacheDtype>().unwrap(), dtype);
        }
        let message = "fp8".parse::<CacheDtype>().unwrap_err().to_string();
        assert!(message.contains("\"fp8\"") && message.contains("bf16"), "{message}");
    }
}
