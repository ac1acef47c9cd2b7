//! A model of full keys and values from the weights of its layers.

use burn::tensor::Device;
use faer::Mat;
use lowkey_model::CausalLm;
use lowkey_model::attention::{AttentionConfig, GroupedConfig};

use super::arrange::Arrangement;
use crate::assemble::with_tensors;
use crate::error::Result;

/// What a layer of full keys and values is made of, in f64. Maps of the hidden state have d columns and one of biases.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// `[H·D, d+1]`
    pub(crate) query: Mat<f64>,
    /// `[G·D, d+1]`
    pub(crate) key: Mat<f64>,
    /// `[G·D, d+1]`
    pub(crate) value: Mat<f64>,
    /// `[d, H·D]`
    pub(crate) out: Mat<f64>,
    /// `[d, 1]`
    pub(crate) out_bias: Mat<f64>,
    /// G
    pub(crate) groups: usize,
}

/// `model` with each layer's attention in the place of its own.
pub(crate) fn with_heads(
    model: &CausalLm,
    layers: &[Weights],
    places: &Arrangement,
    device: &Device,
) -> Result<CausalLm> {
    let d = model.config.hidden_size;
    let biased = |map: &Mat<f64>| map.subcols(d, 1).norm_max() > 0.0;
    let any = |of: &dyn Fn(&Weights) -> bool| layers.iter().any(of);
    let o_bias = any(&|layer| layer.out_bias.norm_max() > 0.0);
    let qkv_bias = any(&|layer| [&layer.query, &layer.key, &layer.value].into_iter().any(biased));
    let mut config = model.config.clone();
    // Biases as one of the known model types has them: Llama all four or none, Qwen2 three. Those that are not needed are zeros.
    let all = o_bias || qkv_bias && config.mlp().bias;
    let grouped = GroupedConfig {
        num_key_value_heads: layers.first().map_or(1, |layer| layer.groups),
        head_dim: places.width,
        rotary_dim: places.width,
        qkv_bias: qkv_bias || all,
        o_bias: all,
        qk_norm: false,
    };
    for layer in config.layers.iter_mut() {
        layer.attention = AttentionConfig::Grouped(grouped.clone());
    }
    config.kv_elastic_ranks = None;
    if let Some(rope) = &places.rope {
        config.rope = rope.clone();
    }
    config.family = config.natural_family();
    config.check()?;

    let mut tensors = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        let mut put = |part: &str, map: &Mat<f64>, columns: std::ops::Range<usize>| {
            let columns = &columns;
            let numbers = (0..map.nrows()).flat_map(|i| columns.clone().map(move |j| map[(i, j)])).collect();
            tensors.push((format!("model.layers.{i}.self_attn.{part}"), numbers));
        };
        for (name, map) in [("q_proj", &layer.query), ("k_proj", &layer.key), ("v_proj", &layer.value)] {
            put(&format!("{name}.weight"), map, 0..d);
            put(&format!("{name}.bias"), map, d..d + 1);
        }
        put("o_proj.weight", &layer.out, 0..layer.out.ncols());
        put("o_proj.bias", &layer.out_bias, 0..1);
    }
    Ok(with_tensors(model, &config, tensors, device))
}
