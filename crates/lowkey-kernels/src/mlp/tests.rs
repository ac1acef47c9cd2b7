//! The feed-forward layer against its reference: values and all gradients, on odd shapes and at extreme gates.

use super::*;
use crate::fixtures::{Leaf, compare, device, host, mlp, random};

#[test]
fn gated_mlp_agrees() {
    device().seed(23);
    for ([batch, seq, d, f], eps) in
        [([1, 1, 1, 1], 1e-6), ([2, 3, 37, 5], 1e-2), ([1, 7, 24, 67], 1e-6), ([3, 85, 20, 33], 1e-5)]
    {
        let (x, w) = (random([batch, seq, d], 3.0), mlp(d, f));
        let inputs = [
            ("x", Leaf::Three(x.clone())),
            ("norm", Leaf::One(w.norm.clone())),
            ("gate", Leaf::Two(w.gate.clone())),
            ("up", Leaf::Two(w.up.clone())),
            ("down", Leaf::Two(w.down.clone())),
        ];
        compare(
            &format!("gated_mlp {batch} {seq} {d} {f}"),
            &inputs,
            || gated_mlp(x.clone(), w.clone(), eps),
            || reference::gated_mlp(x.clone(), w.clone(), eps),
        );
    }
}

#[test]
fn gated_mlp_survives_extreme_gates() {
    let leaf = |values: [f32; 1]| Tensor::<1>::from_floats(values, &device());
    for gate in [1e4, -1e4, 88.0, -88.0, 0.0] {
        let x = leaf([1.0]).reshape([1, 1, 1]).require_grad();
        let one = || leaf([1.0]).reshape([1, 1]);
        let weights =
            MlpWeights { norm: leaf([1.0]), gate: leaf([gate]).reshape([1, 1]).require_grad(), up: one(), down: one() };
        let gate_weight = weights.gate.clone();
        let y = gated_mlp(x.clone(), weights, 0.0);
        let expected = 1.0 + gate.max(0.0);
        assert!((host(y.clone())[0] - expected).abs() <= 1e-4 * expected, "gate {gate}: {:?}", host(y.clone()));
        let grads = y.sum().backward();
        assert!(host(x.grad(&grads).unwrap())[0].is_finite());
        let slope = host(gate_weight.grad(&grads).unwrap())[0];
        assert!(
            (slope
                - if gate > 0.0 {
                    1.0
                } else if gate < 0.0 {
                    0.0
                } else {
                    0.5
                })
            .abs()
                < 1e-5,
            "{slope}"
        );
    }
}
