//! A text on its way through a model, one layer at a time, so that no more than one need be there.

use burn::tensor::{Device, Tensor};
use lowkey_model::attention::Seen;
use lowkey_model::model::Block;
use lowkey_model::{CausalLm, Rows, ids_tensor};

use crate::error::{Error, Result};
use crate::{Observer, Progress};

/// The hidden states of a text's sequences before some layer, each `[1, seq, d]`.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    hidden: Vec<Tensor<3>>,
}

impl Stream {
    /// Before the first layer; sequences of no tokens are left out.
    pub(crate) fn begin(model: &CausalLm, text: &[Vec<u32>], device: &Device) -> Self {
        let embed = |ids: &Vec<u32>| model.model.embed_tokens.forward(ids_tensor(ids, 1, ids.len(), device));
        Self { hidden: text.iter().filter(|ids| !ids.is_empty()).map(embed).collect() }
    }

    /// Through all layers of a model: what `look` finds of each, before whose block the text has come.
    ///
    /// # Errors
    /// Those of `look`.
    pub(crate) fn each_layer<T>(
        model: &CausalLm,
        text: &[Vec<u32>],
        device: &Device,
        (doing, observe): (&'static str, Observer),
        look: impl Fn(usize, &Block, &Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut stream = Self::begin(model, text, device);
        let layers = &model.model.layers;
        let mut found = Vec::with_capacity(layers.len());
        for (layer, block) in layers.iter().enumerate() {
            observe(Progress { doing, done: layer, of: layers.len() });
            found.push(look(layer, block, &stream)?);
            stream.pass(model, block, device);
        }
        Ok(found)
    }

    /// What the attention of a block reads of each sequence, `[1, seq, d]`.
    pub(crate) fn inputs<'a>(&'a self, block: &'a Block) -> impl Iterator<Item = Tensor<3>> + 'a {
        self.hidden.iter().map(|hidden| block.input_layernorm.forward(hidden.clone()))
    }

    /// Goes on to behind a block of `model`.
    pub(crate) fn pass(&mut self, model: &CausalLm, block: &Block, device: &Device) {
        for hidden in &mut self.hidden {
            let [_, seq, _] = hidden.dims();
            let context = model.context(&vec![0; seq], seq, device);
            *hidden = block.forward(hidden.clone(), Seen::Rows(&context), None);
        }
    }

    /// Behind all layers: mean next-token loss of the text that it was begun with, nats. `model` gives final norm and head.
    ///
    /// # Errors
    /// [`Error::Device`] where the device does not give back what it computed.
    pub(crate) fn loss(&self, model: &CausalLm, text: &[Vec<u32>]) -> Result<f64> {
        let (mut nats, mut tokens) = (0.0, 0);
        for (hidden, ids) in self.hidden.iter().zip(text.iter().filter(|ids| !ids.is_empty())) {
            let Some((_, next)) = ids.split_first().filter(|(_, next)| !next.is_empty()) else { continue };
            let targets: Vec<i64> = next.iter().map(|id| i64::from(*id)).collect();
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows: 1,
                seq_len: next.len(),
                input_ids: &ids[..next.len()],
                targets: &targets,
                document_starts: &vec![0; next.len()],
            };
            let losses = model.losses_after_blocks(hidden.clone().narrow(1, 0, next.len()), batch);
            let losses = losses.try_into_vec_as::<f32>();
            let losses = losses.map_err(|e| Error::Device { what: "the losses", why: format!("{e:?}") })?;
            nats += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            tokens += losses.len();
        }
        Ok(nats / tokens.max(1) as f64)
    }

    /// Behind all layers: logits of the first sequence, `[1, seq, vocab]`.
    pub(crate) fn first_logits(&self, model: &CausalLm) -> Option<Tensor<3>> {
        self.hidden.first().map(|hidden| model.logits(model.model.norm.forward(hidden.clone())))
    }
}
