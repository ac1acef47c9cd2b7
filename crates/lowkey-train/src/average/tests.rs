use burn::tensor::Device;

use super::*;
use crate::fixtures::{bits, model, values};

#[test]
fn the_average_is_that_of_plain_numbers_and_holds_what_is_trained_alone() {
    let device = Device::flex().autodiff();
    let mut model = model(29, 16, 5, &device).with_trained(|spec| spec.name.contains("norm"));
    let start: Vec<Vec<f32>> = model.trained_parameters().iter().map(|p| values(&p.value)).collect();
    let mut average = Average::new(0.5, &model);
    let mut expected: Vec<Vec<f64>> =
        start.iter().map(|values| values.iter().map(|x| f64::from(*x)).collect()).collect();
    for step in 1..=12u64 {
        model.update(|parameters| parameters.into_iter().map(|p| p.value + step as f64 * 0.1).collect());
        average.update(&model, step);
        // Two elevenths are kept of the first step's average, a half from the eighth on.
        let decay = f64::min(0.5, (1.0 + step as f64) / (10.0 + step as f64));
        for (expected, p) in expected.iter_mut().zip(model.trained_parameters()) {
            expected.iter_mut().zip(values(&p.value)).for_each(|(e, x)| *e = decay * *e + (1.0 - decay) * f64::from(x));
        }
    }
    let averaged = average.of(&model);
    let mut compared = 0;
    for (found, own) in averaged.parameters().into_iter().zip(model.parameters()) {
        if !found.trainable {
            assert_eq!(bits([&found.value]), bits([&own.value]), "{}", found.name);
            continue;
        }
        for (found, expected) in values(&found.value).into_iter().zip(&expected[compared]) {
            assert!((f64::from(found) - expected).abs() < 1e-5, "{found} for {expected}");
        }
        assert_ne!(bits([&found.value]), bits([&own.value]));
        compared += 1;
    }
    assert_eq!(compared, expected.len());
    assert!(compared > 2);
}

#[test]
fn weights_that_stand_still_are_their_own_average_to_the_last_bit() {
    let model = model(29, 16, 5, &Device::flex());
    let mut average = Average::new(0.999, &model);
    (1..=20).for_each(|step| average.update(&model, step));
    let all = |model: &CausalLm| bits(&model.parameters().into_iter().map(|p| p.value).collect::<Vec<_>>());
    assert_eq!(all(&average.of(&model)), all(&model));
}
