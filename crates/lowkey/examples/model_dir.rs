//! Writes a model directory as Hugging Face lays it out, reads it back, and makes a directory of half the size from it.
//!
//! `cargo run --release --example model_dir`

use burn::tensor::Device;
use lowkey_files::mark::Kind;
use lowkey_model::checkpoint::WeightDtype;
use lowkey_model::config::ModelSection;
use lowkey_model::{CausalLm, ModelDir, NewModelDir, ids_tensor};

/// Weights above this are cut into shards.
const SHARD: usize = 1 << 30;

/// Largest difference of two models' logits for a few tokens.
fn difference(a: &CausalLm, b: &CausalLm, device: &Device) -> f32 {
    let ids = ids_tensor(&[1, 2, 3, 5, 8, 13], 1, 6, device);
    (a.forward(ids.clone()) - b.forward(ids)).abs().max().into_scalar()
}

fn main() -> anyhow::Result<()> {
    let section: ModelSection = serde_json::from_value(serde_json::json!({
        "attention": "mla",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }))?;
    let (config, _notes) = section.resolve(50, 32)?;
    let device = lowkey_kernels::device::open("cpu")?;
    let model = CausalLm::init(&config, 1, &device);

    let folder = tempfile::tempdir()?;
    let wide = folder.path().join("f32");
    std::fs::create_dir(&wide)?;
    model.save(&wide, WeightDtype::F32, SHARD)?;

    // Names and shapes are compared with config.json before a value is read.
    let source = ModelDir::open(&wide)?;
    assert_eq!(source.config()?, config);
    assert_eq!(difference(&model, &source.load(&device)?, &device), 0.0);

    // A directory made from another takes its name when it is whole, and carries the other's tokenizer.
    let narrow = folder.path().join("bf16");
    let made = NewModelDir::begin(&narrow, Kind::Model, false, &source)?;
    made.save(&model, WeightDtype::Bf16, SHARD)?;
    made.carry(&source)?;
    made.commit()?;

    let rounded = ModelDir::open(&narrow)?.load(&device)?;
    let off = difference(&model, &rounded, &device);
    println!("{}: as it was; in bf16 the logits move by at most {off:.4}", config.attention_name());
    assert!(off > 0.0 && off < 0.1, "bf16 keeps eight bits of a weight");
    Ok(())
}
