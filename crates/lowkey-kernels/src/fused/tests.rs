//! Every fused operation against its reference: values and all gradients, on odd shapes and at the edges of f32.

use super::*;
use crate::fixtures::{Leaf, assert_close, compare, device, host, plain_device, random};
use burn::tensor::{Distribution, Tolerance};

#[test]
fn embed_agrees_where_tokens_repeat_and_where_they_are_absent() {
    device().seed(1);
    for (batch, seq, vocab, width) in [(1, 1, 1, 1), (2, 7, 5, 37), (3, 130, 4, 200), (2, 300, 1000, 12)] {
        let weight = random([vocab, width], 1.0);
        let ids: Vec<i32> = (0..batch * seq).map(|i| ((i * i + 3 * i) % vocab) as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, seq]), &device());
        compare(
            &format!("embed {batch} {seq} {vocab} {width}"),
            &[("weight", Leaf::Two(weight.clone()))],
            || embed(weight.clone(), ids.clone()),
            || reference::embed(weight.clone(), ids.clone()),
        );
    }
}

#[test]
fn rms_norm_agrees() {
    device().seed(2);
    for (shape, eps) in [([1, 1, 1], 1e-6), ([2, 3, 37], 1e-2), ([3, 257, 67], 1e-6), ([1, 1, 5000], 1e-5)] {
        let (x, w) = (random(shape, 3.0), random([shape[2]], 1.0));
        compare(
            &format!("rms_norm {shape:?}"),
            &[("x", Leaf::Three(x.clone())), ("weight", Leaf::One(w.clone()))],
            || rms_norm(x.clone(), w.clone(), eps),
            || reference::rms_norm(x.clone(), w.clone(), eps),
        );
    }
}

#[test]
fn rotate_agrees_and_reads_one_table_for_all_rows_or_one_each() {
    device().seed(3);
    for (heads, width, half, from) in
        [(1, 2, 1, 0), (3, 24, 6, 12), (3, 17, 5, 7), (2, 10, 5, 0), (3, 14, 3, 0), (2, 13, 3, 4)]
    {
        for rows in [1, 2] {
            for interleaved in [false, true] {
                let x = random([2, 7, heads, width], 1.0);
                let angle = Tensor::<4>::random([rows, 7, 1, half], Distribution::Normal(0.0, 2.0), &plain_device());
                let angle = Tensor::from_inner(angle);
                let (cos, sin) = (angle.clone().cos(), angle.sin());
                compare(
                    &format!("rotate {heads} {width} {half} {from} {rows} {interleaved}"),
                    &[("x", Leaf::Four(x.clone()))],
                    || rotate(x.clone(), cos.clone(), sin.clone(), from, interleaved),
                    || reference::rotate(x.clone(), cos.clone(), sin.clone(), from, interleaved),
                );
            }
        }
    }
}

#[test]
fn rotating_by_a_right_angle_swaps_the_pair() {
    let tensor = |values: [f32; 2]| Tensor::<1>::from_floats(values, &plain_device()).reshape([1, 1, 1, 2]);
    let (cos, sin) = (tensor([0.0, 1.0]), tensor([1.0, 0.0]));
    let x = Tensor::<1>::from_floats([9.0, 1.0, 2.0, 3.0, 4.0], &plain_device()).reshape([1, 1, 1, 5]);
    // Interleaved: (1, 2) turns to (-2, 1), (3, 4) stays; half-split output is (-2, 3 | 1, 4). The head is copied.
    assert_eq!(host(rotate(x.clone(), cos.clone(), sin.clone(), 1, true)), vec![9.0, -2.0, 3.0, 1.0, 4.0]);
    // Half-split: (1, 3) turns to (-3, 1), (2, 4) stays.
    assert_eq!(host(rotate(x, cos, sin, 1, false)), vec![9.0, -3.0, 2.0, 1.0, 4.0]);
}

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

fn labels(targets: &[i64]) -> Labels<'_> {
    Labels { targets, weights: None, z_loss: 0.0 }
}

