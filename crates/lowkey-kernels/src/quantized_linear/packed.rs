//! Packing on the host, and unpacking parts of rows there.

use std::ops::Range;

use half::bf16;
use pulp::bytemuck;
use rayon::prelude::*;

use super::format::{GROUP, INT4, Layout, NF4, Quantization};

/// A matrix `[d_out, d_in]` in few bits, on the host.
///
/// A row or group of zeros has scale 0. One with a NaN or an infinity has scale NaN. In bf16 each number is for itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// Codes row by row: as bytes of two's complement, or two to a byte with the first in its high half, or two bytes with the lower first.
    pub codes: Vec<u8>,
    /// f32 scales: of the rows, of each row's groups of 64 one behind the other, or of each 64 numbers in the order of memory.
    pub scales: Vec<f32>,
    pub(super) layout: Layout,
}

impl Packed {
    /// Packs the numbers of a matrix, row by row. Each becomes the nearest that its scale allows, and scales are those of the largest
    /// magnitude. The same numbers always give the same bytes.
    pub fn new(values: &[f32], [d_out, d_in]: [usize; 2], quantization: Quantization) -> Self {
        assert!(values.len() == d_out * d_in, "{} numbers for a matrix [{d_out}, {d_in}]", values.len());
        let layout = Layout { d_out, d_in, quantization };
        // A stretch of numbers is one task's, a block has one scale; of a code the largest that there is, and how a number becomes one.
        let (stretch, block, most, code): (_, _, _, fn(f32) -> u8) = match quantization {
            Quantization::Bf16 => return Self::rounded(values, layout),
            Quantization::Int8 => (d_in, d_in, 127.0, |x| (x.round_ties_even().clamp(-127.0, 127.0) as i8) as u8),
            Quantization::Int4 => (d_in, GROUP, 7.0, |x| (x.round_ties_even().clamp(-7.0, 7.0) + 8.0) as u8),
            Quantization::Nf4 => {
                (GROUP << 8, GROUP, 1.0, |x| MIDDLES.iter().filter(|middle| x > **middle).count() as u8)
            }
        };
        let (mut codes, mut scales) = (vec![0u8; values.len()], vec![0f32; layout.scales()]);
        let (stretch, block) = (stretch.max(1), block.max(1));
        let stretches = values
            .par_chunks(stretch)
            .zip(codes.par_chunks_mut(stretch))
            .zip(scales.par_chunks_mut(stretch.div_ceil(block)));
        stretches.for_each(|((values, codes), scales)| {
            for ((values, codes), scale) in values.chunks(block).zip(codes.chunks_mut(block)).zip(scales) {
                *scale = encode(most, code, values, codes);
            }
        });
        if quantization != Quantization::Int8 {
            codes = codes.par_chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect();
        }
        Self { codes, scales, layout }
    }

    fn rounded(values: &[f32], layout: Layout) -> Self {
        let mut codes = vec![0u8; layout.code_bytes()];
        let (pairs, _) = codes.as_chunks_mut::<2>();
        pairs.par_iter_mut().zip(values).for_each(|(code, x)| *code = bf16::from_f32(*x).to_le_bytes());
        Self { codes, scales: vec![1.0], layout }
    }

    /// The same from its parts; none where they are not as many as such a matrix has.
    pub fn from_parts(
        codes: Vec<u8>,
        scales: Vec<f32>,
        [d_out, d_in]: [usize; 2],
        quantization: Quantization,
    ) -> Option<Self> {
        let layout = Layout { d_out, d_in, quantization };
        d_out.checked_mul(d_in)?;
        (codes.len() == layout.code_bytes() && scales.len() == layout.scales()).then_some(Self {
            codes,
            scales,
            layout,
        })
    }

    /// Its numbers of rows and columns, `[d_out, d_in]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.layout.d_out, self.layout.d_in]
    }

    /// How it is packed.
    pub fn quantization(&self) -> Quantization {
        self.layout.quantization
    }

    /// The numbers that it stands for, row by row.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.layout.numbers()];
        self.view().unpack_rows(&mut values);
        values
    }

    pub(super) fn view(&self) -> View<'_> {
        View { codes: &self.codes, scales: &self.scales, layout: self.layout }
    }
}

