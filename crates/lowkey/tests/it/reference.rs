//! Agreement with transformers on small random checkpoints: logits, losses, hidden states, every gradient, AdamW
//! trajectories and greedy continuations.
//!
//! The checkpoints and what transformers computes for them lie outside the project (`../shared/reference/cases` from its
//! root). Where that folder is absent the test says so and passes: the crates' own tests hold the mathematics to finite
//! differences and to independent formulas.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use lowkey_infer::{Form, GenerateConfig, generate};
use lowkey_model::{CausalLm, Family, IGNORE, TokenBatch, Trace, ids_tensor};
use lowkey_train::{Optimizer, OptimizerKind, OptimizerSection, Update, clip_factor, global_norm};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Dense MLA checkpoints, and Llama, Qwen2 and Qwen3 ones.
const DENSE_CASES: usize = 14;

/// Those of which a GPU takes more steps than are known from transformers: without and with a query latent, and grouped queries.
const LONGER: [&str; 3] = ["v2_dense_noqlora", "v3_yarn", "src_llama_gqa"];

/// The folder of the cases; none where it is absent, which is said.
pub(crate) fn cases_dir() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/cases");
    if dir.is_dir() {
        return Some(dir);
    }
    println!("no reference cases at {}: nothing compared", dir.display());
    None
}

/// A tensor of ids of a case, and its shape.
pub(crate) fn integers(case: &Path, name: &str) -> (Vec<i64>, Vec<usize>) {
    Case::open(case.to_path_buf()).integers(name)
}

struct Case {
    dir: PathBuf,
    name: String,
    expected: Vec<u8>,
    tolerance: Value,
}

impl Case {
    fn open(dir: PathBuf) -> Self {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let case: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
        Self { dir, name, expected, tolerance: case["suggested_tolerance"].clone() }
    }

    fn tolerance(&self, key: &str) -> f64 {
        self.tolerance[key].as_f64().unwrap()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.expected).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn integers(&self, name: &str) -> (Vec<i64>, Vec<usize>) {
        let tensors = SafeTensors::deserialize(&self.expected).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::I64, "{name}");
        let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        (values, view.shape().to_vec())
    }

    fn close(&self, what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> f64 {
        assert_eq!(found.len(), expected.len(), "{}: size of {what}", self.name);
        let worst = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(worst <= tolerance, "{}: {what} is off by {worst:.2e}, tolerance {tolerance:.0e}", self.name);
        worst
    }
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

/// Next-token labels as transformers shifts them: the last position of a row predicts nothing.
fn shifted(labels: &[i64], seq: usize) -> Vec<i64> {
    labels.chunks(seq).flat_map(|row| row[1..].iter().copied().chain([IGNORE])).collect()
}

struct Batch {
    rows: usize,
    seq: usize,
    ids: Vec<u32>,
    starts: Vec<u32>,
    targets: Vec<i64>,
}

impl Batch {
    fn new(ids: &[i64], labels: &[i64], shape: &[usize]) -> Self {
        let (rows, seq) = (shape[0], shape[1]);
        Self {
            rows,
            seq,
            ids: ids.iter().map(|id| *id as u32).collect(),
            starts: vec![0; rows * seq],
            targets: shifted(labels, seq),
        }
    }

    fn tokens(&self) -> TokenBatch<'_> {
        TokenBatch {
            rows: self.rows,
            seq_len: self.seq,
            input_ids: &self.ids,
            targets: &self.targets,
            document_starts: &self.starts,
        }
    }

    /// Mean loss and its gradients, flattened.
    fn gradients(&self, model: &CausalLm, device: &Device) -> (f64, Vec<Tensor<1>>) {
        let loss = model.loss(self.tokens(), 0.0, device);
        let mean = loss.nats / loss.targets as f64;
        let mut gradients = mean.backward();
        (f64::from(mean.into_scalar::<f32>()), model.take_gradients(&mut gradients))
    }
}

