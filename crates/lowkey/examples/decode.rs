//! Decodes with one model in three forms of Multi-head Latent Attention: keys and values rebuilt from the cached latents,
//! attention in latent space (absorbed), and the same with the maps around it multiplied out (fused). They give the same tokens.
//!
//! `cargo run --release --example decode`

use std::ops::ControlFlow;

use lowkey_export::export::fused_layers;
use lowkey_infer::{Form, GenerateConfig, Weights, generate};
use lowkey_model::CausalLm;
use lowkey_model::config::ModelSection;

fn main() -> anyhow::Result<()> {
    let section: ModelSection = serde_json::from_value(serde_json::json!({
        "attention": "mla",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }))?;
    let (config, _notes) = section.resolve(100, 64)?;
    let device = lowkey_kernels::device::open("cpu")?;
    let model = CausalLm::init(&config, 7, &device);

    let fused = fused_layers(&model, &device)?;
    let weights = Weights { model: &model, fused: &fused };
    let prompt = [3, 14, 15, 92, 65, 35];
    let mut first: Option<Vec<u32>> = None;
    for form in [Form::Expanded, Form::Absorbed, Form::Fused] {
        let settings = GenerateConfig { max_new_tokens: 24, form, ..GenerateConfig::default() };
        let found = generate(weights, &prompt, &settings, &device, &mut |_| ControlFlow::Continue(()))?;
        println!("{form}: {:?}, from a cache of {} bytes", found.ids, found.cache_bytes);
        let expected = first.get_or_insert_with(|| found.ids.clone());
        assert_eq!(&found.ids, expected, "{form} continues as the others do");
    }
    Ok(())
}
