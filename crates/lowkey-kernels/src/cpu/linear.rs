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
pub(crate) const FEW: usize = 4;

/// Up to this many, W is not copied either: the tokens are, so that they fill vectors.
const SOME: usize = 48;

/// A matrix `[d_out, d_in]`, read row by row.
pub(crate) trait Rows: Copy + Sync {
    /// Whether rows have to be unpacked, or lie somewhere as numbers.
    const PACKED: bool;

    /// Its sizes, `[d_out, d_in]`.
    fn sizes(self) -> [usize; 2];

    /// Bytes that it takes.
    fn bytes(self) -> usize;

    /// A part of some rows as numbers, and how far its rows are apart: where they lie, or in `room`, which has place for them if they are
    /// packed.
    fn part<'b>(&'b self, rows: Range<usize>, columns: Range<usize>, room: &'b mut [f32]) -> (&'b [f32], usize);
}

/// A matrix of numbers.
#[derive(Clone, Copy)]
struct Whole<'a> {
    weight: &'a [f32],
    d_in: usize,
}

impl Rows for Whole<'_> {
    const PACKED: bool = false;

    #[inline(always)]
    fn sizes(self) -> [usize; 2] {
        [self.weight.len() / self.d_in, self.d_in]
    }

    fn bytes(self) -> usize {
        size_of_val(self.weight)
    }

    #[inline(always)]
    fn part<'b>(&'b self, rows: Range<usize>, columns: Range<usize>, _: &'b mut [f32]) -> (&'b [f32], usize) {
        (&self.weight[rows.start * self.d_in + columns.start..], self.d_in)
    }
}

/// `out (+)= x Wᵀ` for `weight [d_out, d_in]`, `out` in rows of `d_out`.
pub(crate) fn project(precision: Precision, x: Tokens, weight: &[f32], d_in: usize, out: &mut [f32], accumulate: bool) {
    if !project_few(precision, x, Whole { weight, d_in }, out, accumulate) {
        let d_out = weight.len() / d_in;
        let weight = View::new(weight, d_in).t();
        product(precision, [x.count, d_out, d_in], out, d_out, accumulate, x.view(), weight);
    }
}

/// The same for so few tokens that reading W takes most of the time, and it is read once. False where that is not so, and nothing was
/// done.
pub(crate) fn project_few(
    precision: Precision,
    x: Tokens,
    weight: impl Rows,
    out: &mut [f32],
    accumulate: bool,
) -> bool {
    if precision == Precision::Bf16 {
        return false;
    }
    match x.count {
        ..=FEW => few(x, weight, out, accumulate),
        ..=SOME if weight.sizes()[1].is_multiple_of(2) => some(x, weight, out, accumulate),
        _ => return false,
    }
    true
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
fn few(x: Tokens, weight: impl Rows, out: &mut [f32], accumulate: bool) {
    let (arch, out) = (Arch::new(), &Parts::new(out));
    shared(weight, |rows| arch.dispatch(Dots { x, weight, rows, out, accumulate }));
}

/// Hands out the rows of W, to all threads where it is worth waking them.
pub(crate) fn shared(weight: impl Rows, job: impl Fn(Range<usize>) + Sync) {
    /// Bytes of W that are worth waking a thread for.
    const SHARE: usize = 1 << 18;
    let [d_out, _] = weight.sizes();
    let threads = rayon::current_num_threads().min(weight.bytes() / SHARE).max(1);
    let rows = d_out.div_ceil(threads);
    let share = |i: usize| job((i * rows).min(d_out)..((i + 1) * rows).min(d_out));
    if threads == 1 {
        share(0);
    } else {
        (0..threads).into_par_iter().for_each(share);
    }
}

/// Products of some tokens: W is read once, and its rows meet vectors of all tokens, which are turned for that.
fn some(x: Tokens, weight: impl Rows, out: &mut [f32], accumulate: bool) {
    let [_, d_in] = weight.sizes();
    let lanes = 2 * x.count.next_multiple_of(LANES / 2);
    let mut turned = Aligned::zeros(d_in * lanes / 2);
    for c in 0..x.count {
        for (k, pair) in x.row(c, d_in).chunks_exact(2).enumerate() {
            turned[k * lanes + 2 * c..][..2].copy_from_slice(pair);
        }
    }
    let (arch, out) = (Arch::new(), &Parts::new(out));
    let sizes = [x.count, lanes];
    shared(weight, |rows| arch.dispatch(Turned { sizes, turned: &turned, weight, rows, out, accumulate }));
}

/// Products of some rows of W with all tokens, which lie side by side, two numbers of each together.
struct Turned<'a, W> {
    /// Tokens, and lanes that they fill.
    sizes: [usize; 2],
    turned: &'a [f32],
    weight: W,
    rows: Range<usize>,
    out: &'a Parts<'a>,
    accumulate: bool,
}

