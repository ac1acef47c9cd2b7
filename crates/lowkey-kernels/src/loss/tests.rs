//! The losses against their references: values and all gradients, on odd shapes and at the edges of f32.

use super::*;
use crate::fixtures::{Leaf, assert_close, compare, device, host, random};

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
fn distances_to_another_head_agree() {
    device().seed(13);
    for (n, d, vocab) in [(1, 3, 2), (7, 24, 67), (40, 12, 67), (9, 8, 900)] {
        let (h, w) = (random([n, d], 1.0), random([vocab, d], 1.0));
        let (hidden, head) = (random([n, d + 3], 0.7), random([vocab, d + 3], 0.7));
        let targets: Vec<i64> = (0..n).map(|i| if i % 5 == 3 { IGNORE } else { (i * 31 % vocab) as i64 }).collect();
        let index = target_tensor(&targets, &device());
        for (beta, temperature, share) in
            [(0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.3, 0.9, 0.6), (0.0, 2.0, 0.5), (1.0, 1.5, 0.0)]
        {
            let divergence = Divergence { beta, temperature, share };
            let teacher = || Teacher::Whole(hidden.clone(), head.clone());
            compare(
                &format!("divergence {n} {d} {vocab}, {divergence:?}"),
                &[("h", Leaf::Two(h.clone())), ("weight", Leaf::Two(w.clone()))],
                || diverge_sum(h.clone(), w.clone(), teacher(), &targets, divergence),
                || {
                    let teacher = [hidden.clone(), head.clone()];
                    reference::diverge_sum(h.clone(), w.clone(), teacher, index.clone(), divergence)
                },
            );
        }
        let divergence = Divergence { beta: 0.4, temperature: 1.0, share: 1.0 };
        let whole =
            diverge_sum(h.clone(), w.clone(), Teacher::Whole(hidden.clone(), head.clone()), &targets, divergence);
        let grads = whole.clone().backward();
        assert!(hidden.grad(&grads).is_none() && head.grad(&grads).is_none(), "the teacher learns");
        // Without a graph the sum is the same.
        let (h, w) = (h.without_autodiff(), w.without_autodiff());
        let plain = diverge_sum(h.clone(), w, Teacher::Whole(hidden, head), &targets, divergence);
        assert_eq!(host(plain), host(whole));
        let none = vec![IGNORE; n];
        let top = TopTokens { k: 1, ..TopTokens::default() };
        assert_eq!(host(diverge_sum(h.clone(), h, Teacher::Top(&top), &none, divergence)), [0.0]);
    }
}