/// Writes the codes of numbers that share a scale, each in a byte of its own, and returns the scale.
fn encode(most: f32, code: fn(f32) -> u8, values: &[f32], codes: &mut [u8]) -> f32 {
    let finite = values.iter().all(|x| x.is_finite());
    let largest = if finite { values.iter().fold(0f32, |most, x| most.max(x.abs())) } else { f32::NAN };
    let scale = largest / most;
    // Nothing is left of numbers that are all zero, and nothing can be said of those that are none.
    let step = if scale > 0.0 { scale } else { f32::INFINITY };
    for (to, x) in codes.iter_mut().zip(values) {
        *to = code(if finite { *x / step } else { 0.0 });
    }
    scale
}

/// Half way between two levels of NF4; a number there becomes the lower one.
const MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (NF4[i] + NF4[i + 1]) / 2.0;
        i += 1;
    }
    middles
};

/// For each byte the two levels of its codes.
type Pairs = [[f32; 2]; 256];

const fn pairs(levels: [f32; 16]) -> Pairs {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [levels[byte >> 4], levels[byte & 15]];
        byte += 1;
    }
    pairs
}

static NF4_PAIRS: Pairs = pairs(NF4);
static INT4_PAIRS: Pairs = pairs(INT4);

/// A packed matrix where it lies.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) codes: &'a [u8],
    pub(super) scales: &'a [f32],
    pub(super) layout: Layout,
}

impl View<'_> {
    /// All numbers, row by row.
    pub(super) fn unpack_rows(self, out: &mut [f32]) {
        let d_in = self.layout.d_in;
        out.par_chunks_mut(d_in.max(1)).enumerate().for_each(|(row, out)| self.unpack(row, 0..d_in, out));
    }

    /// A matrix in bf16 as words of two numbers, where no word belongs to two rows.
    pub(super) fn words(&self) -> Option<&[u32]> {
        let whole = self.layout.quantization == Quantization::Bf16 && self.layout.d_in.is_multiple_of(2);
        // What comes from a tensor lies at the start of a word.
        whole.then(|| bytemuck::try_cast_slice(self.codes).ok()).flatten()
    }

    /// Some numbers of a row. It takes the instruction set of the `pulp` dispatch around it.
    #[inline(always)]
    pub(super) fn unpack(self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let pairs = match self.layout.quantization {
            Quantization::Bf16 => {
                let (codes, _) = self.codes[2 * (row * self.layout.d_in + columns.start)..].as_chunks::<2>();
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*code)) << 16);
                }
                return;
            }
            Quantization::Int8 => {
                let codes = &self.codes[row * self.layout.d_in + columns.start..];
                let scale = self.scales[row];
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = f32::from(*code as i8) * scale;
                }
                return;
            }
            Quantization::Int4 => &INT4_PAIRS,
            Quantization::Nf4 => &NF4_PAIRS,
        };
        let (mut column, mut out) = (columns.start, out);
        while column < columns.end && !out.is_empty() {
            let (scale, left) = self.layout.scale_at(row, column);
            let len = left.min(columns.end - column).min(out.len());
            let (part, rest) = out.split_at_mut(len);
            unpack_pairs(pairs, self.codes, row * self.layout.d_in + column, self.scales[scale], part);
            (column, out) = (column + len, rest);
        }
    }
}

/// Numbers from the one at `at` on, which share a scale.
#[inline(always)]
fn unpack_pairs(pairs: &Pairs, codes: &[u8], at: usize, scale: f32, out: &mut [f32]) {
    let (first, out) = out.split_at_mut(at % 2);
    if let [first] = first {
        *first = pairs[usize::from(codes[at / 2])][1] * scale;
    }
    let codes = &codes[at.div_ceil(2)..];
    let count = out.len() / 2;
    let mut whole = out.chunks_exact_mut(2);
    for (out, code) in (&mut whole).zip(codes) {
        let [high, low] = pairs[usize::from(*code)];
        (out[0], out[1]) = (high * scale, low * scale);
    }
    if let [last] = whole.into_remainder() {
        *last = pairs[usize::from(codes[count])][0] * scale;
    }
}
