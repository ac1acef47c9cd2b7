//! Small models that the tests of several modules share: odd sizes, and every option at least once.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use crate::config::{Family, ModelConfig};
use crate::layer_config::{LayerConfig, Layers, MlpConfig};
use crate::model::CausalLm;
use crate::rope::{RopeConfig, RopePairs, RopeType};
use crate::tensor::{Role, TensorSpec};

pub(crate) fn mla() -> MlaConfig {
    MlaConfig::deepseek(9, [5, 6, 7])
}

pub(crate) fn grouped() -> GroupedConfig {
    GroupedConfig { num_key_value_heads: 3, head_dim: 6, rotary_dim: 6, qkv_bias: false, o_bias: false, qk_norm: false }
}

pub(crate) fn yarn() -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(4.0),
        original_max_position_embeddings: Some(16),
        beta_fast: Some(8.0),
        beta_slow: Some(1.0),
        mscale: Some(1.4),
        mscale_all_dim: Some(0.6),
        ..RopeConfig::default()
    }
}

/// A model of two layers around the given attention.
pub(crate) fn config(attention: AttentionConfig) -> ModelConfig {
    let mut config = ModelConfig {
        vocab_size: 29,
        hidden_size: 12,
        num_attention_heads: 3,
        max_position_embeddings: 128,
        layers: Layers::equal(LayerConfig { attention, mlp: MlpConfig { intermediate_size: 17, bias: false } }, 2)
            .unwrap(),
        kv_elastic_ranks: None,
        rope: RopeConfig::default(),
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        initializer_range: None,
        family: Family::Lowkey,
        bos_token_id: None,
        eos_token_id: Vec::new(),
    };
    config.family = config.natural_family();
    config
}

pub(crate) fn mla_with(change: impl FnOnce(&mut MlaConfig)) -> ModelConfig {
    let mut attention = mla();
    change(&mut attention);
    config(AttentionConfig::Mla(attention))
}

pub(crate) fn grouped_with(change: impl FnOnce(&mut GroupedConfig)) -> ModelConfig {
    let mut attention = grouped();
    change(&mut attention);
    config(AttentionConfig::Grouped(attention))
}

/// With so much of each layer's latent cached.
fn cut(mut config: ModelConfig, ranks: &[usize]) -> ModelConfig {
    config.set_kv_cache_ranks(Some(ranks));
    ModelConfig { family: config.natural_family(), ..config }
}

