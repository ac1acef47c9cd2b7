//! Arguments of `lowkey export` and `lowkey verify`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

/// An adapter, and what it is multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WeightedAdapter {
    pub(crate) dir: PathBuf,
    pub(crate) weight: f64,
}

impl FromStr for WeightedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = || Self { dir: PathBuf::from(text), weight: 1.0 };
        // A folder may have the sign in its name.
        let Some((dir, weight)) = text.rsplit_once('=').filter(|_| !Path::new(text).exists()) else {
            return Ok(whole());
        };
        match weight.parse() {
            Ok(weight) if f64::is_finite(weight) && weight != 0.0 => Ok(Self { dir: PathBuf::from(dir), weight }),
            _ => Err(format!("there is no such folder, and {weight:?} is no weight, a number other than 0")),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// A Hugging Face model directory, such as a checkpoint
    pub(crate) model: PathBuf,
    /// An adapter beside the model, which is multiplied in: a directory in PEFT's form; several with weights add up
    #[arg(long, value_name = "DIR[=WEIGHT]")]
    pub(crate) adapter: Vec<WeightedAdapter>,
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
    /// The model that the adapters stand beside
    pub(crate) model: PathBuf,
    /// The adapter: a directory in PEFT's form, such as a checkpoint of a run that trains one. May be given several times, each
    /// with the weight that what it adds is multiplied by [default: 1]
    #[arg(long, value_name = "DIR[=WEIGHT]", required = true)]
    pub(crate) adapter: Vec<WeightedAdapter>,
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
    /// The adapter that stood beside that model; several with the weights that they were merged with
    #[arg(long, value_name = "DIR[=WEIGHT]", requires = "source")]
    pub(crate) adapter: Vec<WeightedAdapter>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_has_a_weight_where_one_is_written() {
        let read =
            |text: &str| text.parse::<WeightedAdapter>().map(|read| (read.dir.display().to_string(), read.weight));
        assert_eq!(read("runs/a").unwrap(), ("runs/a".into(), 1.0));
        assert_eq!(read("runs/a=0.7").unwrap(), ("runs/a".into(), 0.7));
        assert_eq!(read("runs/a=b=-2").unwrap(), ("runs/a=b".into(), -2.0));
        for wrong in ["runs/a=", "runs/a=b", "runs/a=0", "runs/a=nan", "runs/a=inf"] {
            assert!(read(wrong).unwrap_err().contains("no weight"), "{wrong}");
        }
        let folder = tempfile::tempdir().unwrap();
        let named = folder.path().join("rank=8");
        std::fs::create_dir(&named).unwrap();
        assert_eq!(read(&named.display().to_string()).unwrap().1, 1.0);
        assert_eq!(read(&format!("{}=0.5", named.display())).unwrap().1, 0.5);
    }
}
