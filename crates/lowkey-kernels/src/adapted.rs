//! Frozen linear maps with two narrow matrices beside them, which are trained: `y = x Wᵀ + s·(x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685), and
//! a feed-forward layer of three.
//!
//! The products with A and B do little arithmetic on much memory. So they run on a few tokens at a time, on what lies in the cache, and
//! into the buffers of the frozen product: neither their results nor their gradients are tensors of their own. Of the input nothing is kept
//! that can be formed anew.

pub(crate) mod autodiff;
#[cfg(any(feature = "gpu", test))]
mod composed;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
mod mlp;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::{AdaptedOps, Map};
use self::mlp::AdaptedMlpOps;
use crate::precision;
use crate::quantized_linear::QuantizedMatrix;
use crate::quantized_linear::autodiff::Frozen;
use crate::recalled::MadeOf;
use crate::recalled::autodiff::Recall;

/// W `[d_out, d_in]`; no gradient of it is formed.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per map; a box would stand between every use and the tensors")]
pub enum FrozenMatrix {
    /// As numbers.
    Whole(Tensor<2>),
    /// In few bits, and unpacked for the length of a product.
    Packed(QuantizedMatrix),
}

impl FrozenMatrix {
    /// Its numbers of rows and columns, `[d_out, d_in]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Whole(weight) => weight.dims(),
            Self::Packed(packed) => packed.dims(),
        }
    }

    /// As numbers, of a packed one a copy.
    pub(crate) fn matrix(&self) -> Tensor<2> {
        match self {
            Self::Whole(weight) => weight.clone(),
            Self::Packed(packed) => packed.unpack(),
        }
    }
}

/// A frozen matrix with what stands beside it.
#[derive(Clone, Debug)]
pub struct AdaptedMatrix {
    /// W
    pub weight: FrozenMatrix,
    /// A `[r, d_in]`
    pub a: Tensor<2>,
    /// B `[d_out, r]`
    pub b: Tensor<2>,
    /// s
    pub scale: f64,
}

impl AdaptedMatrix {
    pub(crate) fn map(self) -> Map<Dispatch> {
        let Self { weight, a, b, scale } = self;
        let weight = match weight {
            FrozenMatrix::Whole(weight) => Frozen::Whole(weight.into_dispatch()),
            FrozenMatrix::Packed(packed) => packed.frozen(),
        };
        Map { weight, a: a.into_dispatch(), b: b.into_dispatch(), scale }
    }

    fn check(&self, d_in: usize) {
        let ([rows, columns], [r, a], [b, b_r]) = (self.weight.dims(), self.a.dims(), self.b.dims());
        let trained = matches!(&self.weight, FrozenMatrix::Whole(weight) if weight.is_require_grad());
        assert!(
            columns == d_in && a == d_in && b == rows && b_r == r && !trained,
            "a frozen matrix {:?} beside {:?} and {:?} cannot take {d_in} numbers",
            self.weight.dims(),
            self.a.dims(),
            self.b.dims()
        );
    }
}

/// `(residual +) x · Wᵀ + s·(x · Aᵀ) · Bᵀ`. Where `made` says what `x` is, `x` is not kept for the backward pass.
///
/// # Shapes
/// `x [batch, seq, d_in]` → `[batch, seq, d_out]`, as `residual`.
pub fn adapted_linear(
    residual: Option<Tensor<3>>,
    x: Tensor<3>,
    made: Option<MadeOf>,
    map: AdaptedMatrix,
) -> Tensor<3> {
    let [.., d_in] = x.dims();
    map.check(d_in);
    if x.dtype() != DType::F32 {
        return reference::adapted_linear(residual, x, map);
    }
    let (residual, x) = (residual.map(Tensor::into_dispatch), x.into_dispatch());
    let made = made.map_or_else(|| Recall::Given(x.clone()), MadeOf::recall);
    let precision = precision::current();
    Tensor::from_dispatch(match residual {
        None => Dispatch::adapted(x, map.map(), made, precision),
        Some(residual) => Dispatch::add_adapted(residual, x, map.map(), made, precision),
    })
}

/// The second half of a pre-norm block as [`gated_mlp`](crate::mlp::gated_mlp), of three such maps: gate, up and down.
///
/// # Shapes
/// `x [batch, seq, d]`, `norm [d]` → `[batch, seq, d]`.
pub fn adapted_mlp(x: Tensor<3>, norm: Tensor<1>, maps: [AdaptedMatrix; 3], eps: f64) -> Tensor<3> {
    let ([.., d], [f, _]) = (x.dims(), maps[0].weight.dims());
    maps.iter().zip([d, d, f]).for_each(|(map, d_in)| map.check(d_in));
    if x.dtype() != DType::F32 {
        return reference::adapted_mlp(x, norm, maps, eps);
    }
    let [gate, up, down] = maps.map(AdaptedMatrix::map);
    let (x, norm) = (x.into_dispatch(), norm.into_dispatch());
    Tensor::from_dispatch(Dispatch::adapted_mlp(x, norm, gate, up, down, eps, precision::current()))
}
