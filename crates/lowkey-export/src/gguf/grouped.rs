//! MHA, GQA and MQA models in llama.cpp's architectures `llama`, `qwen2` and `qwen3`.
//!
//! | | `llama` | `qwen2` | `qwen3` |
//! |---|---|---|---|
//! | rotates | adjacent pairs | the two halves | the two halves |
//! | biases | of q, k, v and of the output | of q, k, v | of q, k, v |
//! | norms of q and k heads | none | none | always |
//! | width of a head | any | `hidden_size / num_attention_heads` | any |
//! | divisors of frequencies (`rope_type = "llama3"`, `"longrope"`) | yes | no | no |
//!
//! lowkey rotates halves; for `llama` the rows of `q` and `k` are permuted when they are written, and back when they are read,
//! which changes no value. A model with Qwen2's biases that `qwen2` cannot hold is written as `llama`, which computes the same.

use lowkey_model::{
    ModelConfig,
    attention::{AttentionConfig, GroupedConfig},
    rope::RopeType,
};

use super::architecture::{Keys, size, unsupported};
use super::metadata::Metadata;
use super::rope;
use crate::error::Result;

/// The three architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Llama,
    Qwen2,
    Qwen3,
}

impl Kind {
    /// `general.architecture`
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Llama, Self::Qwen2, Self::Qwen3].into_iter().find(|kind| kind.name() == name)
    }

    /// Whether adjacent components of a head are rotated together, not those half a head apart.
    pub(super) fn rotates_pairs(self) -> bool {
        self == Self::Llama
    }

    /// The architecture that computes a configuration exactly.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] naming the property that none of them has, and the mend.
    pub(super) fn of(config: &ModelConfig, grouped: &GroupedConfig) -> Result<Self> {
        let &GroupedConfig { head_dim, rotary_dim, qkv_bias, o_bias, qk_norm, .. } = grouped;
        if rotary_dim != head_dim {
            return Err(unsupported(format!(
                "{rotary_dim} of {head_dim} components of a head are rotated (partial_rotary_factor), and llama.cpp's {} \
                 rotates all of them; train with partial_rotary_factor = 1",
                if qk_norm { "qwen3" } else { "llama" }
            )));
        }
        if config.mlp().bias {
            return Err(unsupported("mlp_bias = true: biases of the feed-forward layers are not written; use --to hf"));
        }
        if config.rope.rope_type == RopeType::Yarn {
            rope::check_yarn(config, head_dim)?;
        }
        let divided = matches!(config.rope.rope_type, RopeType::Llama3 | RopeType::Longrope);
        if qk_norm {
            if o_bias {
                return Err(unsupported(
                    "attention_bias = true with qk_norm: llama.cpp's qwen3 has no bias on the output projection; train \
                     without one of the two, or use --to hf",
                ));
            }
            if divided {
                return Err(unsupported(
                    "rope_type = \"llama3\" or \"longrope\" with qk_norm: llama.cpp's qwen3 reads no divisors of frequencies; use \
                     yarn, linear or default, or --to hf",
                ));
            }
            return Ok(Self::Qwen3);
        }
        let even = config.num_attention_heads.checked_mul(head_dim) == Some(config.hidden_size);
        Ok(if qkv_bias && !o_bias && even && !divided { Self::Qwen2 } else { Self::Llama })
    }
}

/// The keys of a model beside those that all architectures have.
pub(super) fn metadata(config: &ModelConfig, kind: Kind, grouped: &GroupedConfig, out: &mut Metadata) -> Result<()> {
    let name = kind.name();
    for (key, value) in [
        ("attention.head_count_kv", grouped.num_key_value_heads),
        ("attention.key_length", grouped.head_dim),
        ("attention.value_length", grouped.head_dim),
        ("rope.dimension_count", grouped.head_dim),
    ] {
        out.set(format!("{name}.{key}"), size(key, value)?);
    }
    rope::metadata(config, name, out)
}

/// Every key of the three that is read back. Any other may change what llama.cpp computes.
const KNOWN: [&str; 16] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
];

/// The configuration that a file's keys describe; biases are there where their tensors are.
///
/// # Errors
/// The reason as text.
pub(super) fn config(keys: &Keys, kind: Kind) -> std::result::Result<ModelConfig, String> {
    let prefix = keys.full("");
    let mut found = keys.file.metadata().iter().filter_map(|(key, _)| key.strip_prefix(&prefix));
    if let Some(key) = found.find(|key| !KNOWN.contains(key)) {
        return Err(format!("{prefix}{key} is not read back, and may change what llama.cpp computes"));
    }
    let heads = keys.need("attention.head_count")?;
    let head_dim = keys.need("attention.key_length")?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        let found = keys.need(key)?;
        if found != head_dim {
            return Err(format!("{prefix}{key} = {found}, expected the {head_dim} of a key"));
        }
    }
    let width = keys.need("embedding_length")?;
    if kind == Kind::Qwen2 && heads.checked_mul(head_dim) != Some(width) {
        return Err(format!("{heads} heads of {head_dim} are not the width {width}, as llama.cpp's qwen2 has it"));
    }
    let has = |name: &str| keys.file.tensor(name).is_some();
    let attention = AttentionConfig::Grouped(GroupedConfig {
        num_key_value_heads: keys.need("attention.head_count_kv")?,
        head_dim,
        rotary_dim: head_dim,
        qkv_bias: has("blk.0.attn_q.bias"),
        o_bias: has("blk.0.attn_output.bias"),
        qk_norm: kind == Kind::Qwen3,
    });
    keys.model(attention, rope::config(keys)?)
}
