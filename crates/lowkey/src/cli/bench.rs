//! The command line of the measurements.

use std::path::PathBuf;

use clap::{Args, Subcommand};

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
