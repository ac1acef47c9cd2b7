//! The attention against its reference: values and all gradients, at every length, in documents and at extreme logits.

use super::*;
use crate::fixtures::{Leaf, compare, device, host, random};
use crate::loss::{Labels, cross_entropy_sum};
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
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
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
    let one = run(1);
    assert_eq!(one, run(1));
    assert_eq!(one, run(3));
}
