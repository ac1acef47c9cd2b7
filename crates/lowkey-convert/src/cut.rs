//! Cutting a rotated latent: which directions stay in each layer, and the readers fitted to what stays.

use burn::tensor::Device;
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use lowkey_model::CausalLm;

use crate::allocation::{Curve, allocate, grid};
use crate::basis::{Basis, fold, rotate};
use crate::error::{Error, Result};
use crate::importance::Importance;
use crate::matrix::{check_finite, to_mat, to_tensor, trace};
use crate::moments::{Moments, attentions, check_text, measure, of_layer};
use crate::stream::Stream;
use crate::{Observer, Progress};

/// Share of the mean variance that a fit adds to each kept direction: far above what rounding in f64 leaves of a direction that no
/// token uses, so that a latent of which a part is unused has a fit as well.
const RIDGE: f64 = 1e-9;

/// A model with its latents rotated so that every prefix is the best of its width: the same function as before, to rounding.
#[derive(Clone, Debug)]
pub struct Rotated {
    /// The rotated model.
    pub model: CausalLm,
    /// E\[c cᵀ\] of each layer's rotated latent.
    latents: Vec<Mat<f64>>,
}

/// A model that was cut, and why there.
#[derive(Clone, Debug)]
pub struct Reduction {
    /// The cut model.
    pub model: CausalLm,
    /// Directions that each layer keeps.
    pub ranks: Vec<usize>,
    /// Loss on the calibration text before, nats per token.
    pub loss_before: f64,
    /// And after.
    pub loss_after: f64,
    /// What cutting each layer alone costs.
    pub curves: Vec<Curve>,
}

/// A model whose norms are folded, and what a text makes of its latents: all that an order of directions is found from.
pub(crate) struct Measured {
    model: CausalLm,
    moments: Vec<Moments>,
}

