//! The mathematics of the models that lowkey trains, and the Hugging Face directories that hold them.
//!
//! **Purpose.** A causal language model whose attention is Multi-head Latent Attention (MLA; DeepSeek-V2, arXiv 2405.04434)
//! or one of its baselines, written so that the equations can be read off the code, and exact enough that a checkpoint of
//! transformers gives the same logits, gradients and training trajectories here.
//!
//! **Main types.** [`ModelConfig`] (checked sizes), [`CausalLm`] (the parameters), [`attention::Attention`] with [`attention::Mla`] and
//! [`attention::Grouped`], [`rope::RopeConfig`] (frequencies and YaRN), [`model::Context`] (positions and documents of a forward pass), [`model::Trace`]
//! (intermediate results), [`Parameter`] (a named, flat view for optimisers and files).
//!
//! **Flow.** A `[model]` section ([`config::ModelSection`]) or a `config.json` becomes a [`ModelConfig`];
//! [`CausalLm::init`] or [`CausalLm::load`] builds the model on a device; [`CausalLm::loss`] trains it,
//! [`CausalLm::forward`] evaluates it, and the parts of [`attention::Mla`] let a cache stand between latent and attention; [`attention::FusedMla`] holds
//! one layer's attention with its up-projections multiplied out, for that use.
//!
//! **What this crate does not know.** Text and tokenizers, training loops, optimisers, any file format but Hugging Face's,
//! any particular backend. It never prints.
//!
//! # One quantity, four names
//!
//! | paper (arXiv 2405.04434) | Hugging Face tensor | here | GGUF |
//! |---|---|---|---|
//! | W^Q | `q_proj.weight` | [`Mla::q_proj`](attention::Mla::q_proj) | `attn_q` |
//! | W^DQ | `q_a_proj.weight` | [`Mla::q_a_proj`](attention::Mla::q_a_proj) | `attn_q_a` |
//! | norm of c^Q | `q_a_layernorm.weight` | [`Mla::q_a_layernorm`](attention::Mla::q_a_layernorm) | `attn_q_a_norm` |
//! | W^UQ, W^QR, rows per head | `q_b_proj.weight` | [`Mla::q_b_proj`](attention::Mla::q_b_proj) | `attn_q_b` |
//! | W^DKV, then W^KR | `kv_a_proj_with_mqa.weight` | [`Mla::kv_a_proj_with_mqa`](attention::Mla::kv_a_proj_with_mqa) | `attn_kv_a_mqa` |
//! | norm of c^KV | `kv_a_layernorm.weight` | [`Mla::kv_a_layernorm`](attention::Mla::kv_a_layernorm) | `attn_kv_a_norm` |
//! | W^UK, W^UV, rows per head | `kv_b_proj.weight` | [`Mla::kv_b_proj`](attention::Mla::kv_b_proj) | `attn_k_b` (transposed), `attn_v_b` |
//! | W^O | `o_proj.weight` | [`Mla::o_proj`](attention::Mla::o_proj) | `attn_output` |
//! | c^KV_t, cached | — | [`Latent::c_kv`](attention::Latent::c_kv) | — |
//! | k^R_t, cached | — | [`Latent::k_pe`](attention::Latent::k_pe) | — |
//! | d_c | `kv_lora_rank` | [`MlaConfig::kv_lora_rank`](attention::MlaConfig::kv_lora_rank), L | `attention.kv_lora_rank` |
//! | d_c′ | `q_lora_rank` | [`MlaConfig::q_lora_rank`](attention::MlaConfig::q_lora_rank), Q | `attention.q_lora_rank` |
//! | d_h of k^C | `qk_nope_head_dim` | [`MlaConfig::qk_nope_head_dim`](attention::MlaConfig::qk_nope_head_dim), N | `key_length_mla − rope.dimension_count` |
//! | d_h^R | `qk_rope_head_dim` | [`MlaConfig::qk_rope_head_dim`](attention::MlaConfig::qk_rope_head_dim), R | `rope.dimension_count` |
//! | d_h of v^C | `v_head_dim` | [`MlaConfig::v_head_dim`](attention::MlaConfig::v_head_dim), V | `attention.value_length_mla` |
//!
//! # Example
//!
//! A small model from the keys of a run file, its loss and its gradients:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lowkey_model::config::ModelSection;
//! use lowkey_model::objective::{Objective, Term};
//! use lowkey_model::{CausalLm, Recompute, Rows};
//!
//! let section: ModelSection = serde_json::from_value(serde_json::json!({
//!     "attention": "mla", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
//!     "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
//! }))?;
//! let (config, _notes) = section.resolve(32, 4)?;
//! let device = burn::tensor::Device::flex().autodiff();
//! let model = CausalLm::init(&config, 1, &device);
//!
//! let batch = Rows {
//!     rows: 1,
//!     seq_len: 4,
//!     input_ids: &[1, 2, 3, 4],
//!     targets: &[2, 3, 4, 5],
//!     document_starts: &[0; 4],
//!     vectors: None,
//!     pairs: false,
//! };
//! let objective = Objective { scale: 1.0 / 4.0, terms: &[Term::NEXT] };
//! let (loss, gradients) = model.loss_and_gradients(batch, objective, Recompute::None, &device);
//!
//! // A new model guesses: ln 32 nats per token.
//! let nats = loss.nats.into_scalar::<f32>() / 4.0;
//! assert!((nats - 32f32.ln()).abs() < 1.0, "{nats}");
//! assert_eq!(gradients.len(), model.trained_parameters().len());
//! # Ok(())
//! # }
//! ```

pub mod adapter;
pub mod attention;
pub mod checkpoint;
pub mod checksums;
pub mod config;
mod context;
pub mod cost;
mod decode_cost;
mod error;
#[cfg(test)]
mod fixtures;
mod gradients;
mod hf_config;
mod init;
mod input;
mod json_keys;
mod layer_config;
mod layers;
mod limits;
pub mod model;
mod model_dir;
pub mod objective;
mod params;
mod pass;
mod reshape;
pub mod rope;
pub mod tensor;

pub use config::ModelConfig;
pub use error::{Error, Result};
pub use gradients::Recompute;
pub use lowkey_batch::Rows;
pub use model::{CausalLm, ids_tensor};
pub use model_dir::{ModelDir, NewModelDir};
pub use params::Parameter;
