//! Few tokens times a matrix in bf16: bounded by reading it, so nothing of it is written down as f32.
//!
//! Two numbers of a row are one word of 32 bits. Its upper half is the second of them as f32, once the lower half is zero, and the word moved up by
//! 16 bits is the first. So even and odd numbers of the tokens are kept apart, and one load serves two products.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use crate::cpu::linear::{Rows, Tokens, shared};
use crate::cpu::parts::Parts;
use crate::cpu::tile::Aligned;
use crate::quantized_linear::packed::View;

/// Tokens at a time.
const TOKENS: usize = 4;

/// `out (+)= x Wᵀ` for W in bf16 with rows of whole words, `out` in rows of `d_out`.
pub(super) fn project(x: Tokens, weight: View, words: &[u32], out: &mut [f32], accumulate: bool) {
    let [_, d_in] = weight.sizes();
    let pairs = d_in / 2;
    let mut apart = Aligned::zeros(x.count * d_in);
    for t in 0..x.count {
        let (even, odd) = apart[t * d_in..][..d_in].split_at_mut(pairs);
        for ((even, odd), pair) in even.iter_mut().zip(odd).zip(x.row(t, d_in).chunks_exact(2)) {
            (*even, *odd) = (pair[0], pair[1]);
        }
    }
    let (arch, out) = (Arch::new(), &Parts::new(out));
    let sizes = [x.count, weight.sizes()[0], pairs];
    shared(weight, |rows| arch.dispatch(Halves { apart: &apart, words, sizes, rows, out, accumulate }));
}

/// Scalar products of some rows of W with all tokens.
struct Halves<'a> {
    /// Of each token its even numbers, then its odd ones.
    apart: &'a [f32],
    words: &'a [u32],
    /// Tokens, rows of W and words of a row.
    sizes: [usize; 3],
    rows: Range<usize>,
    out: &'a Parts<'a>,
    accumulate: bool,
}

impl WithSimd for Halves<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let [count, ..] = self.sizes;
        let mut t = 0;
        while t < count {
            t += match count - t {
                1 => self.tokens::<S, 8, 1>(simd, t),
                2 | 3 => self.tokens::<S, 4, 2>(simd, t),
                _ => self.tokens::<S, 4, TOKENS>(simd, t),
            };
        }
    }
}

impl Halves<'_> {
    /// All rows with tokens `t..t+T`, `R` rows at a time; returns `T`.
    #[inline(always)]
    fn tokens<S: Simd, const R: usize, const T: usize>(&self, simd: S, t: usize) -> usize {
        let mut row = self.rows.start;
        while row + R <= self.rows.end {
            self.block::<S, R, T>(simd, row, t);
            row += R;
        }
        while row < self.rows.end {
            self.block::<S, 1, T>(simd, row, t);
            row += 1;
        }
        T
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const T: usize>(&self, simd: S, row: usize, t: usize) {
        let [_, d_out, pairs] = self.sizes;
        let part = |token: usize, odd: usize| S::as_simd_f32s(&self.apart[(2 * (t + token) + odd) * pairs..][..pairs]);
        let x: [_; T] = std::array::from_fn(|token| [part(token, 0), part(token, 1)]);
        let w: [_; R] = std::array::from_fn(|r| S::as_simd_u32s(&self.words[(row + r) * pairs..][..pairs]));
        let (upper, up) = (simd.splat_u32s(0xFFFF_0000), simd.splat_u32s(16));
        let mut sums = [[simd.splat_f32s(0.0); T]; R];
        for k in 0..pairs / S::F32_LANES {
            let x: [[S::f32s; 2]; T] = std::array::from_fn(|token| x[token].map(|x| x.0[k]));
            for (sums, w) in sums.iter_mut().zip(w) {
                let w = w.0[k];
                let even = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(w, up));
                let odd = simd.transmute_f32s_u32s(simd.and_u32s(w, upper));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = simd.mul_add_e_f32s(odd, x[1], simd.mul_add_e_f32s(even, x[0], *sum));
                }
            }
        }
        for (token, x) in x.into_iter().enumerate() {
            // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
            let out = unsafe { self.out.range((t + token) * d_out + row, R) };
            for (r, (out, w)) in out.iter_mut().zip(w).enumerate() {
                let rest = w.1.iter().zip(x[0].1).zip(x[1].1);
                let rest: f32 = rest.map(|((w, even), odd)| number(w << 16) * even + number(*w) * odd).sum();
                let sum = simd.reduce_sum_f32s(sums[r][token]) + rest;
                *out = if self.accumulate { *out + sum } else { sum };
            }
        }
    }
}

/// The number in the upper half of a word.
fn number(word: u32) -> f32 {
    f32::from_bits(word & 0xFFFF_0000)
}
