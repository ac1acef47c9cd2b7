//! Number formats of tensors.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// Values per block of [`TensorType::Q8_0`].
const BLOCK: usize = 32;
/// Bytes of such a block: the scale in half precision, then 32 signed bytes.
const BLOCK_BYTES: usize = 2 + BLOCK;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// 32-bit floating point.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 along a row: d = max|x| / 127 in half precision and 32 bytes q = round(x / d); 8.5 bits per value.
    Q8_0,
}

impl TensorType {
    /// Every type, the most exact first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::F16, Self::Q8_0];

    /// `ggml_type`
    pub(super) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// `llama_ftype`: the value of `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }

    /// Bytes of a tensor of `elements` values in rows of `row`; `None` where rows do not divide into blocks or the count
    /// overflows.
    pub(super) fn bytes(self, elements: u64, row: u64) -> Option<u64> {
        match self {
            Self::F32 => elements.checked_mul(4),
            Self::F16 | Self::Bf16 => elements.checked_mul(2),
            Self::Q8_0 => row
                .is_multiple_of(BLOCK as u64)
                .then(|| (elements / BLOCK as u64).checked_mul(BLOCK_BYTES as u64))
                .flatten(),
        }
    }

    /// The type in which rows of `row` values are stored when this one is asked for: half precision where they do not divide
    /// into blocks, as llama.cpp's own converter does.
    pub(super) fn for_rows(self, row: usize) -> Self {
        if self == Self::Q8_0 && !row.is_multiple_of(BLOCK) { Self::F16 } else { self }
    }

    /// The bytes of these values, or a value that the type cannot hold: one that is finite and would become an infinity, or
    /// any that is not finite in [`Self::Q8_0`], whose blocks it would spoil.
    pub(super) fn encode(self, values: &[f32]) -> std::result::Result<Vec<u8>, f32> {
        let lost = |x: &&f32| match self {
            Self::F32 => false,
            Self::Bf16 => x.is_finite() && bf16::from_f32(**x).is_infinite(),
            Self::F16 => x.is_finite() && f16::from_f32(**x).is_infinite(),
            Self::Q8_0 => !x.is_finite() || f16::from_f32(x.abs() / 127.0).is_infinite(),
        };
        if let Some(value) = values.iter().find(lost) {
            return Err(*value);
        }
        Ok(match self {
            Self::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Self::Q8_0 => {
                let mut bytes = Vec::with_capacity(values.len() / BLOCK * BLOCK_BYTES);
                values.chunks(BLOCK).for_each(|block| encode_block(block, &mut bytes));
                bytes
            }
        })
    }

    /// The values of these bytes.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self {
            Self::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Self::Bf16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            Self::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Self::Q8_0 => bytes
                .chunks_exact(BLOCK_BYTES)
                .flat_map(|block| {
                    let (scale, values) = block.split_at(2);
                    let scale = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
                    values.iter().map(move |q| scale * f32::from(*q as i8))
                })
                .collect(),
        }
    }
}

/// As `quantize_row_q8_0_ref` of ggml computes it: the quotient is a product with 1/d in f32, rounded half away from zero, and
/// d is rounded to half precision only for storage.
fn encode_block(block: &[f32], bytes: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    bytes.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        })
    }
}

impl FromStr for TensorType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == name).ok_or_else(|| Error::Unsupported {
            format: "GGUF",
            why: format!("the type {name:?} is not written; choose f32, bf16, f16 or q8_0"),
        })
    }
}
