//! The command line of the measurements.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Time whole training steps
    #[command(after_help = "\
        Shapes, with their usual batch: d256 (8 × 256), d512 (4 × 512), d768 (16 × 1024), d1536 (8 × 2048).\n\
        MFU is the model's operations per second, causal attention counted as half, over the rate of\n\
        plain matrix products on as many threads, measured before and after.\n\n\
        Examples:\n  \
        lowkey bench train --shape d256\n  \
        lowkey bench train --shape d512 --batch 1 --seq 2048 --threads 2 --json")]
    Train(BenchTrainArguments),
    /// Time single tokens over a cache that already holds a context
    #[command(after_help = "\
        Reads are what a step cannot but read: weights, the cache, and in the expanded form the keys and\n\
        values that it makes of the latents. The bound is reading them at the rate of memory, or computing\n\
        at the rate of matrix products, whichever takes longer.\n\
        A context beyond what a model was made for is measured all the same: it changes texts, not speed.\n\n\
        Examples:\n  \
        lowkey bench decode runs/quickstart/checkpoints/best --context 512,4096\n  \
        lowkey bench decode --shape d256 --context 512,4096,32768 --json\n  \
        lowkey bench decode --shape d512 --way absorbed --batch 4 --cache-dtype int8")]
    Decode(BenchDecodeArguments),
    /// Time whole prompts, in turn with training's forward pass over as many tokens
    #[command(after_help = "\
        The ratio is the rate of prompts over that of the forward pass of training, loss included: the\n\
        median of the rounds, in which both take turns. Memory is the most that the process had held\n\
        after its first prompts of that length, shorter ones before and training after them.\n\n\
        Examples:\n  \
        lowkey bench prefill --shape d256 --context 512,2048,4096,8192\n  \
        lowkey bench prefill --shape d512 --way expanded,absorbed --chunk 256 --json")]
    Prefill(BenchPrefillArguments),
    /// Take a training step apart: time, rate and share of each operation
    #[command(after_help = "\
        Each operation runs by itself, shared between the same threads as in a step; what the whole step\n\
        takes beyond their sum is \"other\".\n\n\
        Examples:\n  \
        lowkey bench ops --shape d256\n  \
        lowkey bench ops --shape d512 --batch 1 --seq 2048 --json")]
    Ops(BenchOpsArguments),
    /// Compare with another program on the same work, in turns
    #[command(after_help = "\
        The script has this interface, and ends its output with a line that is a JSON object with tokens_per_s,\n\
        and as far as it knows them peak_rss_mb, peak_gpu_mb, params and flops_per_token:\n  \
        SCRIPT train  --shape d256 --batch 8 --seq 256 --threads 2 --steps 12 --warmup 3\n  \
        \u{20}             --device cpu|cuda --dtype f32|bf16 --mode eager|compile\n  \
        SCRIPT decode --shape d256 --context 4096 --new 64 --way absorbed --threads 2\n\
        Each run is a process of its own. Where both count them, parameters and operations must agree.\n\n\
        Examples:\n  \
        lowkey bench peer --script torch_train.py --rounds 5\n  \
        lowkey bench peer --script torch_train.py --what train,decode --shape d256,d512 --csv results.csv\n  \
        lowkey bench peer --other old/lowkey --shape d512 --sizes 4x512,1x2048")]
    Peer(BenchPeerArguments),
}

/// What programs are compared on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Work {
    /// Whole training steps
    Train,
    /// Single tokens over a cache
    Decode,
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Decode => "decode",
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchPeerArguments {
    /// The other side: a Python script with the interface below
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// The interpreter that runs it
    #[arg(long, default_value = "python3", value_name = "PROGRAM")]
    pub(crate) python: String,
    /// Another lowkey, such as a build of before a change
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) other: Option<PathBuf>,
    /// The work
    #[arg(long, default_value = "train", value_delimiter = ',', value_name = "WORK,…")]
    pub(crate) what: Vec<Work>,
    /// The models: d256, d512, d768, d1536
    #[arg(long, default_value = "d256", value_delimiter = ',', value_name = "NAME,…")]
    pub(crate) shape: Vec<String>,
    /// Rounds: in each all sides run once
    #[arg(long, default_value_t = 3, value_parser = at_least_one, value_name = "N")]
    pub(crate) rounds: usize,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// In training: sequences × tokens of a step [default: the shape's]
    #[arg(long, value_delimiter = ',', value_parser = sizes, value_name = "NxN,…")]
    pub(crate) sizes: Vec<(usize, usize)>,
    /// In training: how the script runs
    #[arg(long, default_values = ["eager", "compile"], value_delimiter = ',', value_name = "MODE,…")]
    pub(crate) mode: Vec<String>,
    /// In training: steps to time
    #[arg(long, default_value_t = 12, value_name = "N")]
    pub(crate) steps: usize,
    /// In training: steps before those
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(crate) warmup: usize,
    /// In training: what to compute on
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    pub(crate) device: String,
    /// In training: what products are computed in
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    pub(crate) dtype: String,
    /// In decoding: tokens in the cache before the first step
    #[arg(long, default_values_t = [512, 4096, 32768], value_delimiter = ',', value_name = "N,…")]
    pub(crate) context: Vec<usize>,
    /// In decoding: tokens to time
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) new: usize,
    /// Write every single run to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `8x256`.
