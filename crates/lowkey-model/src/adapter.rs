//! Adapters: small tensors beside frozen matrices, in the files and with the rules of PEFT. [`PeftType`] names their kinds.
//!
//! Of low rank: an adapted map applies W' = W + s·B·A, with A `[r, d_in]`, B `[d_out, r]` and s = α/r (LoRA, arXiv 2106.09685, section 4.1),
//! or α/√r (rsLoRA, arXiv 2312.03732). With a magnitude m `[d_out]` (DoRA, arXiv 2402.09353, eq. 5) row i of W' is scaled to
//! length mᵢ. W is frozen: no gradient of it is formed, and the product with B·A goes through the r numbers between.
//!
//! * [`AdapterConfig`] has PEFT's keys, for a run file and for `adapter_config.json`; with a model's configuration it becomes an
//!   [`AdapterPlan`], which says what each map gets. A pattern that fits nothing is an error, never a silence.
//! * [`CausalLm::load_adapted`](crate::CausalLm::load_adapted) and [`CausalLm::begin_adapter`](crate::CausalLm::begin_adapter) build a
//!   model with adapters, [`CausalLm::merged`](crate::CausalLm::merged) multiplies them out,
//!   [`CausalLm::unadapted`](crate::CausalLm::unadapted) leaves them off.
//! * Several adapters with weights are one whose factors lie side by side
//!   ([`CausalLm::load_combined`](crate::CausalLm::load_combined)): the sum of their products, without rounding a matrix.
//! * In training [`AdapterConfig::lora_dropout`] leaves numbers out; a pass is told by
//!   [`CausalLm::with_draws`](crate::CausalLm::with_draws) that it trains.
//! * [`AdapterDir`] reads and writes the directories of PEFT.
//!
//! The frozen matrices may be packed in few bits (QLoRA, arXiv 2305.14314): with [`AdapterConfig::quantization`] while the model is
//! loaded, or by [`CausalLm::quantized`](crate::CausalLm::quantized).
//!
//! Whoever asks a map for its matrix ([`Linear::matrix`](crate::model::Linear::matrix)) gets W': the adapter of MLA's `kv_b_proj`
//! is thereby in force in every way to compute attention, which other engines that split this matrix when they load it overlook.

mod attach;
mod by_matrix;
mod combine;
mod config;
mod dropout;
mod files;
mod kind;
mod plan;
mod quantization;

pub use by_matrix::overlooked_by_peft;
pub use config::{AdapterConfig, ByPattern, Layers, Modules};
pub use dropout::Draws;
pub(crate) use files::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
pub use files::{AdapterDir, Reader, companion_dir, is_adapter};
pub use kind::{Adapter, LowRank, PeftType, Planned};
pub use lowkey_kernels::quantized_linear::Quantization;
pub use plan::AdapterPlan;
pub use quantization::QuantizedLayer;

#[cfg(test)]
mod tests;