/// Configurations that between them use every option of a model, with a name each.
pub(crate) fn every_kind() -> Vec<(&'static str, ModelConfig)> {
    let tied = ModelConfig { tie_word_embeddings: true, ..mla_with(|_| ()) };
    let with_yarn = ModelConfig { rope: yarn(), ..mla_with(|m| m.q_lora_rank = Some(8)) };
    let mut v2 = mla_with(|_| ());
    v2.family = Family::DeepseekV2;
    let mut llama_by_another_name = grouped_with(|_| ());
    llama_by_another_name.family = Family::Lowkey;
    let mlp_bias = |mut config: ModelConfig| {
        config.layers.iter_mut().for_each(|layer| layer.mlp.bias = true);
        ModelConfig { family: config.natural_family(), ..config }
    };
    vec![
        ("MLA, feed-forward biases", mlp_bias(mla_with(|_| ()))),
        ("MLA in halves, feed-forward biases", mlp_bias(mla_with(|m| m.rope_interleave = false))),
        ("MHA, feed-forward biases", mlp_bias(grouped_with(|_| ()))),
        ("Qwen3's norms, feed-forward biases", mlp_bias(grouped_with(|g| g.qk_norm = true))),
        ("MLA", mla_with(|_| ())),
        ("MLA as DeepSeek-V2", v2),
        ("MLA with query latent", mla_with(|m| m.q_lora_rank = Some(8))),
        ("MLA with biases", mla_with(|m| m.attention_bias = true)),
        (
            "MLA with query latent and biases",
            mla_with(|m| {
                m.q_lora_rank = Some(8);
                m.attention_bias = true;
            }),
        ),
        ("MLA in halves", mla_with(|m| m.rope_interleave = false)),
        ("MLA with latent scale", mla_with(|m| m.latent_scale = true)),
        ("MLA without a latent norm", mla_with(|m| m.latent_norm = false)),
        ("MLA with a query bias", mla_with(|m| m.query_bias = true)),
        ("MLA with a query latent and a bias behind it", mla_with(|m| (m.q_lora_rank, m.query_bias) = (Some(8), true))),
        (
            "MLA with frequencies that repeat",
            mla_with(|m| m.rope_pairs = Some(RopePairs { width: 8, frequencies: vec![2, 0, 2] })),
        ),
        ("MLA without rotation", mla_with(|m| m.qk_rope_head_dim = 0)),
        ("MLA, cut", cut(mla_with(|_| ()), &[4, 9])),
        (
            "MLA with query latent and latent scale, cut",
            cut(mla_with(|m| (m.q_lora_rank, m.latent_scale) = (Some(8), true)), &[7, 1]),
        ),
        ("MLA, elastic", ModelConfig { kv_elastic_ranks: Some(vec![3, 5]), ..mla_with(|_| ()) }),
        ("MLA, tied", tied),
        ("MLA, YaRN", with_yarn),
        ("MHA", grouped_with(|_| ())),
        ("MHA as lowkey", llama_by_another_name),
        ("MQA", grouped_with(|g| g.num_key_value_heads = 1)),
        (
            "GQA with 4 query heads",
            ModelConfig { num_attention_heads: 4, ..grouped_with(|g| g.num_key_value_heads = 2) },
        ),
        ("Qwen2's biases", grouped_with(|g| g.qkv_bias = true)),
        (
            "Llama's biases",
            grouped_with(|g| {
                g.qkv_bias = true;
                g.o_bias = true;
            }),
        ),
        ("Qwen3's norms", grouped_with(|g| g.qk_norm = true)),
        ("partial rotation", grouped_with(|g| g.rotary_dim = 4)),
        ("no rotation", grouped_with(|g| g.rotary_dim = 0)),
        ("tied MHA with YaRN", ModelConfig { tie_word_embeddings: true, rope: yarn(), ..grouped_with(|_| ()) }),
    ]
}

/// `len` standard normal numbers.
pub(crate) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect()
}

/// A model whose norms and biases are random too: with ones and zeros half of all mistakes would not show.
pub(crate) fn scrambled(config: &ModelConfig, seed: u64, device: &Device) -> CausalLm {
    let mut tensors = 0;
    CausalLm::build(config, device, &mut |TensorSpec { shape, role, .. }| {
        tensors += 1;
        let values = normal(seed * 1000 + tensors, shape.iter().product());
        match role {
            Role::Embedding => values,
            Role::Norm => values.iter().map(|x| 1.0 + 0.3 * x.tanh()).collect(),
            Role::Bias | Role::Adapter(_) => values.iter().map(|x| 0.3 * x).collect(),
            Role::Head | Role::Matrix | Role::Residual => values.iter().map(|x| x / (shape[1] as f32).sqrt()).collect(),
        }
    })
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

/// Largest absolute difference; infinite where lengths differ or a number is not finite.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() || a.iter().chain(b).any(|x| !x.is_finite()) {
        return f32::INFINITY;
    }
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The reference cases with dense layers of a family that is implemented here: the project's own, and those of a second judge where
/// it lies beside the project.
pub(crate) fn dense_cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = |root: PathBuf| -> std::io::Result<Vec<PathBuf>> {
        let mut cases: Vec<PathBuf> = std::fs::read_dir(root)?
            .map(|entry| entry.unwrap().path())
            .filter(|dir| dir.join("config.json").is_file())
            .filter(|dir| {
                let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
                let config: serde_json::Value = serde_json::from_str(&text).unwrap();
                let dense = match config.get("first_k_dense_replace") {
                    Some(dense) => dense == &config["num_hidden_layers"],
                    None => true,
                };
                dense && config["model_type"] != "minicpm3"
            })
            .collect();
        cases.sort();
        Ok(cases)
    };
    let mut cases = list(here.join("../../tests/reference/cases")).unwrap();
    assert_eq!(cases.len(), 19, "{cases:?}");
    if let Ok(second) = list(here.join("../../../shared/reference/cases")) {
        assert!(second.len() >= 14, "only {} dense cases found", second.len());
        cases.extend(second);
    }
    cases
}
