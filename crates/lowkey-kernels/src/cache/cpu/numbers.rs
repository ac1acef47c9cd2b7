//! Numbers of a cache as they are stored, and their way to f32 and back.

use half::{bf16, f16};
use rayon::prelude::*;

/// Vectors of `width` numbers, stored one after another.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) numbers: Numbers<'a>,
    pub(crate) width: usize,
}

/// The formats of a cache.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    /// Codes of each vector, of which the first `split` belong to its first scale and the others, if any, to its second.
    Int8 {
        codes: &'a [i8],
        scales: &'a [f32],
        split: usize,
    },
}

impl Numbers<'_> {
    /// Scales per vector of that width.
    pub(crate) fn parts(width: usize, split: usize) -> usize {
        if split < width { 2 } else { 1 }
    }
}

impl Vectors<'_> {
    /// Vectors `from..` as f32 into rows of `out`, `stride ≥ width` apart; what lies between the rows stays as it is.
    #[inline(always)]
    pub(super) fn widen(self, from: usize, out: &mut [f32], stride: usize) {
        let width = self.width;
        let rows = out.chunks_mut(stride).map(|row| &mut row[..width]);
        match self.numbers {
            Numbers::F32(x) => {
                rows.zip(x[from * width..].chunks_exact(width)).for_each(|(row, x)| row.copy_from_slice(x));
            }
            Numbers::Bf16(x) => {
                for (row, x) in rows.zip(x[from * width..].chunks_exact(width)) {
                    row.iter_mut().zip(x).for_each(|(row, x)| *row = f32::from_bits(u32::from(x.to_bits()) << 16));
                }
            }
            Numbers::F16(x) => {
                for (row, x) in rows.zip(x[from * width..].chunks_exact(width)) {
                    row.iter_mut().zip(x).for_each(|(row, x)| *row = wide(x.to_bits()));
                }
            }
            Numbers::Int8 { codes, scales, split } => {
                let parts = Numbers::parts(width, split);
                let vectors = codes[from * width..].chunks_exact(width).zip(scales[from * parts..].chunks_exact(parts));
                for (row, (codes, scales)) in rows.zip(vectors) {
                    let split = split.min(width);
                    // Of a vector in one part the second is empty.
                    let (first, second) = row.split_at_mut(split);
                    for (part, codes, scale) in
                        [(first, &codes[..split], scales[0]), (second, &codes[split..], scales[parts - 1])]
                    {
                        part.iter_mut().zip(codes).for_each(|(x, code)| *x = f32::from(*code) * scale);
                    }
                }
            }
        }
    }
}

/// The number that 16 bits of binary16 are, without a branch: the library's conversion is one call per number where the compiler
/// may not assume the instruction.
#[inline(always)]
fn wide(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let rest = u32::from(bits & 0x7fff) << 13;
    // The exponent is 112 too small; a product, not a sum of bits, so that subnormal numbers become normal ones.
    let scaled = f32::from_bits(rest) * f32::from_bits(0x7780_0000);
    let magnitude = if rest >= 0x0f80_0000 { rest | 0x7f80_0000 } else { scaled.to_bits() };
    f32::from_bits(magnitude | sign)
}

/// Vectors `first..` as f32, side by side, as many as `out` has room for.
pub(crate) fn widen(vectors: Vectors, first: usize, out: &mut [f32]) {
    struct Share<'a>(Vectors<'a>, usize, &'a mut [f32]);

    impl pulp::WithSimd for Share<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) {
            self.0.widen(self.1, self.2, self.0.width);
        }
    }

    /// Vectors per task.
    const SHARE: usize = 1 << 9;
    let arch = pulp::Arch::new();
    let rows = out.par_chunks_mut(SHARE * vectors.width);
    rows.enumerate().for_each(|(i, out)| arch.dispatch(Share(vectors, first + i * SHARE, out)));
}

/// Symmetric int8 codes and scales of vectors side by side; see [`crate::cache::Stored::Int8`].
pub(crate) fn quantise(x: &[f32], width: usize, split: usize, codes: &mut [i8], scales: &mut [f32]) {
    let parts = Numbers::parts(width, split);
    let vectors = x.chunks_exact(width).zip(codes.chunks_exact_mut(width)).zip(scales.chunks_exact_mut(parts));
    for ((x, codes), scales) in vectors {
        let (first, second) = x.split_at(split.min(width));
        let (first_codes, second_codes) = codes.split_at_mut(split.min(width));
        scales[0] = quantise_part(first, first_codes);
        if parts == 2 {
            scales[1] = quantise_part(second, second_codes);
        }
    }
}

fn quantise_part(x: &[f32], codes: &mut [i8]) -> f32 {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = if x.iter().all(|x| x.is_finite()) { largest / 127.0 } else { f32::NAN };
    if scale > 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
    } else {
        // All zero; or not numbers, and then a scale that is none says so.
        codes.fill(0);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_number_is_read_right() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (wide(bits), f16::from_bits(bits).to_f32());
            assert!(
                found == expected && found.is_sign_negative() == expected.is_sign_negative()
                    || expected.is_nan() && found.is_nan(),
                "{bits:x}"
            );
        }
    }

    #[test]
    fn a_code_is_off_by_half_a_step_at_most() {
        let x: Vec<f32> =
            (0..7 * 9).map(|i| ((i * 37 % 23) as f32 - 11.0) * if i % 9 < 5 { 1.0 } else { 1e-3 }).collect();
        let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; 14]);
        quantise(&x, 9, 5, &mut codes, &mut scales);
        let mut back = vec![f32::NAN; x.len()];
        widen(Vectors { numbers: Numbers::Int8 { codes: &codes, scales: &scales, split: 5 }, width: 9 }, 0, &mut back);
        for (i, (x, back)) in x.iter().zip(back).enumerate() {
            let scale = scales[i / 9 * 2 + usize::from(i % 9 >= 5)];
            assert!((x - back).abs() <= scale * 0.5001, "number {i}: {x} and {back} at {scale}");
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_stays_none() {
        let x = [0.0, 0.0, f32::NAN, 1.0, f32::INFINITY, -1.0, 1e-44, 0.0];
        let (mut codes, mut scales) = ([1; 8], [1.0; 4]);
        quantise(&x, 2, 2, &mut codes, &mut scales);
        let mut back = [7.0; 8];
        widen(Vectors { numbers: Numbers::Int8 { codes: &codes, scales: &scales, split: 2 }, width: 2 }, 0, &mut back);
        assert_eq!((&back[..2], scales[0]), (&[0.0, 0.0][..], 0.0));
        assert!(back[2..6].iter().all(|x| x.is_nan()) && back[6..].iter().all(|x| x.is_finite()), "{back:?}");
    }
}
