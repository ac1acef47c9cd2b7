//! Full keys and values become a latent: multi-head, grouped-query and multi-query attention as Multi-head Latent Attention.
//!
//! [`exact`] computes the same function. Every rotated key head becomes a part of the one shared key, whose frequencies then repeat;
//! a query reads zeros in the parts of other groups (TransMLA, arXiv 2502.07864, eqs. 11–15). Values, and keys that do not turn, are
//! linear in the hidden state, and a latent of their joint rank holds them. So the cache is never wider than before, and narrower
//! only where that rank is less: whatever more is saved is an approximation. [`narrowed`] makes the first, in which only the strongest
//! directions of keys go on turning, and the rest moves into the latent; cutting the latent, as of any model that has one, is the second.

mod absorb;
mod build;
mod by_layer;
mod fit;
mod heads;
mod inputs;
mod stages;
mod turning;
mod weights;

use burn::tensor::Device;
use faer::{Mat, c64};
use lowkey_model::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use lowkey_model::{CausalLm, ModelConfig};

pub use absorb::absorb_head_norms;
pub use by_layer::{ByLayer, by_layer};
pub use fit::{Converted, Tried, Wanted, Width, fit};
pub use inputs::Inputs;
pub use stages::{Loss, Stage, Texts};
pub use turning::Keep;

use crate::error::{Error, Result};
use crate::matrix::check_finite;
use build::Common;
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
    exact_padded(model, None, device)
}

/// The same with what all layers of a larger model have in common.
fn exact_padded(model: &CausalLm, common: Option<Common>, device: &Device) -> Result<CausalLm> {
    let (grouped, layers) = source(model)?;
    let turning = (0..grouped.rotary_dim / 2).map(|l| Turning::whole(l, grouped.num_key_value_heads)).collect();
    let turning: Vec<Vec<Turning>> = vec![turning; layers.len()];
    convert(
        model,
        Parts { grouped: &grouped, layers: &layers, turning: &turning, means: &without_mean(model) },
        common,
        device,
    )
}

/// Latent attention with `rotated` numbers of a shared key that turns, of those that [`exact`] would have; what no longer turns is in
/// the latent, without a position.
///
/// # Errors
/// As [`exact`]; [`Error::Setting`] where `rotated` is odd or more than there are.
pub fn narrowed(model: &CausalLm, rotated: usize, keep: Keep, inputs: &Inputs, device: &Device) -> Result<CausalLm> {
    Narrowing::new(model, 1, inputs)?.narrowed(model, rotated, keep, device)
}

/// What is needed to leave out what turns least, found once for all widths.
pub(crate) struct Narrowing<'a> {
    grouped: GroupedConfig,
    layers: Vec<Heads>,
    inputs: &'a Inputs,
    /// The directions of each band in each layer.
    directions: Vec<Vec<Directions>>,
    /// What stands in for the rotation of each frequency.
    turns: Vec<c64>,
    /// What leaving out each direction of each band costs in all layers.
    costs: Vec<Vec<f64>>,
}

impl<'a> Narrowing<'a> {
    /// With bands of `fold` neighbouring frequencies.
    ///
    /// # Errors
    /// As [`exact`].
    pub(crate) fn new(model: &CausalLm, fold: usize, inputs: &'a Inputs) -> Result<Self> {
        let (grouped, layers) = source(model)?;
        let frequencies = model.config.inverse_frequencies();
        let means = |power| {
            let near = inputs.near(power);
            frequencies.iter().map(|frequency| mean_turn(*frequency, &near)).collect::<Vec<c64>>()
        };
        let (turns, means) = (means(STANDS_IN), means(COSTS));
        let mut costs: Vec<Vec<f64>> = Vec::new();
        let mut directions = Vec::with_capacity(layers.len());
        for (layer, (heads, moment)) in layers.iter().zip(&inputs.moments).enumerate() {
            let found = Directions::of_layer(heads, moment, fold, layer)?;
            costs.resize_with(found.len(), Vec::new);
            for (band, costs) in found.iter().zip(&mut costs) {
                let (turn, mean) = (turns[band.frequency()], means[band.frequency()]);
                // The mean of |e^(−iθΔ) − turn|².
                let missed = 1.0 - 2.0 * (mean.conj() * turn).re + turn.norm_sqr();
                costs.resize(band.energies.len(), 0.0);
                costs.iter_mut().zip(&band.energies).for_each(|(cost, energy)| *cost += energy * missed);
            }
            directions.push(found);
        }
        Ok(Self { grouped, layers, inputs, directions, turns, costs })
    }

    /// As [`narrowed`].
    pub(crate) fn narrowed(&self, model: &CausalLm, rotated: usize, keep: Keep, device: &Device) -> Result<CausalLm> {
        let counts = counts(&self.grouped, &self.costs, rotated, keep)?;
        self.turning(model, &counts, None, device)
    }

