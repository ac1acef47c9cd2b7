//! Latent attention against its reference: values and all gradients, at every length, width and pairing.

use super::*;
use crate::adapted::{AdaptedMatrix, FrozenMatrix, adapted_linear};
use crate::fixtures::{Leaf, assert_close, compare, device, frozen, host, is_cpu, mlp, plain_device, random};
use crate::loss::{Labels, cross_entropy_sum};
use crate::mlp::gated_mlp;
use crate::precision::scope;
use crate::recalled::MadeOf;
use crate::{Precision, linear, rms_norm, rotate};

/// By how much two results differ, of the size of the second.
fn distance<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f64 {
    let norm = |x: Vec<f32>| x.into_iter().map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(host(found - expected.clone())) / norm(host(expected))
}

#[test]
fn products_of_rounded_operands_are_near_and_their_backward_pass_remembers() {
    device().seed(28);
    let case = Case::new([2, 40], 3, [24, 12, 12, 20], false);
    let (x, weights) = (random([2, 40, 64], 1.0), mlp(64, 96));
    let (h, head) = (random([80, 64], 1.0), random([300, 64], 0.3));
    let targets: Vec<i64> = (0..80).collect();
    let run = |precision| {
        let scope = scope(precision);
        let Case { dims, q, kv_a, weights: latent } = &case;
        let out = latent_attention(q.clone(), kv_a.clone(), latent.clone(), &[0; 80], *dims);
        let y = gated_mlp(x.clone(), weights.clone(), 1e-6);
        let z = linear(x.clone(), weights.gate.clone(), None);
        let labels = Labels { targets: &targets, weights: None, z_loss: 0.0 };
        let loss = cross_entropy_sum(h.clone(), head.clone(), labels).nats;
        drop(scope);
        let sum = out.clone().sum() + y.clone().sum() + z.clone().sum() + loss.clone();
        let grads = sum.backward();
        let three = |x: &Tensor<3>| x.grad(&grads).unwrap().reshape([-1]);
        let two = |x: &Tensor<2>| x.grad(&grads).unwrap().reshape([-1]);
        let values = [out.reshape([-1]), y.reshape([-1]), z.reshape([-1]), loss].map(Tensor::without_autodiff);
        let gradients =
            [three(kv_a), three(&x), two(&latent.kv_b), two(&weights.gate), two(&weights.down), two(&h), two(&head)];
        values.into_iter().chain(gradients).collect::<Vec<Tensor<1>>>()
    };
    let exact = run(Precision::F32);
    for (precision, dtype, most) in [(Precision::F16, DType::F16, 2e-3), (Precision::Bf16, DType::BF16, 2e-2)] {
        if !is_cpu() && !plain_device().supports_dtype(dtype) {
            continue;
        }
        for (i, (found, expected)) in run(precision).into_iter().zip(exact.clone()).enumerate() {
            let off = distance(found, expected);
            if is_cpu() && precision == Precision::F16 {
                assert_eq!(off, 0.0, "{precision:?} {i}: the CPU does not round to it");
            } else {
                assert!(off > 0.0 && off < most, "{precision:?} {i}: {off:.1e}");
            }
        }
    }
}

/// Sizes with their queries, latents and weights; positions begin far from 0.
struct Case {
    dims: MlaDims,
    q: Tensor<4>,
    kv_a: Tensor<3>,
    weights: LatentWeights,
}

impl Case {
    fn new([batch, seq]: [usize; 2], heads: usize, [nope, rope, value, rank]: [usize; 4], interleave: bool) -> Self {
        let dims =
            MlaDims { heads, nope, rope, value, rank, scale: 0.3, latent_scale: 1.25, latent_eps: 1e-3, interleave };
        // Without a shared key there is no table; one number stands in for it.
        let half = (rope / 2).max(1);
        let angle = |t: usize, i: usize| (5000 + t) as f32 / 10f32.powi(i as i32);
        let angles: Vec<f32> = (0..seq).flat_map(|t| (0..half).map(move |i| angle(t, i))).collect();
        let angles = Tensor::<1>::from_floats(angles.as_slice(), &device()).reshape([1, seq, 1, half]);
        Self {
            dims,
            q: random([batch, seq, heads, nope + rope], 1.0),
            kv_a: random([batch, seq, rank + rope], 1.0),
            weights: LatentWeights {
                norm: random([rank], 1.0),
                kv_b: random([heads * (nope + value), rank], 0.2),
                cos: angles.clone().cos(),
                sin: angles.sin(),
            },
        }
    }

