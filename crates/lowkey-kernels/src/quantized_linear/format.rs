//! What packed numbers stand for, and where they lie.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Numbers that share a scale in the formats of 4 bits.
pub const GROUP: usize = 64;

/// How the numbers of a matrix `[d_out, d_in]` are packed. Number = code · scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 8 bits: whole codes from −127 to 127, with a scale for each row.
    Int8,
    /// 4 bits: whole codes from −7 to 7, with a scale for each 64 numbers of a row.
    Int4,
    /// 4 bits: codes are 16 levels between −1 and 1, denser near 0, as suits numbers of a normal distribution (QLoRA, arXiv 2305.14314,
    /// section 3), with a scale for each 64 numbers in the order of memory. The layout of bitsandbytes.
    Nf4,
    /// 16 bits: f32 without the lower half of its bits, and no scale. Most published weights are so, and lose nothing.
    Bf16,
}

impl Quantization {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Int8, Self::Int4, Self::Nf4, Self::Bf16];

    /// Its name in a run file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Nf4 => "nf4",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a matrix `[d_out, d_in]` on a device, scales included.
    pub fn bytes(self, [d_out, d_in]: [usize; 2]) -> usize {
        let layout = Layout { d_out, d_in, quantization: self };
        layout.code_bytes().next_multiple_of(4) + 4 * layout.scales()
    }
}

/// The levels of [`Quantization::Nf4`] by their code (arXiv 2305.14314, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The same for [`Quantization::Int4`].
pub(crate) const INT4: [f32; 16] =
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// A packed matrix's sizes and format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) d_out: usize,
    pub(crate) d_in: usize,
    pub(crate) quantization: Quantization,
}

impl Layout {
    pub(crate) fn numbers(self) -> usize {
        self.d_out * self.d_in
    }

    /// Bytes of the codes: two of 4 bits in a byte, the first in its high half, whatever row they belong to; those of bf16 with the lower
    /// byte first.
    pub(crate) fn code_bytes(self) -> usize {
        match self.quantization {
            Quantization::Bf16 => 2 * self.numbers(),
            Quantization::Int8 => self.numbers(),
            Quantization::Int4 | Quantization::Nf4 => self.numbers().div_ceil(2),
        }
    }

    /// Scales of a row where rows have their own.
    pub(crate) fn row_scales(self) -> usize {
        match self.quantization {
            Quantization::Int8 | Quantization::Bf16 => 1,
            Quantization::Int4 | Quantization::Nf4 => self.d_in.div_ceil(GROUP),
        }
    }

    /// Scales of all of it; of bf16 a single one that says nothing, since a tensor on a device must hold something.
    pub(crate) fn scales(self) -> usize {
        match self.quantization {
            Quantization::Bf16 => 1,
            Quantization::Int8 | Quantization::Int4 => self.d_out * self.row_scales(),
            Quantization::Nf4 => self.numbers().div_ceil(GROUP),
        }
    }

    /// The scale of a number, and for how many numbers of its row from it on that holds at most.
    pub(crate) fn scale_at(self, row: usize, column: usize) -> (usize, usize) {
        match self.quantization {
            Quantization::Bf16 => (0, self.d_in - column),
            Quantization::Int8 => (row, self.d_in - column),
            Quantization::Int4 => (row * self.row_scales() + column / GROUP, GROUP - column % GROUP),
            Quantization::Nf4 => {
                let at = row * self.d_in + column;
                (at / GROUP, GROUP - at % GROUP)
            }
        }
    }
}
