//! Row primitives. All are `inline(always)`: they take the instruction set of the `pulp` dispatch around them, which is a function with
//! `pulp::with_simd`. A closure that is dispatched would not do: it is called from a place per instruction set, and where it is too long
//! to be copied into each, it stays one function for the vectors that every machine has.

use pulp::Simd;

/// Numbers that a loop takes at a time.
pub(crate) const LANES: usize = 16;

/// e^x for x ≤ 88, to about 1e-7 relative; below −87 it stays at e^−87, which is 0 beside anything it is added to.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; a polynomial in r (Cephes `expf`), scaled by 2ⁿ through the exponent's bits. Half of its
/// operations are of two that every processor with AVX2 or NEON does at once, which a compiler joins only where it is told to.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(LEAST, MOST);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(LN_2[1], n.mul_add(LN_2[0], x));
    let p = POLYNOMIAL.into_iter().fold(POWER_5, |p, c| p.mul_add(r, c));
    let p = p.mul_add(r * r, r) + 1.0;
    // The last bits of `rounded` are n itself; a conversion of n to an integer would not be vectorised.
    let power = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    // Arithmetic on bits would make a number of some of them.
    if x.is_nan() { x } else { power }
}

/// [`exp`] of the numbers of a vector.
#[inline(always)]
pub(crate) fn exps<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |x| simd.splat_f32s(x);
    let inside = simd.min_f32s(simd.max_f32s(x, splat(LEAST)), splat(MOST));
    let rounded = simd.mul_add_e_f32s(inside, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(rounded, splat(ROUND));
    let r = simd.mul_add_e_f32s(n, splat(LN_2[1]), simd.mul_add_e_f32s(n, splat(LN_2[0]), inside));
    let p = POLYNOMIAL.into_iter().fold(splat(POWER_5), |p, c| simd.mul_add_e_f32s(p, r, splat(c)));
    let p = simd.add_f32s(simd.mul_add_e_f32s(p, simd.mul_f32s(r, r), r), splat(1.0));
    let (p, rounded) = (simd.transmute_u32s_f32s(p), simd.transmute_u32s_f32s(rounded));
    let power = simd.add_u32s(p, simd.wrapping_dyn_shl_u32s(rounded, simd.splat_u32s(23)));
    simd.select_f32s(simd.equal_f32s(x, x), simd.transmute_f32s_u32s(power), x)
}

/// Where e^x stays a normal number.
const LEAST: f32 = -87.0;
const MOST: f32 = 88.0;
/// Adding 1.5·2²³ rounds to the nearest integer.
const ROUND: f32 = 12_582_912.0;
/// −ln 2 in two parts: n · 0.693359375 is exact.
const LN_2: [f32; 2] = [-0.693_359_4, 2.121_944_4e-4];
/// Coefficients from the fifth power on, down to the square.
const POWER_5: f32 = 1.987_569_1e-4;
const POLYNOMIAL: [f32; 5] = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// What a loop of products does aside at each of its turns.
pub(crate) trait Aside {
    fn turn(&mut self);
}

/// Nothing.
impl Aside for () {
    #[inline(always)]
    fn turn(&mut self) {}
}

/// Asks for the line at an address, which need not be one. Where the language has no such instruction, the processor has to guess.
#[inline(always)]
pub(crate) fn ask_for(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: reads nothing, whatever lies there; every x86-64 has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Asks for numbers that will be read soon, some at each of `turns`: a core waits for no more than a dozen lines at a time, and stands
/// still where it is told to ask for more.
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    lines: usize,
    turns: usize,
    due: usize,
}

/// Bytes that memory hands out at a time.
pub(crate) const LINE: usize = 64;

impl<'a> Ahead<'a> {
    pub(crate) fn new(bytes: &'a [u8], turns: usize) -> Self {
        Self { bytes, lines: bytes.len().div_ceil(LINE), turns: turns.max(1), due: 0 }
    }
}

impl Aside for Ahead<'_> {
    #[inline(always)]
    fn turn(&mut self) {
        self.due += self.lines;
        while self.due >= self.turns {
            self.due -= self.turns;
            ask_for(self.bytes.as_ptr());
            self.bytes = self.bytes.get(LINE..).unwrap_or(&[]);
        }
    }
}

/// Largest element; −∞ for none.
#[inline(always)]
pub(crate) fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, x| if *x > a { *x } else { a })
}