    fn compare(&self, starts: &[u32]) {
        let Self { dims, q, kv_a, weights } = self;
        let inputs = [
            ("q", Leaf::Four(q.clone())),
            ("kv_a", Leaf::Three(kv_a.clone())),
            ("norm", Leaf::One(weights.norm.clone())),
            ("kv_b", Leaf::Two(weights.kv_b.clone())),
        ];
        compare(
            &format!("latent attention {:?} {dims:?}", q.dims()),
            &inputs,
            || latent_attention(q.clone(), kv_a.clone(), weights.clone(), starts, *dims),
            || reference::latent_attention(q.clone(), kv_a.clone(), weights.clone(), starts, *dims),
        );
    }
}

#[test]
fn latent_attention_agrees_at_every_length_width_and_pairing() {
    device().seed(24);
    for seq in [1, 7, 255, 257] {
        Case::new([2, seq], 3, [24, 12, 12, 20], seq % 2 == 0).compare(&vec![0; 2 * seq]);
    }
    for (sizes, interleave) in
        [([5, 4, 7, 3], true), ([5, 4, 7, 3], false), ([8, 0, 6, 16], false), ([1, 2, 1, 1], true)]
    {
        Case::new([2, 33], 2, sizes, interleave).compare(&[0; 66]);
    }
    let starts: Vec<u32> = (0..260)
        .map(|t| {
            if t < 100 {
                0
            } else if t < 193 {
                100
            } else {
                193
            }
        })
        .collect();
    Case::new([1, 260], 3, [8, 4, 6, 9], true).compare(&starts);
}

#[test]
fn the_number_of_threads_does_not_matter() {
    device().seed(26);
    let case = Case::new([1, 257], 4, [12, 4, 10, 20], false);
    let (x, weights) = (random([1, 257, 40], 1.0), mlp(40, 100));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let Case { dims, q, kv_a, weights: latent } = &case;
            let out = latent_attention(q.clone(), kv_a.clone(), latent.clone(), &[0; 257], *dims);
            let y = gated_mlp(x.clone(), weights.clone(), 1e-6);
            let grads = (out.clone().sum() + y.clone().sum()).backward();
            [
                host(out),
                host(y),
                host(kv_a.grad(&grads).unwrap()),
                host(latent.kv_b.grad(&grads).unwrap()),
                host(x.grad(&grads).unwrap()),
                host(weights.gate.grad(&grads).unwrap()),
            ]
        })
    };
    let one = run(1);
    assert_eq!(one, run(1));
    assert_eq!(one, run(3));
}

/// Of queries that are not kept, in rows of several documents: the same numbers, and the gradients of what they were made of.
#[test]
fn queries_that_are_formed_anew_are_those_that_were_kept() {
    device().seed(29);
    for (batch_seq, heads, sizes, interleave) in
        [([2, 70], 3, [24, 12, 12, 20], true), ([1, 33], 2, [8, 0, 6, 16], false), ([2, 9], 4, [8, 8, 16, 16], false)]
    {
        let [batch, seq] = batch_seq;
        let Case { dims, kv_a, weights, .. } = Case::new(batch_seq, heads, sizes, interleave);
        let (d, rows) = (20, heads * (dims.nope + dims.rope));
        let (x, gain) = (random([batch, seq, d], 2.0), random([d], 1.0));
        let map = AdaptedMatrix {
            weight: FrozenMatrix::Whole(frozen(random([rows, d], 0.3))),
            a: random([4, d], 0.3),
            b: random([rows, 4], 0.3),
            scale: 1.5,
        };
        let starts: Vec<u32> = (0..batch * seq).map(|i| if i % seq < 5 { 0 } else { 5 }).collect();
        let run = |anew: bool| {
            let normed = rms_norm(x.clone(), gain.clone(), 1e-5);
            let of = MadeOf::Norm { x: x.clone(), gain: gain.clone(), eps: 1e-5 };
            let q =
                adapted_linear(None, normed, Some(of.clone()), map.clone()).reshape([batch, seq, heads, rows / heads]);
            let (cos, sin) = (weights.cos.clone(), weights.sin.clone());
            let q = if dims.rope > 0 { rotate(q, cos, sin, dims.nope, interleave) } else { q };
            let made = anew.then(|| MadeQueries { map: map.clone(), of });
            let out = latent_attention_of(q, made, kv_a.clone(), weights.clone(), &starts, dims);
            let grads = out.clone().powf_scalar(2.0).sum().backward();
            let two = |x: &Tensor<2>| host(x.grad(&grads).unwrap());
            let others =
                [host(x.grad(&grads).unwrap()), host(gain.grad(&grads).unwrap()), host(kv_a.grad(&grads).unwrap())];
            [host(out), two(&map.a), two(&map.b), two(&weights.kv_b)].into_iter().chain(others).collect::<Vec<_>>()
        };
        for (i, (found, expected)) in run(true).into_iter().zip(run(false)).enumerate() {
            if is_cpu() {
                assert!(found == expected, "{sizes:?}: {i}");
            } else {
                assert_close(&format!("{sizes:?}: {i}"), found, expected);
            }
        }
    }
}
