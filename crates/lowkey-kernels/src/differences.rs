//! Every operation's gradients against central differences in f64: derivatives by definition, not by another autodiff.
//!
//! The public functions take f32 to the fused operations and f64 to the reference. Values that f32 holds exactly go in as
//! both, so that one difference quotient of the reference judges both gradients. Beyond the definition: queries that see no
//! key, and logits at which an exponential overflows.

use std::ops::Range;

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};

use crate::fixtures::{Leaf, compare, device, host, random};
use crate::{
    LatentWeights, MlaDims, add_linear, causal_attention, latent_attention, linear,
    mlp::{MlpWeights, gated_mlp},
    rms_norm, rotate,
};

/// Half the distance of two points: a power of two, so that moving a value that f32 holds by it rounds nothing.
const STEP: f64 = 1.0 / (1 << 18) as f64;
/// Coordinates of each input that are tried.
const SAMPLES: usize = 12;
/// Below this a gradient is 0, as that of the queries where each sees one key, and what is left of its terms, which are of
/// size 1, is held against 1.
const NOTHING: f64 = 1e-6;

/// A small generator (Steele et al., "Fast splittable pseudorandom number generators"): the device's is shared by all tests
/// of the process, and the coordinates must be the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Numbers that f32 holds, uniform with variance `spread²`.
    fn numbers(&mut self, n: usize, spread: f64) -> Vec<f64> {
        let unit = |bits: u64| (bits >> 11) as f64 / (1u64 << 53) as f64;
        (0..n).map(|_| f64::from(((2.0 * unit(self.next()) - 1.0) * 3f64.sqrt() * spread) as f32)).collect()
    }

    /// [`SAMPLES`] different numbers below `n`, all of them if there are fewer.
    fn coordinates(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        let count = n.min(SAMPLES);
        for i in 0..count {
            all.swap(i, i + (self.next() % (n - i) as u64) as usize);
        }
        all.truncate(count);
        all
    }
}

/// A differentiable argument, as a flat tensor: name, length, spread.
type Input = (&'static str, usize, f64);

fn tensor(values: &[f64], dtype: DType, device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, dtype))
}

