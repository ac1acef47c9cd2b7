//! The linear map and its gradients, on rows of any distance.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{View, product};
use super::parts::Parts;
use super::tile::{Aligned, LANES, paired_products};
use crate::precision::Precision;

/// Rows of an activation: `count` of them, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) count: usize,
    pub(crate) stride: usize,
}

impl<'a> Tokens<'a> {
    /// Rows of `width` numbers side by side.
    pub(crate) fn dense(data: &'a [f32], width: usize) -> Self {
        Self { data, count: data.len() / width.max(1), stride: width }
    }

    /// The first `width` numbers of row `i`.
    #[inline(always)]
    pub(crate) fn row(self, i: usize, width: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + width]
    }

    fn view(self) -> View<'a> {
        View::new(self.data, self.stride)
    }
}

/// Up to this many tokens each row of W is read once and multiplied with all of them: a general product would first copy W.
const FEW: usize = 4;

/// Up to this many, W is not copied either: the tokens are, so that they fill vectors.
const SOME: usize = 48;

/// `out (+)= x Wᵀ` for `weight [d_out, d_in]`, `out` in rows of `d_out`.
pub(crate) fn project(precision: Precision, x: Tokens, weight: &[f32], d_in: usize, out: &mut [f32], accumulate: bool) {
    let d_out = weight.len() / d_in;
    if x.count <= FEW && precision != Precision::Bf16 {
        few(x, weight, [d_in, d_out], out, accumulate);
    } else if x.count <= SOME && d_in.is_multiple_of(2) && precision != Precision::Bf16 {
        some(x, weight, [d_in, d_out], out, accumulate);
    } else {
        let weight = View::new(weight, d_in).t();
        product(precision, [x.count, d_out, d_in], out, d_out, accumulate, x.view(), weight);
    }
}

/// `d_x (+)= d_y W`, both side by side.
pub(crate) fn input_gradient(
    precision: Precision,
    d_y: &[f32],
    weight: &[f32],
    d_in: usize,
    d_x: &mut [f32],
    accumulate: bool,
) {
    let d_out = weight.len() / d_in;
    let d_y = View::new(d_y, d_out);
    let sizes = [d_x.len() / d_in, d_in, d_out];
    product(precision, sizes, d_x, d_in, accumulate, d_y, View::new(weight, d_in));
}

/// `d_weight = d_yᵀ x`.
pub(crate) fn weight_gradient(precision: Precision, d_y: &[f32], x: Tokens, d_in: usize, d_weight: &mut [f32]) {
    let d_out = d_weight.len() / d_in;
    product(precision, [d_out, d_in, x.count], d_weight, d_in, false, View::new(d_y, d_out).t(), x.view());
}

/// Products of few tokens: bounded by reading W, so W is read once, by all threads where it is large.
fn few(x: Tokens, weight: &[f32], [d_in, d_out]: [usize; 2], out: &mut [f32], accumulate: bool) {
    let (arch, out) = (Arch::new(), &Parts::new(out));
    shared(weight, d_out, |rows| arch.dispatch(Dots { x, weight, d_in, rows, out, d_out, accumulate }));
}

/// Hands out the rows of W, to all threads where it is worth waking them.
fn shared(weight: &[f32], d_out: usize, job: impl Fn(Range<usize>) + Sync) {
    /// Bytes of W that are worth waking a thread for.
    const SHARE: usize = 1 << 18;
    let threads = rayon::current_num_threads().min(size_of_val(weight) / SHARE).max(1);
    let rows = d_out.div_ceil(threads);
    let share = |i: usize| job((i * rows).min(d_out)..((i + 1) * rows).min(d_out));
    if threads == 1 {
        share(0);
    } else {
        (0..threads).into_par_iter().for_each(share);
    }
}

/// Products of some tokens: W is read once, and its rows meet vectors of all tokens, which are turned for that.
fn some(x: Tokens, weight: &[f32], [d_in, d_out]: [usize; 2], out: &mut [f32], accumulate: bool) {
    let lanes = 2 * x.count.next_multiple_of(LANES / 2);
    let mut turned = Aligned::zeros(d_in * lanes / 2);
    for c in 0..x.count {
        for (k, pair) in x.row(c, d_in).chunks_exact(2).enumerate() {
            turned[k * lanes + 2 * c..][..2].copy_from_slice(pair);
        }
    }
    let (arch, out) = (Arch::new(), &Parts::new(out));
    let sizes = [x.count, lanes, d_in, d_out];
    shared(weight, d_out, |rows| arch.dispatch(Turned { sizes, turned: &turned, weight, rows, out, accumulate }));
}

