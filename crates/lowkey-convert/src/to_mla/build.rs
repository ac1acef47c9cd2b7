//! A model of latent attention from the weights of its layers.

use burn::tensor::Device;
use faer::Mat;
use lowkey_model::CausalLm;
use lowkey_model::attention::{AttentionConfig, MlaConfig};
use lowkey_model::rope::RopePairs;

use super::weights::Weights;
use crate::assemble::with_tensors;
use crate::error::Result;

/// What all layers of a model have in common, where one of them may not need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Common {
    /// Numbers of the latent: in a layer of lower rank some are 0.
    pub(crate) rank: usize,
    /// Biases of latent, shared key and output.
    pub(crate) attention_bias: bool,
    /// Those of queries.
    pub(crate) query_bias: bool,
}

impl Common {
    /// The least that these layers need.
    pub(crate) fn of(layers: &[Weights]) -> Self {
        let any = |of: &dyn Fn(&Weights) -> bool| layers.iter().any(of);
        let biased = |map: &Mat<f64>| map.subcols(map.ncols() - 1, 1).norm_max() > 0.0;
        Self {
            rank: layers.iter().map(|layer| layer.latent.nrows()).max().unwrap_or(0),
            attention_bias: any(&|layer| {
                biased(&layer.shared) || layer.latent_bias.norm_max() > 0.0 || layer.out_bias.norm_max() > 0.0
            }),
            query_bias: any(&|layer| biased(&layer.query)),
        }
    }

    /// What either needs.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            rank: self.rank.max(other.rank),
            attention_bias: self.attention_bias || other.attention_bias,
            query_bias: self.query_bias || other.query_bias,
        }
    }
}

/// `model` with each layer's attention in the place of its own. `frequencies` says for each pair of numbers that turn with which of
/// those of `width` rotated numbers.
pub(crate) fn with_attention(
    model: &CausalLm,
    layers: &[Weights],
    common: Common,
    (frequencies, width): (Vec<usize>, usize),
    device: &Device,
) -> Result<CausalLm> {
    let [nope, rope, value] = layers.first().map_or([0; 3], |layer| layer.sizes);
    let Common { rank, attention_bias, query_bias } = common;
    let d = model.config.hidden_size;
    let mla = MlaConfig {
        latent_norm: false,
        rope_interleave: false,
        attention_bias,
        query_bias,
        ..MlaConfig::deepseek(rank, [nope, rope, value])
    };
    let mut config = model.config.clone();
    for layer in config.layers.iter_mut() {
        layer.attention = AttentionConfig::Mla(mla.clone());
    }
    let all = model.config.inverse_frequencies();
    let wanted = frequencies.iter().map(|l| all.get(*l).copied().unwrap_or(0.0));
    // Those that DeepSeek's attention would choose itself need no mention.
    let own = config.inverse_frequencies();
    if !own.iter().zip(wanted).all(|(own, wanted)| (own - wanted).abs() <= 1e-12 * wanted) {
        config.latents_mut().for_each(|mla| {
            mla.rope_pairs = Some(RopePairs { width, frequencies: frequencies.clone() });
        });
    }
    config.family = config.natural_family();
    config.check()?;

    let mut tensors = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{i}.self_attn.{part}");
        let mut put = |part: &str, numbers: Vec<f64>| tensors.push((name(part), numbers));
        let low = layer.latent.nrows();
        put("q_proj.weight", flat(layer.query.nrows(), d, |i, j| layer.query[(i, j)]));
        put("q_proj.bias", flat(layer.query.nrows(), 1, |i, _| layer.query[(i, d)]));
        let down = |i: usize, j: usize| match i {
            _ if i >= rank => layer.shared[(i - rank, j)],
            _ if i >= low => 0.0,
            _ if j == d => layer.latent_bias[(i, 0)],
            _ => layer.latent[(i, j)],
        };
        put("kv_a_proj_with_mqa.weight", flat(rank + rope, d, down));
        put("kv_a_proj_with_mqa.bias", flat(rank + rope, 1, |i, _| down(i, d)));
        put("kv_a_layernorm.weight", vec![1.0; rank]);
        let up = flat(layer.up.nrows(), rank, |i, j| if j < low { layer.up[(i, j)] } else { 0.0 });
        put("kv_b_proj.weight", up);
        put("o_proj.bias", flat(d, 1, |i, _| layer.out_bias[(i, 0)]));
    }
    Ok(with_tensors(model, &config, tensors, device))
}

/// `of(row, column)`, row by row.
fn flat(rows: usize, columns: usize, of: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let of = &of;
    (0..rows).flat_map(|i| (0..columns).map(move |j| of(i, j))).collect()
}
