//! The rotation against its reference, and by hand.

use super::*;
use crate::fixtures::{Leaf, compare, device, host, plain_device, random};
use burn::tensor::Distribution;

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

#[test]
fn a_rotation_leaves_its_argument_as_it_was() {
    device().seed(4);
    let plain = plain_device();
    let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &plain);
    let (x, angle) = (random([2, 5, 3, 8]), random([1, 5, 1, 3]));
    let (cos, sin) = (angle.clone().cos(), angle.sin());
    let before = host(x.clone());
    let first = host(rotate(x.clone(), cos.clone(), sin.clone(), 1, false));
    assert_eq!(host(x.clone()), before);
    assert_eq!(host(rotate(x, cos, sin, 1, false)), first);
}