/// Products of some rows of W with all tokens, which lie side by side, two numbers of each together.
struct Turned<'a> {
    /// Tokens, lanes that they fill, and the sizes of W.
    sizes: [usize; 4],
    turned: &'a [f32],
    weight: &'a [f32],
    rows: Range<usize>,
    out: &'a Parts<'a>,
    accumulate: bool,
}

impl WithSimd for Turned<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        /// Rows of W at a time.
        const ROWS: usize = 64;
        let Self { sizes: [count, lanes, d_in, d_out], turned, weight, rows, out, accumulate } = self;
        let mut products = Aligned::zeros(ROWS * lanes);
        for from in rows.clone().step_by(ROWS) {
            let some = ROWS.min(rows.end - from);
            paired_products(
                simd,
                [some, lanes, d_in / 2],
                (&weight[from * d_in..], d_in),
                turned,
                &mut products,
                &mut (),
            );
            for c in 0..count {
                // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
                let out = unsafe { out.range(c * d_out + from, some) };
                for (out, pairs) in out.iter_mut().zip(products.chunks_exact(lanes)) {
                    let sum = pairs[2 * c] + pairs[2 * c + 1];
                    *out = if accumulate { *out + sum } else { sum };
                }
            }
        }
    }
}

/// Scalar products of some rows of W with all tokens.
struct Dots<'a> {
    x: Tokens<'a>,
    weight: &'a [f32],
    d_in: usize,
    rows: Range<usize>,
    out: &'a Parts<'a>,
    d_out: usize,
    accumulate: bool,
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut t = 0;
        while t < self.x.count {
            match self.x.count - t {
                1 => self.tokens::<S, 8, 1>(simd, t),
                2 | 3 => self.tokens::<S, 4, 2>(simd, t),
                _ => self.tokens::<S, 4, 4>(simd, t),
            }
            t += match self.x.count - t {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
        }
    }
}

impl Dots<'_> {
    /// All rows with tokens `t..t+T`, `R` rows at a time.
    #[inline(always)]
    fn tokens<S: Simd, const R: usize, const T: usize>(&self, simd: S, t: usize) {
        let x: [&[f32]; T] = std::array::from_fn(|i| self.x.row(t + i, self.d_in));
        let mut row = self.rows.start;
        while row + R <= self.rows.end {
            self.block::<S, R, T>(simd, row, t, x);
            row += R;
        }
        while row < self.rows.end {
            self.block::<S, 1, T>(simd, row, t, x);
            row += 1;
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const T: usize>(&self, simd: S, row: usize, t: usize, x: [&[f32]; T]) {
        let w: [&[f32]; R] = std::array::from_fn(|r| &self.weight[(row + r) * self.d_in..][..self.d_in]);
        let w_parts = w.map(|w| S::as_simd_f32s(w));
        let x_parts = x.map(|x| S::as_simd_f32s(x));
        let mut sums = [[simd.splat_f32s(0.0); T]; R];
        for k in 0..self.d_in / S::F32_LANES {
            let x: [S::f32s; T] = std::array::from_fn(|i| x_parts[i].0[k]);
            for (sums, w) in sums.iter_mut().zip(w_parts) {
                let w = w.0[k];
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = simd.mul_add_e_f32s(w, x, *sum);
                }
            }
        }
        for (i, x) in x_parts.iter().enumerate() {
            // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
            let out = unsafe { self.out.range((t + i) * self.d_out + row, R) };
            for (r, (out, w)) in out.iter_mut().zip(w_parts).enumerate() {
                let rest: f32 = w.1.iter().zip(x.1).map(|(w, x)| w * x).sum();
                let sum = simd.reduce_sum_f32s(sums[r][i]) + rest;
                *out = if self.accumulate { *out + sum } else { sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_tokens_get_the_same_products() {
        for (d_in, d_out) in [(1, 1), (16, 8), (37, 29), (300, 301)] {
            let weight: Vec<f32> = (0..d_in * d_out).map(|i| ((i * 37 % 19) as f32) - 9.0).collect();
            for count in (1..20).chain([47, 48, 49]) {
                let stride = d_in + 3;
                let x: Vec<f32> = (0..count * stride).map(|i| ((i * 53 % 23) as f32) - 11.0).collect();
                for accumulate in [false, true] {
                    let mut out = vec![7.0; count * d_out];
                    project(Precision::F32, Tokens { data: &x, count, stride }, &weight, d_in, &mut out, accumulate);
                    for (t, out) in out.chunks_exact(d_out).enumerate() {
                        for (o, found) in out.iter().enumerate() {
                            let dot: f32 = (0..d_in).map(|i| x[t * stride + i] * weight[o * d_in + i]).sum();
                            let expected = dot + if accumulate { 7.0 } else { 0.0 };
                            assert_eq!(*found, expected, "{count} tokens, {d_in} to {d_out}");
                        }
                    }
                }
            }
        }
    }
}
