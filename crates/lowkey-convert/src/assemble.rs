//! A model from the tensors of another one and some that were computed.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_model::{CausalLm, ModelConfig};

/// A model of `config` with these tensors, each row by row, and for the rest with those of `model` that have the same name. What is
/// neither here nor there begins as in a new model; what is given and the configuration does not ask for is left.
pub(crate) fn with_tensors(
    model: &CausalLm,
    config: &ModelConfig,
    tensors: impl IntoIterator<Item = (String, Vec<f64>)>,
    device: &Device,
) -> CausalLm {
    let dtype = model.model.embed_tokens.table().dtype();
    let mut kept: BTreeMap<String, Tensor<1>> =
        model.parameters().into_iter().map(|parameter| (parameter.name, parameter.value)).collect();
    kept.extend(tensors.into_iter().map(|(name, numbers)| {
        let length = numbers.len();
        (name, Tensor::from_data(TensorData::new(numbers, [length]), (device, dtype)))
    }));
    CausalLm::of_tensors(config, device, |name| kept.remove(name))
}
