//! Cached decoding against the forward pass without a cache, over models of every kind with random parameters.

mod adapters;
mod agreement;
mod formats;
mod generation;
mod packed;
mod reference;
mod scheduler;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use lowkey_model::{
    CausalLm, ModelConfig,
    attention::{Attention, AttentionConfig, FusedMla, GroupedConfig, Mla, MlaConfig},
    config::{Family, LayerConfig, Layers, MlpConfig},
    ids_tensor,
    rope::{RopeConfig, RopePairs, RopeType},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Form;

const FORMS: [Form; 4] = [Form::Expanded, Form::Absorbed, Form::Fused, Form::Auto];

/// Sizes that have no factor in common, so that a mixed-up axis cannot go unnoticed.
fn odd_mla() -> MlaConfig {
    MlaConfig::deepseek(19, [6, 10, 5])
}

fn grouped(num_key_value_heads: usize) -> GroupedConfig {
    GroupedConfig { num_key_value_heads, head_dim: 10, rotary_dim: 10, qkv_bias: false, o_bias: false, qk_norm: false }
}

fn config(heads: usize, attention: AttentionConfig) -> ModelConfig {
    ModelConfig {
        vocab_size: 53,
        hidden_size: 23,
        num_attention_heads: heads,
        max_position_embeddings: 192,
        layers: Layers::equal(LayerConfig { attention, mlp: MlpConfig { intermediate_size: 29, bias: false } }, 3)
            .unwrap(),
        kv_elastic_ranks: None,
        rope: RopeConfig { rope_theta: 500.0, ..RopeConfig::default() },
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        initializer_range: Some(0.35),
        family: Family::Lowkey,
        bos_token_id: None,
        eos_token_id: Vec::new(),
    }
}

fn mla(heads: usize, change: impl FnOnce(&mut MlaConfig)) -> ModelConfig {
    let mut mla = odd_mla();
    change(&mut mla);
    config(heads, AttentionConfig::Mla(mla))
}

/// With so much of each layer's latent cached.
fn cut(mut config: ModelConfig, ranks: [usize; 3]) -> ModelConfig {
    for (mla, rank) in config.latents_mut().zip(ranks) {
        mla.kv_cache_rank = Some(rank);
    }
    config
}

/// One configuration of every kind.
fn zoo() -> Vec<(&'static str, ModelConfig)> {
    let yarn = RopeConfig {
        rope_theta: 500.0,
        rope_type: RopeType::Yarn,
        factor: Some(6.0),
        original_max_position_embeddings: Some(32),
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        ..RopeConfig::default()
    };
    let with_rope = |mut config: ModelConfig, rope: &RopeConfig| {
        config.rope = rope.clone();
        config
    };
    let tied = |mut config: ModelConfig| {
        config.tie_word_embeddings = true;
        config
    };
    let gqa = |change: fn(&mut GroupedConfig), kv_heads| {
        let mut grouped = grouped(kv_heads);
        change(&mut grouped);
        config(4, AttentionConfig::Grouped(grouped))
    };
    let linear = RopeConfig { rope_type: RopeType::Linear, factor: Some(3.0), ..RopeConfig::default() };
    let zoo = vec![
        ("mla", mla(3, |_| {})),
        ("mla, one head", mla(1, |_| {})),
        ("mla, q_lora_rank", mla(3, |m| m.q_lora_rank = Some(11))),
        ("mla, halves", mla(3, |m| m.rope_interleave = false)),
        ("mla, yarn", with_rope(mla(3, |m| m.q_lora_rank = Some(11)), &yarn)),
        ("mla, attention_bias", mla(3, |m| (m.attention_bias, m.q_lora_rank) = (true, Some(7)))),
        ("mla, latent_scale", mla(3, |m| m.latent_scale = true)),
        ("mla, no latent norm", mla(3, |m| m.latent_norm = false)),
        ("mla, query bias", mla(3, |m| (m.query_bias, m.attention_bias) = (true, true))),
        ("mla, rope pairs", mla(3, |m| m.rope_pairs = Some(RopePairs { width: 12, frequencies: vec![3, 0, 5, 1, 1] }))),
        ("mla, R = 0", mla(3, |m| m.qk_rope_head_dim = 0)),
        ("mla, L = 1", mla(3, |m| m.kv_lora_rank = 1)),
        ("mla, cut", cut(mla(3, |_| {}), [5, 3, 19])),
        (
            "mla, cut, q_lora_rank, latent_scale",
            cut(mla(3, |m| (m.q_lora_rank, m.latent_scale) = (Some(11), true)), [1, 8, 18]),
        ),
        ("mla, tied", tied(mla(3, |_| {}))),
        ("mha", gqa(|_| {}, 4)),
        ("gqa, qk_norm", gqa(|g| g.qk_norm = true, 2)),
        ("gqa, bias, linear", with_rope(gqa(|g| (g.qkv_bias, g.o_bias) = (true, true), 2), &linear)),
        ("gqa, yarn, tied", tied(with_rope(gqa(|_| {}, 2), &yarn))),
        ("mqa, partial rotary", gqa(|g| (g.rotary_dim, g.qk_norm) = (4, true), 1)),
        ("mqa, no rotary", gqa(|g| g.rotary_dim = 0, 1)),
    ];
    for (name, config) in &zoo {
        config.check().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    zoo
}

/// A model none of whose parameters has its initial value: gains away from 1, biases away from 0.
fn random_model(config: &ModelConfig, seed: u64) -> CausalLm {
    let device = Device::flex();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let model = CausalLm::init(config, seed, &device);
    let values = model.parameters().into_iter().map(|parameter| {
        let values = parameter.value.try_into_vec_as::<f32>().unwrap();
        let moved: Vec<f32> = values.iter().map(|x| x + random.random_range(-0.5f32..0.5)).collect();
        Tensor::from_data(moved.as_slice(), &device)
    });
    let values = values.collect();
    model.with_values(values)
}

/// The products that the fused form attends with, formed in f64.
fn fused(mla: &Mla) -> FusedMla {
    let lowkey_model::attention::MlaDims { heads, nope, rope, value, rank, .. } = mla.dims;
    let wide = |weight: Tensor<2>| weight.cast(FloatDType::F64);
    let up = mla.q_b_proj.as_ref().or(mla.q_proj.as_ref()).unwrap().matrix();
    let dtype = up.dtype();
    let narrow = |product: Tensor<2>| if dtype == DType::F32 { product.cast(FloatDType::F32) } else { product };
    let [_, inner] = up.dims();
    let [d, _] = mla.o_proj.matrix().dims();
    let up = wide(up).reshape([heads, nope + rope, inner]);
    let kv_b = wide(mla.kv_b_proj.matrix()).reshape([heads, nope + value, rank]);
    let mapped = kv_b.clone().narrow(1, 0, nope).swap_dims(1, 2).matmul(up.clone().narrow(1, 0, nope));
    let query = if rope > 0 { Tensor::cat(vec![mapped, up.narrow(1, nope, rope)], 1) } else { mapped };
    let out = wide(mla.o_proj.matrix()).reshape([d, heads, value]).swap_dims(0, 1);
    let output = out.matmul(kv_b.narrow(1, nope, value)).swap_dims(0, 1);
    FusedMla {
        query: narrow(query.reshape([heads * (rank + rope), inner])),
        output: narrow(output.reshape([d, heads * rank])),
    }
}

fn fused_layers(model: &CausalLm) -> Vec<Option<FusedMla>> {
    let layer = |attention: &Attention| match attention {
        Attention::Mla(mla) if model.config.attention().fuses() => Some(fused(mla)),
        _ => None,
    };
    model.model.layers.iter().map(|block| layer(&block.self_attn)).collect()
}

fn tokens(len: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| random.random_range(0..53)).collect()
}

/// The same model in f64.
fn widened(model: &CausalLm) -> CausalLm {
    let values = model.parameters().into_iter().map(|parameter| parameter.value.cast(FloatDType::F64)).collect();
    model.clone().with_values(values)
}

/// Logits of every position without a cache, `[T][vocab]`: in f64, so that what is held against them has its own rounding alone.
fn uncached(model: &CausalLm, ids: &[u32]) -> Vec<Vec<f32>> {
    let logits = widened(model).forward(ids_tensor(ids, 1, ids.len(), &Device::flex()));
    assert_eq!(logits.dtype(), DType::F64);
    rows(logits.cast(FloatDType::F32))
}

/// `[1, T, vocab]` or `[T, vocab]` → `[T][vocab]`
fn rows<const D: usize>(logits: Tensor<D>) -> Vec<Vec<f32>> {
    let vocab = logits.dims()[D - 1];
    let values = logits.try_into_vec_as::<f32>().unwrap();
    values.chunks(vocab).map(<[f32]>::to_vec).collect()
}

/// Within 1e-4, or 2.5e-5 of the row's largest logit, and never more than 1.25e-4. All forms but one stay within 1e-4: the fused form of the model with a factor on its latents, whose weights are rounded
/// after they were multiplied, has been 1.12e-4 off.
fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let bound = expected.iter().fold(1e-4f32, |bound, x| bound.max(2.5e-5 * x.abs())).min(1.25e-4);
    for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
        // A NaN fails too.
        assert!((found - expected).abs() < bound, "{what}: logit {token} is {found}, expected {expected}");
    }
}

/// The most probable continuation by whole forward passes: what every cached way has to reproduce.
fn greedy_uncached(model: &CausalLm, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let logits = uncached(model, &ids).pop().unwrap();
        let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        ids.push(best as u32);
    }
    ids.split_off(prompt.len())
}