#[test]
fn cross_entropy_agrees() {
    device().seed(8);
    for (n, d, vocab) in [(1, 3, 2), (7, 24, 67), (255, 40, 257), (257, 12, 67), (600, 8, 1000), (300, 8, 9000)] {
        let (h, w) = (random([n, d], 1.0), random([vocab, d], 1.0));
        let targets: Vec<i64> = (0..n).map(|i| if i % 5 == 3 { IGNORE } else { (i * 31 % vocab) as i64 }).collect();
        let weights: Vec<f32> = (0..n).map(|i| (i % 4) as f32 * 0.5).collect();
        let index = target_tensor(&targets, &device());
        for (weights, z_loss) in [(None, 0.0), (Some(&weights[..]), 0.0), (None, 0.01), (Some(&weights[..]), 0.02)] {
            let labels = Labels { targets: &targets, weights, z_loss };
            let tensor = || Tensor::<1>::from_floats(weights.unwrap_or(&[1.0]), &device());
            let plain = || reference::cross_entropy_sum(h.clone(), w.clone(), index.clone(), tensor(), z_loss);
            compare(
                &format!("cross entropy {n} {d} {vocab}, weights {}, z {z_loss}", weights.is_some()),
                &[("h", Leaf::Two(h.clone())), ("weight", Leaf::Two(w.clone()))],
                || cross_entropy_sum(h.clone(), w.clone(), labels).nats,
                || plain().narrow(0, 0, 1),
            );
            let found = cross_entropy_sum(h.clone(), w.clone(), labels);
            assert_close("z-loss", host(found.z_loss), host(plain().narrow(0, 1, 1)));
            assert_eq!(found.targets, targets.iter().filter(|t| **t != IGNORE).count());
            // Without a graph the sums come another way.
            let (h, w) = (h.clone().without_autodiff(), w.clone().without_autodiff());
            assert_close("untracked", host(cross_entropy_sum(h, w, labels).nats), host(plain().narrow(0, 0, 1)));
        }
        let each = host(cross_entropy_each(h.clone(), w.clone(), &targets));
        assert_close("each", each, host(reference::cross_entropy_each(h, w, index)));
    }
}

#[test]
fn distillation_agrees() {
    device().seed(11);
    for (n, d, vocab) in [(1, 3, 2), (7, 24, 67), (255, 40, 257), (257, 12, 67), (300, 8, 9000)] {
        let (h, w, teacher) = (random([n, d], 1.0), random([vocab, d], 1.0), random([n, d], 1.0));
        let targets: Vec<i64> = (0..n).map(|i| if i % 5 == 3 { IGNORE } else { (i * 31 % vocab) as i64 }).collect();
        let index = target_tensor(&targets, &device());
        for share in [1.0, 0.3, 0.0] {
            compare(
                &format!("distillation {n} {d} {vocab}, share {share}"),
                &[("h", Leaf::Two(h.clone())), ("weight", Leaf::Two(w.clone()))],
                || distill_sum(h.clone(), w.clone(), teacher.clone(), &targets, share),
                || reference::distill_sum(h.clone(), w.clone(), teacher.clone(), index.clone(), share),
            );
        }
        let loss = distill_sum(h.clone(), w.clone(), teacher.clone(), &targets, 0.5);
        assert!(teacher.grad(&loss.backward()).is_none(), "the teacher learns");
        let own = host(distill_sum(h.clone(), w.clone(), h.clone(), &targets, 1.0));
        assert!(own[0].abs() < 1e-4, "a pass differs from itself by {}", own[0]);
        let labelled = host(distill_sum(h.clone(), w.clone(), teacher, &targets, 0.0));
        assert_close("share 0", labelled, host(cross_entropy_sum(h, w, labels(&targets)).nats));
    }
}

#[test]
fn cross_entropy_survives_extreme_logits_and_no_targets() {
    let h = Tensor::<2>::from_floats([[1e4, 0.0], [-1e4, 0.0]], &device()).require_grad();
    let w = Tensor::<2>::from_floats([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], &device()).require_grad();
    let loss = cross_entropy_sum(h.clone(), w.clone(), labels(&[0, 0]));
    // The first is certain and right; the second is certain and wrong by 2e4.
    assert!((loss.nats.clone().into_scalar::<f32>() - 2e4).abs() < 1.0);
    let grads = loss.nats.backward();
    assert!(host(h.grad(&grads).unwrap()).iter().chain(&host(w.grad(&grads).unwrap())).all(|x| x.is_finite()));
    let none = cross_entropy_sum(h.clone(), w, labels(&[IGNORE, IGNORE]));
    assert_eq!((none.targets, none.nats.clone().into_scalar::<f32>()), (0, 0.0));
    let grads = none.nats.backward();
    assert_eq!(host(h.grad(&grads).unwrap()), vec![0.0; 4]);
}

#[test]
fn a_repetition_gives_the_same_bits_and_the_number_of_threads_does_not_matter() {
    device().seed(9);
    let attention = Attention::new(2, 257, [4, 2], [12, 4, 10], 1.0);
    let (h, w) = (random([300, 40], 1.0), random([67, 40], 1.0));
    let targets: Vec<i64> = (0..300).map(|i| i % 67).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let out = attention.fused(&[0; 514]);
            let grads = out.clone().sum().backward();
            let loss = cross_entropy_sum(h.clone(), w.clone(), labels(&targets));
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
