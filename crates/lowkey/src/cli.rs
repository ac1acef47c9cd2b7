//! The command line.

mod bench;
mod convert;
mod export;
mod lab;
mod runs;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use lowkey_data::chat::DateTime;

use crate::schema::FileKind;
pub(crate) use bench::{
    BenchCacheArguments, BenchCommand, BenchDecodeArguments, BenchOpsArguments, BenchPeerArguments,
    BenchPrefillArguments, BenchStepArguments, BenchTrainArguments, Work,
};
pub(crate) use convert::{Attention, ConvertArguments};
pub(crate) use export::{ExportArguments, MergeArguments, VerifyArguments, WeightedAdapter};
pub(crate) use lab::{LabCommand, LabReportArguments, LabRunArguments};
pub(crate) use runs::{ReportArguments, RunsArguments};

/// Trains, samples, evaluates, exports and inspects Multi-head Latent Attention (MLA) language models.
#[derive(Debug, Parser)]
#[command(
    version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("LOWKEY_COMMIT"), ")"),
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong use, 128 + n ended by signal n (130 Ctrl-C, 143 TERM).\n\n\
        Examples:\n  \
        lowkey train configs/quickstart.toml\n  \
        lowkey generate runs/quickstart/checkpoints/best --prompt \"Once\"\n  \
        lowkey eval runs/quickstart/checkpoints/best --data datasets/storybook.toml\n  \
        lowkey export runs/quickstart/checkpoints/best --to gguf"
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train a model as a run file says: pre-training, or fine-tuning with `[init] from`
    #[command(after_help = "Examples:\n  \
        lowkey train configs/quickstart.toml\n  \
        lowkey train configs/quickstart.toml --resume\n  \
        lowkey train configs/quickstart.toml --set model.attention=mha --out runs/quickstart-mha")]
    Train(TrainArguments),
    /// Say what a run will cost (parameters, FLOPs, cache, memory, time), without starting it
    #[command(after_help = "Examples:\n  \
        lowkey plan configs/mla-124m.toml --set training.batch_size=8\n  \
        lowkey plan configs/mla-124m.toml --ranks 8 --bandwidth 100 --latency 5\n  \
        lowkey plan configs/mla-124m.toml --tflops 170 --ranks 8 --bandwidth 400 --latency 5")]
    Plan(PlanArguments),
    /// Continue a prompt with any model directory
    #[command(after_help = "Examples:\n  \
        lowkey generate runs/quickstart/checkpoints/best --prompt \"Once\"\n  \
        lowkey generate MODEL --prompt \"To be\" --temperature 0 --decode expanded --max-new-tokens 64\n  \
        lowkey generate MODEL --chat --prompt \"What is a latent?\"")]
    Generate(GenerateArguments),
    /// Measure a model's loss, bits per byte and, where it is known, the gap to the true entropy
    #[command(after_help = "Examples:\n  \
        lowkey eval runs/quickstart/checkpoints/best --data datasets/storybook.toml\n  \
        lowkey eval MODEL --data my.txt --json\n  \
        lowkey eval runs/elastic/checkpoints/best --data datasets/storybook.toml --kv-rank 16\n  \
        mpirun -n 4 lowkey eval MODEL --data my.txt")]
    Eval(EvalArguments),
    /// Write an inference-ready checkpoint with a certificate that it is the same model
    #[command(after_help = "Examples:\n  \
        lowkey export runs/quickstart/checkpoints/best --to hf --dtype bf16\n  \
        lowkey export MODEL --to absorbed --out exports/story\n  \
        lowkey export MODEL --to fused --form fused\n  \
        lowkey export MODEL --to gguf --dtype q8_0 --data my.txt\n  \
        lowkey export runs/lora/checkpoints/best --for vllm")]
    Export(ExportArguments),
    /// Multiply an adapter, or several with weights, into its model, with a certificate that the two are the same
    #[command(after_help = "Examples:\n  \
        lowkey merge models/base --adapter runs/lora/checkpoints/best --out models/tuned\n  \
        lowkey merge MODEL --adapter ADAPTER --out OUT --dtype bf16 --data my.txt\n  \
        lowkey merge MODEL --adapter A=0.7 --adapter B=0.3 --out OUT\n\n\
        Several adapters add up: to each matrix 0.7 times what A adds and 0.3 times what B does.\n\
        The certificate compares the merged model with the one that has this sum beside it;\n\
        lowkey verify OUT --source MODEL with the same adapters computes it again.\n\n\
        The merged model can be exported, converted and fine-tuned like any other.")]
    Merge(MergeArguments),
    /// Compute an export's certificate again from its files; exit code 1 where it does not hold
    #[command(after_help = "Examples:\n  \
        lowkey verify exports/quickstart-absorbed\n  \
        lowkey verify exports/quickstart-gguf --source runs/quickstart/checkpoints/best")]
    Verify(VerifyArguments),
    /// Make a trained model's latent narrower, full keys and values a latent or the other way round, without training
    #[command(after_help = "\
        The latents are rotated so that their directions come in the order in which queries and outputs\n\
        read them, which changes nothing; then each layer keeps its first ones, as many as lower the loss\n\
        most on a calibration text (of the model's run, or --data), and its readers are fitted to them.\n\
        A budget of 100% only rotates. --kv-rank keeps the first directions of every layer as they are,\n\
        for a model that was trained to be read so ([model.elastic]).\n\n\
        --to mla makes a model of MHA, GQA or MQA one of latent attention that computes the same. With a\n\
        width its keys go on turning only in their strongest directions, and its latents are cut: not the\n\
        same model, but one to go on training from.\n\n\
        --to mha gives a model with latents full keys and values, in the layout of Llama: the same model\n\
        where its latents are not normalised, refused where they are. With --data a constant stands in the\n\
        place of each such norm, and what that loses is told. --to mqa makes one key head, as wide as\n\
        latent and rotated key together.\n\n\
        Examples:\n  \
        lowkey convert runs/quickstart/checkpoints/best --kv-rank-budget 50%\n  \
        lowkey convert runs/elastic/checkpoints/best --kv-rank 16\n  \
        lowkey convert MODEL --kv-rank-budget 96 --data my.txt --out models/narrow --json\n  \
        lowkey convert LLAMA --to mla\n  \
        lowkey convert LLAMA --to mla --kv-rank-budget 50% --data my.txt\n  \
        lowkey convert MISTRAL-7B --to mla --by-layer --kv-rank 448 --dtype bf16 --data my.txt\n  \
        lowkey convert models/LLAMA-mla --to mha")]
    Convert(ConvertArguments),
    /// Run experiments: many runs of one question, and an answer with error bars
    #[command(after_help = "Examples:\n  \
        lowkey lab run experiments/rank-sweep/experiment.toml --jobs 2\n  \
        lowkey lab report experiments/rank-sweep/experiment.toml")]
    Lab {
        #[command(subcommand)]
        command: LabCommand,
    },
    /// Write a page about a run, or about several in one: curves, samples, settings, cost
    #[command(after_help = "\
        The page needs nothing beside it, and is made from the runs' folders alone, also while they go on.\n\
        Every lowkey train writes it at its end.\n\n\
        Examples:\n  \
        lowkey report runs/quickstart\n  \
        lowkey report runs/quickstart runs/quickstart-mha --out compared.html")]
    Report(ReportArguments),
    /// List the runs below a folder: how they stand, how far they are, and what goes on with them
    #[command(after_help = "Examples:\n  lowkey runs\n  lowkey runs runs/rank-sweep --json")]
    Runs(RunsArguments),
    /// Turn a corpus into token shards, or look at one
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Describe a model directory or a run
    #[command(after_help = "Examples:\n  \
        lowkey info runs/quickstart/checkpoints/best\n  \
        lowkey info runs/quickstart/checkpoints/best --spectrum\n  \
        lowkey info MODEL --spectrum --data my.txt --energy 0.999 --json")]
    Info(InfoArguments),
    /// List the devices of this machine: what each can do, and why others cannot be used
    #[command(after_help = "Examples:\n  lowkey devices\n  lowkey devices --json")]
    Devices(DevicesArguments),
    /// Compute logits for given token ids, to compare with other programs
    #[command(after_help = "IN holds `input_ids` (I64 [B, T]); OUT receives `logits` (F32 [B, T, V]).\n\n\
        Example:\n  lowkey logits MODEL --ids in.safetensors --out out.safetensors")]
    Logits(LogitsArguments),
    /// Show the text that a conversation becomes for a model, and what of it the assistant says
    #[command(after_help = "\
        FILE.json holds messages, and as needed tools, documents and variables of the template:\n  \
        {\"messages\": [{\"role\": \"user\", \"content\": \"Hello.\"}], \"variables\": {\"enable_thinking\": false}}\n\
        or is a list of messages. The text is printed to the byte, without a line end of its own.\n\n\
        Examples:\n  \
        lowkey template MODEL --messages chat.json\n  \
        lowkey template chatml --messages chat.json --add-generation-prompt\n  \
        lowkey template MODEL --messages chat.json --json\n  \
        lowkey template my.jinja --messages chat.json --now 2026-01-15T12:00:00")]
    Template(TemplateArguments),
    /// Say which keys a run, dataset or experiment file may have: a JSON Schema for editors, or a reference for readers
    #[command(after_help = "\
        An editor that knows TOML (taplo, Even Better TOML) completes and checks the keys of a file whose\n\
        first line names its schema:\n  \
        #:schema run.schema.json\n\n\
        Examples:\n  \
        lowkey schema run > run.schema.json\n  \
        lowkey schema --keys > keys.md")]
    Schema(SchemaArguments),
    /// Measure speed and memory of training and decoding on fixed shapes and random tokens
    #[command(after_help = "Examples:\n  \
        lowkey bench train --shape d256\n  \
        lowkey bench decode --shape d512 --context 4096\n  \
        lowkey bench prefill --shape d256 --context 4096\n  \
        lowkey bench ops --shape d256 --batch 1 --seq 2048")]
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunFileArguments {
    /// The run file
    pub(crate) run: PathBuf,
    /// Replace a key of the run file; the value is TOML, a bare word counts as a string
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Folder of the run [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DeviceArgument {
    /// What to compute on: auto, cpu, wgpu, vulkan, metal or cuda, the latter four with :1 for the second of their kind
    #[arg(long = "device", value_name = "NAME", default_value = "auto")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArguments {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArguments {
    #[command(flatten)]
    pub(crate) file: RunFileArguments,
    /// Go on from the newest checkpoint of this run
    #[arg(long, conflicts_with = "overwrite")]
    pub(crate) resume: bool,
    /// Replace the run that is already in the folder
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Same as --set run.device=NAME; several with commas share every batch, as --set run.devices=["cuda:0", "cuda:1"]
    #[arg(long, value_name = "NAME")]
    pub(crate) device: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    #[command(flatten)]
    pub(crate) file: RunFileArguments,
    /// On another machine, whose products of matrices run at so many TFLOP/s (say what a library reaches there, not a data sheet)
    #[arg(long, value_name = "RATE", value_parser = above_zero)]
    pub(crate) tflops: Option<f64>,
    /// The same on so many ranks (`mpirun -n N lowkey train`), each on such a machine
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ranks: Option<u32>,
    /// The link of each rank, in Gbit/s
    #[arg(long, value_name = "GBIT", requires = "ranks", default_value_t = 10.0, value_parser = above_zero)]
    pub(crate) bandwidth: f64,
    /// How long a message is under way, in microseconds
    #[arg(long, value_name = "US", requires = "ranks", default_value_t = 50.0, value_parser = above_zero)]
    pub(crate) latency: f64,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn above_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArguments {
    /// A Hugging Face model directory, such as a checkpoint
    pub(crate) model: PathBuf,
    /// Text to continue
    #[arg(long, conflicts_with = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// File with the text to continue
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// The prompt is a user's message: it is put into the model's chat template, and the answer alone is printed
    #[arg(long, conflicts_with = "add_special_tokens")]
    pub(crate) chat: bool,
    /// Most tokens to add [default: 200, or as many as the model has room for]
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,
    /// 0 takes the most likely token; higher is more varied [default: as the model's generation_config.json says, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f64>,
    /// Choose among the K most likely tokens only [default: as generation_config.json says, else all]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Choose among the fewest tokens that together have probability P [default: as generation_config.json says, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f64>,
    /// Above 1: make tokens that have occurred less likely [default: as generation_config.json says, else 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f64>,
    /// Seed of the random choice
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// End at this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Begin the prompt with the special tokens that the tokenizer puts before a text, such as `<s>`, or not [default: as the model
    /// was trained, else as its tokenizer does]
    #[arg(long, value_name = "BOOL")]
    pub(crate) add_special_tokens: Option<bool>,
    /// Do not end at the model's end-of-text tokens
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// How attention is computed over the latent cache: auto, expanded, absorbed or fused
    #[arg(long, default_value = "auto", value_name = "FORM")]
    pub(crate) decode: String,
    /// Cache and read only the first R numbers of each latent: meant for models trained with [model.elastic]
    #[arg(long, value_name = "R")]
    pub(crate) kv_rank: Option<usize>,
    /// How the cache stores its numbers: f32, bf16, f16 or int8
    #[arg(long, default_value = "f32", value_name = "FORMAT")]
    pub(crate) cache_dtype: String,
    /// How the matrices are held: f32, bf16 (half of what a token reads, and nothing lost of a model that was published so), int8, int4
    /// or nf4; with a cache in bf16, too, products are, where the processor is faster with them
    #[arg(long, default_value = "f32", value_name = "FORMAT")]
    pub(crate) weights: String,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print JSON instead of streaming text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// A Hugging Face model directory, such as a checkpoint
    pub(crate) model: PathBuf,
    /// A dataset file (.toml) or a text file
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// The held-out split, or all of the text [default: validation of a dataset file, all of a text file]
    #[arg(long, value_parser = ["validation", "all"])]
    pub(crate) split: Option<String>,
    /// Put around documents the special tokens that the tokenizer puts around a text, such as `<s>`, or not [default: as the model
    /// was trained, else as its tokenizer does]
    #[arg(long, value_name = "BOOL")]
    pub(crate) add_special_tokens: Option<bool>,
    /// Tokens per sequence [default: the model's longest, at most 2048]
    #[arg(long, value_name = "N")]
    pub(crate) seq_len: Option<usize>,
    /// Sequences per batch
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Read only the first R numbers of each latent: meant for models trained with [model.elastic]
    #[arg(long, value_name = "R")]
    pub(crate) kv_rank: Option<usize>,
    /// Measure the first N batches only
    #[arg(long, value_name = "N")]
    pub(crate) batches: Option<usize>,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Tokenise a corpus into memory-mapped shards
    #[command(after_help = "Example:\n  lowkey data prepare datasets/storybook.toml")]
    Prepare(DataPrepareArguments),
    /// Describe prepared shards and show a document
    #[command(
        after_help = "Example:\n  lowkey data info datasets/prepared/storybook --show 3\n  lowkey data info datasets/tasks/mqar.toml --show 3"
    )]
    Info(DataInfoArguments),
}

#[derive(Debug, Args)]
pub(crate) struct DataPrepareArguments {
    /// A dataset file (.toml) or a text file
    pub(crate) dataset: PathBuf,
    /// Folder to write [default: prepared/NAME beside the dataset file]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Use this tokenizer.json, or that of a model's folder with its chat template, instead of the dataset's
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DataInfoArguments {
    /// A prepared folder, or a dataset file (.toml): of a task, or one that has been prepared
    pub(crate) dir: PathBuf,
    /// Print the first N training documents, and what of them is learnt where that is not all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) show: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArguments {
    /// A model directory or a run's folder
    pub(crate) path: PathBuf,
    /// How much of its latent each layer uses: singular values, ranks, the share of position, a recommended rank
    #[arg(long)]
    pub(crate) spectrum: bool,
    /// With --spectrum: a dataset file (.toml) or a text file to look at the model with [default: its run's]
    #[arg(long, value_name = "FILE", requires = "spectrum")]
    pub(crate) data: Option<PathBuf>,
    /// With --spectrum: the share of what is read of a latent that a recommended rank has to carry
    #[arg(long, default_value_t = 0.99, value_name = "SHARE", requires = "spectrum")]
    pub(crate) energy: f64,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TemplateArguments {
    /// A model directory, a template's file (.jinja), or a built-in template: chatml, llama3, qwen, deepseek or plain
    pub(crate) template: PathBuf,
    /// File with the conversation
    #[arg(long, value_name = "FILE.json")]
    pub(crate) messages: PathBuf,
    /// End with what comes before the assistant's next message
    #[arg(long)]
    pub(crate) add_generation_prompt: bool,
    /// The present that the template may ask for, like 2026-01-15T12:00:00 [default: the clock]
    #[arg(long, value_name = "TIME")]
    pub(crate) now: Option<DateTime>,
    /// Which of a model's templates, where it has several
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Print JSON: the text, which bytes of it are whose answer, and with a model its token ids and which of them are answers
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SchemaArguments {
    /// Print the JSON Schema of such a file
    #[arg(required_unless_present = "keys")]
    pub(crate) file: Option<FileKind>,
    /// Print every key of all three files as Markdown
    #[arg(long, conflicts_with = "file")]
    pub(crate) keys: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArguments {
    /// A Hugging Face model directory
    pub(crate) model: PathBuf,
    /// Safetensors file with `input_ids`
    #[arg(long, value_name = "IN")]
    pub(crate) ids: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "OUT")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
}
