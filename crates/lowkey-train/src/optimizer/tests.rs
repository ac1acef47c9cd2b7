use burn::tensor::{Device, TensorData};
use lowkey_model::CausalLm;

use super::*;
use crate::fixtures::{Lcg, bits, model, uneven_batch, values, weight_bits};
use crate::run_config::OptimizerKind;
use crate::workers::Workers;

fn section() -> OptimizerSection {
    let kind = OptimizerKind::AdamW;
    OptimizerSection { kind, lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: None }
}

fn tensor(values: &[f32]) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::flex())
}

/// A matrix, a norm and a bias.
fn parameters() -> Vec<Parameter> {
    let parameter = |name: &str, shape: &[usize], values: &[f32]| Parameter {
        name: name.into(),
        shape: shape.to_vec(),
        value: tensor(values),
    };
    vec![
        parameter("q_proj.weight", &[2, 3], &[0.5, -1.0, 2.0, 0.0, 1e-3, -30.0]),
        parameter("norm.weight", &[3], &[1.0, 0.9, 1.1]),
        parameter("q_proj.bias", &[2], &[0.0, -0.2]),
    ]
}

/// Gradients of a step: of changing size and sign, over ten orders of magnitude, and zero now and then.
fn gradients(step: u64) -> Vec<Tensor<1>> {
    let mut random = Lcg(step + 1);
    let mut draw = |_| {
        let size = 10f32.powi(random.below(11) as i32 - 8);
        (random.below(5) as f32 - 2.0) * size * (1.0 + random.below(100) as f32 / 100.0)
    };
    parameters().iter().map(|p| tensor(&values(&p.value).iter().map(|_| draw(())).collect::<Vec<_>>())).collect()
}

fn rate(step: u64) -> f64 {
    1e-2 / (1.0 + step as f64)
}

fn take(optimizer: &mut AdamW, mut parameters: Vec<Parameter>, steps: std::ops::Range<u64>) -> Vec<Parameter> {
    for step in steps {
        let new = optimizer.step(parameters.clone(), gradients(step), 1.0, rate(step));
        parameters.iter_mut().zip(new).for_each(|(parameter, value)| parameter.value = value);
    }
    parameters
}

/// `torch.optim.AdamW` (torch/optim/adamw.py, the single-tensor form) for one number, in f64.
fn reference(mut p: f64, gradients: impl Iterator<Item = f64>, decay: f64) -> f64 {
    let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
    let (mut exp_avg, mut exp_avg_sq) = (0.0, 0.0);
    for (step, grad) in gradients.enumerate() {
        let (lr, t) = (rate(step as u64), step as i32 + 1);
        p *= 1.0 - lr * decay;
        exp_avg += (grad - exp_avg) * (1.0 - beta1);
        exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad;
        let (bias_correction1, bias_correction2) = (1.0 - f64::powi(beta1, t), 1.0 - f64::powi(beta2, t));
        let denom = f64::sqrt(exp_avg_sq) / bias_correction2.sqrt() + eps;
        p -= lr / bias_correction1 * exp_avg / denom;
    }
    p
}

#[test]
fn steps_are_those_of_pytorch_and_only_matrices_decay() {
    const STEPS: u64 = 12;
    let start = parameters();
    let mut optimizer = AdamW::new(&section(), &start, Parameter::is_matrix);
    let end = take(&mut optimizer, start.clone(), 0..STEPS);
    let all: Vec<Vec<Vec<f32>>> = (0..STEPS).map(|step| gradients(step).iter().map(values).collect()).collect();
    for (i, (start, end)) in start.iter().zip(&end).enumerate() {
        let name = &start.name;
        let decay = if name == "q_proj.weight" { 0.1 } else { 0.0 };
        for (j, (start, found)) in values(&start.value).iter().zip(values(&end.value)).enumerate() {
            let expected = reference(f64::from(*start), all.iter().map(|step| f64::from(step[i][j])), decay);
            let error = (f64::from(found) - expected).abs() / expected.abs().max(0.01);
            assert!(error < 2e-6, "{} [{j}]: {found} for {expected}", name);
        }
    }
    assert_eq!(optimizer.state().1, STEPS);
}

#[test]
fn without_a_gradient_matrices_shrink_and_the_rest_stays() {
    let start = parameters();
    let zeros = start.iter().map(|p| p.value.zeros_like()).collect();
    let end = AdamW::new(&section(), &start, Parameter::is_matrix).step(start.clone(), zeros, 1.0, 0.5);
    for (before, after) in values(&start[0].value).iter().zip(values(&end[0])) {
        assert!((after - before * 0.95).abs() <= before.abs() * 1e-6);
    }
    assert_eq!(bits(&end[1..]), bits(&[start[1].value.clone(), start[2].value.clone()]));
}

