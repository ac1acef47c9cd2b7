//! Norms of query and key heads, replaced by what they do in the mean.

use burn::tensor::{Device, Tensor};
use faer::Mat;
use lowkey_model::CausalLm;
use lowkey_model::attention::{Attention, AttentionConfig, Grouped};
use lowkey_model::model::{Block, Linear, RmsNorm};

use super::heads::grouped;
use crate::Observer;
use crate::error::Result;
use crate::matrix::{check_finite, to_mat};
use crate::moments::check_text;
use crate::stream::Stream;

/// The nearest model without norms on query and key heads: what a norm divides by becomes a constant of each head, with which the head
/// misses least of what it was, in the mean over a text; the gain goes into the projection. A model without such norms is returned as
/// it is.
///
/// # Errors
/// [`Error::Text`](crate::Error::Text) for a text that the model cannot read, [`Error::NotFinite`](crate::Error::NotFinite) for a
/// weight that is no number, [`Error::Unsupported`](crate::Error::Unsupported) for a model with latents.
pub fn absorb_head_norms(model: &CausalLm, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<CausalLm> {
    let layers = grouped(model)?;
    if layers.iter().all(|layer| layer.q_norm.is_none() && layer.k_norm.is_none()) {
        return Ok(model.clone());
    }
    check_finite(model)?;
    check_text(model, text)?;
    let fits = Stream::each_layer(model, text, device, ("norms of heads", observe), |layer, block, stream| {
        fitted(layers[layer], block, stream)
    })?;
    Ok(without_norms(model, &fits, device))
}

/// The same of a model of one layer, for a text that has come before that.
pub(super) fn absorb_in_layer(model: &CausalLm, stream: &Stream, device: &Device) -> Result<CausalLm> {
    let layers = grouped(model)?;
    if layers.iter().all(|layer| layer.q_norm.is_none() && layer.k_norm.is_none()) {
        return Ok(model.clone());
    }
    let each = model.model.layers.iter().zip(layers).map(|(block, layer)| fitted(layer, block, stream));
    Ok(without_norms(model, &each.collect::<Result<Vec<_>>>()?, device))
}

/// The constants of query and key heads of a layer that a text has come before.
fn fitted(layer: &Grouped, block: &Block, stream: &Stream) -> Result<[Fit; 2]> {
    let [mut queries, mut keys] = [Fit::queries(layer), Fit::keys(layer)];
    for x in stream.inputs(block) {
        queries.add(&layer.q_proj, layer.q_norm.as_ref(), x.clone())?;
        keys.add(&layer.k_proj, layer.k_norm.as_ref(), x)?;
    }
    Ok([queries, keys])
}

/// The model with constants in the place of its heads' norms.
fn without_norms(model: &CausalLm, fits: &[[Fit; 2]], device: &Device) -> CausalLm {
    let mut config = model.config.clone();
    for layer in config.layers.iter_mut() {
        if let AttentionConfig::Grouped(grouped) = &mut layer.attention {
            grouped.qk_norm = false;
        }
    }
    config.family = config.natural_family();
    let mut scaled = model.clone();
    for (block, [queries, keys]) in scaled.model.layers.iter_mut().zip(fits) {
        if let Attention::Grouped(grouped) = &mut block.self_attn {
            let (q_norm, k_norm) = (grouped.q_norm.take(), grouped.k_norm.take());
            queries.apply(&mut grouped.q_proj, q_norm.as_ref(), device);
            keys.apply(&mut grouped.k_proj, k_norm.as_ref(), device);
        }
    }
    // Without the norms' tensors the names and their values go by another list: that of a model which never had them.
    let mut named: std::collections::BTreeMap<String, Tensor<1>> = std::collections::BTreeMap::new();
    let norms = |name: &str| name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight");
    let names = model.parameters().into_iter().map(|parameter| parameter.name).filter(|name| !norms(name));
    named.extend(names.zip(scaled.parameters().into_iter().map(|parameter| parameter.value)));
    CausalLm::of_tensors(&config, device, |name| named.remove(name))
}

/// Σ over tokens of what a head's constant is fitted to.
struct Fit {
    /// Of each head Σ|γ⊙y|² / rms(y).
    normed: Vec<f64>,
    /// Of each head Σ|γ⊙y|².
    plain: Vec<f64>,
    width: usize,
}

impl Fit {
    fn new(heads: usize, width: usize) -> Self {
        Self { normed: vec![0.0; heads], plain: vec![0.0; heads], width }
    }

    fn queries(layer: &Grouped) -> Self {
        Self::new(layer.dims.heads, layer.dims.head_dim)
    }

    fn keys(layer: &Grouped) -> Self {
        Self::new(layer.dims.kv_heads, layer.dims.head_dim)
    }

    /// `x [1, seq, d]`.
    fn add(&mut self, map: &Linear, norm: Option<&RmsNorm>, x: Tensor<3>) -> Result<()> {
        let Some(norm) = norm else { return Ok(()) };
        let gain = to_mat(norm.gain().unsqueeze_dim(1), "a gain")?;
        let y = to_mat(map.forward(x).squeeze_dim::<2>(0), "heads")?;
        for token in 0..y.nrows() {
            for (head, (normed, plain)) in self.normed.iter_mut().zip(&mut self.plain).enumerate() {
                let part = y.row(token).subcols(head * self.width, self.width);
                let rms = (part.squared_norm_l2() / self.width as f64 + norm.eps).sqrt();
                let energy: f64 = (0..self.width).map(|i| (gain[(i, 0)] * part[i]).powi(2)).sum();
                *normed += energy / rms;
                *plain += energy;
            }
        }
        Ok(())
    }

    /// Multiplies gain and constants into the map.
    fn apply(&self, map: &mut Linear, norm: Option<&RmsNorm>, device: &Device) {
        let Some(norm) = norm else { return };
        let constants = self.normed.iter().zip(&self.plain).map(|(n, p)| if *p > 0.0 { n / p } else { 1.0 });
        let constants: Vec<f64> = constants.flat_map(|c| std::iter::repeat_n(c, self.width)).collect();
        let rows = constants.len();
        let column = Mat::from_fn(rows, 1, |i, _| constants[i]);
        let column = crate::matrix::to_tensor(&column, map.dtype(), device);
        let gains = norm.gain().repeat_dim(0, rows / self.width).unsqueeze_dim::<2>(1) * column;
        map.set_matrix(map.matrix() * gains.clone());
        let bias = map.bias().map(|bias| bias * gains.squeeze_dim::<1>(1));
        map.set_bias(bias);
    }
}
