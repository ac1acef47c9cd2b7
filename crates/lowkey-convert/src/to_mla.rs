//! Full keys and values become a latent: multi-head, grouped-query and multi-query attention as Multi-head Latent Attention.
//!
//! [`exact`] computes the same function. Every rotated key head becomes a part of the one shared key, whose frequencies then repeat;
//! a query reads zeros in the parts of other groups (TransMLA, arXiv 2502.07864, eqs. 11–15). Values, and keys that do not turn, are
//! linear in the hidden state, and a latent of their joint rank holds them. So the cache is never wider than before, and narrower
//! only where that rank is less: whatever more is saved is an approximation. [`narrowed`] makes the first, in which only the strongest
//! directions of keys go on turning, and the rest moves into the latent; cutting the latent, as of any model that has one, is the second.

mod absorb;
mod build;
mod fit;
mod heads;
mod inputs;
mod turning;
mod weights;

use burn::tensor::Device;
use faer::{Mat, c64};
use lowkey_model::CausalLm;
use lowkey_model::attention::{AttentionConfig, GroupedConfig, MlaConfig};

pub use absorb::absorb_head_norms;
pub use fit::{Converted, Tried, Wanted, Width, fit};
pub use inputs::Inputs;
pub use turning::Keep;

use crate::error::{Error, Result};
use crate::matrix::check_finite;
use heads::Heads;
use turning::{Directions, Turning, mean_turn, share};
use weights::Weights;

/// By which power of their distance pairs of query and key count less where a constant is to stand in for a rotation, and where it is
/// asked what leaving a direction out costs. Of the powers 0 to 3 those by which one small language
/// model lost least.
const STANDS_IN: i32 = 2;
const COSTS: i32 = 1;

/// The same function with latent attention, to rounding.
///
/// # Errors
/// [`Error::Unsupported`] for a model that has latents already, or whose key heads have norms of their own: their lengths are no linear
/// function of anything that is cached ([`absorb_head_norms`] is the nearest model without). [`Error::NotFinite`] for a weight that is
/// no number.
pub fn exact(model: &CausalLm, device: &Device) -> Result<CausalLm> {
    let (grouped, layers) = source(model)?;
    let turning = vec![Turning::whole(grouped.num_key_value_heads); grouped.rotary_dim / 2];
    let counts = vec![grouped.num_key_value_heads; turning.len()];
    let turning = vec![turning; layers.len()];
    let means = without_mean(model);
    convert(model, &grouped, &layers, &turning, (&counts, &means), device)
}

/// Latent attention with `rotated` numbers of a shared key that turns, of those that [`exact`] would have; what no longer turns is in
/// the latent, without a position.
///
/// # Errors
/// As [`exact`]; [`Error::Setting`] where `rotated` is odd or more than there are.
pub fn narrowed(model: &CausalLm, rotated: usize, keep: Keep, inputs: &Inputs, device: &Device) -> Result<CausalLm> {
    let (grouped, layers) = source(model)?;
    let groups = grouped.num_key_value_heads;
    let most = groups * grouped.rotary_dim;
    if rotated > most || !rotated.is_multiple_of(2) {
        let why = format!("an even number, at most the {most} that turn now: {groups} heads of {}", grouped.rotary_dim);
        return Err(Error::Setting { field: "rope_dim", value: rotated.to_string(), why });
    }
    let frequencies = model.config.inverse_frequencies();
    let means = |power| {
        let near = inputs.near(power);
        frequencies.iter().map(|frequency| mean_turn(*frequency, &near)).collect::<Vec<c64>>()
    };
    let (turns, means) = (means(STANDS_IN), means(COSTS));
    let mut costs = vec![vec![0.0; groups]; frequencies.len()];
    let mut directions = Vec::with_capacity(layers.len());
    for (layer, (heads, moment)) in layers.iter().zip(&inputs.moments).enumerate() {
        let mut of_layer = Vec::with_capacity(frequencies.len());
        for (at, ((turn, mean), costs)) in turns.iter().zip(&means).zip(&mut costs).enumerate() {
            let found = Directions::of(heads, moment, at, layer)?;
            // The mean of |e^(−iθΔ) − turn|².
            let missed = 1.0 - 2.0 * (mean.conj() * turn).re + turn.norm_sqr();
            for (cost, energy) in costs.iter_mut().zip(&found.energies) {
                *cost += energy * missed;
            }
            of_layer.push(found);
        }
        directions.push(of_layer);
    }
    let counts = share(&costs, groups, rotated / 2, keep);
    // Cosines and sines have a factor under YaRN, and scores its square.
    let factor = model.config.rope.table_factor().powi(2);
    let turning: Vec<Vec<Turning>> = directions
        .iter()
        .map(|of_layer| {
            let each = of_layer.iter().zip(&counts).zip(&turns);
            each.map(|((found, count), turn)| found.keep(*count, *turn * factor)).collect()
        })
        .collect();
    convert(model, &grouped, &layers, &turning, (&counts, &inputs.constants()), device)
}