#[test]
fn a_restored_optimiser_continues_with_the_same_bits() {
    let mut unbroken = AdamW::new(&section(), &parameters(), Parameter::is_matrix);
    let expected = take(&mut unbroken, parameters(), 0..9);

    let mut first = AdamW::new(&section(), &parameters(), Parameter::is_matrix);
    let half = take(&mut first, parameters(), 0..4);
    let (moments, steps) = first.state();
    let mut second = AdamW::new(&section(), &half, Parameter::is_matrix);
    second.restore(moments.to_vec(), steps);
    let found = take(&mut second, half, 4..9);
    let all = |parameters: &[Parameter]| bits(&parameters.iter().map(|p| p.value.clone()).collect::<Vec<_>>());
    assert_eq!(all(&found), all(&expected));
    assert_eq!(second.state().1, unbroken.state().1);
}

#[test]
fn the_norm_is_that_of_all_gradients_together() {
    let gradients = [tensor(&[3.0, 0.0]), tensor(&[4.0]), tensor(&[12.0, 0.0, 84.0])];
    assert!((global_norm(&gradients).unwrap() - 85.0).abs() < 1e-9);
    assert_eq!(global_norm(&[]).unwrap(), 0.0);
}

#[test]
fn the_norm_of_many_numbers_is_exact_and_always_the_same() {
    let mut random = Lcg(5);
    let numbers: Vec<f32> = (0..5_000_001).map(|_| random.below(2000) as f32 / 1000.0 - 1.0).collect();
    let exact = numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let gradients = [tensor(&numbers), tensor(&[1e-3])];
    let first = global_norm(&gradients).unwrap();
    assert!((first / exact - 1.0).abs() < 1e-6, "{first} for {exact}");
    assert!((0..5).all(|_| global_norm(&gradients).unwrap().to_bits() == first.to_bits()));
}

#[test]
fn the_first_gradient_that_is_no_number_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let gradients = [tensor(&[1.0]), tensor(&[0.0, bad, 1.0]), tensor(&[f32::NAN])];
        let (i, value) = global_norm(&gradients).unwrap_err();
        assert_eq!(i, 1);
        assert!(!value.is_finite());
    }
}

#[test]
fn a_norm_whose_square_exceeds_f32_is_none() {
    assert_eq!(global_norm(&[tensor(&[1.0]), tensor(&[2e19])]), Err((1, f64::INFINITY)));
    assert!(global_norm(&[tensor(&[1e18, 1e18])]).is_ok());
}

#[test]
fn clipping_is_that_of_pytorch() {
    for (limit, norm) in [(1.0, 5.0), (5.0, 5.0), (4.9999, 5.0), (10.0, 5.0), (1e-3, 5.0), (1.0, 0.0)] {
        // clip_grad_norm_: coefficient max_norm / (total_norm + 1e-6), at most 1.
        assert_eq!(clip_factor(norm, limit), f64::min(limit / (norm + 1e-6), 1.0));
    }
    let step = |gradients: Vec<Tensor<1>>, clip| {
        let mut optimizer = AdamW::new(&section(), &parameters(), Parameter::is_matrix);
        bits(&optimizer.step(parameters(), gradients, clip, 1e-2))
    };
    let clipped = gradients(1).into_iter().map(|gradient| gradient * 0.3).collect();
    assert_eq!(step(gradients(1), 0.3), step(clipped, 1.0));
}

#[test]
fn a_step_of_a_model_happens_where_its_numbers_lie() {
    let device = Device::flex().autodiff();
    let mut model = model(29, 16, 5, &device);
    let mut optimizer = AdamW::new(&section(), &model.parameters(), Parameter::is_matrix);
    let address = |x: &Tensor<1>| optim::address(x).unwrap();
    let addresses = |model: &CausalLm, optimizer: &AdamW| -> Vec<usize> {
        let values = model.parameters();
        let moments = optimizer.state().0.iter().flat_map(|moments| [address(&moments.m), address(&moments.v)]);
        values.iter().map(|p| address(&p.value)).chain(moments).collect()
    };
    let (before, weights) = (addresses(&model, &optimizer), weight_bits(&model));
    let workers = Workers::new(2, 4).unwrap();
    for seed in 0..3 {
        let batch = uneven_batch(4, 9, 29, seed);
        let gradients = workers.gradients(&model, &batch, 4, &device).unwrap().gradients;
        workers.together(|| model.update(|parameters| optimizer.step(parameters, gradients, 1.0, 1e-2)));
    }
    assert_eq!(addresses(&model, &optimizer), before);
    assert_ne!(weight_bits(&model), weights);
}

#[test]
fn any_number_of_threads_takes_the_same_steps() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut optimizer = AdamW::new(&section(), &parameters(), Parameter::is_matrix);
        let end = pool.install(|| take(&mut optimizer, parameters(), 0..5));
        (bits(&end.into_iter().map(|p| p.value).collect::<Vec<_>>()), pool.install(|| global_norm(&gradients(3))))
    };
    let one = run(1);
    assert!([2, 3].into_iter().all(|threads| run(threads) == one));
}
