//! Row-wise and element-wise operations.

use burn::tensor::{Tensor, activation::sigmoid};

/// `x · Wᵀ (+ b)` with the weight as Hugging Face stores it.
///
/// # Shapes
/// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `bias [d_out]` → `[batch, seq, d_out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let [d_out, _] = weight.dims();
    // One tall product: a batched one would repeat the packing of W for every row of the batch.
    let y = x.reshape([batch * seq, d_in]).matmul(weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.unsqueeze::<2>(),
        None => y,
    };
    y.reshape([batch, seq, d_out])
}

/// Root-mean-square normalisation over the last axis: `x / sqrt(mean(x²) + eps) · weight` (Zhang & Sennrich,
/// arXiv 1910.07467, eq. 4).
///
/// # Shapes
/// `x [..., d]`, `weight [d]` → `[..., d]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let inv = (x.clone().square().mean_dim(D - 1) + eps).sqrt().recip();
    x * inv * weight.unsqueeze()
}

/// Rotary position embedding (Su et al., arXiv 2104.09864) on the last axis.
///
/// With `interleaved` the rotated pairs are `(x[2i], x[2i+1])`, else `(x[i], x[i + R/2])`. The result is always in
/// half-split order (all first components, then all second ones): dot products between two rotated tensors do not depend on
/// the order, and one order for the cache serves both conventions.
///
/// # Shapes
/// `x [batch, seq, heads, R]`, `cos` and `sin [batch or 1, seq, 1, R/2]` → `[batch, seq, heads, R]`.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, interleaved: bool) -> Tensor<4> {
    let [batch, seq, heads, dim] = x.dims();
    let half = dim / 2;
    let (first, second) = if interleaved {
        let pairs = x.reshape([batch, seq, heads * half, 2]);
        let first = pairs.clone().narrow(3, 0, 1).reshape([batch, seq, heads, half]);
        let second = pairs.narrow(3, 1, 1).reshape([batch, seq, heads, half]);
        (first, second)
    } else {
        (x.clone().narrow(3, 0, half), x.narrow(3, half, half))
    };
    Tensor::cat(vec![first.clone() * cos.clone() - second.clone() * sin.clone(), first * sin + second * cos], 3)
}

/// `silu(gate) · up` (Shazeer, arXiv 2002.05202), with `silu(x) = x · sigmoid(x)`.
///
/// # Shapes
/// `gate` and `up [batch, seq, d]` → `[batch, seq, d]`.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    gate.clone() * sigmoid(gate) * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData, Tolerance};

    fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    #[test]
    fn rms_norm_of_a_known_row() {
        // mean(x²) of (3, 4) is 12.5.
        let y = rms_norm(tensor(vec![3.0, 4.0], [1, 1, 2]), tensor(vec![2.0, 0.5], [2]), 0.0);
        let r = 12.5f32.sqrt();
        let expected = TensorData::new(vec![6.0 / r, 2.0 / r], [1, 1, 2]);
        y.into_data().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-6));
    }

    #[test]
    fn rotating_by_a_right_angle_swaps_the_pair() {
        let (cos, sin) = (tensor(vec![0.0, 1.0], [1, 1, 1, 2]), tensor(vec![1.0, 0.0], [1, 1, 1, 2]));
        let x = tensor(vec![1.0, 2.0, 3.0, 4.0], [1, 1, 1, 4]);
        // Interleaved: (1, 2) turns to (-2, 1), (3, 4) stays; half-split output is (-2, 3 | 1, 4).
        let y = rotate(x.clone(), cos.clone(), sin.clone(), true).into_data();
        assert_eq!(y.try_to_vec::<f32>().unwrap(), vec![-2.0, 3.0, 1.0, 4.0]);
        // Half-split: (1, 3) turns to (-3, 1), (2, 4) stays.
        let y = rotate(x, cos, sin, false).into_data();
        assert_eq!(y.try_to_vec::<f32>().unwrap(), vec![-3.0, 2.0, 1.0, 4.0]);
    }

    #[test]
    fn linear_multiplies_by_the_transposed_weight_and_adds_the_bias() {
        let x = tensor(vec![1.0, 2.0], [1, 1, 2]);
        let w = tensor(vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2]);
        let y = linear(x, w, Some(tensor(vec![10.0, 20.0, 30.0], [3])));
        assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), vec![11.0, 22.0, 33.0]);
    }

    #[test]
    fn swiglu_of_known_numbers() {
        let y = swiglu(tensor(vec![0.0, 1.0], [1, 1, 2]), tensor(vec![5.0, 3.0], [1, 1, 2]));
        let expected = TensorData::new(vec![0.0, 3.0 / (1.0 + (-1.0f32).exp())], [1, 1, 2]);
        y.into_data().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-6));
    }
}
