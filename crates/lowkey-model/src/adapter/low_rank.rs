//! The two small matrices beside a frozen one.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowkey_kernels::{add_linear, linear};

use super::plan::LowRank;
use crate::layers::{Builder, Weight};
use crate::tensor::{HeadRows, Role};

/// What is added to a matrix W `[d_out, d_in]`: s·B·A, and where there is a magnitude, the length of each row.
#[derive(Module, Debug)]
pub struct Adapter {
    /// A `[r, d_in]`
    lora_a: Param<Tensor<2>>,
    /// B `[d_out, r]`
    lora_b: Param<Tensor<2>>,
    /// m `[d_out]`
    magnitude: Option<Param<Tensor<1>>>,
    /// s
    #[module(skip)]
    scale: f64,
}

impl Adapter {
    pub(crate) fn build(b: &mut Builder, name: &str, [d_in, d_out]: [usize; 2], low_rank: &LowRank) -> Self {
        let LowRank { r, scale, use_dora } = *low_rank;
        Self {
            lora_a: b.tensor(format!("{name}.lora_A.weight"), [r, d_in], Role::LoraA, HeadRows::one(r)),
            lora_b: b.tensor(format!("{name}.lora_B.weight"), [d_out, r], Role::LoraB, HeadRows::one(d_out)),
            // PEFT writes this one without `.weight`.
            magnitude: use_dora.then(|| b.vector(format!("{name}.lora_magnitude_vector"), d_out, Role::Magnitude)),
            scale,
        }
    }

    /// W' `[d_out, d_in]` in place of W.
    pub(crate) fn matrix(&self, weight: Tensor<2>) -> Tensor<2> {
        let sum = self.sum(weight);
        match &self.magnitude {
            None => sum,
            Some(magnitude) => {
                let lengths = row_lengths(sum.clone());
                sum * (magnitude.val() / lengths).unsqueeze_dim(1)
            }
        }
    }

    /// `residual + x W'ᵀ (+ b)`, without W': the product with B·A goes through r numbers.
    ///
    /// # Shapes
    /// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `residual [batch, seq, d_out]`. Beside a packed matrix it is packed numbers that
    /// are multiplied; the lengths of rows that DoRA divides by are those of the matrix unpacked for a moment.
    pub(crate) fn apply(
        &self,
        residual: Option<Tensor<3>>,
        x: Tensor<3>,
        weight: &Weight,
        bias: Option<Tensor<1>>,
    ) -> Tensor<3> {
        let low = linear(x.clone(), self.lora_a.val(), None) * self.scale;
        let Some(magnitude) = &self.magnitude else {
            let y = match residual {
                Some(residual) => weight.add_linear(residual, x, bias),
                None => weight.linear(x, bias),
            };
            return add_linear(y, low, self.lora_b.val(), None);
        };
        let factor = magnitude.val() / row_lengths(self.sum(weight.matrix()));
        let y = add_linear(weight.linear(x, None), low, self.lora_b.val(), None) * factor.unsqueeze::<3>();
        let y = match bias {
            Some(bias) => y + bias.unsqueeze::<3>(),
            None => y,
        };
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }

    /// W + s·B·A.
    fn sum(&self, weight: Tensor<2>) -> Tensor<2> {
        weight + (self.lora_b.val() * self.scale).matmul(self.lora_a.val())
    }
}

/// The length of each row, `[d_out]`. No gradient flows through it: DoRA treats it as a constant (arXiv 2402.09353, section 4.3).
fn row_lengths(matrix: Tensor<2>) -> Tensor<1> {
    matrix.detach().powf_scalar(2.0).sum_dim(1).sqrt().squeeze_dim(1)
}