impl<W: Rows> WithSimd for Turned<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes: [count, lanes], turned, weight, rows, out, accumulate } = self;
        let [d_out, d_in] = weight.sizes();
        // Rows of W at a time: of a packed one as many as a core's second cache holds as numbers.
        let most = if W::PACKED { 16 } else { 64 };
        let mut room = Aligned::zeros(if W::PACKED { most * d_in } else { 0 });
        let mut products = Aligned::zeros(most * lanes);
        for from in rows.clone().step_by(most) {
            let some = most.min(rows.end - from);
            let part = weight.part(from..from + some, 0..d_in, &mut room);
            paired_products(simd, [some, lanes, d_in / 2], part, turned, &mut products, &mut ());
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
struct Dots<'a, W> {
    x: Tokens<'a>,
    weight: W,
    rows: Range<usize>,
    out: &'a Parts<'a>,
    accumulate: bool,
}

/// Rows of W at a time at most.
const TALL: usize = 8;

/// Columns of a packed W at a time: whole rows of most matrices, so that memory is read in its order, and with [`TALL`] rows little
/// enough for a core's second cache.
const STRETCH: usize = 2048;

impl<W: Rows> WithSimd for Dots<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut room = Aligned::zeros(if W::PACKED { TALL * STRETCH } else { 0 });
        let mut t = 0;
        while t < self.x.count {
            match self.x.count - t {
                1 => self.tokens::<S, TALL, 1>(simd, t, &mut room),
                2 | 3 => self.tokens::<S, 4, 2>(simd, t, &mut room),
                _ => self.tokens::<S, 4, 4>(simd, t, &mut room),
            }
            t += match self.x.count - t {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
        }
    }
}

impl<W: Rows> Dots<'_, W> {
    /// All rows with tokens `t..t+T`, `R` rows at a time.
    #[inline(always)]
    fn tokens<S: Simd, const R: usize, const T: usize>(&self, simd: S, t: usize, room: &mut [f32]) {
        let mut row = self.rows.start;
        while row + R <= self.rows.end {
            self.block::<S, R, T>(simd, row, t, room);
            row += R;
        }
        while row < self.rows.end {
            self.block::<S, 1, T>(simd, row, t, room);
            row += 1;
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const T: usize>(&self, simd: S, row: usize, t: usize, room: &mut [f32]) {
        let [d_out, d_in] = self.weight.sizes();
        let x: [&[f32]; T] = std::array::from_fn(|i| self.x.row(t + i, d_in));
        let mut sums = [[simd.splat_f32s(0.0); T]; R];
        // What no vector holds, of the last columns alone.
        let mut rests = [[0.0; T]; R];
        let step = if W::PACKED { STRETCH } else { d_in.max(1) };
        for from in (0..d_in).step_by(step) {
            let columns = from..(from + step).min(d_in);
            let (part, apart) = self.weight.part(row..row + R, columns.clone(), room);
            let w_parts: [_; R] = std::array::from_fn(|r| S::as_simd_f32s(&part[r * apart..][..columns.len()]));
            let x_parts = x.map(|x| S::as_simd_f32s(&x[columns.clone()]));
            for k in 0..columns.len() / S::F32_LANES {
                let x: [S::f32s; T] = std::array::from_fn(|i| x_parts[i].0[k]);
                for (sums, w) in sums.iter_mut().zip(w_parts) {
                    let w = w.0[k];
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = simd.mul_add_e_f32s(w, x, *sum);
                    }
                }
            }
            for (rests, w) in rests.iter_mut().zip(w_parts) {
                for (rest, x) in rests.iter_mut().zip(x_parts) {
                    *rest += w.1.iter().zip(x.1).map(|(w, x)| w * x).sum::<f32>();
                }
            }
        }
        for i in 0..T {
            // SAFETY: these rows of W belong to this task alone, and so do their numbers of each token.
            let out = unsafe { self.out.range((t + i) * d_out + row, R) };
            for (r, out) in out.iter_mut().enumerate() {
                let sum = simd.reduce_sum_f32s(sums[r][i]) + rests[r][i];
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
