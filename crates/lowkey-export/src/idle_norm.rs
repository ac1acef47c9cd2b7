//! A latent without a norm, for programs whose attention normalises every latent.
//!
//! An RMSNorm divides by √(mean c² + ε). Of a latent that is t times as large, t² mean c² far below ε, it divides by √ε, and a gain of
//! √ε/t gives back what there was before: t goes into W_DKV, and the norm does nothing. As |x| ≤ √d before the gain of the norm in
//! front of it, the weights alone say how small t must be. Numbers of 32 bits, and of bf16, have room for that; those of f16 have not.

use burn::tensor::Tensor;
use lowkey_model::CausalLm;
use lowkey_model::attention::LATENT_NORM_EPS;

use crate::error::{Error, Result};

/// Largest share of ε that the mean square of a latent may come to: half of it is the relative error, below what 32 bits resolve.
const SHARE: f64 = 1.0 / (1u64 << 26) as f64;

/// Whether the model has latents without a norm.
pub(crate) fn lacks_norms(model: &CausalLm) -> bool {
    model.config.attention().latent().is_some_and(|mla| !mla.latent_norm)
}

/// Gives each latent that has no norm one that does nothing, for `what` is to hold the model.
///
/// # Errors
/// [`Error::Unsupported`] where other programs would take another ε, which here is what counts; [`Error::Device`] where a device does
/// not give back what it computed.
pub(crate) fn with_idle_norms(model: &mut CausalLm, what: &'static str) -> Result<()> {
    if !lacks_norms(model) {
        return Ok(());
    }
    if model.config.rms_norm_eps != LATENT_NORM_EPS {
        let why = format!(
            "its latents have no norm (latent_norm = false); elsewhere it becomes one whose ε is all that counts, and programs disagree \
             on which that is where rms_norm_eps = {} and not {LATENT_NORM_EPS}",
            model.config.rms_norm_eps
        );
        return Err(Error::unsupported(what, why));
    }
    for block in &mut model.model.layers {
        let before = block.input_layernorm.gain();
        let Some(mla) = block.self_attn.latent_mut() else { continue };
        let map = mla.kv_a_proj_with_mqa.matrix();
        let [rows, d] = map.dims();
        let rank = mla.dims.rank;
        let norm = |tensor: Tensor<1>| -> Result<f64> {
            let values = tensor.try_into_vec_as::<f32>().map_err(|e| Error::device("kv_a_proj_with_mqa.weight", e))?;
            Ok(values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt())
        };
        let read = map.clone().narrow(0, 0, rank) * before.unsqueeze_dim::<2>(0);
        let bias = mla.kv_a_proj_with_mqa.bias();
        let of_bias = bias.clone().map_or(Ok(0.0), |bias| norm(bias.narrow(0, 0, rank)))?;
        // √mean c² at most.
        let largest = (norm(read.reshape([rank * d]))? * (d as f64).sqrt() + of_bias) / (rank as f64).sqrt();
        // A power of two, by which weights are multiplied without rounding.
        let small = match largest > 0.0 {
            true => ((LATENT_NORM_EPS * SHARE).sqrt() / largest).log2().floor().exp2(),
            false => 1.0,
        };
        let scaled = |tensor: Tensor<2>| match rows > rank {
            true => {
                Tensor::cat(vec![tensor.clone().narrow(0, 0, rank) * small, tensor.narrow(0, rank, rows - rank)], 0)
            }
            false => tensor * small,
        };
        mla.kv_a_proj_with_mqa.set_matrix(scaled(map));
        mla.kv_a_proj_with_mqa.set_bias(bias.map(|bias| scaled(bias.unsqueeze_dim(1)).squeeze_dim(1)));
        mla.kv_a_layernorm.set_gain(mla.kv_a_layernorm.gain() * (LATENT_NORM_EPS.sqrt() / small));
        mla.kv_a_layernorm.eps = LATENT_NORM_EPS;
        (mla.dims.latent_eps, mla.dims.latent_scale) = (LATENT_NORM_EPS, 1.0);
    }
    model.config.latents_mut().for_each(|mla| mla.latent_norm = true);
    Ok(())
}
