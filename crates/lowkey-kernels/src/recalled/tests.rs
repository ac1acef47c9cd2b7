//! Maps of what is formed anew against maps of what is kept: the same values, and all gradients.

use super::*;
use crate::fixtures::{Leaf, compare, device, frozen, random};
use crate::norm::rms_norm;
use crate::swiglu::swiglu;

#[test]
fn a_map_of_a_norm_agrees() {
    device().seed(26);
    for ([batch, seq, d, r], eps) in [([1, 1, 1, 1], 1e-6), ([2, 3, 37, 5], 1e-2), ([3, 85, 20, 33], 1e-5)] {
        let (x, gain, weight) = (random([batch, seq, d], 3.0), random([d], 1.0), random([r, d], 0.5));
        let normed = || rms_norm(x.clone(), gain.clone(), eps);
        compare(
            &format!("linear_of a norm {batch} {seq} {d} {r}"),
            &[("x", Leaf::Three(x.clone())), ("gain", Leaf::One(gain.clone())), ("weight", Leaf::Two(weight.clone()))],
            || linear_of(normed(), MadeOf::Norm { x: x.clone(), gain: gain.clone(), eps }, weight.clone(), None),
            || linear(normed(), weight.clone(), None),
        );
    }
}

#[test]
fn a_map_of_an_activation_agrees() {
    device().seed(27);
    for [batch, seq, f, r] in [[1, 1, 1, 1], [2, 3, 37, 5], [3, 85, 20, 33]] {
        let (gate, up, weight) = (random([batch, seq, f], 2.0), random([batch, seq, f], 3.0), random([r, f], 0.5));
        let inner = || swiglu(gate.clone(), up.clone());
        compare(
            &format!("linear_of an activation {batch} {seq} {f} {r}"),
            &[
                ("gate", Leaf::Three(gate.clone())),
                ("up", Leaf::Three(up.clone())),
                ("weight", Leaf::Two(weight.clone())),
            ],
            || linear_of(inner(), MadeOf::Swiglu { gate: gate.clone(), up: up.clone() }, weight.clone(), None),
            || linear(inner(), weight.clone(), None),
        );
    }
}

#[test]
fn a_frozen_map_passes_its_gradient_on() {
    device().seed(28);
    let (x, gain, weight) = (random([1, 4, 7], 1.0), frozen(random([7], 1.0)), frozen(random([3, 7], 0.5)));
    compare(
        "linear_of with a frozen gain and map",
        &[("x", Leaf::Three(x.clone()))],
        || {
            let made = MadeOf::Norm { x: x.clone(), gain: gain.clone(), eps: 1e-6 };
            linear_of(rms_norm(x.clone(), gain.clone(), 1e-6), made, weight.clone(), None)
        },
        || linear(rms_norm(x.clone(), gain.clone(), 1e-6), weight.clone(), None),
    );
}
