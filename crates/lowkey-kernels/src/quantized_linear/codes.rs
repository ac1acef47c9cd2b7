//! Few tokens times a matrix in 4 or 8 bits, on AVX-512 and AVX2: codes become numbers within a vector, and nothing of the matrix is written
//! down as f32.
//!
//! Codes of 8 bits are widened. Of 4 bits eight codes are one word of 32 bits. A shift brings one of them to the lower end of each word of a vector, where it chooses one of the
//! sixteen levels that one or two vectors hold. So a step has every eighth number of a stretch of a row, and the numbers of the tokens are
//! put in that order before.

use std::arch::x86_64::{__m256, __m256i, __m512, __m512i};
use std::ops::Range;

use pulp::x86::{V3, V4};
use pulp::{NullaryFnOnce, Simd, bytemuck, cast};

use super::format::{GROUP, INT4, NF4, Quantization};
use super::packed::View;
use crate::cpu::linear::{FEW, Tokens, shared};
use crate::cpu::parts::Parts;
use crate::cpu::tile::Aligned;

/// Codes of a word.
const CODES: usize = 8;

/// Tokens for which rows of numbers take less time, which are unpacked once; those of 8 bits are from [`FEW`] on.
const MANY: usize = 40;

/// `out (+)= x Wᵀ`, `out` in rows of `d_out`. False where it is not for this, and nothing was done.
pub(super) fn project(x: Tokens, weight: View, out: &mut [f32], accumulate: bool) -> bool {
    match (V4::try_new(), V3::try_new()) {
        _ if x.count >= MANY => false,
        (Some(simd), _) => project_by(simd, x, weight, out, accumulate),
        (None, Some(simd)) => project_by(simd, x, weight, out, accumulate),
        (None, None) => false,
    }
}

fn project_by<S: Lookup>(simd: S, x: Tokens, weight: View, out: &mut [f32], accumulate: bool) -> bool {
    let levels = match weight.layout.quantization {
        Quantization::Int4 => &INT4,
        Quantization::Nf4 => &NF4,
        Quantization::Int8 if x.count <= FEW => {
            let out = &Parts::new(out);
            shared(weight, |rows| simd.with(Bytes { simd, x, weight, rows, out, accumulate }));
            return true;
        }
        Quantization::Int8 | Quantization::Bf16 => return false,
    };
    // Groups begin with a row then, and whole words hold them.
    let words = bytemuck::try_cast_slice(weight.codes).ok();
    let Some(words) = words.filter(|_| weight.layout.d_in.is_multiple_of(GROUP)) else { return false };
    let stretch = CODES * S::F32_LANES;
    let row = weight.layout.d_in.next_multiple_of(stretch);
    let (apart, out) = (apart(x, weight.layout.d_in, stretch), &Parts::new(out));
    shared(weight, |rows| {
        let few = Few { simd, weight, words, levels, apart: &apart, row, rows, count: x.count, out, accumulate };
        simd.with(few);
    });
    true
}

/// The numbers of each token in stretches, in each of which every eighth number lies together; zeros fill the last one.
fn apart(x: Tokens, d_in: usize, stretch: usize) -> Aligned {
    let row = d_in.next_multiple_of(stretch);
    let mut apart = Aligned::zeros(x.count * row);
    for (t, apart) in apart.chunks_exact_mut(row.max(1)).enumerate() {
        for (apart, numbers) in apart.chunks_exact_mut(stretch).zip(x.row(t, d_in).chunks(stretch)) {
            for (lane, numbers) in numbers.as_chunks::<CODES>().0.iter().enumerate() {
                for (n, number) in numbers.iter().enumerate() {
                    apart[n * (stretch / CODES) + lane] = *number;
                }
            }
        }
    }
    apart
}

/// Instructions that choose among sixteen numbers.
trait Lookup: Simd {
    /// Sixteen numbers.
    type Levels: Copy;

    /// Runs a job with these instructions.
    fn with(self, job: impl NullaryFnOnce<Output = ()>);

    fn levels(self, levels: &[f32; 16]) -> Self::Levels;

    /// Those that the lower four bits of each lane choose, whatever the others are.
    fn choose(self, levels: Self::Levels, codes: Self::u32s) -> Self::f32s;

    /// For each eight words their scale.
    fn scales(self, scales: &[f32]) -> Self::f32s;

    /// As many codes of 8 bits as a vector has lanes.
    fn whole(self, codes: &[u8]) -> Self::f32s;
}

impl Lookup for V4 {
    type Levels = __m512;

    #[inline(always)]
    fn with(self, job: impl NullaryFnOnce<Output = ()>) {
        self.vectorize(job);
    }

    #[inline(always)]
    fn levels(self, levels: &[f32; 16]) -> __m512 {
        cast(*levels)
    }

    #[inline(always)]
    fn choose(self, levels: __m512, codes: Self::u32s) -> Self::f32s {
        cast(self.avx512f._mm512_permutexvar_ps(cast::<_, __m512i>(codes), levels))
    }

