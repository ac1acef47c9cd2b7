//! Sizes, weights and tables of a latent attention.

use burn::tensor::Tensor;

use crate::adapted::AdaptedMatrix;
use crate::recalled::MadeOf;

/// Sizes and factors of a Multi-head Latent Attention, in the symbols of DeepSeek-V2 (arXiv 2405.04434).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaDims {
    /// H
    pub heads: usize,
    /// N
    pub nope: usize,
    /// R
    pub rope: usize,
    /// V
    pub value: usize,
    /// L
    pub rank: usize,
    /// Softmax scale.
    pub scale: f64,
    /// Factor on the normalised latent.
    pub latent_scale: f64,
    /// ε of the latent's norm.
    pub latent_eps: f64,
    /// Rotate adjacent pairs.
    pub interleave: bool,
}

/// What queries were made of: this map of that, rotated.
#[derive(Clone, Debug)]
pub struct MadeQueries {
    /// To `H(N+R)` numbers; rows per head: N without, R with position.
    pub map: AdaptedMatrix,
    /// What it reads.
    pub of: MadeOf,
}

/// The weights and tables that make keys and values of a latent.
#[derive(Clone, Debug)]
pub struct LatentWeights {
    /// Gain of the latent's norm, `[L]`.
    pub norm: Tensor<1>,
    /// W_UK and W_UV, `[H(N+V), L]`; rows per head: N of the key, V of the value.
    pub kv_b: Tensor<2>,
    /// Cosines of the positions, `[batch or 1, seq, 1, R/2]`.
    pub cos: Tensor<4>,
    /// Sines of the positions.
    pub sin: Tensor<4>,
}
