//! The feed-forward layer on GPUs.

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::{MlpGradients, MlpOps, MlpState, MlpWeights};
use crate::autodiff::Wanted;
use crate::gpu::product::{format, operand, product, projected, rounded_product, rounded_projection, transposed};
use crate::gpu::tensors::{dims, reshaped, tall};
use crate::norm::gpu::{dense, rms_norm, rms_norm_grad};
use crate::precision::Precision;
use crate::swiglu::gpu::{swiglu, swiglu_in_place};

impl MlpOps for CubeBackend {
    fn gated_mlp(
        x: CubeTensor,
        norm: CubeTensor,
        gate: CubeTensor,
        up: CubeTensor,
        down: CubeTensor,
        eps: f64,
        precision: Precision,
    ) -> CubeTensor {
        let [out, ..] = Self::gated_mlp_saving(x, [norm, gate, up, down], eps, precision);
        out
    }
}

impl MlpGradients for CubeBackend {
    fn gated_mlp_saving(x: CubeTensor, weights: MlpWeights<Self>, eps: f64, precision: Precision) -> [CubeTensor; 3] {
        let [norm, gate, up, down] = weights;
        let [batch, seq, width] = dims::<3>(&x);
        let (flat, norm) = (tall(x.clone()), into_contiguous(norm));
        let normed = rms_norm(&flat, &norm, dense(&flat, width, eps), format(precision));
        let [gate, up] = [gate, up].map(|weight| rounded_projection(normed.clone(), weight, precision));
        let out = reshaped(projected(swiglu(&gate, &up), down, precision), [batch, seq, width]);
        [Self::float_add(out, x), gate, up]
    }

    fn gated_mlp_grad(
        saved: MlpState<Self>,
        grad: CubeTensor,
        eps: f64,
        precision: Precision,
        [of_x, of_norm, of_gate, of_up, of_down]: Wanted<5>,
    ) -> [Option<CubeTensor>; 5] {
        let MlpState { x, weights: [norm, gate_weight, up_weight, down], inner: [gate, up] } = saved;
        let shape = x.meta.shape().to_vec();
        let width = shape[shape.len() - 1];
        let (flat, norm, d_out) = (tall(x), into_contiguous(norm), tall(grad));
        let rounded = operand(d_out.clone(), precision);
        let d_act = into_contiguous(rounded_product(rounded.clone(), operand(down, precision), precision));
        // The inner activations are consumed: their gradients take their places.
        let act = swiglu_in_place(&gate, &up, d_act);
        let d_down = of_down.then(|| product(transposed(rounded), act, precision));
        let rows = dense(&flat, width, eps);
        let normed = (of_gate || of_up).then(|| rms_norm(&flat, &norm, rows, format(precision)));
        let [gate_weight, up_weight] = [gate_weight, up_weight].map(|x| operand(x, precision));
        let of = |d_y: &CubeTensor, wanted: bool| {
            normed.clone().filter(|_| wanted).map(|x| product(transposed(d_y.clone()), x, precision))
        };
        let (d_gate, d_up) = (of(&gate, of_gate), of(&up, of_up));
        drop(normed);
        let [by_gate, by_up] = [product(gate, gate_weight, precision), product(up, up_weight, precision)];
        let [by_gate, by_up] = [by_gate, by_up].map(into_contiguous);
        let (d_x, d_norm) = rms_norm_grad(&flat, &norm, &by_gate, Some([by_up, d_out]), rows, of_norm);
        [of_x.then(|| reshaped(d_x, shape)), d_norm, d_gate, d_up, d_down]
    }
}