fn wide(tensor: Tensor<1>) -> Vec<f64> {
    tensor.try_into_vec_as::<f64>().unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Holds both gradients of `Σ w · op(inputs)` to its difference quotients, along sampled coordinates of every input and along
/// one random direction through all of them.
fn check<const D: usize>(what: &str, seed: u64, inputs: &[Input], op: impl Fn(&[Tensor<1>]) -> Tensor<D>) {
    let mut random = Random(seed);
    let values: Vec<Vec<f64>> = inputs.iter().map(|(_, n, spread)| random.numbers(*n, *spread)).collect();
    let plain = Device::flex();
    let evaluate = |values: &[Vec<f64>]| {
        let inputs: Vec<_> = values.iter().map(|values| tensor(values, DType::F64, &plain)).collect();
        let out = op(&inputs);
        assert_eq!(out.dtype(), DType::F64, "{what}");
        let n = out.shape().num_elements();
        wide(out.reshape([n]))
    };
    let weights = random.numbers(evaluate(&values).len(), 1.0);
    let gradients = |dtype: DType| -> Vec<Vec<f64>> {
        let leaves: Vec<_> = values.iter().map(|values| tensor(values, dtype, &device()).require_grad()).collect();
        let loss = (op(&leaves).reshape([weights.len()]) * tensor(&weights, dtype, &device())).sum();
        let grads = loss.backward();
        leaves.iter().map(|leaf| wide(leaf.grad(&grads).unwrap())).collect()
    };
    let (reference, fused) = (gradients(DType::F64), gradients(DType::F32));
    for (at, (name, n, _)) in inputs.iter().enumerate() {
        let along = |direction: &[f64]| {
            let moved = |step: f64| {
                let mut values = values.clone();
                values[at].iter_mut().zip(direction).for_each(|(x, d)| *x += step * d);
                evaluate(&values)
            };
            // Outputs are subtracted one by one: their sum would round away what a single coordinate changes.
            let change: Vec<f64> = moved(STEP).iter().zip(moved(-STEP)).map(|(a, b)| a - b).collect();
            dot(&weights, &change) / (2.0 * STEP)
        };
        let hold = |whereabouts: &str, slope: f64, scale: f64, direction: &[f64]| {
            for (kind, gradient, tolerance) in [("reference", &reference[at], 1e-6), ("fused", &fused[at], 1e-5)] {
                let found = dot(gradient, direction);
                let error = (found - slope).abs() / if scale > NOTHING { scale } else { 1.0 };
                // Not `error > tolerance`: NaN must fail.
                assert!(
                    error <= tolerance,
                    "{what}, {kind} gradient of {name} {whereabouts}: {found:.9e}, by differences {slope:.9e}, \
                     error {error:.1e}"
                );
            }
        };
        let norm = dot(&reference[at], &reference[at]).sqrt();
        for coordinate in random.coordinates(*n) {
            let mut direction = vec![0.0; *n];
            direction[coordinate] = 1.0;
            let slope = along(&direction);
            let scale = slope.abs().max(norm / (*n as f64).sqrt());
            hold(&format!("at {coordinate}"), slope, scale, &direction);
        }
        let direction = random.numbers(*n, 1.0);
        hold("along all", along(&direction), norm, &direction);
    }
}

/// Cosines and sines of random angles, `[rows, seq, 1, half]`, in the dtype of `like` and the same in every dtype.
fn tables(seed: u64, [rows, seq, half]: [usize; 3], like: &Tensor<1>) -> [Tensor<4>; 2] {
    let angles = Random(seed).numbers(rows * seq * half, 2.0);
    [f64::cos, f64::sin].map(|of| {
        let values: Vec<f64> = angles.iter().map(|angle| f64::from(of(*angle) as f32)).collect();
        tensor(&values, like.dtype(), &like.device()).reshape([rows, seq, 1, half])
    })
}

#[test]
fn rms_norm_has_the_slopes_of_its_definition() {
    for (seed, [batch, seq, d]) in [[2, 1, 24], [1, 7, 12], [2, 33, 37]].into_iter().enumerate() {
        let inputs = [("x", batch * seq * d, 1.0), ("weight", d, 1.0)];
        check(&format!("rms_norm {batch} {seq} {d}"), seed as u64, &inputs, |t| {
            rms_norm(t[0].clone().reshape([batch, seq, d]), t[1].clone(), 1e-5)
        });
    }
}

#[test]
fn rotate_has_the_slopes_of_its_definition() {
    for (seed, (seq, width, from, half)) in [(1, 24, 12, 6), (7, 12, 0, 6), (33, 17, 7, 3)].into_iter().enumerate() {
        for (rows, interleaved) in [(1, false), (1, true), (2, false), (2, true)] {
            let what = format!("rotate {seq} {width} {from} {half}, {rows} tables, interleaved {interleaved}");
            check(&what, seed as u64, &[("x", 2 * seq * 3 * width, 1.0)], |t| {
                let [cos, sin] = tables(9, [rows, seq, half], &t[0]);
                rotate(t[0].clone().reshape([2, seq, 3, width]), cos, sin, from, interleaved)
            });
        }
    }
}

#[test]
fn linear_has_the_slopes_of_its_definition() {
    for (seed, [batch, seq, d_in, d_out]) in
        [[2, 1, 24, 12], [1, 7, 37, 5], [2, 33, 12, 24], [1, 33, 1, 1]].into_iter().enumerate()
    {
        let what = format!("{batch} {seq} {d_in} {d_out}");
        let inputs = [("x", batch * seq * d_in, 1.0), ("weight", d_out * d_in, 1.0), ("bias", d_out, 1.0)];
        let shaped = |t: &[Tensor<1>]| {
            (t[0].clone().reshape([batch, seq, d_in]), t[1].clone().reshape([d_out, d_in]), t[2].clone())
        };
        check(&format!("linear {what}"), seed as u64, &inputs, |t| {
            let (x, weight, bias) = shaped(t);
            linear(x, weight, Some(bias))
        });
        let [x, weight, bias] = inputs;
        let inputs = [x, weight, bias, ("residual", batch * seq * d_out, 1.0)];
        check(&format!("add_linear {what}"), seed as u64, &inputs, |t| {
            let (x, weight, bias) = shaped(t);
            add_linear(t[3].clone().reshape([batch, seq, d_out]), x, weight, Some(bias))
        });
    }
}

#[test]
fn gated_mlp_has_the_slopes_of_its_definition() {
    for (seed, [batch, seq, d, f]) in
        [[2, 1, 24, 12], [1, 7, 12, 37], [2, 33, 24, 67], [1, 33, 37, 5]].into_iter().enumerate()
    {
        let inputs = [
            ("x", batch * seq * d, 1.0),
            ("norm", d, 1.0),
            ("gate", f * d, 0.3),
            ("up", f * d, 0.3),
            ("down", d * f, 0.3),
        ];
        check(&format!("gated_mlp {batch} {seq} {d} {f}"), seed as u64, &inputs, |t| {
            let weights = MlpWeights {
                norm: t[1].clone(),
                gate: t[2].clone().reshape([f, d]),
                up: t[3].clone().reshape([f, d]),
                down: t[4].clone().reshape([d, f]),
            };
            gated_mlp(t[0].clone().reshape([batch, seq, d]), weights, 1e-5)
        });
    }
}

/// Document starts of rows of `seq` tokens: one document, then rows cut at a third, at its successor, and at two thirds.
fn documents(batch: usize, seq: usize) -> Vec<u32> {
    let bounds = [0, seq / 3, seq / 3 + 1, 2 * seq / 3];
    let start = |t: usize| bounds.into_iter().filter(|bound| *bound <= t).max().unwrap_or(0) as u32;
    (0..batch).flat_map(|row| (0..seq).map(move |t| if row == 0 { 0 } else { start(t) })).collect()
}

#[test]
fn causal_attention_has_the_slopes_of_its_definition() {
    // The last two lengths span blocks of queries, and of keys.
    for (seed, (seq, [heads, groups], [nope, rope, value])) in [
        (1, [3, 3], [12, 12, 12]),
        (7, [3, 3], [24, 0, 12]),
        (7, [6, 3], [12, 12, 24]),
        (33, [3, 3], [24, 12, 12]),
        (33, [6, 2], [12, 0, 24]),
        (33, [3, 1], [5, 4, 7]),
        (131, [3, 3], [12, 12, 12]),
        (197, [3, 1], [12, 4, 8]),
    ]
    .into_iter()
    .enumerate()
    {
        for (kind, starts) in [("whole", vec![0; 2 * seq]), ("documents", documents(2, seq))] {
            let mut inputs =
                vec![("q", 2 * seq * heads * (nope + rope), 1.0), ("kv", 2 * seq * groups * (nope + value), 1.0)];
            inputs.extend((rope > 0).then_some(("k_pe", 2 * seq * rope, 1.0)));
            let what = format!("causal_attention {seq} {heads}/{groups} [{nope} {rope} {value}] {kind}");
            check(&what, seed as u64, &inputs, |t| {
                let q = t[0].clone().reshape([2, seq, heads, nope + rope]);
                let kv = t[1].clone().reshape([2, seq, groups, nope + value]);
                let k_pe = t.get(2).map(|k_pe| k_pe.clone().reshape([2, seq, rope]));
                causal_attention(q, kv, k_pe, &starts, nope, 0.3)
            });
        }
    }
}

#[test]
fn latent_attention_has_the_slopes_of_its_definition() {
    for (seed, (seq, heads, [nope, rope, value, rank])) in [
        (1, 3, [24, 12, 12, 20]),
        (7, 3, [12, 12, 24, 7]),
        (7, 2, [8, 0, 6, 16]),
        (33, 3, [24, 12, 12, 20]),
        (33, 3, [12, 4, 24, 12]),
        (131, 3, [12, 12, 12, 24]),
    ]
    .into_iter()
    .enumerate()
    {
        for (rows, interleave) in [(1, false), (1, true), (2, true)] {
            let starts = documents(2, seq);
            let dims = MlaDims {
                heads,
                nope,
                rope,
                value,
                rank,
                scale: 0.3,
                latent_scale: 1.25,
                latent_eps: 1e-3,
                interleave,
            };
            let inputs = [
                ("q", 2 * seq * heads * (nope + rope), 1.0),
                ("kv_a", 2 * seq * (rank + rope), 1.0),
                ("norm", rank, 1.0),
                ("kv_b", heads * (nope + value) * rank, 0.3),
            ];
            check(&format!("latent_attention {seq}, {rows} tables, {dims:?}"), seed as u64, &inputs, |t| {
                // Without a shared key there is no table; one number stands in for it.
                let [cos, sin] = tables(9, [rows, seq, (rope / 2).max(1)], &t[0]);
                let q = t[0].clone().reshape([2, seq, heads, nope + rope]);
                let kv_a = t[1].clone().reshape([2, seq, rank + rope]);
                let kv_b = t[3].clone().reshape([heads * (nope + value), rank]);
                latent_attention(q, kv_a, LatentWeights { norm: t[2].clone(), kv_b, cos, sin }, &starts, dims)
            });
        }
    }
}

/// A row of tokens whose document starts leave the queries of some gaps without a key: `pieces` are the documents between the
/// gaps, up to the end.
struct Gapped {
    seq: usize,
    pieces: Vec<Range<usize>>,
}

impl Gapped {
    /// The queries of a gap are told that their document is the next one, which has not begun.
    fn starts(&self) -> Vec<u32> {
        let piece = |t: usize| self.pieces.iter().find(|piece| t < piece.end).unwrap();
        (0..self.seq).map(|t| piece(t).start as u32).collect()
    }

    /// Of one row's numbers, those of tokens in gaps.
    fn in_gaps<'a>(&self, numbers: &'a [f32]) -> impl Iterator<Item = &'a f32> {
        let rows = numbers.chunks_exact(numbers.len() / self.seq).enumerate();
        rows.filter(|(t, _)| !self.pieces.iter().any(|piece| piece.contains(t))).flat_map(|(_, row)| row)
    }

    /// Queries in gaps give 0 and receive and cause no gradient; the others are what they are where their document is alone.
    /// `op` runs on a part of the tokens; the first `per_token` of `leaves` hold one row per token.
    fn check(
        &self,
        what: &str,
        leaves: &[(&str, Leaf)],
        per_token: usize,
        op: impl Fn(Range<usize>, &[u32]) -> Tensor<3>,
    ) {
        let packed = || op(0..self.seq, &self.starts());
        let alone = || {
            let mut parts = Vec::new();
            let mut end = 0;
            for piece in &self.pieces {
                let part = op(piece.clone(), &vec![0; piece.len()]);
                let [batch, _, width] = part.dims();
                if piece.start > end {
                    parts.push(Tensor::zeros([batch, piece.start - end, width], &part.device()));
                }
                parts.push(part);
                end = piece.end;
            }
            Tensor::cat(parts, 1)
        };
        compare(what, leaves, packed, alone);
        let out = packed();
        assert!(self.in_gaps(&host(out.clone())).all(|x| *x == 0.0), "{what}: output");
        let weights = Tensor::random(out.dims(), Distribution::Normal(0.0, 100.0), &device());
        let grads = (out * weights).sum().backward();
        for (i, (name, leaf)) in leaves.iter().enumerate() {
            let gradient = leaf.grad(&grads);
            assert!(gradient.iter().all(|x| x.is_finite()), "{what}: gradient of {name} is not finite");
            if i < per_token {
                assert!(self.in_gaps(&gradient).all(|x| *x == 0.0), "{what}: gradient of {name} in a gap");
            }
        }
    }
}