#[test]
fn every_dense_case_agrees_with_transformers() {
    let Some(dir) = cases_dir() else { return };
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    let device = lowkey_kernels::device::open(&crate::gpu::name().unwrap_or("cpu".into())).unwrap().autodiff();
    let mut ran = Vec::new();
    for path in cases {
        let case = Case::open(path);
        match CausalLm::load(&case.dir, &device) {
            Ok(model) => {
                check(&case, model, &device);
                ran.push(case.name);
            }
            Err(e) => {
                let message = e.to_string();
                let known = message.contains("mixture-of-experts") || message.contains("minicpm3");
                assert!(known, "{}: refused for another reason: {message}", case.name);
                println!("{:<22} refused: not dense, or another architecture", case.name);
            }
        }
    }
    assert_eq!(ran.len(), DENSE_CASES, "{ran:?}");
}

fn check(case: &Case, model: CausalLm, device: &Device) {
    let (ids, shape) = case.integers("input_ids");
    let (masked, _) = case.integers("labels_masked");
    let batch = Batch::new(&ids, &ids, &shape);

    let logits = host(model.forward(ids_tensor(&batch.ids, batch.rows, batch.seq, device)));
    let logit_error = case.close("logits", &logits, &case.floats("logits"), case.tolerance("logits_abs"));
    states(case, &model, &batch, device);

    let (loss, gradients) = batch.gradients(&model, device);
    case.close("loss", &[loss as f32], &case.floats("loss"), case.tolerance("loss_abs"));
    let (masked_loss, _) = Batch::new(&ids, &masked, &shape).gradients(&model, device);
    case.close("loss_masked", &[masked_loss as f32], &case.floats("loss_masked"), case.tolerance("loss_abs"));

    let norm = global_norm(&gradients).unwrap();
    let expected_norm = f64::from(case.floats("grad_norm")[0]);
    assert!((norm / expected_norm - 1.0).abs() < case.tolerance("grad_rel_l2"), "{}: gradient norm", case.name);
    let mut grad_error: f64 = 0.0;
    for (parameter, gradient) in model.parameters().iter().zip(gradients) {
        let expected = case.floats(&format!("grad.{}", parameter.name));
        let found = host(gradient);
        let square = |x: f32| f64::from(x).powi(2);
        let difference: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let size: f64 = expected.iter().map(|x| square(*x)).sum();
        let relative = (difference / size).sqrt();
        let limit = case.tolerance("grad_rel_l2");
        assert!(relative <= limit, "{}: gradient of {} is off by {relative:.2e}", case.name, parameter.name);
        grad_error = grad_error.max(relative);
    }

    greedy(case, &model, &batch, device);
    let adamw = trajectory(case, model.clone(), &batch, None, "adamw.losses", device);
    let clipped = trajectory(case, model.clone(), &batch, Some(0.5), "adamw_clip.losses", device);
    if LONGER.contains(&case.name.as_str()) && !lowkey_kernels::device::is_cpu(device) {
        longer_trajectory(case, model, &batch, device);
    }
    println!(
        "{:<22} logits {logit_error:.1e}  gradients {grad_error:.1e}  AdamW {adamw:.1e}  clipped {clipped:.1e}",
        case.name
    );
}

/// Inputs of the layers, output of the first attention, and what the first layer caches.
fn states(case: &Case, model: &CausalLm, batch: &Batch, device: &Device) {
    let tolerance = case.tolerance("logits_abs");
    let mut trace = Trace::default();
    model.losses(batch.tokens(), device, Some(&mut trace));
    for (i, hidden) in trace.hidden.into_iter().enumerate() {
        case.close(&format!("hidden.{i}"), &host(hidden), &case.floats(&format!("hidden.{i}")), tolerance);
    }
    case.close("attn_out.0", &host(trace.attn_out.swap_remove(0)), &case.floats("attn_out.0"), tolerance);
    if trace.latent.is_empty() {
        return;
    }
    case.close("latent.0", &host(trace.latent.swap_remove(0)), &case.floats("latent.0"), tolerance);
    let k_pe = trace.k_pe.swap_remove(0);
    let [_, _, width] = k_pe.dims();
    let mut k_pe = host(k_pe);
    if model.config.family == Family::DeepseekV2 {
        // DeepSeek-V2 in transformers leaves pairs side by side; here all first components come first.
        let half = width / 2;
        k_pe = k_pe
            .chunks(width)
            .flat_map(|row| (0..half).flat_map(|i| [row[i], row[half + i]]).collect::<Vec<_>>())
            .collect();
    }
    case.close("k_rope.0", &k_pe, &case.floats("k_rope.0"), tolerance);
}

