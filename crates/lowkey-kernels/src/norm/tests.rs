//! The norm against its reference: values and all gradients.

use super::*;
use crate::fixtures::{Leaf, compare, device, random};

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
