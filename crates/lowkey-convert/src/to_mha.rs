//! A latent becomes full keys and values: Multi-head Latent Attention as multi-head, grouped-query or multi-query attention.
//!
//! **What can be exact.** A head of Llama's attention is affine in the hidden state before it turns. So is one of latent attention where
//! nothing between the hidden state and the head is an RMSNorm: of latents without a norm (`latent_norm = false`), which is what
//! [`to_mla`](crate::to_mla) makes of full keys and values, and of norms so far below their ε that they only divide by √ε, which is what an
//! export of such a model has. Then keys W_UK W_DKV h, values W_UV W_DKV h and queries are products of the weights, and [`exact`] multiplies
//! them out. Any other norm divides by a length that depends on the token, and a product of weights cannot: [`exact`] refuses it by its
//! layer. Neither is a norm on heads, as in Qwen3, one on latents: it would divide by the length of the rotated part as well, and leave
//! values alone. [`nearest`] puts a constant in the place of each such norm, and is another model.
//!
//! **Parts that turn, and parts that do not.** Llama turns all numbers of a head, and no number that turns can do for one that does not: a
//! score would be a sum of waves in the distance, and a constant is none of them. But a frequency may be as slow as one likes. LongRoPE
//! divides the frequency of each pair by a number of its own, and what is divided by 10²⁵ turns in a million tokens by less than a number of
//! 64 bits can tell from nothing. So one head holds the shared key, each pair with the frequency that it had, and beside it the part
//! without position; heads are as wide as the wider of keys and values, filled up with zeros. Where nothing is left that does not turn and
//! the frequencies are those that a head of that width has anyway, the rotation of the model stays as it is: full keys and values that were
//! made latent come back as they were.
//!
//! **How many heads.** [`Form::Heads`] gives each query head keys and values of its own, and one to several where they would be the same.
//! [`Form::Single`] is latent attention as it decodes (arXiv 2405.04434 §2.1.2, "absorbed"): one key head, the shared key beside the latent,
//! one value head, the latent, with W_UK in the queries' map and W_UV in that of the output. Its cache is the narrowest, twice that of the
//! latent, and its maps of queries and outputs are the largest.

mod arrange;
mod build;
mod heads;
mod layer;
mod norms;
mod pairs;

use burn::tensor::Device;
use lowkey_model::CausalLm;
use lowkey_model::attention::Mla;

use crate::Observer;
use crate::error::{Error, Result};
use crate::matrix::check_finite;
use crate::moments::check_text;
use layer::Layer;
use norms::Norms;

/// What full keys and values there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A key and value head for each query head, or for several where they are the same: MHA, GQA or MQA.
    Heads,
    /// One key and value head, as wide as latent and shared key together: MQA.
    Single,
}

/// The same function with full keys and values, to rounding.
///
/// # Errors
/// [`Error::Unsupported`] for a model without latents, and for one whose latents are normalised, with the layer; [`Error::NotFinite`] for
/// a weight that is no number.
pub fn exact(model: &CausalLm, form: Form, device: &Device) -> Result<CausalLm> {
    let layers = source(model)?;
    let norms = norms::idle(model, &layers)?;
    convert(model, &layers, &norms, form, device)
}

/// The nearest model with full keys and values: what a latent's norm divides by becomes a constant of its layer, with which the latent
/// misses least of what it was, in the mean over a text. A model that has an exact form becomes that one.
///
/// # Errors
/// As [`exact`], but for the norms; [`Error::Text`] for a text that the model cannot read.
pub fn nearest(
    model: &CausalLm,
    form: Form,
    text: &[Vec<u32>],
    device: &Device,
    observe: Observer,
) -> Result<CausalLm> {
    let layers = source(model)?;
    check_text(model, text)?;
    let norms = norms::fitted(model, &layers, text, device, observe)?;
    convert(model, &layers, &norms, form, device)
}

fn source(model: &CausalLm) -> Result<Vec<&Mla>> {
    let name = model.config.attention_name();
    let none = || Error::Unsupported {
        what: "giving it full keys and values",
        why: format!("{name} attention has them already"),
    };
    let layers =
        model.model.layers.iter().map(|block| block.self_attn.latent().ok_or_else(none)).collect::<Result<_>>()?;
    if model.config.attention().latent().is_some_and(|mla| !mla.reads_linearly()) {
        let why = "what reads its latents is not a matter of weights alone".to_owned();
        return Err(Error::Unsupported { what: "giving it full keys and values", why });
    }
    check_finite(model)?;
    Ok(layers)
}

fn convert(model: &CausalLm, layers: &[&Mla], norms: &[Norms], form: Form, device: &Device) -> Result<CausalLm> {
    let layers = layers.iter().zip(norms).map(|(mla, norms)| Layer::of(mla, *norms)).collect::<Result<Vec<_>>>()?;
    let frequencies = model.config.inverse_frequencies();
    let parts = match form {
        Form::Heads => heads::each(&layers, &frequencies),
        Form::Single => heads::single(&layers, &frequencies),
    };
    let width = parts.iter().flat_map(|layer| &layer.values).map(|value| value.nrows()).max().unwrap_or(0);
    let first = parts.first();
    let turning: Vec<f64> = first.map_or_else(Vec::new, |layer| layer.frequencies.clone());
    let still = first.map_or(0, |layer| layer.still);
    let arrangement = arrange::arrange(&model.config, &turning, still, width);
    let made: Vec<_> = parts.iter().map(|layer| layer.arranged(&model.config, &arrangement)).collect();
    build::with_heads(model, &made, &arrangement, device)
}

#[cfg(test)]
mod tests;
