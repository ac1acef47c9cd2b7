//! Adapted maps against their reference: values, and the gradients of the input and of all factors.

use super::*;
use crate::fixtures::{Leaf, compare, device, frozen, random};
use crate::norm::rms_norm;
use crate::quantized_linear::{Packed, Quantization};
use crate::swiglu::swiglu;

/// A frozen matrix from `d_in` to `d_out` numbers with r between its factors.
fn map([d_in, r, d_out]: [usize; 3]) -> AdaptedMatrix {
    let weight = frozen(random([d_out, d_in], 0.5));
    let weight = FrozenMatrix::Whole(weight);
    AdaptedMatrix { weight, a: random([r, d_in], 0.3), b: random([d_out, r], 0.4), scale: 1.7 }
}

/// The same beside a matrix in few bits.
fn packed(map: &AdaptedMatrix, quantization: Quantization) -> AdaptedMatrix {
    let values = crate::fixtures::host(map.weight.matrix());
    let packed = Packed::new(&values, map.weight.dims(), quantization);
    let weight = FrozenMatrix::Packed(QuantizedMatrix::new(&packed, &device()));
    AdaptedMatrix { weight, ..map.clone() }
}

fn factors<'a>([a, b]: [&'a str; 2], map: &AdaptedMatrix) -> [(&'a str, Leaf); 2] {
    [(a, Leaf::Two(map.a.clone())), (b, Leaf::Two(map.b.clone()))]
}

/// Widths that fill vectors and such that do not; one token, a few, and more than are computed at a time.
const SHAPES: [([usize; 2], [usize; 3]); 6] = [
    ([1, 1], [1, 1, 1]),
    ([2, 3], [37, 5, 12]),
    ([1, 7], [24, 16, 67]),
    ([3, 85], [20, 3, 33]),
    ([2, 130], [48, 16, 64]),
    ([1, 257], [32, 33, 16]),
];

#[test]
fn an_adapted_map_agrees_with_a_residual_and_without() {
    device().seed(31);
    for ([batch, seq], widths @ [d_in, _, d_out]) in SHAPES {
        let (x, map) = (random([batch, seq, d_in], 1.0), map(widths));
        let residual = random([batch, seq, d_out], 1.0);
        let what = format!("adapted_linear {batch} {seq} {widths:?}");
        let [a, b] = factors(["a", "b"], &map);
        compare(
            &what,
            &[("x", Leaf::Three(x.clone())), a, b],
            || adapted_linear(None, x.clone(), None, map.clone()),
            || reference::adapted_linear(None, x.clone(), map.clone()),
        );
        let [a, b] = factors(["a", "b"], &map);
        compare(
            &format!("{what}, residual"),
            &[("x", Leaf::Three(x.clone())), ("residual", Leaf::Three(residual.clone())), a, b],
            || adapted_linear(Some(residual.clone()), x.clone(), None, map.clone()),
            || reference::adapted_linear(Some(residual.clone()), x.clone(), map.clone()),
        );
    }
}

#[test]
fn an_adapted_map_of_what_is_formed_anew_agrees() {
    device().seed(32);
    for ([batch, seq], widths @ [d_in, ..]) in SHAPES {
        let (x, gain, map) = (random([batch, seq, d_in], 3.0), random([d_in], 1.0), map(widths));
        let normed = || rms_norm(x.clone(), gain.clone(), 1e-5);
        let [a, b] = factors(["a", "b"], &map);
        compare(
            &format!("adapted_linear of a norm {batch} {seq} {widths:?}"),
            &[("x", Leaf::Three(x.clone())), ("gain", Leaf::One(gain.clone())), a, b],
            || {
                let made = MadeOf::Norm { x: x.clone(), gain: gain.clone(), eps: 1e-5 };
                adapted_linear(None, normed(), Some(made), map.clone())
            },
            || reference::adapted_linear(None, normed(), map.clone()),
        );
        let (gate, up) = (random([batch, seq, d_in], 2.0), random([batch, seq, d_in], 3.0));
        let inner = || swiglu(gate.clone(), up.clone());
        let [a, b] = factors(["a", "b"], &map);
        compare(
            &format!("adapted_linear of an activation {batch} {seq} {widths:?}"),
            &[("gate", Leaf::Three(gate.clone())), ("up", Leaf::Three(up.clone())), a, b],
            || {
                let made = MadeOf::Swiglu { gate: gate.clone(), up: up.clone() };
                adapted_linear(None, inner(), Some(made), map.clone())
            },
            || reference::adapted_linear(None, inner(), map.clone()),
        );
    }
}

#[test]
fn what_is_frozen_costs_the_others_nothing() {
    device().seed(33);
    let (x, map) = (random([2, 70, 24], 1.0), map([24, 4, 32]));
    let with_frozen = |map: &AdaptedMatrix, [a, b]: [bool; 2]| {
        let of = |factor: &Tensor<2>, is: bool| if is { frozen(factor.clone()) } else { factor.clone() };
        AdaptedMatrix { a: of(&map.a, a), b: of(&map.b, b), ..map.clone() }
    };
    for which in [[true, false], [false, true], [true, true]] {
        let map = with_frozen(&map, which);
        let leaves = [("x", Leaf::Three(x.clone())), ("a", Leaf::Two(map.a.clone())), ("b", Leaf::Two(map.b.clone()))];
        let wanted = [true, !which[0], !which[1]];
        let leaves: Vec<_> =
            leaves.into_iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(leaf, _)| leaf).collect();
        compare(
            &format!("frozen {which:?}"),
            &leaves,
            || adapted_linear(None, x.clone(), None, map.clone()),
            || reference::adapted_linear(None, x.clone(), map.clone()),
        );
    }
    let x = frozen(x);
    compare(
        "frozen input",
        &factors(["a", "b"], &map),
        || adapted_linear(None, x.clone(), None, map.clone()),
        || reference::adapted_linear(None, x.clone(), map.clone()),
    );
}

