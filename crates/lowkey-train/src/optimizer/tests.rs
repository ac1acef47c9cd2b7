use burn::tensor::{Device, TensorData};
use lowkey_model::{
    CausalLm, ModelConfig,
    tensor::{Part, Role},
};

use lowkey_kernels::optim::clip_factor;

use super::*;
use crate::fixtures::{Lcg, bits, model, model_config, optimizer_section, passes, uneven_batch, values, weight_bits};
use crate::run_config::OptimizerKind;
use crate::workers::Workers;

fn section() -> OptimizerSection {
    optimizer_section(OptimizerKind::AdamW)
}

fn tensor(values: &[f32]) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::flex())
}

/// A matrix, a norm and a bias.
fn parameters() -> Vec<Parameter> {
    let parameter = |name: &str, role: Role, shape: &[usize], values: &[f32]| Parameter {
        name: name.into(),
        shape: shape.to_vec(),
        role,
        head_rows: vec![shape[0]],
        trainable: true,
        value: tensor(values),
    };
    vec![
        parameter("q_proj.weight", Role::Matrix, &[2, 3], &[0.5, -1.0, 2.0, 0.0, 1e-3, -30.0]),
        parameter("norm.weight", Role::Norm, &[3], &[1.0, 0.9, 1.1]),
        parameter("q_proj.bias", Role::Bias, &[2], &[0.0, -0.2]),
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

fn take(optimizer: &mut Optimizer, mut parameters: Vec<Parameter>, steps: std::ops::Range<u64>) -> Vec<Parameter> {
    for step in steps {
        let new = optimizer.step(parameters.clone(), gradients(step), &Update::new(1.0, rate(step)));
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
    let mut optimizer = Optimizer::new(&section(), &start, Parameter::is_matrix);
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

/// The same four numbers in every part of a model of three layers, of which the middle one is frozen.
fn in_layers() -> Vec<Parameter> {
    let parameter = |name: &str, role: Role| Parameter {
        name: name.into(),
        shape: vec![2, 2],
        role,
        head_rows: vec![2],
        trainable: true,
        value: tensor(&[0.5, -1.0, 2.0, 0.25]),
    };
    vec![
        parameter("model.embed_tokens.weight", Role::Embedding),
        parameter("model.layers.0.self_attn.o_proj.weight", Role::Residual),
        parameter("model.layers.0.self_attn.o_proj.lora_A.weight", Role::Adapter(Part::Reads)),
        parameter("model.layers.0.self_attn.o_proj.lora_B.weight", Role::Adapter(Part::Writes)),
        parameter("model.layers.2.mlp.down_proj.weight", Role::Residual),
        parameter("model.layers.2.input_layernorm.weight", Role::Norm),
        parameter("model.norm.weight", Role::Norm),
        parameter("lm_head.weight", Role::Head),
    ]
}

#[test]
fn a_step_of_each_layer_is_that_of_its_own_rate() {
    // Of decay 0.5: the embedding has an eighth, layer 0 a quarter, and what stands above all layers or in the last one the whole rate.
    let shares = [0.125, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0];
    let gradient = [0.3f32, -0.1, 1e-3, 4.0];
    let parameters = in_layers();
    let gradients = || parameters.iter().map(|_| tensor(&gradient)).collect::<Vec<_>>();
    let step = |decay: Option<f64>, kind: OptimizerKind, lr: f64| {
        let section = OptimizerSection { layer_lr_decay: decay, ..optimizer_section(kind) };
        let mut optimizer =
            Optimizer::new(&section, &parameters, Parameter::is_matrix).with_rates(&section, &parameters, 3);
        optimizer.step(parameters.clone(), gradients(), &Update::new(1.0, lr))
    };
    for ((p, found), share) in parameters.iter().zip(step(Some(0.5), OptimizerKind::AdamW, 1e-2)).zip(shares) {
        let (lr, decay) = (1e-2 * share, if p.is_matrix() { 0.1 } else { 0.0 });
        for ((found, w), g) in values(&found).into_iter().zip(values(&p.value)).zip(gradient) {
            // The first step of AdamW: both means, without their bias, are the gradient and its square.
            let (w, g) = (f64::from(w), f64::from(g));
            let expected = w * (1.0 - lr * decay) - lr * g / (g.abs() + 1e-8);
            assert!((f64::from(found) - expected).abs() < 1e-6, "{}: {found} for {expected}", p.name);
        }
    }
    for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
        let found = step(Some(0.5), kind, 1e-2);
        for (i, share) in shares.into_iter().enumerate() {
            assert_eq!(
                bits([&found[i]]),
                bits([&step(None, kind, 1e-2 * share)[i]]),
                "{kind:?}: {}",
                parameters[i].name
            );
        }
        assert_eq!(bits(&step(Some(1.0), kind, 1e-2)), bits(&step(None, kind, 1e-2)));
    }
}

#[test]
fn without_a_gradient_matrices_shrink_and_the_rest_stays() {
    let start = parameters();
    let zeros = start.iter().map(|p| p.value.zeros_like()).collect();
    let end =
        Optimizer::new(&section(), &start, Parameter::is_matrix).step(start.clone(), zeros, &Update::new(1.0, 0.5));
    for (before, after) in values(&start[0].value).iter().zip(values(&end[0])) {
        assert!((after - before * 0.95).abs() <= before.abs() * 1e-6);
    }
    assert_eq!(bits(&end[1..]), bits(&[start[1].value.clone(), start[2].value.clone()]));
}

#[test]
fn a_restored_optimiser_continues_with_the_same_bits() {
    for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
        let new = || Optimizer::new(&optimizer_section(kind), &parameters(), Parameter::is_matrix);
        let mut unbroken = new();
        let expected = take(&mut unbroken, parameters(), 0..9);

        let mut first = new();
        let half = take(&mut first, parameters(), 0..4);
        let (states, steps) = first.state();
        let mut second = new();
        second.restore(states.to_vec(), steps);
        let found = take(&mut second, half, 4..9);
        let all = |parameters: &[Parameter]| bits(&parameters.iter().map(|p| p.value.clone()).collect::<Vec<_>>());
        assert_eq!(all(&found), all(&expected));
        assert_eq!(second.state().1, unbroken.state().1);
    }
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
        let mut optimizer = Optimizer::new(&section(), &parameters(), Parameter::is_matrix);
        bits(&optimizer.step(parameters(), gradients, &Update::new(clip, 1e-2)))
    };
    let clipped = gradients(1).into_iter().map(|gradient| gradient * 0.3).collect();
    assert_eq!(step(gradients(1), 0.3), step(clipped, 1.0));
}

#[test]
fn a_step_of_a_model_happens_where_its_numbers_lie() {
    let device = Device::flex().autodiff();
    for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
        let mut model = model(29, 16, 5, &device);
        let mut optimizer = Optimizer::new(&optimizer_section(kind), &model.parameters(), Parameter::is_matrix);
        let address = |x: &Tensor<1>| optim::address(x).unwrap();
        let addresses = |model: &CausalLm, optimizer: &Optimizer| -> Vec<usize> {
            let values = model.parameters();
            let states = optimizer.state().0.iter().flat_map(ParameterState::tensors);
            values.iter().map(|p| address(&p.value)).chain(states.map(|(_, tensor)| address(tensor))).collect()
        };
        let (before, weights) = (addresses(&model, &optimizer), weight_bits(&model));
        let workers = Workers::new(2, 4).unwrap();
        for seed in 0..3 {
            let batch = uneven_batch(4, 9, 29, seed);
            let gradients = workers.gradients(&model, &batch, passes(4), &device).gradients;
            workers
                .together(|| model.update(|parameters| optimizer.step(parameters, gradients, &Update::new(1.0, 1e-2))));
        }
        assert_eq!(addresses(&model, &optimizer), before);
        assert_ne!(weight_bits(&model), weights);
    }
}

