//! The small layers: linear map, norm, embedding. Weights lie as Hugging Face stores them, `[d_out, d_in]`.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};

use lowkey_kernels::{add_linear, embed, linear, rms_norm};

/// Supplies the values of each parameter by checkpoint name: random ones, or those of a file. No values at all make an empty
/// tensor, for a model that is about to be refused: nothing as large as a wrong configuration claims is allocated.
pub(crate) struct Builder<'a> {
    pub(crate) device: &'a Device,
    pub(crate) fill: &'a mut dyn FnMut(&str, &[usize]) -> Vec<f32>,
}

impl Builder<'_> {
    fn vector(&mut self, name: &str, len: usize) -> Param<Tensor<1>> {
        let values = (self.fill)(name, &[len]);
        let shape = [values.len()];
        Param::from_data(TensorData::new(values, shape), self.device)
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Param<Tensor<2>> {
        let values = (self.fill)(name, &[rows, columns]);
        let shape = if values.is_empty() { [0, 0] } else { [rows, columns] };
        Param::from_data(TensorData::new(values, shape), self.device)
    }
}

/// `y = x Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_out, d_in]`
    pub weight: Param<Tensor<2>>,
    /// `[d_out]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    pub(crate) fn build(b: &mut Builder, name: &str, d_in: usize, d_out: usize, bias: bool) -> Self {
        Self {
            weight: b.matrix(&format!("{name}.weight"), d_out, d_in),
            bias: bias.then(|| b.vector(&format!("{name}.bias"), d_out)),
        }
    }

    /// `[batch, seq, d_in]` → `[batch, seq, d_out]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        linear(x, self.weight.val(), self.bias.as_ref().map(Param::val))
    }

    /// `residual + y`, `residual [batch, seq, d_out]`.
    pub fn add_to(&self, residual: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
        add_linear(residual, x, self.weight.val(), self.bias.as_ref().map(Param::val))
    }
}

/// Root-mean-square norm with a gain.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d]`
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    pub(crate) fn build(b: &mut Builder, name: &str, width: usize, eps: f64) -> Self {
        Self { weight: b.vector(&format!("{name}.weight"), width), eps }
    }

    /// `[..., d]` → `[..., d]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, self.weight.val(), self.eps)
    }
}

/// Token embedding.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab_size, hidden_size]`
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    pub(crate) fn build(b: &mut Builder, name: &str, rows: usize, width: usize) -> Self {
        Self { weight: b.matrix(&format!("{name}.weight"), rows, width) }
    }

    /// `[batch, seq]` → `[batch, seq, d]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        embed(self.weight.val(), ids)
    }
}
