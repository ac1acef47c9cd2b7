//! The choice between the ways to compute one attention.

use std::fmt;
use std::str::FromStr;

use lowkey_model::{
    attention::{FusedMla, MlaDims, Way},
    model::Block,
};

use crate::error::{Error, Result};

/// How Multi-head Latent Attention is computed from the cached latents. All forms give the same numbers to rounding; MHA, GQA
/// and MQA have only one, and ignore this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Form {
    /// For each chunk the form that takes fewer multiplications: usually expanded for a prompt, absorbed for single tokens, and
    /// instead of absorbed fused in the layers that have fused weights.
    #[default]
    Auto,
    /// Keys and values of every head are rebuilt from the latents.
    Expanded,
    /// Queries are mapped into the latent space and attend there; keys and values of the heads never exist.
    Absorbed,
    /// As absorbed, with the maps into the latent space and out of it multiplied into the weights around them; layers without
    /// such weights are absorbed. See [`lowkey_model::attention::FusedMla`].
    Fused,
}

impl Form {
    const ALL: [Self; 4] = [Self::Auto, Self::Expanded, Self::Absorbed, Self::Fused];

    /// Whether a chunk of `queries` tokens per row attends to its `keys` cached tokens in latent space.
    ///
    /// Multiplications per head (paper symbols as in [`MlaDims`]): expanded, L(N+V) per key to rebuild it and N+R+V per pair;
    /// absorbed, L(N+V) per query to map it there and back and 2L+R per pair.
    pub(crate) fn absorbs(self, dims: &MlaDims, queries: usize, keys: usize) -> bool {
        let MlaDims { nope, rope, value, rank, .. } = *dims;
        let (maps, pairs) = (rank * (nope + value), queries * keys);
        let expanded = keys * maps + pairs * (nope + rope + value);
        let absorbed = queries * maps + pairs * (2 * rank + rope);
        match self {
            Self::Auto => absorbed < expanded,
            Self::Expanded => false,
            Self::Absorbed | Self::Fused => true,
        }
    }
}

impl Form {
    /// How a block attends with `queries` tokens per row to the `keys` tokens of its cache, the new ones among them.
    pub(crate) fn way<'a>(self, block: &Block, fused: Option<&'a FusedMla>, queries: usize, keys: usize) -> Way<'a> {
        match (block.self_attn.latent(), fused) {
            (Some(mla), _) if !self.absorbs(&mla.dims, queries, keys) => Way::Expanded,
            (Some(_), Some(fused)) if self != Self::Absorbed => Way::Fused(fused),
            (Some(_), _) => Way::Absorbed,
            (None, _) => Way::Expanded,
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Expanded => "expanded",
            Self::Absorbed => "absorbed",
            Self::Fused => "fused",
        })
    }
}

impl FromStr for Form {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|form| form.to_string() == name)
            .ok_or_else(|| Error::setting("form", &format!("{name:?}"), "auto, expanded, absorbed or fused"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_reads_back_from_its_name() {
        for form in Form::ALL {
            assert_eq!(form.to_string().parse::<Form>().unwrap(), form);
        }
        let message = "latent".parse::<Form>().unwrap_err().to_string();
        assert!(message.contains("\"latent\"") && message.contains("absorbed"), "{message}");
    }

    /// design: absorbed wins for a chunk of q tokens on a long prefix iff q < L(N+V)/(2L−N−V).
    #[test]
    fn auto_expands_long_chunks_and_absorbs_short_ones() {
        let dims = MlaDims {
            heads: 16,
            nope: 128,
            rope: 64,
            value: 128,
            rank: 512,
            scale: 1.0,
            latent_scale: 1.0,
            latent_eps: 1e-6,
            interleave: true,
        };
        // 512·256/(1024−256) = 170.7
        for (queries, absorbs) in [(1, true), (170, true), (171, false), (4096, false)] {
            assert_eq!(Form::Auto.absorbs(&dims, queries, 1_000_000), absorbs, "{queries} queries");
        }
        assert!(!Form::Auto.absorbs(&dims, 512, 512), "the first chunk of a prompt");
        assert!(!Form::Expanded.absorbs(&dims, 1, 100) && Form::Absorbed.absorbs(&dims, 512, 512));
    }
}
