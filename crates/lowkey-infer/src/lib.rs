//! Prefill, decode and sampling for the models of `lowkey-model`.
//!
//! **Purpose.** Continue token sequences without computing the past again. What the past leaves behind is the [`Cache`]: for
//! Multi-head Latent Attention L + R numbers per token and layer whatever the number of heads is (DeepSeek-V2,
//! arXiv 2405.04434 §2.1), for multi-head, grouped-query and multi-query attention 2·G·D. The cache still grows linearly with the
//! sequence; what MLA shrinks is the width per token.
//!
//! **Main types.** [`generate`] and [`generate_batch`] with [`GenerateConfig`] and [`Generation`]: prompts that begin together.
//! [`Scheduler`]: requests that come and go, in slots.
//! [`Decoder`]: its two moves, [`prefill`](Decoder::prefill) and [`step`](Decoder::step), for callers with a loop of their own.
//! [`Cache`]: what they fill, in one of the formats of [`CacheDtype`]. [`Form`]: how MLA attention is computed from it. [`Sampler`] with [`SamplingConfig`]: from logits
//! to a token.
//!
//! **Flow.** A prompt's ids go through the model in chunks; each chunk appends to the cache and attends to all that lies there.
//! The logits of each row's last token come back to the host, a sampler per row picks a token, a callback sees it, and the token
//! is the next chunk of length one; [`Scheduler::step`] is one round of that. Rows of a batch may have different lengths: every row starts at slot 0 of the cache, has
//! a length and positions of its own, and leaves the batch when it ends, so that a row's result does not depend on its
//! neighbours, but for rounding: products with few tokens and with many are not summed in one order.
//!
//! **Four ways to the same numbers.** The forward pass of `lowkey-model` without a cache, the cache with keys and values
//! rebuilt ([`Form::Expanded`]), the cache attended to as it is ([`Form::Absorbed`]) and the same with weights that have the
//! maps around it multiplied in ([`Form::Fused`]) agree to rounding at every position; the tests hold them to it, and to
//! greedy continuations that transformers computed.
//!
//! **What this crate does not know.** Text, tokenizers, chat templates and stop strings (a caller that knows them ends a
//! generation through the callback), files, training. It never prints.
//!
//! # Example
//!
//! Five tokens, each the likeliest:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use lowkey_model::config::ModelSection;
//! # let section: ModelSection = serde_json::from_value(serde_json::json!({
//! #     "attention": "mla", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
//! #     "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
//! # }))?;
//! use std::ops::ControlFlow;
//!
//! use lowkey_infer::{GenerateConfig, generate};
//! use lowkey_model::CausalLm;
//!
//! let (config, _notes) = section.resolve(32, 16)?;
//! let device = lowkey_kernels::device::open("cpu")?;
//! let model = CausalLm::init(&config, 1, &device);
//!
//! let settings = GenerateConfig { max_new_tokens: 5, ..GenerateConfig::default() };
//! let found = generate(&model, &[1, 2, 3], &settings, &device, &mut |_| ControlFlow::Continue(()))?;
//! assert_eq!((found.ids.len(), found.prompt_tokens), (5, 3));
//! # Ok(())
//! # }
//! ```

mod cache;
mod cache_dtype;
mod decoder;
mod error;
mod form;
mod generate;
mod sampler;
mod scheduler;

pub use cache::Cache;
pub use cache_dtype::CacheDtype;
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use form::Form;
pub use generate::{Finish, GenerateConfig, Generation, Weights, generate, generate_batch};
pub use sampler::{Sampler, SamplingConfig};
pub use scheduler::{Request, RequestId, Scheduler, Slots, Update};

#[cfg(test)]
mod tests;
