//! The decoder: embedding, pre-norm blocks, final norm, output head.

use std::path::PathBuf;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowkey_batch::Rows;
use lowkey_kernels::{
    adapted::adapted_mlp,
    loss::LossSum,
    mlp::{MlpWeights, gated_mlp},
    quantized_linear::QuantizedMatrix,
};

use crate::adapter::{AdapterConfig, AdapterPlan, QuantizedLayer};
use crate::attention::{Attention, Seen};
use crate::config::{Family, ModelConfig};
pub use crate::context::{Context, Trace};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::layer_config::LayerConfig;
use crate::layers::Builder;
pub use crate::layers::{Embedding, Linear, RmsNorm};
use crate::rope::RopeTable;
use crate::tensor::{Role, TensorSpec};

/// A causal language model. Field names spell the checkpoint's tensor names.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// Embedding, blocks and final norm.
    pub model: Decoder,
    /// Output head; absent where it is the embedding matrix.
    pub lm_head: Option<Linear>,
    /// The output head's matrix packed, which [`CausalLm::logits`] reads in its place.
    pub(crate) packed_head: Option<QuantizedMatrix>,
    /// What it was built from.
    #[module(skip)]
    pub config: ModelConfig,
    /// What its tensors are, in the order of the fields.
    #[module(skip)]
    pub(crate) tensors: Arc<[TensorSpec]>,
    /// What its adapters were made from, where it has any, and the directory of the model that they stand beside.
    #[module(skip)]
    pub(crate) adapter: Option<Arc<(AdapterConfig, PathBuf)>>,
    /// What packing did to the matrices that are packed.
    #[module(skip)]
    pub(crate) quantized: Arc<[QuantizedLayer]>,
}

/// The part of a [`CausalLm`] below the output head.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Decoder blocks, first to last.
    pub layers: Vec<Block>,
    /// Final norm.
    pub norm: RmsNorm,
}

/// A pre-norm decoder block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention.
    pub self_attn: Attention,
    /// Norm before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward layer.
    pub mlp: Mlp,
}

