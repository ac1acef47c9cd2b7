//! Packed matrices in plain tensor operations.

use burn::tensor::{DType, Int, Tensor, TensorData};
use half::bf16;

use super::QuantizedMatrix;
use super::format::{GROUP, INT4, Layout, NF4, Quantization};
use crate::linear::reference::linear;

/// See [`QuantizedMatrix::linear`]; without a bias.
pub fn quantized_linear(x: Tensor<3>, matrix: &QuantizedMatrix) -> Tensor<3> {
    let weight = unpack(matrix.words.clone(), matrix.scales.clone(), matrix.layout).cast(x.dtype());
    linear(x, weight)
}

/// The numbers `[d_out, d_in]` of a packed matrix.
pub(crate) fn unpack(words: Tensor<1, Int>, scales: Tensor<1>, layout: Layout) -> Tensor<2> {
    let Layout { d_out, d_in, quantization } = layout;
    let count = layout.numbers();
    let bits = |x: &Tensor<1, Int>, by: u32, mask: i32| {
        let part = if by == 0 { x.clone() } else { x.clone().bitwise_right_shift_scalar(by) };
        part.bitwise_and_scalar(mask)
    };
    // Numbers of 32 bits lie with their lowest byte first.
    let bytes: Vec<Tensor<1, Int>> = [0, 8, 16, 24].map(|by| bits(&words, by, 255)).to_vec();
    let bytes: Tensor<1, Int> = Tensor::stack::<2>(bytes, 1).flatten(0, 1);
    match quantization {
        Quantization::Bf16 => {
            // No device reads bits as a number in plain operations: all numbers that there are lie in a table.
            let halves = vec![bits(&words, 0, 0xFFFF), bits(&words, 16, 0xFFFF)];
            let codes: Tensor<1, Int> = Tensor::stack::<2>(halves, 1).flatten(0, 1);
            let all: Vec<f32> = (0..=u16::MAX).map(|code| bf16::from_bits(code).to_f32()).collect();
            let all = Tensor::<1>::from_data(TensorData::new(all, [1 << 16]), (&scales.device(), DType::F32));
            all.select(0, codes.narrow(0, 0, count)).reshape([d_out, d_in])
        }
        Quantization::Int8 => {
            let codes = bytes.narrow(0, 0, count).float();
            let below_zero = codes.clone().greater_elem(127.0).float();
            (codes - below_zero * 256.0).reshape([d_out, d_in]) * scales.unsqueeze_dim::<2>(1)
        }
        Quantization::Int4 | Quantization::Nf4 => {
            let halves = vec![bits(&bytes, 4, 15), bits(&bytes, 0, 15)];
            let codes: Tensor<1, Int> = Tensor::stack::<2>(halves, 1).flatten(0, 1);
            let levels = if quantization == Quantization::Nf4 { NF4 } else { INT4 };
            let levels = Tensor::<1>::from_data(levels, (&scales.device(), DType::F32));
            let values = levels.select(0, codes.narrow(0, 0, count));
            let (rows, width) = match quantization {
                Quantization::Nf4 => (1, count),
                _ => (d_out, d_in),
            };
            let groups = width.div_ceil(GROUP);
            let scales = scales.reshape([rows, groups, 1]).expand([rows, groups, GROUP]);
            let scales = scales.reshape([rows, groups * GROUP]).narrow(1, 0, width);
            (values.reshape([rows, width]) * scales).reshape([d_out, d_in])
        }
    }
}
