//! The linear map in plain tensor operations.

use burn::tensor::Tensor;

use crate::reference::product;

/// See [`crate::linear`]; without a bias.
pub fn linear(x: Tensor<3>, weight: Tensor<2>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let [d_out, _] = weight.dims();
    // One tall product: a batched one would repeat the packing of W for every row of the batch.
    product(x.reshape([batch * seq, d_in]), weight.transpose()).reshape([batch, seq, d_out])
}
