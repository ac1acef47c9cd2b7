//! From a trained model to files that inference engines load, with the evidence that they hold the same model.
//!
//! **Purpose.** Engines compute Multi-head Latent Attention (MLA) in a form of their own: they split `kv_b_proj`, absorb one half
//! into the query and the other into the output, store it transposed, in another number format, with the rotation or the YaRN
//! factors elsewhere. Each step is "mathematically equal", and each has gone wrong in practice. This crate writes the files and
//! then reads them back, runs what it has read beside the source, and writes down how far apart they are.
//!
//! **Main types.** [`Source`] (a model directory, opened), [`Target`] (layout and number format), [`export()`] with [`Options`],
//! [`Certificate`] (hashes, [`certificate::Bounds`] and [`certificate::Evidence`]), [`verify`] with its [`Verdict`], [`plan::plan`] (what each form costs), and
//! [`gguf`] (the file format of llama.cpp).
//!
//! **Flow.** [`export()`] writes into a hidden folder: Hugging Face files, a side file or a GGUF. The evidence is gathered from the
//! files as they lie there, by the same code that [`verify`] runs; only a folder whose figures keep the bounds gets its name.
//!
//! # Layouts
//!
//! The paper's W^UK and W^UV (DeepSeek-V2, arXiv 2405.04434 §2.1.2) are rows of one checkpoint tensor; every engine cuts it in
//! its own way when it loads. With H heads, N and V the key and value widths of a head, L the latent's:
//!
//! | who | W_UK | W_UV | from |
//! |---|---|---|---|
//! | Hugging Face, `kv_b_proj` | `[H(N+V), L]`, a head's N rows, then its V rows | | the file |
//! | `absorbed.safetensors` | `w_uk` (H, N, L) | `w_uv` (H, V, L) | the file |
//! | vLLM | `W_UK_T` (H, N, L) | `W_UV` (H, L, V) | `kv_b_proj`, at load |
//! | SGLang | `w_kc` (H, N, L), stored by columns | `w_vc` (H, L, V) | `kv_b_proj`, at load |
//! | mlx-lm | `embed_q` (H, L, N) | `unembed_out` (H, V, L) | `kv_b_proj`, at conversion |
//! | llama.cpp, GGUF | `attn_k_b` (H, L, N) | `attn_v_b` (H, V, L) | the file |
//!
//! vLLM and SGLang load the plain Hugging Face files, which every layout but GGUF therefore keeps; the side file is for engines
//! that want the halves as they use them.
//!
//! `fused.safetensors` holds, for each layer that the plan chose, `q_fused.weight` (`[H(L+R), Q]`: a head's L rows of
//! W_UKᵀ·W_UQ, then its R rows of W_QR; Q is the width of the query latent, or the model's) and `o_fused.weight` (`[d, H·L]`:
//! W_O·W_UV of all heads side by side). The softmax scale stays that of N+R.
//!
//! **What this crate does not know.** Training, optimisers, corpora (the text to compare on comes in as token ids), and any
//! network. It never prints.
//!
//! # Example
//!
//! A small model as transformers reads it, checked from the files that were written:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use lowkey_model::config::ModelSection;
//! # let section: ModelSection = serde_json::from_value(serde_json::json!({
//! #     "attention": "mla", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
//! #     "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
//! # }))?;
//! use lowkey_export::{Options, Source, Target, Text, export, verify};
//! use lowkey_model::{CausalLm, checkpoint::WeightDtype};
//!
//! let (config, _notes) = section.resolve(32, 16)?;
//! let device = burn::tensor::Device::flex();
//! let dir = tempfile::tempdir()?;
//! let (model, out) = (dir.path().join("model"), dir.path().join("export"));
//! std::fs::create_dir(&model)?;
//! CausalLm::init(&config, 1, &device).save(&model, WeightDtype::F32, 1 << 30)?;
//!
//! let target = Target::parse("hf", "f32")?;
//! let options = Options {
//!     bounds: target.bounds(),
//!     target,
//!     out: out.clone(),
//!     overwrite: false,
//!     form: None,
//!     context: None,
//!     text: Text { description: "sixteen numbers".into(), sequences: vec![(0..16).collect()] },
//!     max_shard_bytes: 1 << 30,
//! };
//! export(&Source::open(&model, &device)?, &options, &device, &mut |_| {})?;
//! assert!(out.join("config.json").is_file());
//! assert!(verify(&out, None, &device, &mut |_| {})?.failures.is_empty());
//! # Ok(())
//! # }
//! ```

pub mod adapter;
mod card;
pub mod certificate;
mod error;
pub mod evidence;
pub mod export;
mod files;
pub mod gguf;
mod hf;
mod idle_norm;
mod markdown;
pub mod plan;
mod products;
mod side;
pub mod source;
pub mod target;

pub use certificate::Certificate;
pub use error::{Error, Result};
pub use evidence::Text;
pub use export::{Options, Verdict, export, verify};
pub use source::Source;
pub use target::Target;

/// How far a long operation is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is being done.
    pub doing: &'static str,
    /// Parts done.
    pub done: usize,
    /// Parts in all; 0 where it is not known.
    pub of: usize,
}

/// Sees the progress of [`export()`] and [`verify`].
pub type Observer<'a> = &'a mut dyn FnMut(Progress);

#[cfg(test)]
mod tests;