    /// With so many directions of each band that turn, and what all layers of a larger model have in common.
    fn turning(&self, model: &CausalLm, counts: &[usize], common: Option<Common>, device: &Device) -> Result<CausalLm> {
        // Cosines and sines have a factor under YaRN, and scores its square.
        let factor = model.config.rope.table_factor().powi(2);
        let rests: Vec<c64> = self.turns.iter().map(|turn| *turn * factor).collect();
        let of_layer = |found: &Vec<Directions>| {
            found.iter().zip(counts).flat_map(|(band, count)| band.keep(*count, &rests)).collect::<Vec<Turning>>()
        };
        let turning: Vec<Vec<Turning>> = self.directions.iter().map(of_layer).collect();
        let parts =
            Parts { grouped: &self.grouped, layers: &self.layers, turning: &turning, means: &self.inputs.constants() };
        convert(model, parts, common, device)
    }
}

/// How many directions of each band go on turning where `rotated` numbers do, by what leaving each out costs.
fn counts(grouped: &GroupedConfig, costs: &[Vec<f64>], rotated: usize, keep: Keep) -> Result<Vec<usize>> {
    let most = grouped.num_key_value_heads * grouped.rotary_dim;
    if rotated > most || !rotated.is_multiple_of(2) {
        let why = format!(
            "an even number, at most the {most} that turn now: {} heads of {}",
            grouped.num_key_value_heads, grouped.rotary_dim
        );
        return Err(Error::Setting { field: "rope_dim", value: rotated.to_string(), why });
    }
    Ok(share(costs, rotated / 2, keep))
}

/// Numbers per token of the rotated keys, all heads together, and of what is cached.
///
/// # Errors
/// As [`exact`], but for weights.
pub fn widths(config: &ModelConfig) -> Result<[usize; 2]> {
    let grouped = sizes_of(config)?;
    Ok([grouped.num_key_value_heads * grouped.rotary_dim, 2 * grouped.num_key_value_heads * grouped.head_dim])
}

fn sizes_of(config: &ModelConfig) -> Result<GroupedConfig> {
    match config.attention() {
        AttentionConfig::Grouped(grouped) => Ok(grouped.clone()),
        AttentionConfig::Mla(_) => {
            let why = "it has latents already; those can be cut".to_owned();
            Err(Error::Unsupported { what: "making it latent attention", why })
        }
    }
}

/// Numbers of one key head that turn.
fn one_head(config: &ModelConfig) -> usize {
    match config.attention() {
        AttentionConfig::Grouped(grouped) => grouped.rotary_dim,
        AttentionConfig::Mla(_) => 0,
    }
}

/// For each layer (0, 1): no mean that is taken away.
fn without_mean(model: &CausalLm) -> Vec<Mat<f64>> {
    let d = model.config.hidden_size;
    vec![Mat::from_fn(d + 1, 1, |i, _| if i == d { 1.0 } else { 0.0 }); model.config.layers.len()]
}

fn source(model: &CausalLm) -> Result<(GroupedConfig, Vec<Heads>)> {
    let grouped = sizes_of(&model.config)?;
    if grouped.qk_norm {
        return Err(normed());
    }
    check_finite(model)?;
    let layers = heads::grouped(model)?.into_iter().map(Heads::of).collect::<Result<_>>()?;
    Ok((grouped, layers))
}

/// Why a model with norms on its heads has no exact form.
fn normed() -> Error {
    let why = "each of its query and key heads is normalised by itself (qk_norm, as in Qwen3), and keys are rebuilt from a latent by \
               linear maps; a calibration text finds the nearest model without these norms"
        .to_owned();
    Error::Unsupported { what: "an exact latent form", why }
}

/// What a model of latent attention is made of, layer by layer.
struct Parts<'a> {
    grouped: &'a GroupedConfig,
    layers: &'a [Heads],
    turning: &'a [Vec<Turning>],
    /// What latents do not hold, [`Inputs::constants`].
    means: &'a [Mat<f64>],
}

/// `common`: what other layers need that are not there.
fn convert(model: &CausalLm, parts: Parts, common: Option<Common>, device: &Device) -> Result<CausalLm> {
    let Parts { grouped, layers, turning, means } = parts;
    let mut made = Vec::with_capacity(layers.len());
    for (layer, ((heads, turning), mean)) in layers.iter().zip(turning).zip(means).enumerate() {
        let scale = scale_of(model, heads, turning);
        made.push(Weights::of(heads, turning, scale, mean, layer)?);
    }
    let own = Common::of(&made);
    let common = common.map_or(own, |common| own.and(common));
    // The same in all layers.
    let each = turning.first().into_iter().flatten();
    let frequencies = each.flat_map(|turning| std::iter::repeat_n(turning.frequency, turning.key.nrows())).collect();
    build::with_attention(model, &made, common, (frequencies, grouped.rotary_dim), device)
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
