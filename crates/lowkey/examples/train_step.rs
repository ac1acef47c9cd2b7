//! Builds a small Multi-head Latent Attention model and takes one step of AdamW on one batch.
//!
//! `cargo run --release --example train_step`

use lowkey_batch::Batch;
use lowkey_kernels::optim::clip_factor;
use lowkey_model::config::ModelSection;
use lowkey_model::objective::{Objective, Term};
use lowkey_model::{CausalLm, Recompute};
use lowkey_train::optimizer::{Optimizer, Update, global_norm};
use lowkey_train::run_config::{OptimizerKind, OptimizerSection};

fn main() -> anyhow::Result<()> {
    // The keys of a run file's [model]; the vocabulary and the longest position come from the corpus.
    let section: ModelSection = serde_json::from_value(serde_json::json!({
        "attention": "mla",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }))?;
    let (config, _notes) = section.resolve(64, 16)?;
    let device = lowkey_kernels::device::open("cpu")?.autodiff();
    let mut model = CausalLm::init(&config, 1, &device);

    // Two rows that count, one in threes and one in fives.
    let mut batch = Batch::with_capacity(16, 2);
    for stride in [3, 5] {
        for position in 0..16 {
            batch.input_ids.push(position * stride % 64);
            batch.targets.push(i64::from((position + 1) * stride % 64));
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
    let (loss, gradients) = model.loss_and_gradients(batch.all(), objective, Recompute::None, &device);
    let before = f64::from(loss.nats.into_scalar::<f32>()) / targets;

    let norm = global_norm(&gradients)
        .map_err(|(index, norm)| anyhow::anyhow!("the gradient of parameter {index} has the norm {norm}"))?;
    let update = Update::new(clip_factor(norm, 1.0), settings.lr);
    model.update(|parameters| optimizer.step(parameters, gradients, &update));

    let after = f64::from(model.loss(batch.all(), 0.0, &device).nats.into_scalar::<f32>()) / targets;
    println!("{before:.4} nats per token before the step, {after:.4} after it (norm of the gradient {norm:.3})");
    assert!(after < before, "a step against the gradient lowers the loss");
    Ok(())
}
