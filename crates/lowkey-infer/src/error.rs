//! What can go wrong between a prompt and its continuation.

use burn::tensor::TensorReadError;

/// Why a generation was refused or ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that means nothing.
    #[error("{field} = {value}: must be {allowed}")]
    Setting {
        /// Name of the field.
        field: &'static str,
        /// The offending value as text.
        value: String,
        /// The values that are allowed.
        allowed: &'static str,
    },
    /// The sequence would be longer than the model was made for.
    #[error(
        "the sequence needs {needed} positions, but the model has max_position_embeddings = {limit}; \
         shorten the prompt or generate fewer tokens"
    )]
    Positions {
        /// Positions that prompt and continuation take together.
        needed: usize,
        /// `max_position_embeddings` of the model.
        limit: usize,
    },
    /// The sequence would be longer than the cache.
    #[error("row {row} needs {needed} slots, but the cache has a capacity of {capacity}; build it larger")]
    Capacity {
        /// The row of the batch.
        row: usize,
        /// Slots that its past and its new tokens take together.
        needed: usize,
        /// Slots per row.
        capacity: usize,
    },
    /// A row without a token: there is nothing to predict from.
    #[error("row {row} has no token; a prompt needs at least one")]
    NoToken {
        /// The row of the batch.
        row: usize,
    },
    /// A token id that the embedding does not have.
    #[error("row {row}: token id {token} is outside the vocabulary of {vocab_size}; was another tokenizer used?")]
    Token {
        /// The row of the batch.
        row: usize,
        /// The id.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The fused form was asked for, and no layer has fused weights.
    #[error(
        "the fused form needs weights that are multiplied out, which this model comes without; \
         `lowkey export --to fused` makes them, and the forms absorbed and auto do without"
    )]
    NoFused,
    /// Fused weights that do not go with the model.
    #[error("the fused weights do not go with this model: {why}; export them anew from it")]
    Fused {
        /// What is expected and what was found.
        why: String,
    },
    /// Tokens for another number of rows than the cache has.
    #[error("{found} rows of tokens for a cache of {expected} rows")]
    Rows {
        /// Rows of the cache.
        expected: usize,
        /// Rows given.
        found: usize,
    },
    /// A logit that no probability follows from: NaN or +∞.
    #[error("the logit of token {token} is {value}; the weights or the activations have overflowed")]
    Logit {
        /// The token id.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// No token has a logit above −∞.
    #[error("none of the {vocab_size} logits is above -inf, so no token can be chosen")]
    NoCandidate {
        /// Number of logits.
        vocab_size: usize,
    },
    /// Logits could not be copied from the device.
    #[error("the logits could not be read from the device: {0:?}")]
    Read(TensorReadError),
}

impl Error {
    /// The same, told of the row of that number.
    pub(crate) fn of_row(mut self, number: usize) -> Self {
        if let Self::NoToken { row } | Self::Token { row, .. } | Self::Capacity { row, .. } = &mut self {
            *row = number;
        }
        self
    }

    pub(crate) fn setting(field: &'static str, value: &dyn ToString, allowed: &'static str) -> Self {
        Self::Setting { field, value: value.to_string(), allowed }
    }
}

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;
