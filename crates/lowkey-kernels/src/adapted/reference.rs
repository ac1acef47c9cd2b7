//! The adapted maps in plain tensor operations.

use burn::tensor::Tensor;

use super::AdaptedMatrix;
use crate::linear::reference::linear;
use crate::norm::reference::rms_norm;
use crate::swiglu::reference::swiglu;

/// See [`crate::adapted::adapted_linear`].
pub fn adapted_linear(residual: Option<Tensor<3>>, x: Tensor<3>, map: AdaptedMatrix) -> Tensor<3> {
    let AdaptedMatrix { weight, a, b, scale } = map;
    let y = linear(x.clone(), weight.matrix()) + linear(linear(x, a), b) * scale;
    match residual {
        Some(residual) => residual + y,
        None => y,
    }
}

/// See [`crate::adapted::adapted_mlp`].
pub fn adapted_mlp(x: Tensor<3>, norm: Tensor<1>, maps: [AdaptedMatrix; 3], eps: f64) -> Tensor<3> {
    let [gate, up, down] = maps;
    let normed = rms_norm(x.clone(), norm, eps);
    let inner = swiglu(adapted_linear(None, normed.clone(), gate), adapted_linear(None, normed, up));
    adapted_linear(Some(x), inner, down)
}
