//! Frozen matrices in few bits (QLoRA, arXiv 2305.14314): which ones, how far they are off, and models that have them.
//!
//! Packed is every matrix between hidden states but `kv_b_proj`: latent attention takes that one apart into keys' and values' maps and
//! multiplies them with others. Embedding, output head, norms and biases stay as they are, and so does what is trained whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::Tensor;
use lowkey_kernels::quantized_linear::{Packed, Quantization, QuantizedMatrix};
use serde::Serialize;

use super::config::AdapterConfig;
use super::plan::{AdapterPlan, module_of};
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::tensor::TensorSpec;

/// What packing did to one matrix.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizedLayer {
    /// The map, such as `model.layers.0.mlp.up_proj`.
    pub name: String,
    /// Its numbers of rows and columns, `[d_out, d_in]`.
    pub shape: [usize; 2],
    /// How it is packed.
    pub quantization: Quantization,
    /// Bytes that it takes, scales included.
    pub bytes: usize,
    /// ‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, where Ŵ is what the packed matrix stands for; 0 for a matrix of zeros.
    pub error: f64,
}

impl QuantizedLayer {
    pub(crate) fn new(tensor: &str, values: &[f32], packed: &Packed) -> Self {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let size: f64 = values.iter().map(|x| square(*x)).sum();
        let off: f64 = values.iter().zip(packed.values()).map(|(x, packed)| square(x - packed)).sum();
        let (shape, quantization) = (packed.dims(), packed.quantization());
        let error = if size == 0.0 { 0.0 } else { (off / size).sqrt() };
        Self { name: module_of(tensor).to_string(), shape, quantization, bytes: quantization.bytes(shape), error }
    }
}

impl AdapterPlan {
    /// How a tensor of the base is packed, where it is.
    pub fn packs(&self, spec: &TensorSpec) -> Option<Quantization> {
        // Where a head has several parts, they are taken apart.
        let one_map = spec.role.is_hidden_matrix() && spec.head_rows.parts.len() == 1;
        self.quantization.filter(|_| one_map && !self.saves(&spec.name))
    }

    /// The numbers of a tensor of the base as the model computes with them.
    pub(super) fn as_packed(&self, spec: &TensorSpec, values: Vec<f32>) -> Vec<f32> {
        match (self.packs(spec), &spec.shape[..]) {
            (Some(quantization), [d_out, d_in]) if values.len() == d_out * d_in => {
                Packed::new(&values, [*d_out, *d_in], quantization).values()
            }
            _ => values,
        }
    }

    /// Bytes that packing spares of a model with these tensors, each number of which takes 4 where it is not packed.
    pub fn bytes_spared(&self, tensors: &[TensorSpec]) -> usize {
        let of = |spec: &TensorSpec| match (self.packs(spec), &spec.shape[..]) {
            (Some(quantization), [d_out, d_in]) => {
                (4 * d_out * d_in).saturating_sub(quantization.bytes([*d_out, *d_in]))
            }
            _ => 0,
        };
        tensors.iter().map(of).sum()
    }
}

impl CausalLm {
    /// The same model with its frozen matrices packed: all but what is trained where it has adapters, else all. What is packed is no
    /// parameter any more; [`CausalLm::quantized_layers`] says how far each is off, and [`CausalLm::merged`] gives a model of whole
    /// matrices again.
    ///
    /// # Errors
    /// [`Error::Adapter`] where matrices are packed already, or their values cannot be read from their device.
    pub fn quantized(&self, quantization: Quantization) -> Result<Self> {
        let refuse = |why: String| Error::adapter("quantization", quantization.name(), why);
        if !self.quantized.is_empty() {
            return Err(refuse("the matrices are packed already; merge the model first".into()));
        }
        let plan = match self.adapter() {
            Some(own) => AdapterConfig { quantization: Some(quantization), ..own.clone() }.plan(&self.config)?,
            None => AdapterPlan::packing(quantization),
        };
        let mut values: BTreeMap<String, Tensor<1>> =
            self.parameters().into_iter().map(|parameter| (parameter.name, parameter.value)).collect();
        let mut failure = None;
        let device = self.model.norm.gain().device();
        let mut model = Self::build_adapted(&self.config, Some(&plan), &device, &mut |spec| {
            let read = values.remove(&spec.name).map(|value| value.try_into_vec_as::<f32>());
            match read {
                Some(Ok(values)) => values,
                Some(Err(e)) => {
                    failure.get_or_insert(format!("{} cannot be read back: {e:?}", spec.name));
                    Vec::new()
                }
                None => Vec::new(),
            }
        });
        if let Some(why) = failure {
            return Err(refuse(why));
        }
        model.adapter = self.adapter.as_deref().map(|(adapter, base)| {
            Arc::new((AdapterConfig { quantization: Some(quantization), ..adapter.clone() }, base.clone()))
        });
        let trained: BTreeMap<&str, bool> =
            self.tensors.iter().map(|spec| (spec.name.as_str(), spec.trainable)).collect();
        Ok(model.with_trained(|spec| trained.get(spec.name.as_str()).copied().unwrap_or(false)))
    }

    /// The same model to be read and not trained: [`CausalLm::quantized`], and in bf16, by which published weights lose nothing, the output
    /// head, too. The head's whole matrix stays beside it, where embeddings are looked up or losses computed.
    ///
    /// # Errors
    /// As [`CausalLm::quantized`].
    pub fn packed_to_read(&self, quantization: Quantization) -> Result<Self> {
        self.quantized(quantization)?.with_packed_head(quantization)
    }

    /// The same model with its output head packed as well, where that is worth it.
    pub(crate) fn with_packed_head(mut self, quantization: Quantization) -> Result<Self> {
        if quantization == Quantization::Bf16 {
            let head = self.head_weight().detach();
            let (shape, device) = (head.dims(), head.device());
            let values = head.try_into_vec_as::<f32>().map_err(|e| {
                let why = format!("the output head cannot be read back: {e:?}");
                Error::adapter("quantization", quantization.name(), why)
            })?;
            self.packed_head = Some(QuantizedMatrix::new(&Packed::new(&values, shape, quantization), &device));
        }
        Ok(self)
    }

    /// How matrices are packed, where they are.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantized.first().map(|layer| layer.quantization)
    }

    /// Bytes that a pass does not read since matrices are packed, each number of which would take 4.
    pub fn packed_bytes_spared(&self) -> usize {
        let of = |quantization: Quantization, shape: [usize; 2]| {
            (4 * shape[0] * shape[1]).saturating_sub(quantization.bytes(shape))
        };
        let layers = self.quantized.iter().map(|layer| of(layer.quantization, layer.shape));
        layers.sum::<usize>() + self.packed_head.as_ref().map_or(0, |head| of(head.quantization(), head.dims()))
    }

    /// What packing did to each matrix that is packed, in the model's order.
    pub fn quantized_layers(&self) -> &[QuantizedLayer] {
        &self.quantized
    }
}
