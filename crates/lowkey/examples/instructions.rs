//! Does one kind of work so many times, for counting the instructions of it: those of twice are those of once and of everything around
//! it. `.ci/instructions` runs it under valgrind.
//!
//! `cargo run --release --example instructions -- train 2` (or `decode`, `prefill`)

use std::ops::ControlFlow;

use lowkey_batch::Batch;
use lowkey_infer::{Form, GenerateConfig, Weights, generate};
use lowkey_kernels::optim::clip_factor;
use lowkey_model::config::ModelSection;
use lowkey_model::objective::{Objective, Term};
use lowkey_model::{CausalLm, ModelConfig, Recompute};
use lowkey_train::optimizer::{Optimizer, Update, global_norm};
use lowkey_train::run_config::{OptimizerKind, OptimizerSection};

/// Tokens of the vocabulary.
const VOCAB: usize = 512;
/// Tokens of a row in training, and of a prompt.
const SEQ: usize = 48;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(what), Some(times)) = (arguments.next(), arguments.next().and_then(|times| times.parse().ok())) else {
        anyhow::bail!("give what to do (train, decode or prefill), and how often");
    };
    // Deep enough that a step is what it is in larger models: products, attention, the loss over the vocabulary.
    let section: ModelSection = serde_json::from_value(serde_json::json!({
        "attention": "mla",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 352,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    }))?;
    let (config, _notes) = section.resolve(VOCAB, 16 * SEQ)?;
    match &*what {
        "train" => train(&config, times),
        // Tokens after a prompt, eight at a time: of one the work around it would be too large a part.
        "decode" => continued(&config, 1, 3 * SEQ, 8 * times),
        "prefill" => continued(&config, times, 6 * SEQ, 1),
        _ => anyhow::bail!("there is no {what:?}: train, decode and prefill"),
    }
}

/// Steps of AdamW on two rows.
fn train(config: &ModelConfig, steps: usize) -> anyhow::Result<()> {
    let device = lowkey_kernels::device::open("cpu")?.autodiff();
    let mut model = CausalLm::init(config, 1, &device);
    let mut batch = Batch::with_capacity(SEQ, 2);
    for stride in [3, 5] {
        for position in 0..SEQ {
            batch.input_ids.push((position * stride % VOCAB) as u32);
            batch.targets.push(((position + 1) * stride % VOCAB) as i64);
            batch.document_starts.push(0);
        }
        batch.end_row(false);
    }
    let settings = OptimizerSection {
        kind: OptimizerKind::AdamW,
        lr: 1e-3,
        momentum: None,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: Some(1.0),
        layer_lr_decay: None,
        loraplus_lr_ratio: None,
    };
    let mut optimizer = Optimizer::new(&settings, &model.trained_parameters(), |parameter| parameter.is_matrix());
    let targets = batch.target_tokens() as f64;
    let objective = Objective { scale: 1.0 / targets, terms: &[Term::NEXT] };
    for step in 1..=steps {
        let (loss, gradients) = model.loss_and_gradients(batch.all(), objective, Recompute::None, &device);
        let nats = f64::from(loss.nats.into_scalar::<f32>()) / targets;
        let norm = global_norm(&gradients)
            .map_err(|(index, norm)| anyhow::anyhow!("the gradient of parameter {index} has the norm {norm}"))?;
        let update = Update::new(clip_factor(norm, 1.0), settings.lr);
        model.update(|parameters| optimizer.step(parameters, gradients, &update));
        println!("step {step}: {nats:.4} nats per token");
    }
    Ok(())
}

/// Continues a prompt in the absorbed form, and does so again.
fn continued(config: &ModelConfig, times: usize, prompt: usize, tokens: usize) -> anyhow::Result<()> {
    let device = lowkey_kernels::device::open("cpu")?;
    let model = CausalLm::init(config, 1, &device);
    let prompt: Vec<u32> = (0..prompt).map(|position| (position * 7 % VOCAB) as u32).collect();
    let settings = GenerateConfig { max_new_tokens: tokens, form: Form::Absorbed, ..GenerateConfig::default() };
    let weights = Weights { model: &model, fused: &[] };
    for _ in 0..times {
        let found = generate(weights, &prompt, &settings, &device, &mut |_| ControlFlow::Continue(()))?;
        println!("{} tokens after {}", found.ids.len(), prompt.len());
    }
    Ok(())
}
