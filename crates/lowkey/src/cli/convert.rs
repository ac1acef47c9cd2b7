//! Arguments of `lowkey convert`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// A directory of a model with latent attention (MLA)
    pub(crate) model: PathBuf,
    /// Latent directions to keep in all layers together: a number, or a share such as 50%
    #[arg(long, value_name = "N|P%")]
    pub(crate) kv_rank_budget: String,
    /// A dataset file (.toml) or a text file to calibrate with [default: the run's training text]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Tokens to calibrate with
    #[arg(long, default_value_t = 16384, value_name = "N")]
    pub(crate) tokens: usize,
    /// Folder to make [default: models/NAME-kvN]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Replace the model that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
