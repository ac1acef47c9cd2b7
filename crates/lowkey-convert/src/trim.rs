//! Leaving out what no layer reads of a latent that has no norm.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use lowkey_model::CausalLm;

use crate::error::Result;

/// The same function without the rows of W_DKV that no layer caches. A norm is taken over all of them, so only of a latent without one
/// can any be spared; other models are returned as they are.
///
/// # Errors
/// [`Error::Model`](crate::Error::Model) where the narrower model cannot be built.
pub fn trimmed(model: &CausalLm, device: &Device) -> Result<CausalLm> {
    trimmed_to(model, model.config.kv_ranks().into_iter().max().unwrap_or(0), device)
}

/// The same with `most` rows of W_DKV for all layers, as many as the widest of them caches.
pub(crate) fn trimmed_to(model: &CausalLm, most: usize, device: &Device) -> Result<CausalLm> {
    let ranks = model.config.kv_ranks();
    let Some(mla) = model.config.attention().latent().filter(|mla| !mla.latent_norm) else { return Ok(model.clone()) };
    let (whole, rotated) = (mla.kv_lora_rank, mla.qk_rope_head_dim);
    if most >= whole {
        return Ok(model.clone());
    }
    let mut config = model.config.clone();
    let alike = ranks.iter().all(|rank| *rank == most);
    for (mla, rank) in config.latents_mut().zip(&ranks) {
        mla.kv_lora_rank = most;
        mla.kv_cache_rank = (!alike).then_some(*rank);
    }
    // Those below the whole that is left.
    config.kv_elastic_ranks = config.kv_elastic_ranks.take().map(|mut ranks| {
        ranks.retain(|rank| *rank < most);
        ranks
    });
    config.kv_elastic_ranks = config.kv_elastic_ranks.filter(|ranks| !ranks.is_empty());
    config.family = config.natural_family();
    config.check()?;
    let mut kept: BTreeMap<String, Tensor<1>> = BTreeMap::new();
    for parameter in model.parameters() {
        let name = parameter.name;
        let columns = parameter.shape.get(1).copied().unwrap_or(1);
        let value = match name.rsplit_once("self_attn.").map_or("", |(_, part)| part) {
            "kv_a_proj_with_mqa.weight" | "kv_a_proj_with_mqa.bias" => {
                let part = |from: usize, count: usize| {
                    (count > 0).then(|| parameter.value.clone().narrow(0, from * columns, count * columns))
                };
                Tensor::cat([part(0, most), part(whole, rotated)].into_iter().flatten().collect(), 0)
            }
            "kv_a_layernorm.weight" => parameter.value.narrow(0, 0, most),
            _ => parameter.value,
        };
        kept.insert(name, value);
    }
    Ok(CausalLm::of_tensors(&config, device, |name| kept.remove(name)))
}
