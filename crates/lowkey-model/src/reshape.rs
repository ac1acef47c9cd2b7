//! What may change of a model's shape when training goes on from it: more tokens, and more positions.
//!
//! Both leave all weights where they are. A new token has a row of its own in the embedding and in the output head, which begins as the
//! mean of the rows that are there. Positions beyond the trained length are reached by other frequencies ([`RopeChange`]).

use std::ops::Range;
use std::path::Path;

use burn::tensor::Tensor;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::rope::{RopeConfig, RopeType};

/// `rope_parameters` that take the place of a model's. Where `rope_theta` is not among them, that of the model stays.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeChange {
    parameters: RopeConfig,
    keeps_theta: bool,
}

const THETA: &str = "rope_theta";

impl Serialize for RopeChange {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut written = serde_json::to_value(&self.parameters).map_err(serde::ser::Error::custom)?;
        if let (Value::Object(keys), true) = (&mut written, self.keeps_theta) {
            keys.shift_remove(THETA);
        }
        written.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RopeChange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let written = Value::deserialize(deserializer)?;
        let keeps_theta = written.get(THETA).is_none();
        let parameters = RopeConfig::deserialize(written).map_err(D::Error::custom)?;
        Ok(Self { parameters, keeps_theta })
    }
}

impl JsonSchema for RopeChange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RopeChange".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = RopeConfig::json_schema(generator);
        // What is absent is another thing here.
        for (key, description) in [
            ("rope_theta", "Base of the frequencies, above 0. Absent: that of the model."),
            (
                "original_max_position_embeddings",
                "YaRN, Llama 3 and LongRoPE: the original length in tokens. Absent: that of the model.",
            ),
        ] {
            if let Some(Value::Object(key)) = schema.pointer_mut(&format!("/properties/{key}")) {
                key.shift_remove("default");
                key.insert("description".into(), description.into());
            }
        }
        schema
    }
}

impl ModelConfig {
    /// The same model made for `longest` positions, with other frequencies. Frequencies that follow from an original length keep it.
    ///
    /// # Errors
    /// [`Error::Config`] for parameters that no model can have, and for a factor that would make positions closer than they were.
    pub fn with_positions(mut self, longest: Option<usize>, rope: Option<&RopeChange>) -> Result<Self> {
        let original = self.rope.original_max_position_embeddings.unwrap_or(self.max_position_embeddings);
        if let Some(RopeChange { parameters, keeps_theta }) = rope {
            let theta = if *keeps_theta { self.rope.rope_theta } else { parameters.rope_theta };
            self.rope = RopeConfig { rope_theta: theta, ..parameters.clone() };
            if let Some(factor) = parameters.factor.filter(|factor| *factor < 1.0) {
                let why = "would set positions apart and make the context shorter; it must be at least 1";
                return Err(Error::config("rope_parameters.factor", &factor, why));
            }
        }
        self.max_position_embeddings = longest.unwrap_or(self.max_position_embeddings);
        if matches!(self.rope.rope_type, RopeType::Yarn | RopeType::Llama3 | RopeType::Longrope) {
            // Absent it would be the new length.
            self.rope.original_max_position_embeddings.get_or_insert(original);
        }
        self.rope.settle(self.max_position_embeddings);
        self.check()?;
        Ok(self)
    }

    /// Whether two models of one base have the same tokens and positions.
    pub(crate) fn same_shape(&self, other: &Self) -> bool {
        self.vocab_size == other.vocab_size
            && self.max_position_embeddings == other.max_position_embeddings
            && self.rope == other.rope
    }

    /// The same model with the tokens and positions that a `config.json` beside an adapter says; `rows`: the adapter brings embedding
    /// and output head with it. What else such a file says is the base's to say.
    pub(crate) fn with_shape_of(self, path: &Path, rows: bool) -> Result<Self> {
        let other = Self::shape_in(path, &self)?;
        let vocab_size = if rows { other.vocab_size } else { self.vocab_size };
        let (max_position_embeddings, rope) = (other.max_position_embeddings, other.rope);
        let config = Self { vocab_size, max_position_embeddings, rope, ..self };
        config.check().map_err(|e| Error::file(path, e.to_string()))?;
        Ok(config)
    }
}

impl CausalLm {
    /// The same model in which each of the tokens `new` stands for the mean of those before them: their rows in the embedding and in the
    /// output head, where that is another matrix.
    #[must_use]
    pub fn with_new_rows(mut self, new: Range<usize>) -> Self {
        if new.is_empty() {
            return self;
        }
        let table = begun(self.model.embed_tokens.own_table(), &new);
        self.model.embed_tokens.set_table(table);
        if let Some(head) = &mut self.lm_head {
            head.set_matrix(begun(head.own_matrix(), &new));
        }
        self
    }
}

/// A matrix with the mean of the rows before `new` in each row of it.
fn begun(matrix: Tensor<2>, new: &Range<usize>) -> Tensor<2> {
    let matrix = matrix.detach();
    let ([rows, width], count) = (matrix.dims(), new.len());
    let before = matrix.clone().narrow(0, 0, new.start);
    let mean = before.clone().mean_dim(0).expand([count, width]);
    let mut parts = vec![before, mean];
    if new.end < rows {
        parts.push(matrix.narrow(0, new.end, rows - new.end));
    }
    Tensor::cat(parts, 0)
}

#[cfg(test)]
mod tests;
