//! The linear map.

use burn::tensor::Tensor;

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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn linear_multiplies_by_the_transposed_weight_and_adds_the_bias() {
        let tensor = |values: Vec<f32>, shape: [usize; 2]| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values, shape), &Device::flex())
        };
        let x = tensor(vec![1.0, 2.0], [1, 2]).unsqueeze::<3>();
        let w = tensor(vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2]);
        let bias = tensor(vec![10.0, 20.0, 30.0], [1, 3]).reshape([3]);
        assert_eq!(linear(x, w, Some(bias)).try_into_vec_as::<f32>().unwrap(), vec![11.0, 22.0, 33.0]);
    }
}
