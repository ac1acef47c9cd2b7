//! Arguments of `lowkey convert`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// A directory of a model with latent attention (MLA)
    pub(crate) model: PathBuf,
    /// Latent directions to keep in all layers together: a number, or a share such as 50%
    #[arg(long, value_name = "N|P%", required_unless_present = "kv_rank")]
    pub(crate) kv_rank_budget: Option<String>,
    /// Instead: the first R numbers of every latent as they are, without a rotation
    #[arg(long, value_name = "R", conflicts_with_all = ["kv_rank_budget", "data", "tokens"])]
    pub(crate) kv_rank: Option<usize>,
    /// A dataset file (.toml) or a text file to calibrate with [default: the run's training text]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Tokens to calibrate with
    #[arg(long, default_value_t = 16384, value_name = "N")]
    pub(crate) tokens: usize,
    /// Folder to make [default: models/NAME-kvN, N directions in all layers together]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Replace the model that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