/// SwiGLU feed-forward layer: `down(silu(gate x) · up x)` (arXiv 2002.05202).
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[f, d]`
    pub gate_proj: Linear,
    /// `[f, d]`
    pub up_proj: Linear,
    /// `[d, f]`
    pub down_proj: Linear,
}

impl Block {
    /// One block over a chunk, whose queries see what `seen` says. A report is made of whole rows.
    ///
    /// # Shapes
    /// `[batch, seq, d]` → `[batch, seq, d]`.
    pub fn forward(&self, x: Tensor<3>, seen: Seen, report: Option<&mut Trace>) -> Tensor<3> {
        let normed = Input::normed(&self.input_layernorm, x.clone());
        let report = match (&seen, report) {
            (Seen::Rows(context), Some(report)) => {
                if !report.is_of_attention() {
                    self.self_attn.report(&normed, context, report);
                }
                Some(report)
            }
            _ => None,
        };
        let heads = self.self_attn.attend(normed, seen);
        let x = match report {
            None => self.self_attn.add_to(x, heads),
            Some(report) => {
                let out = self.self_attn.o_proj().forward(heads.values.clone());
                report.attn_out.push(out.clone());
                if report.is_of_attention() { x + out } else { self.self_attn.add_to(x, heads) }
            }
        };
        self.feed_forward(x)
    }

    /// The second half: `x + mlp(norm(x))`, `[batch, seq, d]`.
    pub(crate) fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let (norm, mlp) = (&self.post_attention_layernorm, &self.mlp);
        if let [Some(gate), Some(up), Some(down)] = mlp.linears().map(Linear::adapted) {
            return adapted_mlp(x, norm.gain(), [gate, up, down], norm.eps);
        }
        let apart = |linear: &Linear| linear.is_adapted() || linear.is_packed();
        if mlp.gate_proj.bias().is_some() || mlp.linears().into_iter().any(apart) {
            // Neither operation knows biases, which few models have, nor packed matrices, nor maps of which only some have adapters. What is
            // kept is the same.
            let normed = Input::normed(norm, x.clone());
            let gate = mlp.gate_proj.forward(normed.clone());
            return mlp.down_proj.add_to(x, Input::swiglu(gate, mlp.up_proj.forward(normed)));
        }
        let weights = MlpWeights {
            norm: norm.gain(),
            gate: mlp.gate_proj.matrix(),
            up: mlp.up_proj.matrix(),
            down: mlp.down_proj.matrix(),
        };
        gated_mlp(x, weights, norm.eps)
    }
}

impl Mlp {
    /// Its maps.
    pub(crate) fn linears(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// [`Mlp::linears`], to be changed.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 3] {
        [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj]
    }
}

impl CausalLm {
    /// Builds the model with the values that `fill` gives for each tensor.
    pub(crate) fn build(config: &ModelConfig, device: &Device, fill: &mut dyn FnMut(&TensorSpec) -> Vec<f32>) -> Self {
        Self::build_adapted(config, None, device, fill)
    }

    /// [`CausalLm::build`] with adapters beside those maps that `adapters` names.
    pub(crate) fn build_adapted(
        config: &ModelConfig,
        adapters: Option<&AdapterPlan>,
        device: &Device,
        fill: &mut dyn FnMut(&TensorSpec) -> Vec<f32>,
    ) -> Self {
        let b = &mut Builder::new(device, adapters, fill);
        let (d, eps) = (config.hidden_size, config.rms_norm_eps);
        let embed_tokens = Embedding::build(b, "model.embed_tokens", config.vocab_size, d);
        let layers = config.layers.iter().enumerate();
        let layers = layers
            .map(|(i, LayerConfig { attention, mlp })| {
                let f = mlp.intermediate_size;
                let part = |part: &str| format!("model.layers.{i}.{part}");
                Block {
                    input_layernorm: RmsNorm::build(b, &part("input_layernorm"), d, eps),
                    self_attn: Attention::build(b, &part("self_attn"), config, attention),
                    post_attention_layernorm: RmsNorm::build(b, &part("post_attention_layernorm"), d, eps),
                    mlp: Mlp {
                        gate_proj: Linear::build(b, &part("mlp.gate_proj"), [d, f], Role::Matrix, mlp.bias),
                        up_proj: Linear::build(b, &part("mlp.up_proj"), [d, f], Role::Matrix, mlp.bias),
                        down_proj: Linear::build(b, &part("mlp.down_proj"), [f, d], Role::Residual, mlp.bias),
                    },
                }
            })
            .collect();
        let norm = RmsNorm::build(b, "model.norm", d, eps);
        let head = [d, config.vocab_size];
        let lm_head = (!config.tie_word_embeddings).then(|| Linear::build(b, "lm_head", head, Role::Head, false));
        let (tensors, quantized) = (std::mem::take(&mut b.built).into(), std::mem::take(&mut b.packed).into());
        let model = Decoder { embed_tokens, layers, norm };
        Self { model, lm_head, config: config.clone(), tensors, adapter: None, quantized, packed_head: None }
    }

    /// The model with layer ℓ caching and reading only the first `ranks[ℓ]` numbers of its latent. The latent is normalised over its
    /// whole width as before, so that a cut is a projection, and what is left out is only what those numbers said.
    ///
    /// # Errors
    /// [`Error::Config`] where the model has no latents, where there is not one rank for each layer, or where one is 0 or above
    /// what the layer reads now.
    pub fn with_kv_ranks(&self, ranks: &[usize]) -> Result<Self> {
        self.config.check_kv_ranks(ranks)?;
        if let Some((layer, (rank, now))) =
            ranks.iter().zip(self.config.kv_ranks()).enumerate().find(|(_, (rank, now))| *rank > now)
        {
            let why = format!("layer {layer} was cut to {now} before; {rank} are not there");
            return Err(Error::config("kv_cache_ranks", &format!("{ranks:?}"), why));
        }
        let mut model = self.merged();
        for (block, rank) in model.model.layers.iter_mut().zip(ranks) {
            if let Some(mla) = block.self_attn.latent_mut() {
                mla.cut(*rank);
            }
        }
        model.set_kv_ranks(ranks);
        Ok(model)
    }

    /// The same function with whole latents: cut ones are read with weights of zero. What other programs can run, from a cache as wide
    /// as before the cut.
    pub fn with_whole_latents(&self) -> Self {
        let mut model = self.merged();
        for block in &mut model.model.layers {
            if let Some(mla) = block.self_attn.latent_mut() {
                mla.widen();
            }
        }
        if let Some(mla) = self.config.attention().latent() {
            model.set_kv_ranks(&vec![mla.kv_lora_rank; self.config.layers.len()]);
        }
        model
    }

    fn set_kv_ranks(&mut self, ranks: &[usize]) {
        let whole = self.config.attention().latent().map_or(0, |mla| mla.kv_lora_rank);
        let cut = ranks.iter().any(|rank| *rank < whole);
        self.config.set_kv_cache_ranks(cut.then_some(ranks));
        let (family, natural) = (self.config.family, self.config.natural_family());
        // Back under the name that it had, where it is a plain model again.
        if natural == Family::Lowkey || family == Family::Lowkey {
            self.config.family = natural;
        }
    }

    /// Cosines and sines for the given positions, one row per sequence or one row for all.
    pub fn rope_table(&self, positions: &[Vec<usize>], device: &Device) -> RopeTable {
        let (config, dtype) = (&self.config, self.model.embed_tokens.table().dtype());
        RopeTable::new(&config.inverse_frequencies(), config.rope.table_factor(), positions, (device, dtype))
    }

    /// Positions and documents of whole sequences of `seq` tokens with the given document starts (`[rows · seq]`).
    pub fn context(&self, document_starts: &[u32], seq: usize, device: &Device) -> Context {
        let rope = self.rope_table(&[(0..seq).collect()], device);
        Context { rope, document_starts: document_starts.to_vec(), kv_rank: None }
    }

    /// Hidden states after the final norm, `[batch, seq]` → `[batch, seq, d]`.
    pub fn hidden(&self, ids: Tensor<2, Int>, context: &Context, trace: Option<&mut Trace>) -> Tensor<3> {
        self.through_blocks(self.model.embed_tokens.forward(ids), context, trace)
    }

    /// The blocks and the final norm, `[batch, seq, d]` → `[batch, seq, d]`.
    fn through_blocks(&self, mut x: Tensor<3>, context: &Context, mut trace: Option<&mut Trace>) -> Tensor<3> {
        for block in &self.model.layers {
            if let Some(trace) = trace.as_deref_mut().filter(|trace| trace.has_hidden()) {
                trace.hidden.push(x.clone());
            }
            x = block.forward(x, Seen::Rows(context), trace.as_deref_mut().filter(|trace| trace.has_blocks()));
        }
        let x = self.model.norm.forward(x);
        if let Some(trace) = trace.filter(|trace| trace.has_hidden()) {
            trace.hidden.push(x.clone());
        }
        x
    }

    /// Output head, `[batch, seq, d]` → `[batch, seq, vocab]`.
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.packed_head {
            Some(packed) => packed.linear(hidden, None),
            None => lowkey_kernels::linear(hidden, self.head_weight(), None),
        }
    }

    /// Logits of whole sequences that hold one document each, `[batch, seq]` → `[batch, seq, vocab]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let device = ids.device();
        let context = self.context(&vec![0; batch * seq], seq, &device);
        self.logits(self.hidden(ids, &context, None))
    }

    /// Summed loss of a batch: of tokens, with `z_loss` times the square of each log-partition ([`LossSum`]), and the logits never
    /// exist whole, in either direction; of vectors, the squared error per number.
    pub fn loss(&self, batch: Rows, z_loss: f64, device: &Device) -> LossSum {
        self.loss_of(self.last_hidden(batch, None, device, None), batch, z_loss)
    }

    /// Loss of each position, `[rows · seq_len]`, 0 where there is no target; no gradient flows through it.
    pub fn losses(&self, batch: Rows, device: &Device, trace: Option<&mut Trace>) -> Tensor<1> {
        self.losses_of(self.last_hidden(batch, None, device, trace), batch)
    }

    /// The same of `x [rows, seq_len, d]`, what the last block has made.
    pub fn losses_after_blocks(&self, x: Tensor<3>, batch: Rows) -> Tensor<1> {
        let [rows, seq, d] = x.dims();
        self.losses_of(self.model.norm.forward(x).reshape([rows * seq, d]), batch)
    }

    /// Hidden states after the final norm, `[rows · seq_len, d]`, of latents read up to `kv_rank` ([`Context::kv_rank`]).
    pub(crate) fn last_hidden(
        &self,
        batch: Rows,
        kv_rank: Option<usize>,
        device: &Device,
        trace: Option<&mut Trace>,
    ) -> Tensor<2> {
        self.last_hidden_of(self.embed(batch, device), batch, kv_rank, device, trace)
    }

    /// The same of `x [rows, seq_len, d]`, what the blocks are to read.
    pub(crate) fn last_hidden_of(
        &self,
        x: Tensor<3>,
        batch: Rows,
        kv_rank: Option<usize>,
        device: &Device,
        trace: Option<&mut Trace>,
    ) -> Tensor<2> {
        let Rows { rows, seq_len, .. } = batch;
        let context = Context { kv_rank, ..self.context(batch.document_starts, seq_len, device) };
        let hidden = self.through_blocks(x, &context, trace);
        hidden.reshape([rows * seq_len, self.config.hidden_size])
    }

    /// The output head's matrix, `[vocab, d]`.
    pub(crate) fn head_weight(&self) -> Tensor<2> {
        self.lm_head.as_ref().map_or_else(|| self.model.embed_tokens.table(), |head| head.matrix())
    }
}

/// Token ids as a tensor `[rows, seq]`.
pub fn ids_tensor(ids: &[u32], rows: usize, seq: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(ids, [rows, seq]), device)
}

#[cfg(test)]
mod tests;