#[test]
fn any_number_of_threads_takes_the_same_steps() {
    let run = |threads: usize, kind| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // One that a step spreads over threads, too.
        let device = Device::flex();
        let mut config = ModelConfig { hidden_size: 160, ..model_config(29, 16) };
        config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 320);
        let mut model = CausalLm::init(&config, 3, &device);
        let mut optimizer = Optimizer::new(&optimizer_section(kind), &model.parameters(), Parameter::is_matrix);
        pool.install(|| {
            for _ in 0..3 {
                let gradients: Vec<_> = model.parameters().into_iter().map(|p| p.value.sin() * 0.1 + 0.001).collect();
                let clip = clip_factor(global_norm(&gradients).unwrap(), 1.0);
                model.update(|parameters| optimizer.step(parameters, gradients, &Update::new(clip, 1e-2)));
            }
        });
        weight_bits(&model)
    };
    for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
        let one = run(1, kind);
        assert!([2, 3].into_iter().all(|threads| run(threads, kind) == one), "{kind:?}");
    }
}

/// Row-major matrices in f64.
#[derive(Clone)]
struct Matrix(Vec<Vec<f64>>);

impl Matrix {
    fn times(&self, other: &Self) -> Self {
        let column = |row: &Vec<f64>, j: usize| row.iter().zip(&other.0).map(|(a, b)| a * b[j]).sum();
        Self(self.0.iter().map(|row| (0..other.0[0].len()).map(|j| column(row, j)).collect()).collect())
    }

