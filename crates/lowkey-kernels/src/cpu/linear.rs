//! The linear map and its gradients, on rows of any distance.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{View, product};
use super::parts::Parts;
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
const FEW: usize = 8;

/// `out (+)= x Wᵀ` for `weight [d_out, d_in]`, `out` in rows of `d_out`.
pub(crate) fn project(precision: Precision, x: Tokens, weight: &[f32], d_in: usize, out: &mut [f32], accumulate: bool) {
    let d_out = weight.len() / d_in;
    if x.count <= FEW && precision != Precision::Bf16 {
        few(x, weight, [d_in, d_out], out, accumulate);
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
    /// Bytes of W that are worth waking a thread for.
    const SHARE: usize = 1 << 18;
    let threads = rayon::current_num_threads().min(size_of_val(weight) / SHARE).max(1);
    let rows = d_out.div_ceil(threads);
    let arch = Arch::new();
    let out = &Parts::new(out);
    let share = |from: usize| {
        let to = (from + rows).min(d_out);
        arch.dispatch(Dots { x, weight, d_in, rows: from..to, out, d_out, accumulate });
    };
    if threads == 1 {
        share(0);
    } else {
        (0..threads).into_par_iter().for_each(|i| share((i * rows).min(d_out)));
    }
}

/// Scalar products of some rows of W with all tokens.
struct Dots<'a> {
    x: Tokens<'a>,
    weight: &'a [f32],
    d_in: usize,
    rows: std::ops::Range<usize>,
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
            for count in 1..20 {
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
