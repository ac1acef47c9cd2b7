//! From text to training batches: tokenizers, corpora, token shards, packing and sampling.
//!
//! # What goes through here
//!
//! ```text
//! datasets/*.toml ─▶ DatasetConfig ─▶ prepare ─▶ OUT/{train,validation}.tokens, tokenizer.json, manifest.json
//!                                                    │
//!                                       open ─▶ Prepared { tokenizer, train: Shard, validation: Shard }
//!                                                    │
//!                          Sampler(seed, step) ─▶ Batch { input_ids, targets, document_starts }
//! ```
//!
//! * [`DatasetConfig`] is one TOML file that says where a corpus comes from ([`dataset::Source`]), how it is cut into tokens
//!   ([`dataset::TokenizerConfig`]) and what is held out ([`dataset::Split`]).
//! * [`prepare()`] reads the source once, tokenises it and writes a folder that describes itself; asked again for the
//!   same thing it only opens what is there. [`open`] reads such a folder.
//! * [`Shard`] is a checksummed file of token ids with its document bounds, read as it is needed.
//! * [`Sampler`] is a pure function from (seed, step) to a [`Batch`](lowkey_batch::Batch): a resumed run needs no sampler state.
//!   [`sampler::validation_batches`] walks a held-out shard once, in order, with every target exactly once.
//! * [`Tokenizer`] covers a built-in byte vocabulary, character vocabularies, byte-level BPE trained here, and any
//!   Hugging Face `tokenizer.json`; [`tokenizer::TextStream`] turns ids back into text one at a time. [`Generation`] is what a model's
//!   files say about generating with it, above all which tokens end a text.
//! * Records (conversations, prompts with completions, pairs of answers) become documents of which some tokens are learnt;
//!   [`dataset::Records`] and [`dataset::ChatConfig`] say how. [`sampler::Mixture`] deals rows of several datasets in fixed shares.
//! * [`chat`] renders conversations with the templates that models come with, and says which of the text the assistant says.
//! * [`tasks`] are procedural examples that each ask for one ability, of tokens or of real vectors; they are made while a
//!   run goes and have no shard.
//! * [`storybook`] is a procedural corpus of known entropy, and [`oracle::oracle_documents`] gives its true log-probability
//!   per token, which is what a model's loss is compared with.
//!
//! # What this crate does not know
//!
//! No tensor, no device, no Burn backend: a [`Batch`](lowkey_batch::Batch) is plain vectors, and the only piece of Burn here is the
//! `burn_dataset::Dataset` trait, which [`Shard`] implements so that Burn's own loaders can read one. Nothing here
//! prints; progress is reported through a callback. The environment is read in exactly one place,
//! [`hub::HubConfig::from_env`].
//!
//! # Example
//!
//! A tokenizer that learns from a sentence:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lowkey_data::Tokenizer;
//!
//! let text = "the cat and the hat and the bat";
//! let tokenizer = Tokenizer::train_bpe([text.to_string()].into_iter(), 270)?;
//! let ids = tokenizer.encode(text)?;
//! assert!(ids.len() < text.len());
//! assert_eq!(tokenizer.decode(&ids)?, text);
//! # Ok(())
//! # }
//! ```

pub mod chat;
pub mod dataset;
mod documents;
mod error;
mod generation;
pub mod hub;
pub mod oracle;
pub mod prepare;
mod records;
pub mod sampler;
mod samples;
mod shard;
pub mod storybook;
pub mod tasks;
pub mod tokenizer;

pub use dataset::DatasetConfig;
pub use error::{Error, Result};
pub use generation::Generation;
pub use prepare::{Prepared, open, prepare};
pub use sampler::{Packing, Sampler};
pub use shard::Shard;
pub use tokenizer::Tokenizer;
