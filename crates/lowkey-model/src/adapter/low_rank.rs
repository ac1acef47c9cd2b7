//! The two small matrices beside a frozen one.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use lowkey_kernels::adapted::{AdaptedMatrix, adapted_linear};
use lowkey_kernels::{add_linear, embed, linear};

use super::dropout::{Draws, Dropout};
use super::plan::LowRank;
use crate::input::Input;
use crate::layers::{Builder, Weight};
use crate::tensor::TensorSpec;

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
    /// What is left out in training.
    #[module(skip)]
    dropout: Dropout,
    /// What the rows are multiplied by, `[d_out]`, where nothing is trained any more.
    #[module(skip)]
    settled: Option<Tensor<1>>,
}

impl Adapter {
    /// That of a matrix of these rows and columns.
    pub(crate) fn build(b: &mut Builder, name: &str, shape: [usize; 2], low_rank: &LowRank) -> Self {
        let mut specs = low_rank.tensors(name, shape).into_iter();
        let (Some(lora_a), Some(lora_b), magnitude) = (specs.next(), specs.next(), specs.next()) else {
            unreachable!("an adapter has two factors")
        };
        Self {
            lora_a: matrix(b, lora_a),
            lora_b: matrix(b, lora_b),
            magnitude: magnitude.map(|spec| b.vector(spec.name, spec.head_rows.total(), spec.role)),
            scale: low_rank.scale,
            dropout: Dropout::new(low_rank.dropout, name),
            settled: None,
        }
    }

    /// Whether gradients of it are wanted.
    pub(crate) fn is_trained(&self) -> bool {
        self.lora_a.is_require_grad() || self.lora_b.is_require_grad()
    }

    /// What a pass that trains leaves out from now on; `None`: nothing.
    pub(crate) fn set_draws(&mut self, draws: Option<Draws>) {
        self.dropout.set(draws);
    }

    /// Keeps what follows from weights alone, which no step will change any more.
    pub(crate) fn settle(&mut self, weight: &Weight) {
        self.settled = self.row_factors(|| weight.matrix());
    }

    /// W' `[d_out, d_in]` in place of W.
    pub(crate) fn matrix(&self, weight: Tensor<2>) -> Tensor<2> {
        let product = self.product(self.dropout.of_columns(self.lora_a.val()));
        match self.row_factors(|| weight.clone()) {
            None => weight + product,
            Some(factors) => {
                let factors = factors.unsqueeze_dim::<2>(1);
                match self.dropout.is_on() {
                    false => (weight + product) * factors,
                    true => {
                        let heard = self.dropout.of_columns(weight.clone());
                        weight + heard * (factors.clone() - 1.0) + product * factors
                    }
                }
            }
        }
    }

    /// Both matrices beside `weight`, where W' is the sum and no more, for as long as nothing is left out.
    pub(crate) fn beside(&self, weight: &Weight) -> Option<AdaptedMatrix> {
        let plain = self.magnitude.is_none() && !self.dropout.is_on();
        let weight = plain.then(|| weight.frozen())??;
        Some(AdaptedMatrix { weight, a: self.lora_a.val(), b: self.lora_b.val(), scale: self.scale })
    }

    /// `residual + x W'ᵀ (+ b)`, without W': the product with B·A goes through r numbers.
    ///
    /// # Shapes
    /// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `residual [batch, seq, d_out]`. Beside a packed matrix it is packed numbers that
    /// are multiplied; the lengths of rows that DoRA divides by are those of the matrix unpacked for a moment.
    pub(crate) fn apply(
        &self,
        residual: Option<Tensor<3>>,
        x: Input,
        weight: &Weight,
        bias: Option<Tensor<1>>,
    ) -> Tensor<3> {
        if let Some(map) = self.beside(weight) {
            let y = adapted_linear(residual, x.value, x.made, map);
            return match bias {
                Some(bias) => y + bias.unsqueeze::<3>(),
                None => y,
            };
        }
        let (heard, low) = match self.dropout.is_on() {
            false => (None, x.by(self.lora_a.val())),
            true => {
                let heard = self.dropout.of_tokens(x.value.clone());
                (Some(heard.clone()), linear(heard, self.lora_a.val(), None))
            }
        };
        let (x, low) = (x.value, low * self.scale);
        let Some(factors) = self.row_factors(|| weight.matrix()) else {
            let y = match residual {
                Some(residual) => weight.add_linear(residual, x, bias),
                None => weight.linear(x, bias),
            };
            return add_linear(y, low, self.lora_b.val(), None);
        };
        let factors = factors.unsqueeze::<3>();
        let y = match heard {
            None => add_linear(weight.linear(x, None), low, self.lora_b.val(), None) * factors,
            // As PEFT has it: what is left out of the product is left out of what the lengths change of W.
            Some(heard) => {
                let changed = weight.linear(heard, None) * (factors.clone() - 1.0);
                weight.linear(x, None) + changed + linear(low, self.lora_b.val(), None) * factors
            }
        };
        let y = match bias {
            Some(bias) => y + bias.unsqueeze::<3>(),
            None => y,
        };
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }

    /// `y + s·B·A` at these columns: beside the rows `y [batch, seq, d_out]` of an embedding. PEFT leaves nothing out here.
    pub(crate) fn look_up(&self, y: Tensor<3>, ids: Tensor<2, Int>) -> Tensor<3> {
        let low = embed(self.lora_a.val().transpose(), ids) * self.scale;
        add_linear(y, low, self.lora_b.val(), None)
    }

    /// s·B·A on its side, `[d_in, d_out]`, as the table of an embedding stands.
    pub(crate) fn table(&self) -> Tensor<2> {
        self.product(self.lora_a.val()).transpose()
    }

    /// s·B·A, `[d_out, d_in]`.
    fn product(&self, lora_a: Tensor<2>) -> Tensor<2> {
        (self.lora_b.val() * self.scale).matmul(lora_a)
    }

    /// m over the lengths of the rows of W + s·B·A, `[d_out]`; `None` without a magnitude. No gradient flows through the lengths: DoRA
    /// treats them as constants (arXiv 2402.09353, section 4.3).
    fn row_factors(&self, weight: impl FnOnce() -> Tensor<2>) -> Option<Tensor<1>> {
        let magnitude = self.magnitude.as_ref()?;
        if let Some(settled) = &self.settled {
            return Some(settled.clone());
        }
        let sum = (weight() + self.product(self.lora_a.val())).detach();
        Some(magnitude.val() / sum.powf_scalar(2.0).sum_dim(1).sqrt().squeeze_dim(1))
    }
}

fn matrix(b: &mut Builder, spec: TensorSpec) -> Param<Tensor<2>> {
    let TensorSpec { name, shape, role, head_rows, .. } = spec;
    let shape = <[usize; 2]>::try_from(shape).unwrap_or_default();
    b.tensor(name, shape, role, head_rows)
}
