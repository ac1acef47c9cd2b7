//! The attention against its reference: values and all gradients, at every length, in documents and at extreme logits.

use super::*;
use crate::Precision;
use crate::fixtures::{Leaf, compare, device, host, is_cpu, random};
use crate::loss::{Labels, cross_entropy_sum};
use crate::precision::scope;
use burn::tensor::Tolerance;

struct Attention {
    q: Tensor<4>,
    kv: Tensor<4>,
    k_pe: Option<Tensor<3>>,
    nope: usize,
    scale: f64,
}

impl Attention {
    fn new(
        batch: usize,
        seq: usize,
        [heads, groups]: [usize; 2],
        [nope, rope, value]: [usize; 3],
        spread: f64,
    ) -> Self {
        Self {
            q: random([batch, seq, heads, nope + rope], spread),
            kv: random([batch, seq, groups, nope + value], spread),
            k_pe: (rope > 0).then(|| random([batch, seq, rope], spread)),
            nope,
            scale: 0.3,
        }
    }

    fn fused(&self, starts: &[u32]) -> Tensor<3> {
        causal_attention(self.q.clone(), self.kv.clone(), self.k_pe.clone(), starts, self.nope, self.scale)
    }

    fn compare(&self, what: &str, starts: &[u32]) {
        let mut inputs = vec![("q", Leaf::Four(self.q.clone())), ("kv", Leaf::Four(self.kv.clone()))];
        inputs.extend(self.k_pe.clone().map(|k_pe| ("k_pe", Leaf::Three(k_pe))));
        let (q, kv, k_pe) = (&self.q, &self.kv, &self.k_pe);
        compare(
            what,
            &inputs,
            || self.fused(starts),
            || reference::causal_attention(q.clone(), kv.clone(), k_pe.clone(), starts, self.nope, self.scale),
        );
    }
}

#[test]
fn attention_agrees_at_every_length_and_width() {
    device().seed(4);
    for seq in [1, 2, 7, 63, 64, 65, 255, 257, 321] {
        let attention = Attention::new(2, seq, [3, 3], [12, 12, 12], 1.0);
        attention.compare(&format!("length {seq}"), &vec![0; 2 * seq]);
    }
    for widths in [[24, 12, 40], [5, 4, 7], [16, 0, 9], [1, 2, 1]] {
        let attention = Attention::new(2, 70, [3, 3], widths, 1.0);
        attention.compare(&format!("widths {widths:?}"), &[0; 140]);
    }
}

#[test]
fn attention_agrees_where_heads_share_keys() {
    device().seed(5);
    for groups in [1, 2, 3, 6] {
        let attention = Attention::new(2, 67, [6, groups], [10, 0, 10], 1.0);
        attention.compare(&format!("{groups} key heads"), &[0; 134]);
        let attention = Attention::new(1, 67, [6, groups], [10, 4, 6], 1.0);
        attention.compare(&format!("{groups} key heads and a shared part"), &[0; 67]);
    }
}

#[test]
fn attention_keeps_to_documents() {
    device().seed(6);
    let seq = 330;
    // Bounds inside blocks, at their edges, and two in a row; the second row is one document.
    let bounds = [0, 1, 2, 63, 64, 130, 256, 300, 329];
    let start = |t: usize| *bounds.iter().rev().find(|b| **b <= t).unwrap() as u32;
    let starts: Vec<u32> = (0..seq).map(start).chain(std::iter::repeat_n(0, seq)).collect();
    let attention = Attention::new(2, seq, [3, 3], [8, 4, 6], 1.0);
    attention.compare("documents", &starts);
    // A document packed at 130 is what it is alone.
    let packed = attention.fused(&starts).narrow(0, 0, 1).narrow(1, 130, 126);
    let alone = Attention {
        q: attention.q.clone().narrow(0, 0, 1).narrow(1, 130, 126),
        kv: attention.kv.clone().narrow(0, 0, 1).narrow(1, 130, 126),
        k_pe: attention.k_pe.clone().map(|k| k.narrow(0, 0, 1).narrow(1, 130, 126)),
        ..attention
    };
    let tolerance = Tolerance::absolute(1e-6);
    packed.into_data().assert_approx_eq::<f32>(&alone.fused(&[0; 126]).into_data(), tolerance);
}

/// By how much the vectors of `width` numbers differ at most, of the size of the largest.
fn farthest(found: &[f32], expected: &[f32], width: usize) -> f32 {
    let size = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let off = |(a, b): (&[f32], &[f32])| size(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>());
    let largest = expected.chunks(width).map(size).fold(0.0, f32::max);
    found.chunks(width).zip(expected.chunks(width)).map(off).fold(0.0, f32::max) / largest
}

