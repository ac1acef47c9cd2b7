//! Adds a term of one's own to the loss: a price on certainty (Pereyra et al., arXiv 1701.06548), −β times the entropy of each
//! prediction. It takes a pass of its own over the batch, from hidden states through logits to gradients, which are added to those
//! of the model's objective.
//!
//! `cargo run --release --example objective_term`

use burn::tensor::{Device, Tensor, activation::log_softmax};
use lowkey_batch::Batch;
use lowkey_model::config::{ModelConfig, ModelSection};
use lowkey_model::objective::{Objective, Term};
use lowkey_model::{CausalLm, Recompute, ids_tensor};
use lowkey_train::optimizer::{Optimizer, Update};
use lowkey_train::run_config::{OptimizerKind, OptimizerSection};

/// Mean entropy of the predictions in nats, with the graph that it came from.
fn entropy(model: &CausalLm, batch: &Batch, device: &Device) -> Tensor<1> {
    let ids = ids_tensor(&batch.input_ids, batch.rows, batch.seq_len, device);
    let context = model.context(&batch.document_starts, batch.seq_len, device);
    let log_p = log_softmax(model.logits(model.hidden(ids, &context, None)), 2);
    -(log_p.clone().exp() * log_p).sum() / (batch.rows * batch.seq_len) as f64
}

/// Gradients of the mean loss minus `beta` times the mean entropy.
fn gradients(model: &CausalLm, batch: &Batch, beta: f64, device: &Device) -> Vec<Tensor<1>> {
    let scale = 1.0 / batch.target_tokens() as f64;
    let objective = Objective { scale, terms: &[Term::NEXT] };
    let (_, own) = model.loss_and_gradients(batch.all(), objective, Recompute::None, device);
    if beta == 0.0 {
        return own;
    }
    let mut graph = (entropy(model, batch, device) * -beta).backward();
    own.into_iter().zip(model.take_gradients(&mut graph)).map(|(a, b)| a + b).collect()
}

/// Entropy after forty steps.
fn trained(config: &ModelConfig, batch: &Batch, beta: f64, device: &Device) -> f32 {
    let settings = OptimizerSection {
        kind: OptimizerKind::AdamW,
        lr: 1e-2,
        momentum: None,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip: None,
        layer_lr_decay: None,
        loraplus_lr_ratio: None,
    };
    let mut model = CausalLm::init(config, 1, device);
    let mut optimizer = Optimizer::new(&settings, &model.trained_parameters(), |_| false);
    for _ in 0..40 {
        let gradients = gradients(&model, batch, beta, device);
        model.update(|parameters| optimizer.step(parameters, gradients, &Update::new(1.0, settings.lr)));
    }
    entropy(&model, batch, device).into_scalar()
}

fn main() -> anyhow::Result<()> {
    let section: ModelSection = serde_json::from_value(serde_json::json!({
        "attention": "mla",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }))?;
    let (config, _notes) = section.resolve(32, 16)?;
    let device = lowkey_kernels::device::open("cpu")?.autodiff();
    let mut batch = Batch::with_capacity(16, 1);
    for position in 0..16 {
        batch.input_ids.push(position * 3 % 32);
        batch.targets.push(i64::from((position + 1) * 3 % 32));
        batch.document_starts.push(0);
    }
    batch.end_row(false);

    let (without, with) = (trained(&config, &batch, 0.0, &device), trained(&config, &batch, 0.5, &device));
    println!("entropy of the predictions: {without:.3} nats without the term, {with:.3} with it");
    assert!(with > 2.0 * without, "a price on certainty keeps predictions uncertain");
    Ok(())
}
