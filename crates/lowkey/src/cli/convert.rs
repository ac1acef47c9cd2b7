//! Arguments of `lowkey convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// A directory of a model: with latent attention (MLA), or with --to mla one of MHA, GQA or MQA
    pub(crate) model: PathBuf,
    /// Make full keys and values a latent, or a latent full keys and values; without a width it computes the same
    #[arg(long, value_name = "ATTENTION")]
    pub(crate) to: Option<Attention>,
    /// Latent directions to keep in all layers together, or a share such as 50%; with --to mla numbers cached per token in all layers,
    /// rotated keys included, a share of those now, or their bytes in bf16 such as 512B
    #[arg(long, value_name = "N|P%|BYTES")]
    pub(crate) kv_rank_budget: Option<String>,
    /// Instead: the first R numbers of every latent as they are, without a rotation; with --to mla latents of this width
    #[arg(long, value_name = "R", conflicts_with = "kv_rank_budget")]
    pub(crate) kv_rank: Option<usize>,
    /// Numbers of the shared rotated key [default: as many as lose least of a budget; beside --kv-rank those of one head]
    #[arg(long, value_name = "R", requires = "to")]
    pub(crate) rope_dim: Option<usize>,
    /// Which directions of the keys go on turning [default: of energy and uniform what loses less]
    #[arg(long, value_name = "WHICH", requires = "to")]
    pub(crate) rope_keep: Option<Keep>,
    /// Take so many neighbouring frequencies for one, so that what goes on turning is chosen among the keys of all of them (FreqFold)
    #[arg(long, value_name = "M", default_value_t = 1, requires = "to")]
    pub(crate) rope_fold: usize,
    /// What decides which directions of a latent stay [default: of readers and activations what loses less]
    #[arg(long, value_name = "BY", requires = "to")]
    pub(crate) importance: Option<Importance>,
    /// Leave the mean of keys and values in the latents instead of in a bias of the output: it loses more, and programs whose
    /// DeepSeek has no biases, such as llama.cpp, can run the model
    #[arg(long, requires = "to")]
    pub(crate) no_bias: bool,
    /// With --to mla hold one layer at a time, for a model that does not fit into memory: nothing is tried, so that --rope-dim,
    /// --rope-keep and --importance are one head's, energy and readers unless they are given, and a budget is shared out by what
    /// is read of each layer's latents
    #[arg(long, requires = "to")]
    pub(crate) by_layer: bool,
    /// Number format of the weights: f32 or bf16
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    pub(crate) dtype: String,
    /// A dataset file (.toml) or a text file to calibrate with [default: the run's training text]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Tokens to calibrate with [default: 16384]
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// Folder to make [default: models/NAME-kvN, N directions in all layers together; models/NAME-mla, -mha, -mqa]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Replace the model that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attention {
    /// Multi-head Latent Attention
    Mla,
    /// Full keys and values for each query head, or for several where they are the same
    Mha,
    /// One key and value head as wide as latent and rotated key together
    Mqa,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Keep {
    /// Those whose scores would miss most without
    Energy,
    /// As many of each frequency
    Uniform,
    /// All of the fastest frequencies
    Fastest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Importance {
    /// What logits and outputs see of them
    Readers,
    /// The keys and values that a text makes
    Activations,
    /// The weights alone
    Weights,
}

impl From<Keep> for lowkey_convert::to_mla::Keep {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::Energy => Self::Energy,
            Keep::Uniform => Self::Uniform,
            Keep::Fastest => Self::Fastest,
        }
    }
}

impl From<Importance> for lowkey_convert::Importance {
    fn from(importance: Importance) -> Self {
        match importance {
            Importance::Readers => Self::Readers,
            Importance::Activations => Self::Activations,
            Importance::Weights => Self::Weights,
        }
    }
}
