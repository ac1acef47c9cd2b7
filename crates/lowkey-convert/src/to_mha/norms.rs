//! Norms of latents as constants: those that do nothing, and the best ones for a text.

use burn::tensor::{Device, Tensor};
use faer::Mat;
use lowkey_model::attention::Mla;
use lowkey_model::model::{Linear, RmsNorm, Trace};
use lowkey_model::{CausalLm, ids_tensor};

use crate::error::{Error, Result};
use crate::matrix::{affine, rows, to_mat};
use crate::{Observer, Progress};

/// Largest share of ε that the mean square of a latent may come to under a norm that does nothing: half of it is the relative error, and
/// less than what 32 bits resolve.
const SHARE: f64 = 1.0 / (1u64 << 25) as f64;

/// What the norms of a layer's latents multiply by before their gain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norms {
    pub(crate) latent: f64,
    /// 1 where queries have no latent.
    pub(crate) query: f64,
}

/// The constants of norms that do nothing.
///
/// # Errors
/// [`Error::Unsupported`] naming the first layer with a norm that does something.
pub(crate) fn idle(model: &CausalLm, layers: &[&Mla]) -> Result<Vec<Norms>> {
    let refuse = |layer: usize, what: &str, maps: &str| {
        let why = format!(
            "layer {layer} normalises its latent of {what}: {maps} are divided by a length that each token has of its own, which no product \
             of weights does (a model with latent_norm = false and without q_lora_rank has an exact form). A calibration text finds the \
             nearest model, in which these lengths are constants"
        );
        Error::Unsupported { what: "an exact form with full keys and values", why }
    };
    let each = constants(model, layers)?.into_iter().enumerate().map(|(layer, found)| match found {
        [None, _] => Err(refuse(layer, "keys and values", "both")),
        [_, None] => Err(refuse(layer, "queries (q_lora_rank)", "these")),
        [Some(latent), Some(query)] => Ok(Norms { latent, query }),
    });
    each.collect()
}

/// The same, with the constant that misses least over a text where a norm does something.
pub(crate) fn fitted(
    model: &CausalLm,
    layers: &[&Mla],
    text: &[Vec<u32>],
    device: &Device,
    observe: Observer,
) -> Result<Vec<Norms>> {
    let known = constants(model, layers)?;
    let mut sums = vec![[Fit::default(); 2]; layers.len()];
    for (done, ids) in text.iter().enumerate() {
        observe(Progress { doing: "norms of latents", done, of: text.len() });
        if ids.is_empty() {
            continue;
        }
        let context = model.context(&vec![0; ids.len()], ids.len(), device);
        let mut trace = Trace::of_hidden();
        model.hidden(ids_tensor(ids, 1, ids.len(), device), &context, Some(&mut trace));
        for (((block, mla), hidden), [latent, query]) in
            model.model.layers.iter().zip(layers).zip(trace.hidden).zip(&mut sums)
        {
            let x = block.input_layernorm.forward(hidden);
            latent.add(&mla.kv_a_proj_with_mqa, &mla.kv_a_layernorm, x.clone())?;
            if let (Some(down), Some(norm)) = (&mla.q_a_proj, &mla.q_a_layernorm) {
                query.add(down, norm, x)?;
            }
        }
    }
    let each = known.into_iter().zip(sums).zip(layers).map(|(([latent, query], [fit, of_queries]), mla)| Norms {
        latent: latent.unwrap_or_else(|| fit.constant() * mla.dims.latent_scale),
        query: query.unwrap_or_else(|| of_queries.constant()),
    });
    Ok(each.collect())
}

/// For each layer the constants of its latent's norm and its queries', where they are such.
fn constants(model: &CausalLm, layers: &[&Mla]) -> Result<Vec<[Option<f64>; 2]>> {
    let normed = model.config.attention().latent().is_none_or(|mla| mla.latent_norm);
    let each = model.model.layers.iter().zip(layers).map(|(block, mla)| {
        let before = to_mat(block.input_layernorm.gain().unsqueeze_dim(1), "input_layernorm")?;
        let latent = match normed {
            true => constant(&mla.kv_a_proj_with_mqa, &mla.kv_a_layernorm, &before)?.map(|c| c * mla.dims.latent_scale),
            false => Some(1.0),
        };
        let query = match (&mla.q_a_proj, &mla.q_a_layernorm) {
            (Some(down), Some(norm)) => constant(down, norm, &before)?,
            _ => Some(1.0),
        };
        Ok([latent, query])
    });
    each.collect()
}

/// 1/√ε where the mean square of what is normed is nothing beside ε, for every input: |x| ≤ √d before the gain of the norm in front.
fn constant(map: &Linear, norm: &RmsNorm, before: &Mat<f64>) -> Result<Option<f64>> {
    let [width] = norm.gain().dims();
    let map = rows(&affine(map, "a latent's map")?, 0, width);
    let d = map.ncols() - 1;
    let read = Mat::from_fn(width, d, |i, j| map[(i, j)] * before[(j, 0)]);
    let largest = (read.norm_l2() * (d as f64).sqrt() + map.subcols(d, 1).norm_l2()) / (width as f64).sqrt();
    Ok((largest * largest <= norm.eps * SHARE).then(|| 1.0 / norm.eps.sqrt()))
}

/// Σ over tokens of what a constant is fitted to.
#[derive(Clone, Copy, Debug, Default)]
struct Fit {
    /// Σ|γ⊙y|² / rms(y).
    normed: f64,
    /// Σ|γ⊙y|².
    plain: f64,
}

impl Fit {
    /// `x [1, seq, d]`.
    fn add(&mut self, map: &Linear, norm: &RmsNorm, x: Tensor<3>) -> Result<()> {
        let [width] = norm.gain().dims();
        let gain = to_mat(norm.gain().unsqueeze_dim(1), "a gain")?;
        let y = to_mat(map.forward(x).squeeze_dim::<2>(0), "latents")?;
        for token in 0..y.nrows() {
            let row = y.row(token).subcols(0, width);
            let rms = (row.squared_norm_l2() / width as f64 + norm.eps).sqrt();
            let energy: f64 = (0..width).map(|i| (gain[(i, 0)] * row[i]).powi(2)).sum();
            self.normed += energy / rms;
            self.plain += energy;
        }
        Ok(())
    }

    fn constant(self) -> f64 {
        if self.plain > 0.0 { self.normed / self.plain } else { 1.0 }
    }
}
