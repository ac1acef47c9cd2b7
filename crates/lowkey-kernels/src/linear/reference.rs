//! The linear map in plain tensor operations.

use burn::tensor::Tensor;

/// See [`crate::linear`]; without a bias.
pub fn linear(x: Tensor<3>, weight: Tensor<2>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let [d_out, _] = weight.dims();
    // One tall product: a batched one would repeat the packing of W for every row of the batch.
    x.reshape([batch * seq, d_in]).matmul(weight.transpose()).reshape([batch, seq, d_out])
}