fn sizes(text: &str) -> Result<(usize, usize), String> {
    let pair = text.split_once(['x', '×']).and_then(|(rows, length)| Some((rows.parse().ok()?, length.parse().ok()?)));
    pair.ok_or_else(|| "is not sequences × tokens, such as 8x256".to_owned())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("must be a number of at least 1".to_owned()),
        Ok(n) => Ok(n),
    }
}

/// The step that is measured.
#[derive(Debug, Args)]
pub(crate) struct BenchStepArguments {
    /// The model: d256, d512, d768 or d1536
    #[arg(long, default_value = "d256", value_name = "NAME")]
    pub(crate) shape: String,
    /// Sequences per step [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// Tokens per sequence [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) seq: Option<usize>,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// The optimiser, as in a run file
    #[arg(long, default_value = "adamw", value_name = "KIND")]
    pub(crate) optimizer: String,
    /// Keep only the input of each block, and compute the rest again in the backward pass
    #[arg(long)]
    pub(crate) recompute: bool,
    /// What to compute on, as --device of lowkey train
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    pub(crate) device: String,
    /// What products are computed in; tf32 and f16 on a GPU alone
    #[arg(long, default_value = "f32", value_parser = ["f32", "tf32", "bf16", "f16"])]
    pub(crate) dtype: String,
    /// Train adapters of this width beside all maps, and nothing else
    #[arg(long, value_name = "R")]
    pub(crate) lora_rank: Option<usize>,
    /// Beside these maps alone, by the ends of their names, such as q_proj,o_proj
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora_rank")]
    pub(crate) lora_modules: Vec<String>,
    /// Hold the frozen matrices beside them in bf16, int8, int4 or nf4
    #[arg(long, default_value = "f32", value_name = "FORMAT", requires = "lora_rank")]
    pub(crate) weights: String,
}

#[derive(Debug, Args)]
pub(crate) struct BenchTrainArguments {
    #[command(flatten)]
    pub(crate) step: BenchStepArguments,
    /// Steps to time
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(crate) steps: usize,
    /// Steps before those
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) warmup: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The model whose cache is measured.
#[derive(Debug, Args)]
pub(crate) struct BenchCacheArguments {
    /// A model directory [default: a shape with random weights]
    #[arg(value_name = "MODEL", conflicts_with = "shape")]
    pub(crate) model: Option<PathBuf>,
    /// The model: d256, d512, d768 or d1536
    #[arg(long, default_value = "d256", value_name = "NAME")]
    pub(crate) shape: String,
    /// Sequences at a time
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) batch: usize,
    /// How the cache stores its numbers: f32, bf16, f16 or int8
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub(crate) cache_dtype: String,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecodeArguments {
    #[command(flatten)]
    pub(crate) over: BenchCacheArguments,
    /// Tokens in the cache before the first step
    #[arg(long, default_values_t = [512, 4096], value_delimiter = ',', value_name = "N,…")]
    pub(crate) context: Vec<usize>,
    /// Steps to time, of one token per sequence; a way that takes longer than 20 s ends with fewer
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) new: usize,
    /// How attention is computed in the steps: expanded, absorbed, fused [default: all that the model has]
    #[arg(long, value_delimiter = ',', value_name = "FORM,…")]
    pub(crate) way: Vec<String>,
    /// How the matrices are held: f32, bf16, int8, int4 or nf4
    #[arg(long, default_value = "f32", value_name = "FORMAT")]
    pub(crate) weights: String,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefillArguments {
    #[command(flatten)]
    pub(crate) over: BenchCacheArguments,
    /// Tokens of a prompt
    #[arg(long, default_values_t = [512, 4096], value_delimiter = ',', value_name = "N,…")]
    pub(crate) context: Vec<usize>,
    /// Rounds to time; a length that takes longer than 60 s ends with fewer
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) rounds: usize,
    /// Most tokens of a prompt that go through the model at once
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub(crate) chunk: usize,
    /// How attention is computed: auto, expanded, absorbed, fused
    #[arg(long, default_value = "auto", value_delimiter = ',', value_name = "FORM,…")]
    pub(crate) way: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchOpsArguments {
    #[command(flatten)]
    pub(crate) step: BenchStepArguments,
    /// Rounds: in each a whole step is timed, then each operation
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(crate) steps: usize,
    /// Whole steps before the rounds
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(crate) warmup: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
