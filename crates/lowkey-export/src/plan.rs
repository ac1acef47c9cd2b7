//! Which form a layer should decode in: what each costs, and which is cheapest.

use std::fmt;
use std::str::FromStr;

use lowkey_model::{
    ModelConfig,
    attention::{AttentionConfig, MlaConfig},
    cost::DecodeCosts,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a layer's attention is stored and computed while decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerForm {
    /// Keys and values of every head are rebuilt from the latents for each token.
    Expanded,
    /// W_UK maps the query, W_UV the result; the attention runs over the latents.
    Absorbed,
    /// As absorbed, with W_UKᵀ·W_UQ and W_O·W_UV multiplied out.
    Fused,
}

impl fmt::Display for LayerForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expanded => "expanded",
            Self::Absorbed => "absorbed",
            Self::Fused => "fused",
        })
    }
}

impl FromStr for LayerForm {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Expanded, Self::Absorbed, Self::Fused]
            .into_iter()
            .find(|form| form.to_string() == name)
            .ok_or_else(|| Error::setting("form", format!("{name:?}"), "must be expanded, absorbed or fused"))
    }
}

/// What a layer's attention costs in one form, at batch 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FormCost {
    /// The form.
    pub form: LayerForm,
    /// Weights of the attention that a token multiplies.
    pub weights: u64,
    /// Bytes read per decoded token: those weights, the cached latents, and in the expanded form the keys and values that
    /// were rebuilt from them.
    pub bytes_per_token: u64,
    /// Floating-point operations per decoded token.
    pub flops_per_token: u64,
}

/// The costs of a layer in all forms and the choice among them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Index of the layer.
    pub layer: usize,
    /// The form that it is exported in.
    pub form: LayerForm,
    /// Whether that was asked for rather than chosen.
    pub forced: bool,
    /// Of the forms that the attention has: expanded, absorbed, fused.
    pub costs: Vec<FormCost>,
}

/// How the plan counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanSettings {
    /// Tokens in the cache.
    pub context: usize,
    /// Bytes of a weight and of a cached number.
    pub bytes_per_number: usize,
}

/// Plans every layer. The rule: the form that reads the fewest bytes per decoded token at the given context, because decoding
/// at small batch is bound by memory; among equals the one with fewer operations, then the plainer one.
///
/// `fused` reads fewer weights than `absorbed` only where L < N·Q/(Q−N) on the side of the query (Q the width of the query
/// latent, or d), and L < V·d/(d−V) on the side of the output: roughly where the latent is no wider than a head.
///
/// # Errors
/// [`Error::Unsupported`] where the attention has no latent, or not the form that is asked for.
pub fn plan(config: &ModelConfig, settings: PlanSettings, forced: Option<LayerForm>) -> Result<Vec<LayerPlan>> {
    latent_attention(config)?;
    // What is exported reads whole latents.
    let DecodeCosts { expanded, absorbed, fused } = config.decode_costs(0, settings.context);
    let costs =
        [(LayerForm::Expanded, Some(expanded)), (LayerForm::Absorbed, absorbed), (LayerForm::Fused, fused)].into_iter();
    let costs: Vec<FormCost> = costs
        .filter_map(|(form, cost)| {
            let cost = cost?;
            Some(FormCost {
                form,
                weights: cost.weights as u64,
                bytes_per_token: ((cost.weights + cost.cached + cost.rebuilt) * settings.bytes_per_number) as u64,
                flops_per_token: 2 * cost.products as u64,
            })
        })
        .collect();
    let form = form(&costs, forced).ok_or_else(|| {
        Error::unsupported("this form", format!("{} attention does not have it", config.attention_name()))
    })?;
    let layer = |layer| LayerPlan { layer, form, forced: forced.is_some(), costs: costs.clone() };
    Ok((0..config.layers.len()).map(layer).collect())
}

/// The form that is asked for, or the cheapest; `None` where it is none of those that there are.
fn form(costs: &[FormCost], forced: Option<LayerForm>) -> Option<LayerForm> {
    // Ties go to the form that a reader of the checkpoint has to do least for: absorbed needs no file of its own.
    let order = [LayerForm::Absorbed, LayerForm::Fused, LayerForm::Expanded].into_iter();
    let order = order.filter(|form| forced.is_none_or(|forced| forced == *form));
    let there = order.filter_map(|form| costs.iter().find(|cost| cost.form == form));
    there.min_by_key(|cost| (cost.bytes_per_token, cost.flops_per_token)).map(|cost| cost.form)
}

/// The sizes of a Multi-head Latent Attention, or why there is nothing to absorb.
pub(crate) fn latent_attention(config: &ModelConfig) -> Result<&MlaConfig> {
    match config.attention() {
        AttentionConfig::Mla(mla) => Ok(mla),
        AttentionConfig::Grouped(grouped) => {
            let why = if grouped.qk_norm {
                "a norm on each query and key head stands between the up-projection and the dot product, so that the two \
                 cannot be multiplied; convert the model to MLA first"
            } else if grouped.rotary_dim > 0 {
                "its keys are rotated by position between the up-projection and the dot product, so that the two cannot \
                 be multiplied, and there is no latent to attend to; convert the model to MLA first"
            } else {
                "it has no latent to attend to; convert the model to MLA first"
            };
            Err(Error::unsupported(
                "the absorbed and fused forms",
                format!("{} attention: {why}", config.attention_name()),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_that_an_attention_does_not_have_is_neither_chosen_nor_forced() {
        let cost = |form, bytes_per_token| FormCost { form, weights: 1, bytes_per_token, flops_per_token: 1 };
        let all = [cost(LayerForm::Expanded, 9), cost(LayerForm::Absorbed, 5), cost(LayerForm::Fused, 4)];
        assert_eq!(form(&all, None), Some(LayerForm::Fused));
        assert_eq!(form(&all, Some(LayerForm::Expanded)), Some(LayerForm::Expanded));
        let unfused = &all[..2];
        assert_eq!(form(unfused, None), Some(LayerForm::Absorbed));
        assert_eq!(form(unfused, Some(LayerForm::Fused)), None);
        // Equal ones: what needs no file of its own.
        let equal = [LayerForm::Expanded, LayerForm::Absorbed, LayerForm::Fused].map(|form| cost(form, 5));
        assert_eq!(form(&equal, None), Some(LayerForm::Absorbed));
    }
}
