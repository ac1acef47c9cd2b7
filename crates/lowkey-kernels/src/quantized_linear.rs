//! The linear map whose matrix is frozen and packed in 4 or 8 bits.
//!
//! What a packed number stands for is said by [`Quantization`]. The product is computed from the packed matrix: the CPU unpacks tiles that
//! stay in its cache, and for few tokens vectors that stay in its registers; a GPU unpacks the whole matrix for the length of one product,
//! since its products are kernels of CubeK, which read memory. The matrix has no gradient.

pub(crate) mod autodiff;
#[cfg(target_arch = "x86_64")]
mod codes;
mod cpu;
mod format;
#[cfg(feature = "gpu")]
mod gpu;
mod halves;
mod packed;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use self::autodiff::{Frozen, QuantizedLinearOps};
use self::format::Layout;
pub use self::format::{GROUP, NF4, Quantization};
pub use self::packed::Packed;
use crate::precision;

/// A frozen matrix `[d_out, d_in]` in few bits, on a device.
#[derive(Module, Debug)]
pub struct QuantizedMatrix {
    /// The bytes of [`Packed::codes`] as they lie in memory, four to a number of 32 bits: what every device reads.
    words: Tensor<1, Int>,
    /// [`Packed::scales`].
    scales: Tensor<1>,
    #[module(skip)]
    layout: Layout,
}

impl QuantizedMatrix {
    /// The same on a device.
    pub fn new(packed: &Packed, device: &Device) -> Self {
        let words: Vec<i32> = packed.codes.chunks(4).map(word).collect();
        let (count, scales) = (words.len(), packed.scales.clone());
        Self {
            words: Tensor::from_data(TensorData::new(words, [count]), (device, DType::I32)),
            scales: Tensor::from_data(TensorData::new(scales, [packed.scales.len()]), (device, DType::F32)),
            layout: packed.layout,
        }
    }

    /// Its numbers of rows and columns, `[d_out, d_in]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.layout.d_out, self.layout.d_in]
    }

    /// How it is packed.
    pub fn quantization(&self) -> Quantization {
        self.layout.quantization
    }

    /// The whole matrix as f32, outside any graph of its own.
    pub fn unpack(&self) -> Tensor<2> {
        let (words, scales) = (self.words.clone().into_dispatch(), self.scales.clone().into_dispatch());
        Tensor::from_dispatch(Dispatch::unpack(words, scales, self.layout))
    }

    /// `x · Wᵀ (+ b)`, from the packed matrix.
    ///
    /// # Shapes
    /// `x [batch, seq, d_in]`, `bias [d_out]` → `[batch, seq, d_out]`.
    pub fn linear(&self, x: Tensor<3>, bias: Option<Tensor<1>>) -> Tensor<3> {
        self.check(&x);
        if x.dtype() != DType::F32 {
            return with_bias(reference::quantized_linear(x, self), bias);
        }
        let (x, words, scales) = (x.into_dispatch(), self.words.clone().into_dispatch(), self.scales.clone());
        let precision = precision::current();
        let y = Dispatch::project_quantized(x, words, scales.into_dispatch(), self.layout, precision);
        with_bias(Tensor::from_dispatch(y), bias)
    }

    /// `residual + x · Wᵀ (+ b)`, in one pass over the result.
    ///
    /// # Shapes
    /// As [`QuantizedMatrix::linear`]; `residual [batch, seq, d_out]`.
    pub fn add_linear(&self, residual: Tensor<3>, x: Tensor<3>, bias: Option<Tensor<1>>) -> Tensor<3> {
        self.check(&x);
        if x.dtype() != DType::F32 {
            return residual + self.linear(x, bias);
        }
        let (residual, x, words) = (residual.into_dispatch(), x.into_dispatch(), self.words.clone().into_dispatch());
        let (scales, precision) = (self.scales.clone().into_dispatch(), precision::current());
        let y = Dispatch::add_project_quantized(residual, x, words, scales, self.layout, precision);
        with_bias(Tensor::from_dispatch(y), bias)
    }

    /// The same for an operation that takes more than it.
    pub(crate) fn frozen(self) -> Frozen<Dispatch> {
        let Self { words, scales, layout } = self;
        Frozen::Packed { words: words.into_dispatch(), scales: scales.into_dispatch(), layout }
    }

    fn check(&self, x: &Tensor<3>) {
        let ([.., width], [_, d_in]) = (x.dims(), self.dims());
        assert!(width == d_in, "a matrix of {d_in} columns cannot take {:?}", x.dims());
    }
}

/// Up to four bytes as a number of 32 bits that lies so in memory.
fn word(bytes: &[u8]) -> i32 {
    i32::from_ne_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)))
}

fn with_bias(y: Tensor<3>, bias: Option<Tensor<1>>) -> Tensor<3> {
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}