impl Measured {
    /// # Errors
    /// As [`Rotated::new`].
    pub(crate) fn of(model: &CausalLm, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<Self> {
        check_finite(model)?;
        let model = fold(model)?;
        let moments = measure(&model, text, device, observe)?;
        Ok(Self { model, moments })
    }

    /// The same of a model of one layer, for a text that has come before that.
    pub(crate) fn of_layer(model: &CausalLm, stream: &Stream, device: &Device) -> Result<Self> {
        let model = fold(model)?;
        let layers = attentions(&model, "measuring a latent")?.into_iter().zip(&model.model.layers);
        let moments = layers.map(|(mla, block)| of_layer(&model, mla, block, stream, device)).collect::<Result<_>>()?;
        Ok(Self { model, moments })
    }

    /// Of its only layer: each width of its latent, and the share of what counts that this leaves out.
    pub(crate) fn left_out(&self, importance: Importance) -> Result<Vec<(usize, f64)>> {
        let layers = attentions(&self.model, "a spectrum")?;
        let (Some(mla), Some(moments)) = (layers.first(), self.moments.first()) else { return Ok(Vec::new()) };
        let (readers, latent) = importance.of(mla, moments)?;
        let readout = Basis::of(&readers, &latent, 0)?.readout;
        let all: f64 = readout.iter().sum();
        let mut left = all;
        let points = readout.iter().enumerate().map(|(i, seen)| {
            left -= seen;
            (i + 1, if all > 0.0 { (left / all).max(0.0) } else { 0.0 })
        });
        Ok(points.collect())
    }

    /// Its latents with their directions in the order of what `importance` counts.
    ///
    /// # Errors
    /// As [`Rotated::new`].
    pub(crate) fn rotated(&self, importance: Importance, device: &Device, observe: Observer) -> Result<Rotated> {
        let (mut bases, mut latents) = (Vec::new(), Vec::new());
        let layers = attentions(&self.model, "rotating a latent")?;
        for (layer, (mla, moments)) in layers.iter().zip(&self.moments).enumerate() {
            observe(Progress { doing: "bases", done: layer, of: layers.len() });
            let (readers, latent) = importance.of(mla, moments)?;
            let basis = Basis::of(&readers, &latent, layer)?;
            latents.push(basis.vectors.transpose() * &latent * &basis.vectors);
            bases.push(basis);
        }
        Ok(Rotated { model: rotate(&self.model, &bases, device)?, latents })
    }
}

impl Rotated {
    /// Rotates the latents of a model by what a text makes of them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model without latents or with latents that are cut already, [`Error::Text`] for a text that it
    /// cannot read, [`Error::NotFinite`] for a weight that is no number.
    pub fn new(model: &CausalLm, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<Self> {
        Self::by(Importance::default(), model, text, device, observe)
    }

    /// As [`Rotated::new`], with directions ordered by what `importance` counts.
    ///
    /// # Errors
    /// As [`Rotated::new`].
    pub fn by(
        importance: Importance,
        model: &CausalLm,
        text: &[Vec<u32>],
        device: &Device,
        observe: Observer,
    ) -> Result<Self> {
        Measured::of(model, text, device, observe)?.rotated(importance, device, observe)
    }

    /// Keeps the first `ranks[ℓ]` directions of layer ℓ, and fits W_UK and W_UV to them.
    ///
    /// # Errors
    /// [`Error::Setting`] where there are not as many ranks as layers, or one is 0 or above the layer's.
    pub fn cut(&self, ranks: &[usize], device: &Device) -> Result<CausalLm> {
        Ok(self.padded(ranks, device)?.with_kv_ranks(ranks)?)
    }

    /// The same function at the full width: columns of zeros for what is cut.
    fn padded(&self, ranks: &[usize], device: &Device) -> Result<CausalLm> {
        let layers = self.latents.len();
        if ranks.len() != layers {
            let why = format!("one for each of {layers} layers is needed");
            return Err(Error::Setting { field: "ranks", value: format!("{ranks:?}"), why });
        }
        let mut model = self.model.clone();
        for (layer, ((block, latent), rank)) in model.model.layers.iter_mut().zip(&self.latents).zip(ranks).enumerate()
        {
            let (Some(mla), full) = (block.self_attn.latent_mut(), latent.nrows()) else { continue };
            if !(1..=full).contains(rank) {
                let why = format!("layer {layer} has directions 1 to {full}");
                return Err(Error::Setting { field: "rank", value: rank.to_string(), why });
            }
            if *rank == full {
                continue;
            }
            let weight = mla.kv_b_proj.matrix();
            let fitted = to_mat(weight.clone(), "kv_b_proj")? * fit(latent, *rank, layer)?;
            let padded = Mat::from_fn(fitted.nrows(), full, |i, j| if j < *rank { fitted[(i, j)] } else { 0.0 });
            mla.kv_b_proj.set_matrix(to_tensor(&padded, weight.dtype(), device));
        }
        Ok(model)
    }

    /// Cuts to `budget` directions in all layers together: more of them where a layer's loss falls fastest. Each layer's curve is
    /// measured by cutting it alone; the budget goes along the lower convex hulls of the curves by falling slope, which is optimal as
    /// far as the losses of layers add up, and gives no layer less when there is more to give.
    ///
    /// # Errors
    /// [`Error::Setting`] where `budget` is less than one direction per layer or more than there are; as [`Rotated::new`].
    pub fn cut_to(&self, budget: usize, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<Reduction> {
        let full: Vec<usize> = self.latents.iter().map(Mat::nrows).collect();
        let (least, most) = (full.len(), full.iter().sum::<usize>());
        if !(least..=most).contains(&budget) {
            let why = format!("all layers together have {most} directions, and each keeps at least 1 ({least})");
            return Err(Error::Setting { field: "kv_rank_budget", value: budget.to_string(), why });
        }
        let loss_before = loss(&self.model, text, device)?;
        let mut curves = Vec::with_capacity(full.len());
        let of: usize = full.iter().map(|rank| grid(*rank).len()).sum();
        let mut done = 0;
        for (layer, rank) in full.iter().enumerate() {
            let mut points = Vec::new();
            for kept in grid(*rank) {
                observe(Progress { doing: "cuts", done, of });
                done += 1;
                let mut ranks = full.clone();
                if let Some(at) = ranks.get_mut(layer) {
                    *at = kept;
                }
                let cut = if kept == *rank { loss_before } else { loss(&self.padded(&ranks, device)?, text, device)? };
                points.push((kept, cut - loss_before));
            }
            curves.push(Curve { layer, points });
        }
        let ranks = allocate(&curves, budget);
        let model = self.cut(&ranks, device)?;
        let loss_after = loss(&model, text, device)?;
        Ok(Reduction { model, ranks, loss_before, loss_after, curves })
    }
}

/// F `[L, r]` with W·F the readers' best fit to the first `r` coordinates z of c: E\[c zᵀ\] E\[z zᵀ\]⁻¹.
fn fit(latent: &Mat<f64>, rank: usize, layer: usize) -> Result<Mat<f64>> {
    // Above 0 even where the latent is 0 throughout: there, anything fits.
    let ridge = (RIDGE * trace(latent) / latent.nrows().max(1) as f64).max(f64::MIN_POSITIVE);
    let kept = Mat::from_fn(rank, rank, |i, j| latent[(i, j)] + if i == j { ridge } else { 0.0 });
    let failed = |_| Error::Decomposition { layer, what: "the kept part of the latent" };
    let solved = kept.llt(Side::Lower).map_err(failed)?.solve(latent.subrows(0, rank).to_owned());
    Ok(solved.transpose().to_owned())
}

/// Mean next-token loss over all sequences, nats.
///
/// # Errors
/// [`Error::Text`] for a text that the model cannot read.
pub fn loss(model: &CausalLm, text: &[Vec<u32>], device: &Device) -> Result<f64> {
    check_text(model, text)?;
    let mut stream = Stream::begin(model, text, device);
    model.model.layers.iter().for_each(|block| stream.pass(model, block, device));
    stream.loss(model, text)
}