#[test]
fn attention_of_packed_operands_is_near() {
    if !is_cpu() {
        return;
    }
    device().seed(8);
    // One key too many or too few, or a block that is cut wrongly, changes some query by more than rounding does.
    let mut cases = vec![];
    for seq in [1, 2, 31, 32, 33, 95, 97, 193, 400] {
        cases.push((Attention::new(2, seq, [2, 2], [12, 20, 32], 0.5), vec![0; 2 * seq]));
    }
    for widths in [[64, 32, 64], [5, 4, 7], [16, 0, 33]] {
        let starts =
            (0..130).map(|t| [0, 40, 41, 100][usize::from(t >= 40) + usize::from(t >= 41) + usize::from(t >= 100)]);
        cases.push((Attention::new(1, 130, [4, 2], widths, 0.5), starts.collect()));
    }
    // Documents that begin inside blocks of keys which are not the first.
    let start = |t: u32| [390, 205, 200, 0].into_iter().find(|start| *start <= t).unwrap();
    let starts = (0..800).map(|t| start(t % 400)).collect();
    cases.push((Attention::new(2, 400, [2, 2], [12, 20, 32], 0.5), starts));
    for (attention, starts) in cases {
        let run = |precision| {
            let scope = scope(precision);
            let out = attention.fused(&starts);
            drop(scope);
            // Each number with another weight: keys are not interchangeable in the gradients.
            let numbers = out.dims().iter().product::<usize>();
            let weights: Vec<f32> = (0..numbers).map(|i| (i as f32 * 0.37).sin()).collect();
            let weights = Tensor::<1>::from_floats(weights.as_slice(), &out.device()).reshape(out.dims());
            let grads = (out.clone() * weights).sum().backward();
            let shared = attention.k_pe.as_ref().map(|k_pe| host(k_pe.grad(&grads).unwrap()));
            let [q, kv] = [&attention.q, &attention.kv].map(|x| host(x.grad(&grads).unwrap()));
            [Some(host(out)), Some(q), Some(kv), shared]
        };
        let ([_, seq, _, qk], [.., kv]) = (attention.q.dims(), attention.kv.dims());
        let widths = [kv - attention.nope, qk, kv, qk - attention.nope];
        for ((found, expected), width) in run(Precision::Bf16).iter().zip(&run(Precision::F32)).zip(widths) {
            // A single key is seen whatever the query is: what is left of its gradient is rounding alone.
            let ((Some(found), Some(expected)), true) = ((found, expected), seq > 1 || width == kv) else { continue };
            let off = farthest(found, expected, width);
            assert!(off < 2e-2, "length {seq}, width {width}: {off}");
            assert!(off > 0.0 || seq == 1, "length {seq}, width {width}: nothing was rounded");
        }
    }
}

#[test]
fn attention_survives_extreme_logits() {
    device().seed(7);
    let attention = Attention { scale: 1.0, ..Attention::new(1, 300, [2, 2], [8, 4, 6], 60.0) };
    let out = attention.fused(&[0; 300]);
    assert!(host(out.clone()).iter().all(|x| x.is_finite()));
    let grads = out.sum().backward();
    for gradient in [host(attention.q.grad(&grads).unwrap()), host(attention.kv.grad(&grads).unwrap())] {
        assert!(gradient.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_repetition_gives_the_same_bits_and_the_number_of_threads_does_not_matter() {
    device().seed(9);
    let attention = Attention::new(2, 257, [4, 2], [12, 4, 10], 1.0);
    let (h, w) = (random([300, 40], 1.0), random([67, 40], 1.0));
    let targets: Vec<i64> = (0..300).map(|i| i % 67).collect();
    let labels = Labels { targets: &targets, weights: None, z_loss: 0.0 };
    let run = |threads: usize, precision| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let _scope = scope(precision);
            let out = attention.fused(&[0; 514]);
            let grads = out.clone().sum().backward();
            let loss = cross_entropy_sum(h.clone(), w.clone(), labels);
            let loss_grads = loss.nats.backward();
            [
                host(out),
                host(attention.q.grad(&grads).unwrap()),
                host(attention.kv.grad(&grads).unwrap()),
                host(w.grad(&loss_grads).unwrap()),
            ]
        })
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let one = run(1, precision);
        assert_eq!(one, run(1, precision));
        assert_eq!(one, run(3, precision));
    }
}
