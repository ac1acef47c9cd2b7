//! Token embedding on the CPU: that of the backend.

use burn::backend::Flex;
use burn::backend::ops::ModuleOps;
use burn_flex::FlexTensor;

use super::autodiff::{EmbeddingGradients, EmbeddingOps};

impl EmbeddingOps for Flex {
    fn embed(weight: FlexTensor, ids: FlexTensor) -> FlexTensor {
        Self::embedding(weight, ids)
    }
}

impl EmbeddingGradients for Flex {
    fn embed_grad(weight: FlexTensor, ids: FlexTensor, grad: FlexTensor) -> FlexTensor {
        Self::embedding_backward(weight, grad, ids)
    }
}