#[test]
fn an_adapted_feed_forward_layer_agrees() {
    device().seed(34);
    for ([batch, seq], [d, r, f]) in SHAPES {
        let (x, norm) = (random([batch, seq, d], 2.0), random([d], 1.0));
        let maps = [map([d, r, f]), map([d, r + 2, f]), map([f, r, d])];
        let mut leaves = vec![("x", Leaf::Three(x.clone())), ("norm", Leaf::One(norm.clone()))];
        for (names, map) in [["gate a", "gate b"], ["up a", "up b"], ["down a", "down b"]].into_iter().zip(&maps) {
            leaves.extend(factors(names, map));
        }
        compare(
            &format!("adapted_mlp {batch} {seq} {d} {r} {f}"),
            &leaves,
            || adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-6),
            || reference::adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-6),
        );
        // A frozen input and a frozen gain, as those of a model whose adapters alone are trained.
        let (x, norm) = (frozen(x.clone()), frozen(norm.clone()));
        compare(
            &format!("adapted_mlp of what is frozen {batch} {seq} {d} {r} {f}"),
            &leaves[2..],
            || adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-6),
            || reference::adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-6),
        );
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    if !crate::fixtures::is_cpu() {
        return;
    }
    device().seed(35);
    let (x, norm) = (random([2, 450, 32], 2.0), frozen(random([32], 1.0)));
    let maps = [map([32, 4, 48]), map([32, 4, 48]), map([48, 4, 32])];
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let y = adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-6);
            let y = adapted_linear(Some(y.clone()), y, None, map_of(&maps[0], &maps[2]));
            let grads = y.clone().sum().backward();
            let of = |tensor: &Tensor<2>| crate::fixtures::host(tensor.grad(&grads).unwrap());
            let x = crate::fixtures::host(x.grad(&grads).unwrap());
            let factors = maps.iter().flat_map(|map| [of(&map.a), of(&map.b)]);
            [crate::fixtures::host(y), x].into_iter().chain(factors).collect::<Vec<_>>()
        })
    };
    assert!(run(3) == run(1));
}

/// A map from and to the narrower width, of the factors of two.
fn map_of(first: &AdaptedMatrix, last: &AdaptedMatrix) -> AdaptedMatrix {
    let weight = FrozenMatrix::Whole(last.weight.matrix().matmul(first.weight.matrix()));
    AdaptedMatrix { weight, a: first.a.clone(), b: last.b.clone(), scale: 0.5 }
}

