//! Agreement with transformers on small random checkpoints: logits, losses, hidden states, every gradient, AdamW
//! trajectories and greedy continuations.
//!
//! The checkpoints, and what transformers computes for them, are part of the project (`tests/reference`, with the script that makes
//! them). A second judge, made by another script, is asked where it lies beside the project (`../shared/reference/cases`).

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_batch::{IGNORE, Rows};
use lowkey_infer::{Form, GenerateConfig, generate};
use lowkey_kernels::optim::clip_factor;
use lowkey_model::{CausalLm, ModelDir, Parameter, adapter::Draws, config::Family, ids_tensor, model::Trace};
use lowkey_train::{
    optimizer::{Optimizer, Update, global_norm},
    run_config::{OptimizerKind, OptimizerSection},
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Checkpoints of the project: fifteen with MLA, and four of Llama, Qwen2 and Qwen3.
const CASES: usize = 19;

/// Those of the second judge that are dense and of a family that is implemented.
const SECOND_CASES: usize = 14;

/// Those of which a GPU takes more steps than are known from transformers: without and with a query latent, and grouped queries.
const LONGER: [&str; 3] = ["v2_plain", "v3_yarn", "llama_gqa"];

/// Where the project keeps its checkpoints and tokenizers.
pub(crate) fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference")
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

/// The project's cases.
pub(crate) fn own_cases() -> Vec<PathBuf> {
    let found = folders(&own().join("cases"));
    assert_eq!(found.len(), CASES, "{found:?}");
    found
}

/// Those of the second judge; none where it is absent.
fn second_cases() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/cases");
    if dir.is_dir() { folders(&dir) } else { Vec::new() }
}

/// The cases of both judges.
pub(crate) fn cases() -> Vec<PathBuf> {
    own_cases().into_iter().chain(second_cases()).collect()
}

/// Says on standard error itself, which the test harness does not keep to itself, how much was compared.
pub(crate) fn announce(text: &str) {
    std::io::stderr().write_all(format!("{text}\n").as_bytes()).unwrap();
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

    fn tokens(&self) -> Rows<'_> {
        Rows {
            vectors: None,
            pairs: false,
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
fn every_case_agrees_with_transformers() {
    let device = lowkey_kernels::device::open(&crate::gpu::name().unwrap_or("cpu".into())).unwrap().autodiff();
    for path in own_cases() {
        let case = Case::open(path);
        let model = CausalLm::load(&case.dir, &device).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        check(&case, model, &device);
    }
    announce(&format!("reference: {CASES} checkpoints of the project compared with transformers"));
    let second = second_cases();
    let mut compared = Vec::new();
    for path in &second {
        let case = Case::open(path.clone());
        match CausalLm::load(&case.dir, &device) {
            // Its factors are in the weights, so that its gradients are others. Logits are compared where such models are read.
            Ok(_) if case.name == "minicpm3" => {}
            Ok(model) => {
                check(&case, model, &device);
                compared.push(case.name);
            }
            Err(e) => {
                let message = e.to_string();
                let known = message.contains("mixture-of-experts");
                assert!(known, "{}: refused for another reason: {message}", case.name);
                println!("{:<22} refused: not dense, or another architecture", case.name);
            }
        }
    }
    if !second.is_empty() {
        assert_eq!(compared.len(), SECOND_CASES, "{compared:?}");
        announce(&format!("reference: {SECOND_CASES} checkpoints of a second judge compared with transformers"));
    }
}

/// The sums that were written when the cases were made, by name.
fn sums() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(own().join("SHA256SUMS")).unwrap();
    let pair = |line: &str| {
        let (sum, name) = line.split_once("  ").unwrap();
        (name.to_string(), sum.to_string())
    };
    text.lines().map(pair).collect()
}

#[test]
fn the_cases_are_those_that_were_made() {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut files = Vec::new();
    for part in ["cases", "adapters", "dialects", "tokenizers"] {
        walk(&own().join(part), &mut files);
    }
    let name = |path: &Path| path.strip_prefix(own()).unwrap().to_string_lossy().replace('\\', "/");
    let found: BTreeMap<String, String> =
        files.iter().map(|path| (name(path), lowkey_files::hash::sha256(path).unwrap())).collect();
    let sums = sums();
    assert!(sums.len() > 5 * CASES, "{}", sums.len());
    let other = sums.iter().find(|(name, sum)| found.get(*name) != Some(sum));
    assert_eq!(other, None, "this file is not the one that was made");
    assert_eq!(found.len(), sums.len(), "a file that is not listed");
}

/// The comparison notices one bit of one weight, wherever it lies.
#[test]
fn one_altered_bit_of_a_checkpoint_is_noticed() {
    let device = lowkey_kernels::device::open("cpu").unwrap().autodiff();
    let case = own().join("cases/v3_qlora");
    let bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let used = integers(&case, "input_ids").0[0] as usize;
    let mut noticed = 0;
    for (name, view) in tensors.tensors() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("case");
        std::fs::create_dir(&copy).unwrap();
        for file in ["config.json", "case.json", "expected.safetensors"] {
            std::fs::copy(case.join(file), copy.join(file)).unwrap();
        }
        let mut altered = bytes.clone();
        // Of an embedding, the row of a token that the text has; the comparison says nothing of the others.
        let row = if name.contains("embed_tokens") { used * view.shape()[1] * 4 } else { view.data().len() / 8 * 4 };
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize + row;
        // The lowest bit of the exponent: the number is doubled or halved.
        altered[at + 2] ^= 0x80;
        std::fs::write(copy.join("model.safetensors"), altered).unwrap();
        let case = Case::open(copy);
        let model = CausalLm::load(&case.dir, &device).unwrap();
        let agrees = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&case, model, &device)));
        assert!(agrees.is_err(), "a bit of {name} has changed, and nothing was noticed");
        noticed += 1;
    }
    assert!(noticed > 20, "{noticed}");
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

