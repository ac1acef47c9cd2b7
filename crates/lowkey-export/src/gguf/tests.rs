//! What the tests of this module share: small models in which no value is the initial one.

mod container;
mod grouped;
mod header;
mod models;
mod quantised;
mod reference;
mod sentence_piece;
mod tokenizers;

use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_model::{
    CausalLm, ModelConfig,
    attention::{AttentionConfig, MlaConfig},
    config::{Family, LayerConfig, Layers, MlpConfig},
    ids_tensor,
    rope::{RopeConfig, RopeType},
};

use super::*;

/// Sizes without a common factor, so that a mixed-up axis cannot go unnoticed.
pub(crate) fn odd_mla() -> MlaConfig {
    MlaConfig::deepseek(9, [5, 6, 7])
}

pub(crate) fn config_with(change: impl FnOnce(&mut ModelConfig, &mut MlaConfig)) -> ModelConfig {
    let mut mla = odd_mla();
    let mut config = ModelConfig {
        vocab_size: 29,
        hidden_size: 12,
        num_attention_heads: 3,
        max_position_embeddings: 128,
        layers: Layers::equal(
            LayerConfig {
                attention: AttentionConfig::Mla(mla.clone()),
                mlp: MlpConfig { intermediate_size: 17, bias: false },
            },
            2,
        )
        .unwrap(),
        kv_elastic_ranks: None,
        rope: RopeConfig::default(),
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        initializer_range: None,
        family: Family::Lowkey,
        bos_token_id: Some(3),
        eos_token_id: vec![4],
    };
    change(&mut config, &mut mla);
    config.latents_mut().for_each(|latent| *latent = mla.clone());
    config.family = config.natural_family();
    config.check().unwrap();
    config
}

pub(crate) fn yarn(mscale: Option<f64>, mscale_all_dim: Option<f64>) -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(4.0),
        original_max_position_embeddings: Some(32),
        mscale,
        mscale_all_dim,
        ..RopeConfig::default()
    }
}

/// Numbers in -1..1 that depend on the seed and the place only.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..len).map(|_| (next(&mut state) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// splitmix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A model none of whose parameters has its initial value: norms away from 1.
pub(crate) fn random_model(config: &ModelConfig, seed: u64) -> CausalLm {
    let device = Device::flex();
    let mut model = CausalLm::init(config, seed, &device);
    model.update(|parameters| {
        let changed = parameters.into_iter().enumerate().map(|(i, parameter)| {
            let noise = noise(seed * 1000 + i as u64, parameter.shape.iter().product());
            let values: Vec<f32> = match parameter.shape.as_slice() {
                [_, row] => noise.iter().map(|x| 1.7 * x / (*row as f32).sqrt()).collect(),
                _ => noise.iter().map(|x| 1.0 + 0.4 * x).collect(),
            };
            Tensor::from_data(TensorData::new(values, parameter.value.dims()), &device)
        });
        changed.collect()
    });
    model
}

pub(crate) fn logits(model: &CausalLm, ids: &[u32]) -> Vec<f32> {
    model.forward(ids_tensor(ids, 1, ids.len(), &Device::flex())).try_into_vec_as::<f32>().unwrap()
}

pub(crate) fn bits(model: &CausalLm) -> Vec<(String, Vec<u32>)> {
    let values = |p: Parameter| p.value.try_into_vec_as::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
    model.parameters().into_iter().map(|p| (p.name.clone(), values(p))).collect()
}

/// Largest difference over the largest logit.
pub(crate) fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().chain(expected).all(|x| x.is_finite()));
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
