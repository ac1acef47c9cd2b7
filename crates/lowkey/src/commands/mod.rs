//! One file per command.

mod bench;
mod convert;
mod data;
mod devices;
mod eval;
mod export;
mod generate;
mod info;
mod lab;
mod logits;
mod ranks;
mod report;
mod runs;
mod schema;
mod template;
mod text;
mod train;

use std::path::Path;
use std::process::ExitCode;

use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{CausalLm, ModelDir, adapter::companion_dir};

use crate::cli::{Arguments, Command, DataCommand, DeviceArgument, LabCommand};
use crate::output::{complain, work_goes_on};

/// The command line asked for something that makes no sense.
#[derive(Debug)]
pub(crate) struct WrongUse(pub(crate) String);

impl std::fmt::Display for WrongUse {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUse {}

/// The device that the command line asks for.
fn open_device(argument: &DeviceArgument) -> anyhow::Result<Device> {
    open_device_at(argument, 0, 1)
}

/// That of one of several processes on this machine, of which `place` come before it.
fn open_device_at(argument: &DeviceArgument, place: usize, processes: usize) -> anyhow::Result<Device> {
    Ok(lowkey_kernels::device::open_at(&argument.name, place, processes)
        .map_err(|e| WrongUse(format!("--device {}: {e}", argument.name)))?)
}

/// Loads a model directory; one that carries checksums only if they match.
fn load_model(dir: &Path, device: &Device) -> anyhow::Result<CausalLm> {
    Ok(ModelDir::open(dir)?.load(device)?)
}

/// How the matrices of a model are packed while it is read, as `--weights` says; none: they are whole.
fn packing(format: &str) -> Result<Option<Quantization>, WrongUse> {
    let found = Quantization::ALL.into_iter().find(|quantization| quantization.name() == format);
    if found.is_none() && format != "f32" {
        return Err(WrongUse(format!("--weights {format}: must be f32, bf16, int8, int4 or nf4")));
    }
    Ok(found)
}

/// The tokenizer of a model directory, with the special tokens around a text or without as the command line says.
fn open_tokenizer(dir: &Path, add_special_tokens: Option<bool>) -> anyhow::Result<Tokenizer> {
    let dir = &companion_dir(dir, "tokenizer.json")?;
    let tokenizer = Tokenizer::from_model_dir(dir)?;
    if add_special_tokens.is_none()
        && let Some(note) = lowkey_train::setup::special_tokens_note(dir, &tokenizer, "--add-special-tokens false")
    {
        complain(&format!("note: {note}"));
    }
    Ok(tokenizer.with_special_tokens(add_special_tokens))
}

/// The model with only the first `rank` numbers of each latent read.
fn read_at(model: CausalLm, rank: Option<usize>) -> anyhow::Result<CausalLm> {
    let Some(rank) = rank else { return Ok(model) };
    let config = &model.config;
    let narrow = model
        .with_kv_ranks(&vec![rank; config.layers.len()])
        .map_err(|e| WrongUse(format!("--kv-rank {rank}: {e}")))?;
    if let Some(mla) = config.attention().latent()
        && rank < config.kv_ranks().into_iter().min().unwrap_or(0)
        && !config.kv_elastic_ranks.as_ref().is_some_and(|ranks| ranks.contains(&rank))
    {
        let trained = config.kv_elastic_ranks.as_ref().map_or_else(
            || "train it with [model.elastic], or narrow it with lowkey convert --kv-rank-budget".into(),
            |ranks| format!("its ranks are {ranks:?} and the whole {}", mla.kv_lora_rank),
        );
        complain(&format!("note: this model was not trained to be read at rank {rank}; {trained}"));
    }
    Ok(narrow)
}

/// Whether several processes, started as one job, share the work of a command.
fn takes_several(command: &Command) -> bool {
    match command {
        Command::Train(_) | Command::Eval(_) | Command::Devices(_) => true,
        Command::Lab { command } => matches!(command, LabCommand::Run(_)),
        _ => false,
    }
}

/// Whether the work of a command is in files, rather than in what it prints.
fn keeps_its_work(command: &Command) -> bool {
    match command {
        Command::Train(_)
        | Command::Export(_)
        | Command::Merge(_)
        | Command::Convert(_)
        | Command::Logits(_)
        | Command::Report(_) => true,
        Command::Lab { command } => matches!(command, LabCommand::Run(_)),
        Command::Data { command } => matches!(command, DataCommand::Prepare(_)),
        Command::Plan(_)
        | Command::Generate(_)
        | Command::Eval(_)
        | Command::Verify(_)
        | Command::Runs(_)
        | Command::Devices(_)
        | Command::Info(_)
        | Command::Template(_)
        | Command::Schema(_)
        | Command::Bench { .. } => false,
    }
}

pub(crate) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    if !takes_several(&arguments.command) {
        ranks::refuse_several("this command")?;
    }
    if keeps_its_work(&arguments.command) {
        work_goes_on();
    }
    match arguments.command {
        Command::Train(arguments) => train::train(arguments),
        Command::Plan(arguments) => train::plan(arguments).map(done),
        Command::Generate(arguments) => generate::generate(&arguments).map(done),
        Command::Eval(arguments) => eval::eval(&arguments),
        Command::Export(arguments) => export::export(&arguments).map(done),
        Command::Merge(arguments) => export::merge(&arguments).map(done),
        Command::Verify(arguments) => export::verify(&arguments),
        Command::Convert(arguments) => convert::convert(&arguments).map(done),
        Command::Lab { command } => lab::lab(command),
        Command::Report(arguments) => report::report(&arguments).map(done),
        Command::Runs(arguments) => runs::runs(&arguments).map(done),
        Command::Data { command: DataCommand::Prepare(arguments) } => data::prepare(&arguments).map(done),
        Command::Data { command: DataCommand::Info(arguments) } => data::info(&arguments).map(done),
        Command::Devices(arguments) => devices::devices(&arguments),
        Command::Info(arguments) => info::info(&arguments).map(done),
        Command::Logits(arguments) => logits::logits(&arguments).map(done),
        Command::Template(arguments) => template::template(&arguments).map(done),
        Command::Schema(arguments) => schema::schema(&arguments).map(done),
        Command::Bench { command } => bench::bench(command).map(done),
    }
}