    fn transposed(&self) -> Self {
        Self((0..self.0[0].len()).map(|j| self.0.iter().map(|row| row[j]).collect()).collect())
    }

    fn combine(&self, a: f64, other: &Self, b: f64) -> Self {
        let row = |(x, y): (&Vec<f64>, &Vec<f64>)| x.iter().zip(y).map(|(x, y)| a * x + b * y).collect();
        Self(self.0.iter().zip(&other.0).map(row).collect())
    }

    /// Five steps of the quintic, as the post on Muon has them.
    fn orthogonal(&self) -> Self {
        let norm = self.0.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        let mut x = self.combine(1.0 / norm.max(1e-30), self, 0.0);
        for _ in 0..5 {
            let gram = x.times(&x.transposed());
            let poly = gram.combine(-4.7750, &gram.times(&gram), 2.0315);
            x = x.combine(3.4445, &poly.times(&x), 1.0);
        }
        x
    }
}

#[test]
fn muon_takes_the_published_steps() {
    const STEPS: u64 = 12;
    let (heights, width, clip) = ([3usize, 4], 5, 0.7);
    let start: Vec<f32> = (0..35).map(|i| (i as f32).sin()).collect();
    let gradient =
        |step: u64| -> Vec<f32> { (0..35).map(|i| ((i * 7 + 3 * step) as f32 * 0.37).cos() * 0.1).collect() };
    let parameter = Parameter {
        name: "o_proj.weight".into(),
        shape: vec![7, width],
        role: Role::Residual,
        head_rows: heights.to_vec(),
        trainable: true,
        value: tensor(&start),
    };
    let section = OptimizerSection { momentum: Some(0.9), ..optimizer_section(OptimizerKind::Muon) };
    let mut optimizer = Optimizer::new(&section, std::slice::from_ref(&parameter), Parameter::is_matrix);
    let mut value = parameter.value.clone();

    let rows = |x: &[f32]| -> Vec<Vec<f64>> {
        x.chunks(width).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
    };
    let (mut expected, mut buffer) = (Matrix(rows(&start)), Matrix(vec![vec![0.0; width]; 7]));
    for step in 0..STEPS {
        let parameters = vec![Parameter { value, ..parameter.clone() }];
        value = optimizer.step(parameters, vec![tensor(&gradient(step))], &Update::new(clip, rate(step))).remove(0);

        let g = Matrix(rows(&gradient(step)));
        buffer = buffer.combine(0.9, &g, clip);
        let ahead = g.combine(clip, &buffer, 0.9);
        let mut update = Vec::new();
        for height in heights {
            let block = Matrix(ahead.0[update.len()..update.len() + height].to_vec()).orthogonal();
            let scale = 0.2 * f64::from(height.max(width) as u32).sqrt();
            update.extend(block.combine(scale, &block, 0.0).0);
        }
        expected = expected.combine(1.0 - rate(step) * 0.1, &Matrix(update), -rate(step));
    }
    for (found, expected) in values(&value).into_iter().zip(expected.0.into_iter().flatten()) {
        assert!((f64::from(found) - expected).abs() < 1e-5, "{found} for {expected}");
    }
}

