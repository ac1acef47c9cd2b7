//! llama.cpp's architectures: which one computes a configuration, its keys, and the configuration that a file's keys describe.

use lowkey_model::{
    ModelConfig,
    attention::{AttentionConfig, GroupedConfig, MlaConfig},
    config::{Family, LayerConfig, Layers, MlpConfig},
    rope::RopeConfig,
};

use super::metadata::Metadata;
use super::{Gguf, deepseek2, grouped};
use crate::error::{Error, Result};

/// llama.cpp keeps sizes per layer in arrays of this length.
const MAX_LAYERS: usize = 512;

/// The architecture of a model, with the sizes of its attention.
#[derive(Clone, Copy, Debug)]
pub(super) enum Architecture<'a> {
    /// `deepseek2`, in its latent layout.
    Deepseek2(&'a MlaConfig),
    /// `llama`, `qwen2` or `qwen3`.
    Grouped(grouped::Kind, &'a GroupedConfig),
}

impl<'a> Architecture<'a> {
    /// The architecture that computes a configuration exactly.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the property that none of them has, and the mend.
    pub(super) fn of(config: &'a ModelConfig) -> Result<Self> {
        let layers = config.layers.len();
        if layers > MAX_LAYERS {
            return Err(unsupported(format!(
                "num_hidden_layers = {layers}: llama.cpp allows {MAX_LAYERS}; use --to hf"
            )));
        }
        Ok(match config.attention() {
            AttentionConfig::Mla(mla) => {
                deepseek2::expressible(config, mla)?;
                Self::Deepseek2(mla)
            }
            AttentionConfig::Grouped(grouped) => Self::Grouped(grouped::Kind::of(config, grouped)?, grouped),
        })
    }

    /// `general.architecture`, and the prefix of the keys.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Deepseek2(_) => deepseek2::ARCH,
            Self::Grouped(kind, _) => kind.name(),
        }
    }

    /// The keys of a configuration that has passed [`Architecture::of`].
    pub(super) fn metadata(self, config: &ModelConfig, out: &mut Metadata) -> Result<()> {
        let name = self.name();
        out.set("general.architecture", name);
        for (key, value) in [
            ("block_count", config.layers.len()),
            ("context_length", config.max_position_embeddings),
            ("embedding_length", config.hidden_size),
            ("feed_forward_length", config.mlp().intermediate_size),
            ("vocab_size", config.vocab_size),
            ("attention.head_count", config.num_attention_heads),
        ] {
            out.set(format!("{name}.{key}"), size(key, value)?);
        }
        out.set(format!("{name}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps as f32);
        out.set(format!("{name}.rope.freq_base"), config.rope.rope_theta as f32);
        match self {
            Self::Deepseek2(mla) => deepseek2::metadata(config, mla, out),
            Self::Grouped(kind, grouped) => grouped::metadata(config, kind, grouped, out),
        }
    }

    /// The configuration that a file describes, as llama.cpp computes it.
    ///
    /// # Errors
    /// The reason as text: another architecture, a missing key, sizes that no model has.
    pub(super) fn config(file: &Gguf) -> std::result::Result<ModelConfig, String> {
        let name = file.metadata().text("general.architecture").unwrap_or_default();
        let keys = Keys { file, name };
        let config = match grouped::Kind::named(name) {
            Some(kind) => grouped::config(&keys, kind)?,
            None if name == deepseek2::ARCH => deepseek2::config(&keys)?,
            None => {
                return Err(format!(
                    "general.architecture is {name:?}; deepseek2, llama, qwen2 and qwen3 are read back"
                ));
            }
        };
        config.check().map_err(|e| e.to_string())?;
        // Before anything is multiplied by it: a check of the configuration alone allows sizes that no file holds.
        Architecture::of(&config).map_err(|e| e.to_string())?;
        Ok(config)
    }

    /// The architecture that a file names, around the configuration that it describes.
    pub(super) fn named(file: &Gguf, config: &'a ModelConfig) -> Option<Self> {
        match config.attention() {
            AttentionConfig::Mla(mla) => Some(Self::Deepseek2(mla)),
            AttentionConfig::Grouped(grouped) => {
                let kind = grouped::Kind::named(file.metadata().text("general.architecture")?)?;
                Some(Self::Grouped(kind, grouped))
            }
        }
    }
}

/// The keys of a file under the name of its architecture.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) file: &'a Gguf,
    pub(super) name: &'a str,
}

impl Keys<'_> {
    /// A key with its prefix.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    pub(super) fn size(&self, key: &str) -> Option<usize> {
        usize::try_from(self.file.metadata().integer(&self.full(key))?).ok()
    }

    pub(super) fn need(&self, key: &str) -> std::result::Result<usize, String> {
        self.size(key).ok_or_else(|| format!("{} is missing or not a size", self.full(key)))
    }

    pub(super) fn number(&self, key: &str) -> Option<f64> {
        self.file.metadata().number(&self.full(key))
    }

    /// A configuration around its attention, from the keys that all architectures share.
    pub(super) fn model(
        &self,
        attention: AttentionConfig,
        rope: RopeConfig,
    ) -> std::result::Result<ModelConfig, String> {
        let metadata = self.file.metadata();
        let token =
            |key: &str| metadata.integer(&format!("tokenizer.ggml.{key}")).and_then(|id| u32::try_from(id).ok());
        let mlp = MlpConfig { intermediate_size: self.need("feed_forward_length")?, bias: false };
        let layers = Layers::equal(LayerConfig { attention, mlp }, self.need("block_count")?);
        let mut config = ModelConfig {
            vocab_size: self.need("vocab_size")?,
            hidden_size: self.need("embedding_length")?,
            num_attention_heads: self.need("attention.head_count")?,
            max_position_embeddings: self.need("context_length")?,
            layers: layers.map_err(|e| e.to_string())?,
            kv_elastic_ranks: None,
            rope,
            rms_norm_eps: self
                .number("attention.layer_norm_rms_epsilon")
                .filter(|eps| *eps > 0.0)
                .ok_or("attention.layer_norm_rms_epsilon must be above 0: it is the rms_norm_eps of the model")?,
            tie_word_embeddings: self.file.tensor("output.weight").is_none(),
            initializer_range: None,
            family: Family::Lowkey,
            bos_token_id: token("bos_token_id"),
            eos_token_id: ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(token).collect(),
        };
        config.family = config.natural_family();
        Ok(config)
    }
}

/// A size as the 32 bits that llama.cpp reads.
pub(super) fn size(key: &str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| unsupported(format!("{key} = {value} does not fit into 32 bits")))
}

/// The reason why a model cannot be written.
pub(super) fn unsupported(why: impl Into<String>) -> Error {
    Error::unsupported("GGUF", why)
}
