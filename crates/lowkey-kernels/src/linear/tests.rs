//! The linear map against its reference: values and all gradients, on whole tensors and on views.

use super::*;
use crate::fixtures::{Leaf, compare, device, host, random};
use burn::tensor::Distribution;

#[test]
fn linear_agrees_on_whole_tensors_and_on_views() {
    device().seed(21);
    for [batch, seq, d_in, d_out] in [[1, 1, 1, 1], [2, 3, 37, 5], [1, 7, 24, 67], [3, 85, 20, 33], [1, 8, 300, 310]] {
        let (wide, w) = (random([batch, seq, d_in + 3], 1.0), random([d_out, d_in], 1.0));
        let bias = random([d_out], 1.0);
        let inputs =
            [("x", Leaf::Three(wide.clone())), ("weight", Leaf::Two(w.clone())), ("bias", Leaf::One(bias.clone()))];
        let x = || wide.clone().narrow(2, 2, d_in);
        let plain = || reference::linear(x(), w.clone()) + bias.clone().unsqueeze::<3>();
        compare("linear", &inputs, || linear(x(), w.clone(), Some(bias.clone())), plain);
        let residual = random([batch, seq, d_out], 1.0);
        let inputs = [
            ("residual", Leaf::Three(residual.clone())),
            ("x", Leaf::Three(wide.clone())),
            ("weight", Leaf::Two(w.clone())),
        ];
        compare(
            "add_linear",
            &inputs,
            || add_linear(residual.clone(), x(), w.clone(), None),
            || residual.clone() + reference::linear(x(), w.clone()),
        );
    }
}

#[test]
fn a_sum_does_not_write_over_a_residual_that_is_still_needed() {
    device().seed(22);
    let plain = device().inner();
    let random = |shape: [usize; 3]| Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &plain);
    let (residual, x) = (random([1, 9, 4]), random([1, 9, 5]));
    let w = random([1, 4, 5]).squeeze_dim::<2>(0);
    let before = host(residual.clone());
    let first = host(add_linear(residual.clone(), x.clone(), w.clone(), None));
    assert_eq!(host(residual.clone()), before);
    assert_eq!(host(add_linear(residual, x, w, None)), first);
}