/// Largest element, or NaN where one is not finite; −∞ for none.
#[inline(always)]
pub(crate) fn max_of_finite(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    // 0 times a finite number is 0, and times any other NaN.
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * 0.0;
        }
    }
    max(row) + lanes.iter().chain(rest).map(|x| x * 0.0).sum::<f32>()
}

/// Largest element, as [`max`], of rows so short that what comes after the vectors counts.
#[inline(always)]
pub(crate) fn max_of_few<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(row);
    let lanes = vectors.iter().fold(simd.splat_f32s(f32::NEG_INFINITY), |lanes, x| simd.max_f32s(*x, lanes));
    rest.iter().fold(simd.reduce_max_f32s(lanes), |a, x| if *x > a { *x } else { a })
}

/// Sum of the lanes, in halves: one after the other would wait sixteen times for an addition.
#[inline(always)]
fn total<S: Simd>(simd: S, lanes: [f32; LANES]) -> f32 {
    let sum = vectors::<S>(&lanes).iter().copied().reduce(|sum, lanes| simd.add_f32s(sum, lanes));
    sum.map_or(0.0, |sum| simd.reduce_sum_f32s(sum))
}

/// Replaces x by e^(x − shift) and returns the sum.
#[inline(always)]
pub(crate) fn exp_shifted<S: Simd>(simd: S, row: &mut [f32], shift: f32) -> f32 {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let shifts = simd.splat_f32s(shift);
    let mut lanes = [0.0; LANES];
    let (sums, _) = S::as_mut_simd_f32s(&mut lanes);
    for chunk in chunks {
        for (x, sum) in S::as_mut_simd_f32s(chunk).0.iter_mut().zip(&mut *sums) {
            *x = exps(simd, simd.sub_f32s(*x, shifts));
            *sum = simd.add_f32s(*sum, *x);
        }
    }
    let mut sum = total(simd, lanes);
    for x in rest {
        *x = exp(*x - shift);
        sum += *x;
    }
    sum
}

/// Replaces x by e^(x − shift); returns the sum of these, and of each times (x − shift) − (y − other shift).
#[inline(always)]
pub(crate) fn exp_shifted_with_gain<S: Simd>(
    simd: S,
    (row, shift): (&mut [f32], f32),
    (other, other_shift): (&[f32], f32),
) -> [f32; 2] {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let (others, other_rest) = other.as_chunks::<LANES>();
    let (mut sums, mut gains) = ([0.0; LANES], [0.0; LANES]);
    for (chunk, others) in chunks.iter_mut().zip(others) {
        for (((x, y), sum), gain) in chunk.iter_mut().zip(others).zip(&mut sums).zip(&mut gains) {
            let above = *x - shift;
            *x = exp(above);
            *sum += *x;
            *gain += *x * (above - (y - other_shift));
        }
    }
    let (mut sum, mut gain) = (total(simd, sums), total(simd, gains));
    for (x, y) in rest.iter_mut().zip(other_rest) {
        let above = *x - shift;
        *x = exp(above);
        sum += *x;
        gain += *x * (above - (y - other_shift));
    }
    [sum, gain]
}

/// `to = from · factor`
#[inline(always)]
pub(crate) fn copy_scaled<S: Simd>(simd: S, from: &[f32], to: &mut [f32], factor: f32) {
    let (vectors, rest) = S::as_simd_f32s(from);
    let (to_vectors, to_rest) = S::as_mut_simd_f32s(to);
    let factors = simd.splat_f32s(factor);
    for (from, to) in vectors.iter().zip(to_vectors) {
        *to = simd.mul_f32s(*from, factors);
    }
    for (from, to) in rest.iter().zip(to_rest) {
        *to = from * factor;
    }
}

/// Multiplies all elements.
#[inline(always)]
pub(crate) fn scale(row: &mut [f32], factor: f32) {
    for x in row {
        *x *= factor;
    }
}

/// Σ a·b
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (chunks_a, rest_a) = a.as_chunks::<LANES>();
    let (chunks_b, rest_b) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    let (sums, _) = S::as_mut_simd_f32s(&mut lanes);
    for (x, y) in chunks_a.iter().zip(chunks_b) {
        for (sum, (x, y)) in sums.iter_mut().zip(vectors::<S>(x).iter().zip(vectors::<S>(y))) {
            *sum = simd.mul_add_e_f32s(*x, *y, *sum);
        }
    }
    total(simd, lanes) + rest_a.iter().zip(rest_b).map(|(x, y)| x * y).sum::<f32>()
}