#[test]
fn queries_that_see_no_key_give_zero_and_leave_the_others_alone() {
    device().seed(31);
    // At the beginning, in the middle, and so that whole blocks of queries see nothing of whole blocks of keys.
    for (seq, pieces) in
        [(9, vec![(5, 9)]), (9, vec![(0, 3), (7, 9)]), (300, vec![(200, 300)]), (430, vec![(0, 10), (400, 430)])]
    {
        let gapped = Gapped { seq, pieces: pieces.into_iter().map(|(from, to)| from..to).collect() };
        for ([heads, groups], [nope, rope, value]) in
            [([3, 3], [12, 12, 24]), ([6, 2], [24, 0, 12]), ([3, 1], [5, 4, 7])]
        {
            let q = random([1, seq, heads, nope + rope], 1.0);
            let kv = random([1, seq, groups, nope + value], 1.0);
            let k_pe = (rope > 0).then(|| random([1, seq, rope], 1.0));
            let mut leaves = vec![("q", Leaf::Four(q.clone())), ("kv", Leaf::Four(kv.clone()))];
            leaves.extend(k_pe.clone().map(|k_pe| ("k_pe", Leaf::Three(k_pe))));
            let what = format!("causal_attention {:?} {heads}/{groups}", gapped.pieces);
            gapped.check(&what, &leaves, leaves.len(), |part, starts| {
                let (from, len) = (part.start, part.len());
                let k_pe = k_pe.clone().map(|k_pe| k_pe.narrow(1, from, len));
                causal_attention(
                    q.clone().narrow(1, from, len),
                    kv.clone().narrow(1, from, len),
                    k_pe,
                    starts,
                    nope,
                    0.3,
                )
            });
        }
        let dims = MlaDims {
            heads: 3,
            nope: 12,
            rope: 4,
            value: 8,
            rank: 20,
            scale: 0.3,
            latent_scale: 1.25,
            latent_eps: 1e-3,
            interleave: true,
        };
        let (q, kv_a) = (random([1, seq, 3, 16], 1.0), random([1, seq, 24], 1.0));
        let (norm, kv_b) = (random([20], 1.0), random([60, 20], 0.3));
        let [cos, sin] = tables(9, [1, seq, 2], &norm);
        let leaves = [
            ("q", Leaf::Four(q.clone())),
            ("kv_a", Leaf::Three(kv_a.clone())),
            ("norm", Leaf::One(norm.clone())),
            ("kv_b", Leaf::Two(kv_b.clone())),
        ];
        gapped.check(&format!("latent_attention {:?}", gapped.pieces), &leaves, 2, |part, starts| {
            let (from, len) = (part.start, part.len());
            let [cos, sin] = [&cos, &sin].map(|table| table.clone().narrow(1, from, len));
            let weights = LatentWeights { norm: norm.clone(), kv_b: kv_b.clone(), cos, sin };
            latent_attention(q.clone().narrow(1, from, len), kv_a.clone().narrow(1, from, len), weights, starts, dims)
        });
    }
}