/// What other backends compose, by the operations of the CPU.
#[test]
fn what_is_composed_agrees_with_what_is_fused() {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::TensorData;
    use burn_flex::FlexTensor;

    use super::autodiff::{AdaptedGradients, AdaptedState};
    use super::mlp::{AdaptedMlpGradients, AdaptedMlpState};
    use crate::fixtures::assert_close;
    use crate::precision::Precision;

    let mut drawn = 0u32;
    let mut tensor = |shape: &[usize]| -> FlexTensor {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                drawn = drawn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (drawn >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Flex::float_from_data(TensorData::new(values, shape.to_vec()), &Default::default())
    };
    let host = |x: &FlexTensor| x.to_contiguous().storage::<f32>().to_vec();
    let agree = |what: &str, found: &[Option<FlexTensor>], expected: &[Option<FlexTensor>]| {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.is_some(), expected.is_some(), "{what}: {i}");
            if let Some((found, expected)) = found.as_ref().zip(expected.as_ref()) {
                assert_close(&format!("{what}: {i}"), host(found), host(expected));
            }
        }
    };
    let precision = Precision::F32;
    let (batch, seq, d, f) = (2, 70, 20, 37);
    let mut map = |[d_in, r, d_out]: [usize; 3]| Map::<Flex> {
        weight: Frozen::Whole(tensor(&[d_out, d_in])),
        a: tensor(&[r, d_in]),
        b: tensor(&[d_out, r]),
        scale: 1.5,
    };
    let maps = [map([d, 3, f]), map([d, 4, f]), map([f, 5, d])];
    let (x, norm, grad) = (tensor(&[batch, seq, d]), tensor(&[d]), tensor(&[batch, seq, d]));
    let inner = tensor(&[batch, seq, f]);
    let down = &maps[2];
    let [y, low] = Flex::adapted_saving(Some(x.clone()), inner.clone(), down.clone(), precision);
    let composed = composed::saving::<Flex>(Some(x.clone()), inner.clone(), down.clone(), precision);
    agree("map", &[Some(y), Some(low.clone())], &composed.map(Some));
    for wanted in [[true; 3], [false, true, true], [true, false, true], [true, true, false], [false, false, true]] {
        let state = || AdaptedState { input: Some(Recall::Given(inner.clone())), map: down.clone(), low: low.clone() };
        let found = Flex::adapted_grad(state(), grad.clone(), precision, wanted);
        agree("map", &found, &composed::grad(state(), grad.clone(), precision, wanted));
    }
    let (y, between) = Flex::adapted_mlp_saving(x.clone(), norm.clone(), maps.clone(), 1e-5, precision);
    let (other, _) = composed::mlp_saving::<Flex>(x.clone(), norm.clone(), maps.clone(), 1e-5, precision);
    agree("layer", &[Some(y)], &[Some(other)]);
    let frozen = [false, false, true, true, true, true, true, true];
    for wanted in [[true; 8], frozen, [true, false, true, true, true, true, true, true]] {
        let state =
            || AdaptedMlpState { x: x.clone(), norm: norm.clone(), maps: maps.clone(), between: between.clone() };
        let found = Flex::adapted_mlp_grad(state(), grad.clone(), 1e-5, precision, wanted);
        agree("layer", &found, &composed::mlp_grad(state(), grad.clone(), 1e-5, precision, wanted));
    }
}

/// A matrix in few bits is unpacked for a product, and what is computed is what its numbers say.
#[test]
fn packed_matrices_agree_with_what_they_stand_for() {
    device().seed(37);
    for ([batch, seq], [d, r, f]) in [([2, 3], [37, 5, 12]), ([1, 130], [48, 16, 70])] {
        let (x, norm) = (random([batch, seq, d], 1.0), random([d], 1.0));
        let whole = [map([d, r, f]), map([d, r, f]), map([f, r, d])];
        for quantization in Quantization::ALL {
            let maps = whole.each_ref().map(|map| packed(map, quantization));
            let what = format!("{quantization:?} {batch} {seq} {d} {r} {f}");
            let [a, b] = factors(["a", "b"], &maps[0]);
            compare(
                &format!("map {what}"),
                &[("x", Leaf::Three(x.clone())), a, b],
                || adapted_linear(None, x.clone(), None, maps[0].clone()),
                || reference::adapted_linear(None, x.clone(), maps[0].clone()),
            );
            let names = [["gate a", "gate b"], ["up a", "up b"], ["down a", "down b"]];
            let of_maps = names.iter().zip(&maps).flat_map(|(names, map)| factors(*names, map));
            let inputs = [("x", Leaf::Three(x.clone())), ("norm", Leaf::One(norm.clone()))];
            let inputs: Vec<_> = inputs.into_iter().chain(of_maps).collect();
            compare(
                &format!("layer {what}"),
                &inputs,
                || adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-5),
                || reference::adapted_mlp(x.clone(), norm.clone(), maps.clone(), 1e-5),
            );
        }
    }
}
