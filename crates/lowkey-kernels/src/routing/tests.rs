//! Routings looked at choice by choice, and their gradients.

use burn::tensor::{Int, Tensor, TensorData};

use super::{Routing, on_host, route};
use crate::fixtures::{Leaf, compare, device, host, plain_device, random};

fn integers<const D: usize>(tensor: &Tensor<D, Int>) -> Vec<i64> {
    tensor.clone().into_data().iter::<i64>().collect()
}

fn scores(values: Vec<f32>, experts: usize) -> Tensor<2> {
    let tokens = values.len() / experts;
    Tensor::from_data(TensorData::new(values, [tokens, experts]), &plain_device())
}

/// What a routing has to be, looked at choice by choice.
fn check(routing: &Routing, scores: &[f32], experts: usize, k: usize) {
    let tokens = scores.len() / experts;
    let (chosen, places) = (integers(&routing.experts), integers(&routing.places));
    let (order, begins) = (integers(&routing.order), integers(&routing.begins));
    assert_eq!((chosen.len(), order.len(), begins.len()), (tokens * k, tokens * k, experts + 1));
    for (row, chosen) in scores.chunks(experts).zip(chosen.chunks(k)) {
        // A stable sort of all experts begins with the chosen ones.
        let score = |e: &usize| if row[*e].is_nan() { f32::NEG_INFINITY } else { row[*e] };
        let mut all: Vec<usize> = (0..experts).collect();
        all.sort_by(|a, b| score(b).partial_cmp(&score(a)).unwrap());
        assert_eq!(chosen, all[..k].iter().map(|e| *e as i64).collect::<Vec<_>>(), "{row:?}");
    }
    let mut expected: Vec<usize> = (0..tokens * k).collect();
    expected.sort_by_key(|choice| chosen[*choice]);
    assert_eq!(order, expected.iter().map(|c| *c as i64).collect::<Vec<_>>());
    for (place, choice) in order.iter().enumerate() {
        assert_eq!(places[*choice as usize], place as i64);
        let expert = chosen[*choice as usize] as usize;
        assert!((begins[expert]..begins[expert + 1]).contains(&(place as i64)));
    }
    assert_eq!((begins[0], begins[experts]), (0, (tokens * k) as i64));
}

#[test]
fn the_best_experts_are_chosen_and_ordered() {
    // One token; more choices than a block; one expert; all experts; more experts than units of a cube.
    for (tokens, experts, k) in [(1, 4, 2), (7, 1, 1), (50, 8, 3), (257, 5, 5), (33, 150, 8)] {
        let values = host(random([tokens, experts], 1.0));
        check(&route(scores(values.clone(), experts), k), &values, experts, k);
    }
}

#[test]
fn equal_scores_go_to_the_first_and_what_is_no_number_is_the_lowest() {
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    let rows = [
        [1.0, 1.0, 1.0, 1.0],
        [0.0, -0.0, 0.0, 1.0],
        [nan, 2.0, nan, 1.0],
        [nan, nan, nan, nan],
        [low, nan, low, high],
        [3.0, 2.0, 3.0, high],
    ];
    let values: Vec<f32> = rows.concat();
    for k in 1..=4 {
        check(&route(scores(values.clone(), 4), k), &values, 4, k);
    }
    let every_expert = route(scores(vec![0.5; 40], 4), 1);
    assert_eq!(integers(&every_expert.begins), [0, 10, 10, 10, 10], "an expert may go without a token");
}

#[test]
fn a_device_routes_as_the_host_does() {
    let (experts, k) = (24, 6);
    let values = host(random([300, experts], 1.0));
    let expected = on_host(&values, experts, k);
    let routing = route(scores(values, experts), k);
    let found =
        [integers(&routing.experts), integers(&routing.places), integers(&routing.order), integers(&routing.begins)];
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(*found, expected.iter().map(|x| i64::from(*x)).collect::<Vec<_>>());
    }
}

#[test]
fn tokens_go_to_experts_and_back_with_their_gradients() {
    for (tokens, experts, k, width) in [(1, 3, 1, 5), (9, 4, 2, 24), (40, 6, 6, 3), (70, 16, 3, 130)] {
        let routing = route(random([tokens, experts], 1.0), k);
        let choice = routing.order.clone();
        let token = Tensor::<1, Int>::from_data(
            TensorData::new(integers(&choice).iter().map(|c| *c as i32 / k as i32).collect::<Vec<_>>(), [tokens * k]),
            &device(),
        );
        let x = random([tokens, width], 1.0);
        compare(
            "to_experts",
            &[("x", Leaf::Two(x.clone()))],
            || routing.to_experts(x.clone()),
            || x.clone().select(0, token.clone()),
        );
        let (y, weights) = (random([tokens * k, width], 1.0), random([tokens, k], 1.0));
        let leaves = [("y", Leaf::Two(y.clone())), ("weights", Leaf::Two(weights.clone()))];
        let back = || {
            let places = routing.places.clone().reshape([tokens * k]);
            let rows = y.clone().select(0, places).reshape([tokens, k, width]);
            (rows * weights.clone().unsqueeze_dim::<3>(2)).sum_dim(1).reshape([tokens, width])
        };
        compare("from_experts", &leaves, || routing.from_experts(y.clone(), weights.clone()), back);
    }
}
