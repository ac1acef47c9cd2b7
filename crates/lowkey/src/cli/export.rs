//! Arguments of `lowkey export` and `lowkey verify`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// A Hugging Face model directory, such as a checkpoint
    pub(crate) model: PathBuf,
    /// An adapter beside the model, which is multiplied in: a directory in PEFT's form
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// hf: for transformers, vLLM and SGLang; absorbed, fused: the same and a side file with W_UK and W_UV split, or
    /// multiplied into the weights around them; gguf: one file for llama.cpp
    #[arg(long, value_name = "LAYOUT", value_parser = ["hf", "absorbed", "fused", "gguf"], required_unless_present = "engine")]
    pub(crate) to: Option<String>,
    /// Instead: the adapter by itself, as this engine reads it; what the engine would ignore is refused
    #[arg(long = "for", value_name = "ENGINE", value_parser = ["transformers", "vllm", "sglang", "llamacpp"],
        conflicts_with_all = ["to", "form", "context", "data", "bounds"])]
    pub(crate) engine: Option<String>,
    /// Folder to make [default: exports/NAME-LAYOUT, or exports/NAME-ENGINE]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Number format of the weights: f32, bf16 or f16, q8_0 for gguf, and for hf nf4, the 4 bits of bitsandbytes
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16", "q8_0", "nf4"])]
    pub(crate) dtype: String,
    /// With --to fused: every layer in this form (expanded, absorbed or fused) instead of the one that reads least
    #[arg(long, value_name = "FORM")]
    pub(crate) form: Option<String>,
    /// Tokens in the cache that the plan of the forms counts with [default: the model's longest]
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
    /// A dataset file (.toml) or a text file, whose held-out text the certificate is computed on [default: the run's]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Demand something else of the export: logit, kl, top1 or perplexity; may be given several times
    #[arg(long = "bound", value_name = "NAME=NUMBER")]
    pub(crate) bounds: Vec<String>,
    /// Cut weights into files of at most this many megabytes
    #[arg(long, default_value_t = 5000, value_name = "MB")]
    pub(crate) shard_size: usize,
    /// Replace the export that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print the certificate as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArguments {
    /// The model that the adapter stands beside
    pub(crate) model: PathBuf,
    /// The adapter: a directory in PEFT's form, such as a checkpoint of a run that trains one
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: PathBuf,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Number format of the weights
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
    pub(crate) dtype: String,
    /// A dataset file (.toml) or a text file, whose held-out text the certificate is computed on [default: the run's]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Replace the export that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print the certificate as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArguments {
    /// The folder that `lowkey export` made
    pub(crate) export: PathBuf,
    /// The model that it was made of; needed for gguf
    #[arg(long, value_name = "MODEL")]
    pub(crate) source: Option<PathBuf>,
    /// The adapter that stood beside that model
    #[arg(long, value_name = "DIR", requires = "source")]
    pub(crate) adapter: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