/// Losses before each step of AdamW and after the last. The reference decays every parameter.
fn losses(model: CausalLm, batch: &Batch, limit: Option<f64>, steps: usize, device: &Device) -> Vec<f32> {
    trained(model, batch, limit, steps, |_| true, device).0
}

/// The same, weights decaying as told, with the model after the last step.
fn trained(
    mut model: CausalLm,
    batch: &Batch,
    limit: Option<f64>,
    steps: usize,
    decays: impl Fn(&Parameter) -> bool,
    device: &Device,
) -> (Vec<f32>, CausalLm) {
    let section = OptimizerSection {
        kind: OptimizerKind::AdamW,
        lr: 1e-3,
        momentum: None,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: limit,
        layer_lr_decay: None,
        loraplus_lr_ratio: None,
    };
    let mut optimizer = Optimizer::new(&section, &model.trained_parameters(), decays);
    let mut losses = Vec::new();
    for step in 0..=steps {
        let (loss, gradients) = batch.gradients(&model, device);
        losses.push(loss as f32);
        if step < steps {
            let clip = limit.map_or(1.0, |limit| clip_factor(global_norm(&gradients).unwrap(), limit));
            model.update(|parameters| optimizer.step(parameters, gradients, &Update::new(clip, section.lr)));
        }
    }
    (losses, model)
}

/// Adapters that PEFT saved: rank and factor by pattern with norms trained whole, rsLoRA by expression, DoRA in one layer, the
/// output head, and the embedding with dropout beside it.
const ADAPTERS: usize = 5;

/// What a map makes of one input while numbers are left out, over many draws, where PEFT has done the same: its mean, which is what it
/// makes of all numbers, and how far single outputs are from it.
fn leaves_out_as_much(case: &Case, model: &CausalLm) {
    let tensors = SafeTensors::deserialize(&case.expected).unwrap();
    let Ok(view) = tensors.tensor("dropout.x") else { return };
    const DRAWS: u64 = 4000;
    let shape: [usize; 3] = view.shape().try_into().unwrap();
    let device = model.model.norm.gain().device();
    let x = Tensor::<3>::from_data(TensorData::new(case.floats("dropout.x"), shape), &device);
    let outputs = |draws: Option<Draws>| {
        let model = model.clone().with_draws(draws);
        let q_proj = model.model.layers[0].self_attn.latent().unwrap().q_proj.clone().unwrap();
        host(q_proj.forward(x.clone())).into_iter().map(f64::from).collect::<Vec<_>>()
    };
    let whole = outputs(None);
    let (mut sums, mut squares) = (vec![0.0; whole.len()], vec![0.0; whole.len()]);
    for step in 0..DRAWS {
        let found = outputs(Some(Draws { seed: 5, step, first_row: 0 }));
        for (i, (found, whole)) in found.into_iter().zip(&whole).enumerate() {
            (sums[i], squares[i]) = (sums[i] + found - whole, squares[i] + (found - whole).powi(2));
        }
    }
    let (means, deviations) = (case.floats("dropout.mean"), case.floats("dropout.deviation"));
    for (i, (mean, deviation)) in means.into_iter().zip(deviations).enumerate() {
        let (mean, deviation, count) = (f64::from(mean), f64::from(deviation), DRAWS as f64);
        let found = (squares[i] / count - (sums[i] / count).powi(2)).sqrt();
        // Five deviations of what so many draws leave to chance.
        let off = |of: f64| 5.0 * deviation / count.sqrt() * of + 1e-5;
        assert!((whole[i] + sums[i] / count - mean).abs() < off(1.2), "{}: {i}: mean", case.name);
        assert!((whole[i] - mean).abs() < off(1.0), "{}: {i}: the mean is what all numbers give", case.name);
        assert!((found - deviation).abs() < off(1.5), "{}: {i}: {found} and {deviation}", case.name);
    }
}

#[test]
fn every_adapter_of_peft_agrees() {
    let device = lowkey_kernels::device::open("cpu").unwrap().autodiff();
    let folders = folders(&own().join("adapters"));
    assert_eq!(folders.len(), ADAPTERS, "{folders:?}");
    for dir in folders {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let case = Case { dir: dir.clone(), name, expected, tolerance: Value::Null };
        let (ids, shape) = case.integers("input_ids");
        let batch = Batch::new(&ids, &ids, &shape);
        let opened = ModelDir::open(&dir).unwrap();
        let model = opened.load(&device).unwrap();
        let logits = host(model.forward(ids_tensor(&batch.ids, batch.rows, batch.seq, &device)));
        let expected = case.floats("logits");
        // Of the largest logit: what f32 keeps of sums of that size.
        let most = 1e-5 * expected.iter().fold(1.0, |most, x| f64::from(x.abs()).max(most));
        case.close("logits", &logits, &expected, most);
        let merged = model.merged();
        let logits = host(merged.forward(ids_tensor(&batch.ids, batch.rows, batch.seq, &device)));
        case.close("logits of the merged model", &logits, &expected, most);

        leaves_out_as_much(&case, &model);
        let expected = case.floats("adamw.losses");
        let (found, trained) = trained(model, &batch, None, expected.len() - 1, Parameter::is_matrix, &device);
        case.close("losses of ten steps", &found, &expected, 1e-5);
        for parameter in trained.trained_parameters() {
            let key = format!("adamw.base_model.model.{}", parameter.name);
            case.close(&key, &host(parameter.value), &case.floats(&key), 1e-5);
        }
        announce(&format!("an adapter of PEFT compared: {}", case.name));
    }
}
