//! The activation against its reference: values and both gradients.

use super::*;
use crate::fixtures::{Leaf, compare, device, host, random};

#[test]
fn swiglu_agrees() {
    device().seed(24);
    for shape in [[1, 1, 1], [2, 3, 37], [3, 257, 67], [1, 1, 5000]] {
        let (gate, up) = (random(shape, 3.0), random(shape, 2.0));
        compare(
            &format!("swiglu {shape:?}"),
            &[("gate", Leaf::Three(gate.clone())), ("up", Leaf::Three(up.clone()))],
            || swiglu(gate.clone(), up.clone()),
            || reference::swiglu(gate.clone(), up.clone()),
        );
    }
}

#[test]
fn a_gradient_leaves_the_arguments_as_they_were() {
    device().seed(25);
    let (gate, up) = (random([1, 2, 5], 1.0), random([1, 2, 5], 1.0));
    let before = [host(gate.clone()), host(up.clone())];
    swiglu(gate.clone(), up.clone()).sum().backward();
    assert_eq!([host(gate), host(up)], before);
}
