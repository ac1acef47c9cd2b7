//! Every unit against sums in f64 of rounded operands.

use super::*;
use crate::cpu::gemm::View;
use crate::cpu::vector::Ahead;

/// Numbers of different sizes, which bf16 rounds.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 317.0).collect()
}

/// The result, each number with the sum of what it is made of without signs: what rounding is measured by.
fn exact(product: Product, before: &[f32], stride: usize) -> Vec<[f64; 2]> {
    let Product { sizes: [m, n, k], a, b, accumulate, .. } = product;
    let at = |x: View, i: usize, j: usize| f64::from(half::bf16::from_f32(x.data[i * x.rows + j * x.columns]).to_f32());
    let mut out: Vec<[f64; 2]> = before.iter().map(|x| [f64::from(*x), 0.0]).collect();
    for i in 0..m {
        for j in 0..n {
            let place = &mut out[i * stride + j];
            let begin = if accumulate { place[0] } else { 0.0 };
            *place = (0..k)
                .map(|l| at(a, i, l) * at(b, l, j))
                .fold([begin, begin.abs()], |[sum, size], x| [sum + x, size + x.abs()]);
        }
    }
    out
}

#[test]
fn every_unit_multiplies_rounded_operands() {
    let shapes = [
        [1, 1, 1],
        [3, 48, 7],
        [16, 16, 32],
        [32, 32, 64],
        [33, 31, 65],
        [130, 70, 600],
        [40, 1030, 40],
        [300, 17, 1100],
        // Halves of blocks.
        [64, 16, 70],
        [16, 96, 100],
        [48, 48, 33],
    ];
    for (case, [m, n, k]) in shapes.into_iter().enumerate() {
        // Each operand as it is and transposed, in rows farther apart than they are wide.
        for way in 0..8 {
            let [a_turned, b_turned, accumulate] = [1, 2, 4].map(|bit| way & bit != 0);
            let view = |data, rows, columns, turned: bool| {
                if turned { View::new(data, rows + 3).t() } else { View::new(data, columns + 3) }
            };
            let (a, b) = (numbers((m + 3) * (k + 3), case), numbers((k + 3) * (n + 3), case + 9));
            let (a, b) = (view(&a, m, k, a_turned), view(&b, k, n, b_turned));
            let stride = n + 5;
            let before = numbers(m * stride, 4);
            let product = Product { sizes: [m, n, k], a, b, accumulate, threads: 1 };
            let expected = exact(product, &before, stride);
            for unit in Unit::all() {
                let mut found = before.clone();
                // SAFETY: `found` has all rows, and the unit is there.
                unsafe { multiply(product, unit, found.as_mut_ptr(), stride) };
                for (at, (found, [expected, size])) in found.iter().zip(&expected).enumerate() {
                    let off = (f64::from(*found) - expected).abs();
                    let bound = f64::from(f32::EPSILON) / 2.0 * (2.0 + (k as f64).sqrt());
                    assert!(off <= bound * size, "{unit:?} {m}×{n}×{k}, way {way}, at {at}: {found} for {expected}");
                }
                let mut shared = before.clone();
                let product = Product { threads: 3, ..product };
                // SAFETY: as above.
                unsafe { multiply(product, unit, shared.as_mut_ptr(), stride) };
                assert_eq!(found, shared, "{unit:?} {m}×{n}×{k}: other bits for three tasks at a time");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    for unit in Unit::all() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut a, b) = (vec![1.0; 20 * 40], vec![1.0; 40 * 20]);
            a[45] = bad;
            let mut out = vec![0.0; 400];
            let (a, b) = (View::new(&a, 40), View::new(&b, 20));
            let product = Product { sizes: [20, 20, 40], a, b, accumulate: false, threads: 1 };
            // SAFETY: `out` has all rows, and the unit is there.
            unsafe { multiply(product, unit, out.as_mut_ptr(), 20) };
            assert!(out[20..40].iter().all(|x| !x.is_finite()), "{unit:?}");
            assert!(out[..20].iter().chain(&out[40..]).all(|x| *x == 40.0), "{unit:?}");
        }
    }
}

#[test]
fn what_is_bf16_already_is_packed_as_what_is_rounded() {
    for unit in Unit::all() {
        let core = Core::of(unit);
        for [m, n, k] in [[1, 1, 1], [3, 48, 7], [32, 16, 64], [33, 31, 65], [70, 130, 96]] {
            let (left, right) = (numbers(m * (k + 3), 5), numbers(k * (n + 1), 6));
            let halves = |x: &[f32]| x.iter().map(|x| half::bf16::from_f32(*x)).collect::<Vec<_>>();
            let packed = |of_halves: bool| {
                let [mut a, mut b] = [Side::Left, Side::Right].map(Packed::new);
                let ahead = &mut Ahead::new(&[], 1);
                if of_halves {
                    core.take((&halves(&left), k + 3), [m, k], &mut a, ahead);
                    core.take((&halves(&right), n + 1), [n, k], &mut b, ahead);
                } else {
                    core.pack(View::new(&left, k + 3), [m, k], &mut a);
                    core.pack(View::new(&right, n + 1), [n, k], &mut b);
                }
                let mut out = vec![f32::NAN; m * n];
                let window = Window { from: [0, 0], count: [m, n], inner: [0, k], behind: 0 };
                core.multiply([&a, &b], window, &mut out, n, false);
                out
            };
            assert_eq!(packed(true), packed(false), "{unit:?} {m} {n} {k}");
        }
    }
}