/// Σ a·b·weight
#[inline(always)]
pub(crate) fn dot_weighted<S: Simd>(simd: S, a: &[f32], b: &[f32], weight: &[f32]) -> f32 {
    let (chunks_a, rest_a) = a.as_chunks::<LANES>();
    let (chunks_b, rest_b) = b.as_chunks::<LANES>();
    let (chunks_w, rest_w) = weight.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    let (sums, _) = S::as_mut_simd_f32s(&mut lanes);
    for ((x, y), w) in chunks_a.iter().zip(chunks_b).zip(chunks_w) {
        let factors = vectors::<S>(x).iter().zip(vectors::<S>(y)).zip(vectors::<S>(w));
        for (sum, ((x, y), w)) in sums.iter_mut().zip(factors) {
            *sum = simd.mul_add_e_f32s(simd.mul_f32s(*x, *y), *w, *sum);
        }
    }
    let rest = rest_a.iter().zip(rest_b).zip(rest_w).map(|((x, y), w)| x * y * w);
    total(simd, lanes) + rest.sum::<f32>()
}

/// The vectors of a chunk, which any width of them divides.
#[inline(always)]
fn vectors<S: Simd>(chunk: &[f32; LANES]) -> &[S::f32s] {
    S::as_simd_f32s(chunk).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_good_to_seven_digits() {
        for i in -86_999..87_999 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 3e-7, "e^{x}: {found} {expected}");
        }
        with_vectors_of_all_sorts();
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(-1e4) < 1e-37);
        for payload in [0, 1, 0x1ff, 0x3f_ffff] {
            assert!(
                exp(f32::from_bits(0x7fc0_0000 | payload)).is_nan()
                    && exp(f32::from_bits(0xffc0_0000 | payload)).is_nan()
            );
        }
    }

    #[pulp::with_simd(with_vectors_of_all_sorts = pulp::Arch::new())]
    #[inline(always)]
    fn one_by_one_and_in_vectors<S: Simd>(simd: S) {
        let odd = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, 88.5, -1e4];
        let all: Vec<f32> = (-1600..1600).map(|i| i as f32 * 0.057).chain(odd.repeat(2)).collect();
        let mut found = all.clone();
        let (vectors, rest) = S::as_mut_simd_f32s(&mut found);
        assert!(rest.is_empty());
        vectors.iter_mut().for_each(|x| *x = exps(simd, *x));
        for (x, found) in all.iter().zip(found) {
            let (found, expected) = (found.to_bits(), exp(*x).to_bits());
            assert!(found == expected || x.is_nan() && f32::from_bits(found).is_nan(), "e^{x}: {found:x} {expected:x}");
        }
    }

    #[test]
    fn rows_of_every_length_reduce_right_with_vectors_and_without() {
        with_vectors();
        check(pulp::Scalar::new());
    }

    #[pulp::with_simd(with_vectors = pulp::Arch::new())]
    #[inline(always)]
    fn check<S: Simd>(simd: S) {
        for len in 0..50 {
            let a: Vec<f32> = (0..len).map(|i| ((i * 37 % 11) as f32) - 5.0).collect();
            let naive: f32 = a.iter().map(|x| x * x).sum();
            assert_eq!(dot(simd, &a, &a), naive);
            assert_eq!(dot_weighted(simd, &a, &a, &vec![2.0; len]), 2.0 * naive);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(max_of_finite(&a), max(&a));
            for at in 0..len {
                for spoilt in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut a = a.clone();
                    a[at] = spoilt;
                    assert!(max_of_finite(&a).is_nan(), "{spoilt} at {at} of {len}");
                }
            }
            assert_eq!(max_of_few(simd, &a), max(&a));
            let mut doubled = vec![f32::NAN; len];
            copy_scaled(simd, &a, &mut doubled, 2.0);
            assert!(doubled.iter().zip(&a).all(|(double, x)| *double == 2.0 * x));
            let mut b = a.clone();
            let sum = exp_shifted(simd, &mut b, 1.0);
            let expected: f32 = a.iter().map(|x| (x - 1.0).exp()).sum();
            assert!((sum - expected).abs() <= 1e-5 * expected.max(1.0));
        }
    }
}
