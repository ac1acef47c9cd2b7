//! The keys of an adapter, by PEFT's names: `[adapter]` of a run file and `adapter_config.json` alike.

use std::fmt;

use lowkey_kernels::quantized_linear::Quantization;
use schemars::JsonSchema;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::kind::PeftType;

/// `[adapter]`: low-rank matrices that are trained beside frozen ones. The keys are PEFT's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// The kind of adapter, by PEFT's name. Absent: `LORA`.
    #[serde(default, skip_serializing_if = "PeftType::is_default")]
    pub peft_type: PeftType,
    /// Which maps get an adapter: the ends of their names, such as `["q_proj", "o_proj"]`; or one text: `all-linear` (all but the output
    /// head), `vllm-safe` (all but the output head and `kv_b_proj`, whose adapter vLLM does not apply), `everything` (the output head
    /// as well), or a regular expression that fits whole names, such as `model.layers.[01].self_attn.o_proj`. The embedding
    /// gets one where it is named: `embed_tokens`.
    pub target_modules: Modules,
    /// Width r of an adapter.
    #[serde(default = "default_r")]
    #[schemars(range(min = 1, max = 65536))]
    pub r: usize,
    /// α: an adapter's product is multiplied by α/r.
    #[serde(default = "default_alpha")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lora_alpha: f64,
    /// Another r for some of the maps: the end of a name, or a regular expression for it. The first that fits counts.
    #[serde(default, skip_serializing_if = "ByPattern::is_empty")]
    pub rank_pattern: ByPattern<usize>,
    /// Another α for some of the maps.
    #[serde(default, skip_serializing_if = "ByPattern::is_empty")]
    pub alpha_pattern: ByPattern<f64>,
    /// Multiply by α/√r instead of α/r (rsLoRA, arXiv 2312.03732).
    #[serde(default)]
    pub use_rslora: bool,
    /// Train the length of each row of the adapted matrix, too (DoRA, arXiv 2402.09353).
    #[serde(default)]
    pub use_dora: bool,
    /// Training alone: the chance that an adapter does not read one of a token's numbers (the others count for more). Of `kv_b_proj` and
    /// the output head, which are read as whole matrices, the same numbers are left out for all tokens of a step.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub lora_dropout: f64,
    /// Maps that get no adapter although `target_modules` names them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Modules>,
    /// Layers whose maps get adapters, counted from 0. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Layers>,
    /// Parts of the model that are trained whole and saved with the adapter: the ends of their names, such as `["norm", "lm_head"]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    /// Where `quantization` of `[init]` stood before, which means the same. No key of PEFT's, and the directory of an adapter does not
    /// record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
}

impl AdapterConfig {
    /// Adapters of one width beside all maps, with α twice the width.
    pub fn all_linear(r: usize) -> Self {
        Self {
            peft_type: PeftType::Lora,
            target_modules: Modules::One("all-linear".to_owned()),
            r,
            lora_alpha: 2.0 * r as f64,
            lora_dropout: 0.0,
            quantization: None,
            rank_pattern: ByPattern(Vec::new()),
            alpha_pattern: ByPattern(Vec::new()),
            use_rslora: false,
            use_dora: false,
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: None,
        }
    }
}

fn default_r() -> usize {
    8
}

fn default_alpha() -> f64 {
    16.0
}

/// Modules by name: the ends of names, or one text that is a preset or a regular expression.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Modules {
    /// A preset, or a regular expression for whole names.
    One(String),
    /// Whole names, or what a name has behind a dot.
    Ends(Vec<String>),
}

/// One layer or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Layers {
    /// One layer.
    One(usize),
    /// Several.
    Several(Vec<usize>),
}

impl Layers {
    pub(crate) fn each(&self) -> &[usize] {
        match self {
            Self::One(layer) => std::slice::from_ref(layer),
            Self::Several(layers) => layers,
        }
    }
}

/// Values by pattern of name, in the order of the file: the first that fits counts.
#[derive(Clone, Debug, PartialEq, JsonSchema)]
#[schemars(transparent)]
pub struct ByPattern<T>(#[schemars(with = "std::collections::BTreeMap<String, T>")] pub Vec<(String, T)>);

impl<T> Default for ByPattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> ByPattern<T> {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T: Serialize> Serialize for ByPattern<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (pattern, value) in &self.0 {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ByPattern<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = ByPattern<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a table of patterns and their values")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(ByPattern(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}