    #[inline(always)]
    fn scales(self, scales: &[f32]) -> Self::f32s {
        let scale = |g: usize| self.avx512f._mm512_set1_ps(scales.get(g).copied().unwrap_or(0.0));
        cast(self.avx512f._mm512_mask_blend_ps(0xFF00, scale(0), scale(1)))
    }

    #[inline(always)]
    fn whole(self, codes: &[u8]) -> Self::f32s {
        let codes: [u8; 16] = std::array::from_fn(|i| codes[i]);
        cast(self.avx512f._mm512_cvtepi32_ps(self.avx512f._mm512_cvtepi8_epi32(cast(codes))))
    }
}

impl Lookup for V3 {
    type Levels = [__m256; 2];

    #[inline(always)]
    fn with(self, job: impl NullaryFnOnce<Output = ()>) {
        self.vectorize(job);
    }

    #[inline(always)]
    fn levels(self, levels: &[f32; 16]) -> [__m256; 2] {
        cast(*levels)
    }

    #[inline(always)]
    fn choose(self, [lower, upper]: [__m256; 2], codes: Self::u32s) -> Self::f32s {
        let codes = cast::<_, __m256i>(codes);
        let [lower, upper] = [lower, upper].map(|half| self.avx2._mm256_permutevar8x32_ps(half, codes));
        // The fourth bit says which half.
        let half = self.avx._mm256_castsi256_ps(self.avx2._mm256_slli_epi32::<28>(codes));
        cast(self.avx._mm256_blendv_ps(lower, upper, half))
    }

    #[inline(always)]
    fn scales(self, scales: &[f32]) -> Self::f32s {
        self.splat_f32s(scales[0])
    }

    #[inline(always)]
    fn whole(self, codes: &[u8]) -> Self::f32s {
        let codes: [u8; 16] = std::array::from_fn(|i| if i < 8 { codes[i] } else { 0 });
        cast(self.avx._mm256_cvtepi32_ps(self.avx2._mm256_cvtepi8_epi32(cast(codes))))
    }
}

/// Scalar products of some rows of W with all tokens.
struct Few<'a, S> {
    simd: S,
    weight: View<'a>,
    words: &'a [u32],
    levels: &'a [f32; 16],
    /// The tokens in the order of the codes, each so many numbers long.
    apart: &'a [f32],
    row: usize,
    rows: Range<usize>,
    count: usize,
    out: &'a Parts<'a>,
    accumulate: bool,
}

impl<S: Lookup> NullaryFnOnce for Few<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut t = 0;
        while t < self.count {
            t += match self.count - t {
                1 => self.tokens::<1>(t),
                2 | 3 => self.tokens::<2>(t),
                // AVX2 has half as many registers.
                4..8 => self.tokens::<4>(t),
                _ if S::F32_LANES < 16 => self.tokens::<4>(t),
                _ => self.tokens::<8>(t),
            };
        }
    }
}

impl<S: Lookup> Few<'_, S> {
    /// All rows with tokens `t..t+T`; returns `T`.
    #[inline(always)]
    fn tokens<const T: usize>(&self, t: usize) -> usize {
        let (simd, d_in) = (self.simd, self.weight.layout.d_in);
        let (of_row, groups) = (d_in / CODES, d_in / GROUP);
        let levels = simd.levels(self.levels);
        let apart: [_; T] = std::array::from_fn(|i| S::as_simd_f32s(&self.apart[(t + i) * self.row..][..self.row]).0);
        // Number n of a word is in the upper half of byte n / 2 where n is even, else in the lower one.
        let shifts: [S::u32s; CODES] =
            std::array::from_fn(|n| simd.splat_u32s((8 * (n / 2) + if n % 2 == 0 { 4 } else { 0 }) as u32));
        for row in self.rows.clone() {
            let words = self.words[row * of_row..][..of_row].chunks(S::F32_LANES);
            let scales = self.weight.scales[row * groups..][..groups].chunks(S::F32_LANES * CODES / GROUP);
            let mut totals = [simd.splat_f32s(0.0); T];
            for (k, (words, scales)) in words.zip(scales).enumerate() {
                let words = simd.partial_load_u32s(words);
                let apart: [_; T] = std::array::from_fn(|i| &apart[i][k * CODES..][..CODES]);
                let mut sums = [simd.splat_f32s(0.0); T];
                for (n, shift) in shifts.into_iter().enumerate() {
                    let level = simd.choose(levels, simd.wrapping_dyn_shr_u32s(words, shift));
                    for (sum, apart) in sums.iter_mut().zip(apart) {
                        *sum = simd.mul_add_e_f32s(level, apart[n], *sum);
                    }
                }
                let scales = simd.scales(scales);
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = simd.mul_add_e_f32s(sum, scales, *total);
                }
            }
            for (i, total) in totals.into_iter().enumerate() {
                let sum = simd.reduce_sum_f32s(total);
                // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
                let out = unsafe { self.out.range((t + i) * self.weight.layout.d_out + row, 1) };
                out[0] = if self.accumulate { out[0] + sum } else { sum };
            }
        }
        T
    }
}