/// Numbers per token of the rotated keys, all heads together, and of what is cached.
///
/// # Errors
/// As [`exact`], but for weights.
pub fn widths(model: &CausalLm) -> Result<[usize; 2]> {
    let grouped = sizes(model)?;
    Ok([grouped.num_key_value_heads * grouped.rotary_dim, 2 * grouped.num_key_value_heads * grouped.head_dim])
}

fn sizes(model: &CausalLm) -> Result<GroupedConfig> {
    heads::grouped(model)?;
    match model.config.attention() {
        AttentionConfig::Grouped(grouped) => Ok(grouped.clone()),
        AttentionConfig::Mla(_) => {
            Err(Error::Unsupported { what: "making it latent attention", why: "it has latents already".into() })
        }
    }
}

/// For each layer (0, 1): no mean that is taken away.
fn without_mean(model: &CausalLm) -> Vec<Mat<f64>> {
    let d = model.config.hidden_size;
    vec![Mat::from_fn(d + 1, 1, |i, _| if i == d { 1.0 } else { 0.0 }); model.config.layers.len()]
}

fn source(model: &CausalLm) -> Result<(GroupedConfig, Vec<Heads>)> {
    let grouped = sizes(model)?;
    if grouped.qk_norm {
        let why = "each of its query and key heads is normalised by itself (qk_norm, as in Qwen3), and keys are rebuilt from a latent by \
                   linear maps; a calibration text finds the nearest model without these norms"
            .to_owned();
        return Err(Error::Unsupported { what: "an exact latent form", why });
    }
    check_finite(model)?;
    let layers = heads::grouped(model)?.into_iter().map(Heads::of).collect::<Result<_>>()?;
    Ok((grouped, layers))
}

fn convert(
    model: &CausalLm,
    grouped: &GroupedConfig,
    layers: &[Heads],
    turning: &[Vec<Turning>],
    (counts, means): (&[usize], &[Mat<f64>]),
    device: &Device,
) -> Result<CausalLm> {
    let mut made = Vec::with_capacity(layers.len());
    for (layer, ((heads, turning), mean)) in layers.iter().zip(turning).zip(means).enumerate() {
        let scale = scale_of(model, heads, turning);
        made.push(Weights::of(heads, turning, scale, mean, layer)?);
    }
    build::with_attention(model, &made, counts, grouped.rotary_dim, device)
}

/// The factor on the logits of latent attention of these sizes.
fn scale_of(model: &CausalLm, heads: &Heads, turning: &[Turning]) -> f64 {
    let mut config = model.config.clone();
    let [nope, rope] = weights::widths(heads, turning);
    for layer in config.layers.iter_mut() {
        layer.attention = AttentionConfig::Mla(MlaConfig::deepseek(1, [nope, rope, heads.dims.head_dim]));
    }
    config.softmax_scale()
}

#[cfg(test)]
pub(crate) mod tests;