#[test]
fn muon_leaves_embedding_head_norms_and_biases_to_adamw() {
    let model = model(29, 16, 5, &Device::flex());
    let parameters = model.parameters();
    let gradients = || parameters.iter().map(|p| p.value.clone() * 0.1 + 0.01).collect::<Vec<_>>();
    let step = |kind| {
        let mut optimizer = Optimizer::new(&optimizer_section(kind), &parameters, Parameter::is_matrix);
        let values = optimizer.step(parameters.clone(), gradients(), &Update::new(1.0, 1e-2));
        (optimizer, values)
    };
    let ((muon, a), (_, b)) = (step(OptimizerKind::Muon), step(OptimizerKind::AdamW));
    let mut kinds = [0, 0];
    for ((parameter, state), (a, b)) in parameters.iter().zip(muon.state().0).zip(a.iter().zip(&b)) {
        let hidden = matches!(state, ParameterState::Muon { .. });
        kinds[usize::from(hidden)] += 1;
        assert_eq!(hidden, parameter.is_hidden_matrix(), "{}", parameter.name);
        assert_eq!(bits([a]) != bits([b]), hidden, "{}", parameter.name);
        if hidden {
            // As large as AdamW's usual step: a root mean square of 0.2, for singular values near 1.
            let change = a.clone() - parameter.value.clone() * (1.0 - 1e-3);
            let rms = values(&change.square().mean().reshape([1]))[0].sqrt() / 1e-2;
            assert!((0.02..0.25).contains(&rms), "{}: {rms}", parameter.name);
        }
    }
    assert!(kinds[0] > 4 && kinds[1] == 2 * 7, "{kinds:?}");
}

#[test]
fn the_factor_that_writes_has_a_rate_of_its_own() {
    let parameters = in_layers();
    let step = |ratio: Option<f64>, layer_lr_decay: Option<f64>, lr: f64| {
        let section =
            OptimizerSection { loraplus_lr_ratio: ratio, layer_lr_decay, ..optimizer_section(OptimizerKind::AdamW) };
        let mut optimizer =
            Optimizer::new(&section, &parameters, Parameter::is_matrix).with_rates(&section, &parameters, 3);
        let gradients = parameters.iter().map(|_| tensor(&[0.3, -0.1, 1e-3, 4.0])).collect();
        optimizer.step(parameters.clone(), gradients, &Update::new(1.0, lr))
    };
    for decay in [None, Some(0.5)] {
        let (found, plain, faster) = (step(Some(8.0), decay, 1e-3), step(None, decay, 1e-3), step(None, decay, 8e-3));
        for (i, parameter) in parameters.iter().enumerate() {
            let expected = if parameter.name.contains("lora_B") { &faster[i] } else { &plain[i] };
            assert_eq!(bits([&found[i]]), bits([expected]), "{decay:?}: {}", parameter.name);
            assert_ne!(bits([&plain[i]]), bits([&faster[i]]));
        }
    }
}