/// The same of codes of 8 bits.
struct Bytes<'a, S> {
    simd: S,
    x: Tokens<'a>,
    weight: View<'a>,
    rows: Range<usize>,
    out: &'a Parts<'a>,
    accumulate: bool,
}

impl<S: Lookup> NullaryFnOnce for Bytes<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut t = 0;
        while t < self.x.count {
            t += match self.x.count - t {
                1 => self.tokens::<4, 1>(t),
                2 | 3 => self.tokens::<2, 2>(t),
                _ => self.tokens::<1, 4>(t),
            };
        }
    }
}

impl<S: Lookup> Bytes<'_, S> {
    /// All rows with tokens `t..t+T`, with `A` sums of each, as a sum waits for what was added before; returns `T`.
    #[inline(always)]
    fn tokens<const A: usize, const T: usize>(&self, t: usize) -> usize {
        let (simd, lanes, d_in) = (self.simd, S::F32_LANES, self.weight.layout.d_in);
        let x: [_; T] = std::array::from_fn(|i| S::as_simd_f32s(self.x.row(t + i, d_in)));
        for row in self.rows.clone() {
            let codes = &self.weight.codes[row * d_in..][..d_in];
            let mut sums = [[simd.splat_f32s(0.0); T]; A];
            let (whole, rest) = codes.split_at(d_in / lanes * lanes);
            let mut several = whole.chunks_exact(A * lanes);
            for (k, codes) in (&mut several).enumerate() {
                let x: [_; T] = std::array::from_fn(|i| &x[i].0[k * A..][..A]);
                for (a, sums) in sums.iter_mut().enumerate() {
                    let w = simd.whole(&codes[a * lanes..][..lanes]);
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = simd.mul_add_e_f32s(w, x[a], *sum);
                    }
                }
            }
            let from = d_in / (A * lanes) * A;
            for (k, codes) in several.remainder().chunks_exact(lanes).enumerate() {
                let w = simd.whole(codes);
                for (sum, x) in sums[0].iter_mut().zip(x) {
                    *sum = simd.mul_add_e_f32s(w, x.0[from + k], *sum);
                }
            }
            for (i, x) in x.into_iter().enumerate() {
                let all = sums.iter().fold(simd.splat_f32s(0.0), |all, sums| simd.add_f32s(all, sums[i]));
                let rest: f32 = rest.iter().zip(x.1).map(|(code, x)| f32::from(*code as i8) * x).sum();
                let sum = (simd.reduce_sum_f32s(all) + rest) * self.weight.scales[row];
                // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
                let out = unsafe { self.out.range((t + i) * self.weight.layout.d_out + row, 1) };
                out[0] = if self.accumulate { out[0] + sum } else { sum };
            }
        }
        T
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantized_linear::Packed;

    #[test]
    fn both_sets_of_instructions_choose_what_the_codes_say() {
        let odd = [[1, 64], [5, 128], [7, 192], [3, 1408], [4, 37], [2, 101], [3, 1]];
        for quantization in [Quantization::Int4, Quantization::Nf4, Quantization::Int8] {
            let shapes = if quantization == Quantization::Int8 { &odd[..] } else { &odd[..4] };
            for [d_out, d_in] in shapes.iter().copied() {
                let values: Vec<f32> =
                    (0..d_out * d_in).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1000.0 - 1.0).collect();
                let packed = Packed::new(&values, [d_out, d_in], quantization);
                let whole = packed.values();
                for count in (1..13).chain([39]) {
                    let x: Vec<f32> =
                        (0..count * (d_in + 2)).map(|i| ((i * 31 + 7) % 101) as f32 / 50.0 - 1.0).collect();
                    let x = Tokens { data: &x, count, stride: d_in + 2 };
                    let check = |found: Option<Vec<f32>>| {
                        for (i, found) in found.into_iter().flatten().enumerate() {
                            let (t, row) = (i / d_out, i % d_out);
                            let dot = x.row(t, d_in).iter().zip(&whole[row * d_in..]);
                            let dot: f64 = dot.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                            assert!((f64::from(found) - dot - 2.0).abs() < 1e-4, "{found} for {}", dot + 2.0);
                        }
                    };
                    let out = || vec![2.0; count * d_out];
                    let of = |project: &dyn Fn(&mut [f32]) -> bool| {
                        let mut out = out();
                        let few = quantization != Quantization::Int8 || count <= FEW;
                        assert_eq!(project(&mut out), few);
                        if few { out } else { Vec::new() }
                    };
                    let view = packed.view();
                    check(V4::try_new().map(|simd| of(&|out| project_by(simd, x, view, out, true))));
                    check(V3::try_new().map(|simd| of(&|out| project_by(simd, x, view, out, true))));
                }
            }
        }
        // Rows of 4 bits that do not begin with a group are for others.
        let odd = Packed::new(&[1.0; 96], [2, 48], Quantization::Nf4);
        assert!(!project(Tokens::dense(&[0.0; 48], 48), odd.view(), &mut [0.0; 2], false));
    }
}