/// The continuation of each row, by the full forward pass and by both forms over the latent cache.
fn greedy(case: &Case, model: &CausalLm, batch: &Batch, device: &Device) {
    let (expected, shape) = case.integers("greedy_ids");
    let plain = device.clone().without_autodiff();
    for (row, expected) in expected.chunks(shape[1]).enumerate() {
        let expected: Vec<u32> = expected.iter().map(|id| *id as u32).collect();
        let prompt = &batch.ids[row * batch.seq..(row + 1) * batch.seq];
        let mut ids = prompt.to_vec();
        for _ in 0..expected.len() {
            let logits = host(model.forward(ids_tensor(&ids, 1, ids.len(), device)));
            let last = &logits[logits.len() - model.config.vocab_size..];
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            ids.push(best as u32);
        }
        assert_eq!(&ids[batch.seq..], expected, "{}: full forward, row {row}", case.name);
        for form in [Form::Expanded, Form::Absorbed] {
            let config = GenerateConfig { max_new_tokens: expected.len(), form, ..GenerateConfig::default() };
            let out = generate(model, prompt, &config, &plain, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(out.ids, expected, "{}: {form} decode, row {row}", case.name);
        }
    }
}

/// Losses before each of five steps and after the last.
fn trajectory(case: &Case, model: CausalLm, batch: &Batch, limit: Option<f64>, key: &str, device: &Device) -> f64 {
    let expected = case.floats(key);
    let found = losses(model, batch, limit, expected.len() - 1, device);
    case.close(key, &found, &expected, case.tolerance("adamw_losses_abs"))
}

/// Twice as many steps on a GPU and on the CPU, which the shorter trajectory has compared with transformers.
fn longer_trajectory(case: &Case, model: CausalLm, batch: &Batch, device: &Device) {
    let cpu = lowkey_kernels::device::open("cpu").unwrap().autodiff();
    let expected = losses(CausalLm::load(&case.dir, &cpu).unwrap(), batch, Some(0.5), 10, &cpu);
    let found = losses(model, batch, Some(0.5), 10, device);
    let off = case.close("losses of ten steps", &found, &expected, case.tolerance("adamw_losses_abs"));
    assert!(found[10] < found[0], "{}: ten steps learn nothing, {found:?}", case.name);
    println!("{:<22} ten steps as on the CPU within {off:.1e}", case.name);
}

/// Losses before each step of AdamW and after the last.
fn losses(mut model: CausalLm, batch: &Batch, limit: Option<f64>, steps: usize, device: &Device) -> Vec<f32> {
    let section = OptimizerSection {
        kind: OptimizerKind::AdamW,
        lr: 1e-3,
        momentum: None,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: limit,
    };
    // The reference decays every parameter.
    let mut optimizer = Optimizer::new(&section, &model.parameters(), |_| true);
    let mut losses = Vec::new();
    for step in 0..=steps {
        let (loss, gradients) = batch.gradients(&model, device);
        losses.push(loss as f32);
        if step < steps {
            let clip = limit.map_or(1.0, |limit| clip_factor(global_norm(&gradients).unwrap(), limit));
            model.update(|parameters| optimizer.step(parameters, gradients, &Update::new(clip, section.lr)));
        }
    }
    losses
}