#[test]
fn latent_attention_survives_extreme_logits() {
    let dims = MlaDims {
        heads: 2,
        nope: 4,
        rope: 2,
        value: 6,
        rank: 8,
        scale: 1.0,
        latent_scale: 1.0,
        latent_eps: 1e-6,
        interleave: false,
    };
    let seq = 210;
    let mut random = Random(41);
    let [q, kv_a, kv_b] = [seq * 2 * 6, seq * 10, 2 * 10 * 8].map(|n| random.numbers(n, 1.0));
    // The rotated parts alone make a logit of ±1e4: the first keys all −, so that some queries see nothing better.
    let q: Vec<f64> = q.iter().enumerate().map(|(i, x)| [*x, *x, *x, *x, 100.0, 0.0][i % 6]).collect();
    let sign = |t: usize| if t < 5 || t.is_multiple_of(3) { -1.0 } else { 1.0 };
    let shared = |t: usize, c: usize| if c == 8 { 100.0 * sign(t) } else { 0.0 };
    let kv_a: Vec<f64> =
        kv_a.iter().enumerate().map(|(i, x)| if i % 10 < 8 { *x } else { shared(i / 10, i % 10) }).collect();
    let run = |dtype: DType| {
        let leaf = |values: &[f64]| tensor(values, dtype, &device()).require_grad();
        let leaves = [leaf(&q), leaf(&kv_a), leaf(&[1.0; 8]), leaf(&kv_b)];
        let [q, kv_a, norm, kv_b] = leaves.clone();
        let still = |x: f64| tensor(&vec![x; seq], dtype, &device()).reshape([1, seq, 1, 1]);
        let weights = LatentWeights { norm, kv_b: kv_b.reshape([20, 8]), cos: still(1.0), sin: still(0.0) };
        let (q, kv_a) = (q.reshape([1, seq, 2, 6]), kv_a.reshape([1, seq, 10]));
        let out = latent_attention(q, kv_a, weights, &vec![0; seq], dims).reshape([seq * 12]);
        let grads = out.clone().sum().backward();
        (wide(out), leaves.map(|leaf| wide(leaf.grad(&grads).unwrap())))
    };
    let ((out, gradients), (expected, _)) = (run(DType::F32), run(DType::F64));
    for gradient in &gradients {
        assert!(gradient.iter().all(|x| x.is_finite()));
    }
    // At 1e4 neighbouring f32 lie 1e-3 apart: that much of a probability is lost.
    for (found, expected) in out.iter().zip(&expected) {
        assert!((found - expected).abs() <= 2e-2, "{found} for {expected}");
    }
}
