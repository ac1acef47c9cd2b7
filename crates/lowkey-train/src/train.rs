//! The one training loop.

mod opening;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_files::companions::Companions;
use lowkey_kernels::Precision;
use lowkey_kernels::device::{choose_kernels, chosen_kernels, is_cpu};
use lowkey_model::objective::Term;
use lowkey_model::{CausalLm, Parameter, adapter::QuantizedLayer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::average::Average;
use crate::checkpoint::{self, Beside, Checkpoints, TrainerState};
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Held, evaluate, evaluate_pairs};
use crate::event::{Event, Outcome, RunOptions};
use crate::first_model::first_model;
use crate::metrics::{Metrics, MetricsFile};
use crate::optimizer::{Optimizer, global_norm};
use crate::other_model::Counterpart;
use crate::passes::Passes;
use crate::plan::Plan;
use crate::prefetch::Prefetch;
use crate::prompts::{Prompt, prompts};
use crate::ranks::{self, Meeting, Ranks};
use crate::resume::{self, Earlier};
use crate::run_config::{RankTransport, RunConfig};
use crate::run_data::{RunData, TrainBatches};
use crate::run_dir::{self, Ended, SamplesFile};
use crate::setup::{Setup, check_memory, check_precision, check_tensors, devices, setup_run};
use crate::step::{StepFigures, StepSettings, StepTaken};
use crate::tensorboard::EventWriter;
use crate::workers::{Workers, ceiling, check_threads};
use crate::world::{Replica, World, optimized, threads_each};
use opening::Opened;

/// Trains as the run file says. `interrupt` stops it after the current step, with a checkpoint, or while the corpus is prepared.
///
/// # Errors
/// What is wrong with the run file or its data, and [`Error::Memory`], before the first step; later [`Error::NonFinite`],
/// [`Error::Diverged`] and failures of the disk.
pub fn train(
    config: &RunConfig,
    options: &RunOptions,
    interrupt: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    train_on(&Ranks::default(), config, options, interrupt, observe)
}

/// [`train()`] as one of several ranks, which share every batch. The first one writes, and all are interrupted where one is.
///
/// # Errors
/// As [`train()`]; what one rank meets, all return.
pub fn train_on(
    ranks: &Ranks,
    config: &RunConfig,
    options: &RunOptions,
    interrupt: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    ranks.end(train_together(ranks, config, options, interrupt, observe))
}

fn train_together(
    ranks: &Ranks,
    config: &RunConfig,
    options: &RunOptions,
    interrupt: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    let devices = devices(&config.run, ranks, options.turn)?;
    for device in &devices {
        check_precision(config.training.dtype, config.training.emulate_dtype, device)?;
    }
    check_threads(config, &devices)?;
    let threads = ranks::start::compare(ranks, config, options, &devices[0])?;
    if config.ranks.transport == RankTransport::Nccl || (ranks.meet_on_gpus() && !is_cpu(&devices[0])) {
        ranks.link_gpus(&devices[0])?;
    }
    let opened = if ranks.is_first() { Some(Opened::new(config, options)?) } else { None };
    let found = opening::found(ranks, options, opened.as_ref())?;
    let (_held, checkpoints, damaged) = match opened {
        Some(Opened { held, checkpoints, damaged, .. }) => (Some(held), Some(checkpoints), damaged),
        None => (None, None, Vec::new()),
    };
    let earlier = found.as_ref().map(|checkpoint| Earlier::load(&options.out, checkpoint)).transpose()?;
    let config = &resume::resolve(config, options, earlier.as_ref(), threads)?;
    let crowded = check_threads(config, &devices)?;
    let begun = found.as_deref().zip(earlier.as_ref().map(|earlier| &earlier.state));
    let setup = opening::set_up(ranks, config, || setup_run(config, options, begun, interrupt, observe))?;
    let Some(setup) = setup else {
        let step = begun.map_or(0, |(_, state)| state.step);
        return Ok(Outcome { step, finished: false, evaluation: None });
    };
    let elastic = !setup.model.elastic_ranks().is_empty();
    let since = earlier.as_ref().map(|earlier| resume::notes(config, earlier, elastic)).unwrap_or_default();
    for note in damaged.into_iter().chain(crowded).chain(since).chain(setup.notes.iter().cloned()) {
        observe(Event::Note(note));
    }
    if setup.data.held.is_empty() {
        let note = "nothing is held out to measure the model on: there will be no held-out loss, and `best` is the newest checkpoint";
        observe(Event::Note(note.into()));
    }
    if options.resume && found.is_none() {
        observe(Event::Note("no checkpoint to resume from; starting at step 0".into()));
    }
    let resumed = found.as_deref().zip(earlier.map(|earlier| earlier.state));
    let mut run = Run::start(config, options, setup, (ranks, checkpoints), resumed, devices)?;
    run.world.agree_with_ranks()?;
    if let Some(checkpoints) = &run.checkpoints {
        match found {
            // A process may have been killed between a checkpoint and what follows it.
            Some(_) => checkpoints.settle(&run.state)?,
            // Only now: whatever is wrong with the new run, the old one would be gone.
            None if options.overwrite => checkpoints.clear()?,
            None => {}
        }
        run.open_logs()?;
        run.write_head(found.is_some())?;
    }
    if let Some(reducer) = run.world.reducer() {
        let members = match ranks.size() {
            1 => format!("{} devices", config.run.devices.len()),
            size if is_cpu(&run.world.main().device) => format!("{size} ranks of {} threads each", config.threads()),
            size => format!("{size} ranks of one device each"),
        };
        observe(Event::Note(format!("{members}; gradients are added up by {reducer}")));
    }
    if let Some(note) = quantization_note(run.world.main().model.quantized_layers()) {
        observe(Event::Note(note));
    }
    if let (0, Some(example)) = (run.state.step, &run.data.example) {
        observe(Event::Example(example));
    }
    observe(Event::Ready { plan: &run.plan, step: run.state.step });
    run.warm_up(observe)?;
    run.steps(interrupt, observe)
}

/// What packing did to a model's matrices, in a line; none where none is packed.
fn quantization_note(layers: &[QuantizedLayer]) -> Option<String> {
    const MIB: f64 = (1u64 << 20) as f64;
    let worst = layers.iter().max_by(|a, b| a.error.total_cmp(&b.error))?;
    let least = layers.iter().map(|layer| layer.error).fold(f64::INFINITY, f64::min);
    let bytes: usize = layers.iter().map(|layer| layer.bytes).sum();
    let whole: usize = layers.iter().map(|layer| 4 * layer.shape.iter().product::<usize>()).sum();
    Some(format!(
        "{} frozen matrices are packed as {}: {:.1} MiB instead of {:.1}, each off by {:.2} % to {:.2} % of its norm (most of \
         all {}); {} has them all",
        layers.len(),
        worst.quantization.name(),
        bytes as f64 / MIB,
        whole as f64 / MIB,
        100.0 * least,
        100.0 * worst.error,
        worst.name,
        run_dir::QUANTIZATION,
    ))
}

/// Steps that may be queued on a GPU before the host waits for the first of them: enough that the device never waits for the host,
/// few enough that what is shown is new and Ctrl-C is answered.
const QUEUED: usize = 2;

/// A step whose figures are not yet known.
struct Queued {
    taken: StepTaken,
    /// Steps and targets with it.
    step: u64,
    tokens: u64,
    lr: f64,
    /// Operations over all positions, in all their passes: what is read and not learnt costs as much.
    flops: f64,
}

/// Does what may choose kernels of a GPU on the first rank, whose choices and result are then those of all: kernels that a rank would find
/// the fastest for itself may round in another order. All of them meet here.
///
/// # Errors
/// The job's; as [`Ranks::agree`].
fn chosen_by_the_first<R: Serialize + DeserializeOwned>(ranks: &Ranks, job: impl FnOnce() -> Result<R>) -> Result<R> {
    if !ranks.are_several() {
        return job();
    }
    let unreadable = |e: serde_json::Error| Error::Transfer { call: "gather", why: format!("kernels of rank 0: {e}") };
    let own = || serde_json::to_vec(&(job()?, chosen_kernels())).map_err(unreadable);
    let told = ranks.told(if ranks.is_first() { own() } else { Ok(Vec::new()) })?;
    let (result, kernels) = serde_json::from_slice(&told).map_err(unreadable)?;
    choose_kernels(kernels);
    Ok(result)
}

fn settings<'a>(config: &RunConfig, terms: &'a [Term], step: u64) -> StepSettings<'a> {
    StepSettings { passes: config.passes(terms, step), grad_clip: config.optimizer.grad_clip }
}

/// A run in progress.
struct Run<'a> {
    config: &'a RunConfig,
    options: &'a RunOptions,
    data: RunData,
    batches: Arc<TrainBatches>,
    /// The same from the next step on, made ahead.
    ahead: Prefetch,
    byte_lengths: Vec<u32>,
    /// What came with the model that this session began with.
    companions: Companions,
    world: World,
    /// Of the weights, where the run keeps one.
    average: Option<Average>,
    /// Steps that are queued and not yet waited for, oldest first.
    queued: VecDeque<Queued>,
    /// The processes that train together,
    ranks: Ranks,
    /// the first of which writes.
    checkpoints: Option<Checkpoints>,
    /// After the last step that was queued.
    state: TrainerState,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    plan: Plan,
    passes: Passes,
    /// What the model is asked to write at evaluations.
    prompts: Vec<Prompt>,
    metrics: Option<MetricsFile>,
    samples: Option<SamplesFile>,
    events: Option<EventWriter>,
    /// Time of earlier sessions.
    earlier_s: f64,
    started: Instant,
    /// When the last step was known to be over.
    counted: Instant,
}

impl<'a> Run<'a> {
    fn start(
        config: &'a RunConfig,
        options: &'a RunOptions,
        setup: Setup,
        (ranks, checkpoints): (&Ranks, Option<Checkpoints>),
        resumed: Option<(&Path, TrainerState)>,
        devices: Vec<Device>,
    ) -> Result<Self> {
        let Setup { model: model_config, data, init, new_tokens, other, .. } = setup;
        let (resume, state) = resumed.unzip();
        let threads = config.threads();
        let batches = Arc::new(data.batches(&config.data, config.training.batch_size, config.run.seed)?);
        config.check_pairs(data.is_pairs(), &data.name)?;
        let count = devices.len();
        check_memory(config, &model_config, if devices.iter().any(is_cpu) { count * ranks.here() } else { 1 })?;
        for device in &devices {
            check_tensors(config, &model_config, device)?;
        }
        let Some(device) = devices.first() else { unreachable!("a run has a device") };
        let model = first_model(config, &model_config, init.as_ref(), new_tokens, resume, device)?;
        let companions = match (resume, &init) {
            (Some(checkpoint), _) => Companions::read(checkpoint)?,
            (None, Some(init)) => init.read_companions()?,
            (None, None) => Companions::default(),
        };
        let mut state = state.unwrap_or_default();
        (state.data, state.held_out) = (data.checksum(), Some(data.held_checksum()));
        state.newest_is_best = data.held.is_empty();
        let own_threads = if count > 1 { threads_each(threads, count) } else { threads };
        let mut others_of = Counterpart::load(config, other.as_ref(), &model, &devices, ranks)?.into_iter();
        let mut replica = |model: CausalLm, device: &Device| -> Result<Replica> {
            let parameters = model.trained_parameters();
            let parameters = &parameters[optimized(ranks, config.ranks, &parameters)];
            let optimizer = Optimizer::new(&config.optimizer, parameters, Parameter::is_matrix);
            let mut optimizer = optimizer.with_rates(&config.optimizer, parameters, model.config.layers.len());
            if let Some(dir) = resume {
                let (_, states) = checkpoint::load_state(dir, parameters, optimizer.state().0, device)?;
                optimizer.restore(states, state.step);
            }
            let rows = config.rows_of_a_pass().min(config.training.batch_size / ranks.size());
            let workers = Workers::for_device(own_threads, rows, device)?.among(ranks.clone());
            Ok(Replica {
                device: device.clone(),
                model,
                optimizer,
                workers,
                gate: None,
                other: others_of.next().flatten(),
            })
        };
        // Values of its own for each: a device that is named twice would share them, and one thread would write over what another still
        // has to read.
        let copied = |device: &Device| {
            let copy = model.clone().fork(device);
            let values = copy.parameters().into_iter().map(|p| p.value * 1.0).collect();
            copy.with_values(values)
        };
        let copies: Vec<(CausalLm, &Device)> = devices[1..].iter().map(|device| (copied(device), device)).collect();
        let first = replica(model, device)?;
        let others = copies.into_iter().map(|(model, device)| replica(model, device)).collect::<Result<Vec<_>>>()?;
        let average = match (config.training.ema_decay, resume) {
            (None, _) => None,
            (Some(decay), None) => Some(Average::new(decay, &first.model)),
            (Some(decay), Some(dir)) => {
                let average = Some(dir.join(checkpoint::EMA));
                let averaged = first_model(config, &model_config, init.as_ref(), 0..0, average.as_deref(), device)?;
                Some(Average::new(decay, &averaged))
            }
        };
        // Before anything is multiplied, as the first use of a shape chooses its kernel.
        choose_kernels(state.kernels.clone());
        let of_one = || ceiling(threads, &devices, config.training.dtype);
        let of_one = if is_cpu(device) { of_one()? } else { chosen_by_the_first(ranks, of_one)? };
        let plan = Plan::new(config, &first.model.config, of_one * ranks.size() as f64);
        let passes = Passes::new(config, &first.model.config);
        if config.training.dtype == Precision::F16 {
            state.loss_scale.get_or_insert_default();
        }
        Ok(Self {
            config,
            options,
            ahead: Prefetch::new(Arc::clone(&batches), state.step, config.training.steps)?,
            batches,
            prompts: data.tokenizer.as_ref().map_or(Ok(Vec::new()), |own| prompts(&config.eval, own))?,
            byte_lengths: data.tokenizer.as_ref().map(Tokenizer::byte_lengths).unwrap_or_default(),
            data,
            companions,
            world: World::new(first, others).among(ranks.clone(), config.ranks),
            ranks: ranks.clone(),
            average,
            queued: VecDeque::new(),
            checkpoints,
            earlier_s: state.time_s,
            saved: resume.map(|_| state.step),
            state,
            plan,
            passes,
            metrics: None,
            samples: None,
            events: None,
            started: Instant::now(),
            counted: Instant::now(),
        })
    }

    /// Opens the metrics and the samples, and removes an evaluation that is not this run's last word (a run with nothing held out has
    /// none) and how the session before ended.
    fn open_logs(&mut self) -> Result<()> {
        let out = &self.options.out;
        self.metrics = Some(MetricsFile::open(&out.join(run_dir::METRICS), self.state.step)?);
        if self.config.metrics.tensorboard {
            self.events = Some(EventWriter::create(&out.join(run_dir::TENSORBOARD), self.state.step)?);
        }
        let samples = out.join(run_dir::SAMPLES);
        if !self.prompts.is_empty() || samples.exists() {
            self.samples = Some(SamplesFile::open(&samples, self.state.step)?);
        }
        Ended::forget(out)?;
        let evaluation = out.join(run_dir::EVALUATION);
        if self.state.step < self.config.training.steps || self.state.newest_is_best {
            lowkey_files::write::remove(&evaluation)?;
        }
        Ok(())
    }

    /// `run.toml` as resolved, `environment.json`, and what packing did where matrices are packed.
    fn write_head(&self, resumed: bool) -> Result<()> {
        let out = &self.options.out;
        let quantization = out.join(run_dir::QUANTIZATION);
        match self.world.main().model.quantized_layers() {
            [] => lowkey_files::write::remove(&quantization)?,
            layers => lowkey_files::write_json(&quantization, &layers)?,
        }
        lowkey_files::write(&out.join(run_dir::RUN_FILE), self.config.to_toml()?.as_bytes())?;
        let mut environment = self.options.environment.clone();
        environment.insert("device".into(), json!(self.config.run.device));
        environment.insert("devices".into(), json!(self.config.run.devices));
        environment.insert("ranks".into(), json!(self.ranks.size()));
        environment.insert("seed".into(), json!(self.config.run.seed));
        environment.insert("threads".into(), json!(self.config.training.threads));
        environment.insert("dataset".into(), json!(self.data.name));
        environment.insert("data_sha256".into(), json!(self.state.data));
        environment.insert("held_out_sha256".into(), json!(self.state.held_out));
        environment.insert("matmul_flops_per_s".into(), json!(self.plan.matmul_flops_per_s));
        environment.insert("plan".into(), json!(self.plan));
        environment.insert("resumed_at_step".into(), json!(resumed.then_some(self.state.step)));
        Ok(lowkey_files::write_json(&out.join(run_dir::ENVIRONMENT), &environment)?)
    }

    /// Compiles a GPU's kernels and finds the fastest ones before the first step, whose time is then that of a step.
    fn warm_up(&mut self, observe: &mut dyn FnMut(Event)) -> Result<()> {
        if is_cpu(&self.world.main().device) || self.state.step >= self.config.training.steps {
            return Ok(());
        }
        let started = Instant::now();
        let step = self.state.step;
        let (terms, batch) = (self.passes.terms(step), self.batches.batch(step)?);
        let settings = settings(self.config, &terms, step);
        chosen_by_the_first(&self.ranks, || settings.warm_up(&self.world, &batch))?;
        if !self.ranks.is_first() {
            settings.warm_up(&self.world, &batch)?;
        }
        observe(Event::WarmedUp { seconds: started.elapsed().as_secs_f64() });
        Ok(())
    }

    fn steps(mut self, interrupt: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome> {
        self.ranks.be_patient_for(Duration::from_secs(self.config.ranks.patience_s));
        let result = self.take_steps(interrupt, observe).map_err(|error| error.with_kept(self.saved));
        if self.checkpoints.is_none() {
            return result;
        }
        Ended::keep(&self.options.out, self.state.step, result)
    }

    fn take_steps(&mut self, interrupt: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome> {
        let steps = self.config.training.steps;
        self.counted = Instant::now();
        while self.state.step < steps
            && !self.stalls()
            && !self.ranks.any(Meeting::Step, interrupt.load(Ordering::Relaxed))?
        {
            self.queue()?;
            let step = self.state.step;
            let last = step == steps;
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            let looked_at = last || due(self.config.eval.every);
            let evaluated = looked_at && !self.state.newest_is_best;
            let known = self.queued.back().is_some_and(|step| step.taken.is_known());
            let behind = if known || looked_at || due(self.config.checkpoint.every) { 1 } else { QUEUED + 1 };
            let Some(metrics) = self.settle(behind, observe)? else { continue };
            let mut best = false;
            if evaluated {
                let section = &self.config.eval;
                let measured =
                    self.evaluate(&self.data.held.first(section.batches, self.config.training.batch_size))?;
                // One that was measured on more or less of the text says nothing about this one.
                let before = self.state.best.filter(|_| self.state.measured == Some(section.batches));
                best = before.is_none_or(|(_, loss)| measured.loss < loss);
                if best {
                    (self.state.best, self.state.measured) = (Some((step, measured.loss)), Some(section.batches));
                }
                let metrics = metrics.with_evaluation(&measured);
                observe(Event::Step(&metrics));
                observe(Event::Evaluated { step, evaluation: &measured });
                self.log(&metrics)?;
                self.sample(observe)?;
                self.counted = Instant::now();
            } else {
                self.report(&metrics, observe)?;
                if looked_at {
                    self.sample(observe)?;
                    self.counted = Instant::now();
                }
            }
            if last || best || due(self.config.checkpoint.every) {
                self.save(best, observe)?;
                self.counted = Instant::now();
            }
        }
        let stalls = self.stalls();
        if stalls {
            let (step, patience) = (self.state.step, self.config.eval.patience.unwrap_or_default());
            let note = format!("no lower held-out loss for {patience} evaluations: the run ends at step {step}");
            observe(Event::Note(note));
            if self.saved != Some(step) {
                self.save(false, observe)?;
            }
        }
        if self.state.step < steps && !stalls {
            if let Some(metrics) = self.settle(1, observe)? {
                self.report(&metrics, observe)?;
            }
            if self.saved != Some(self.state.step) {
                self.save(false, observe)?;
            }
            return Ok(Outcome { step: self.state.step, finished: false, evaluation: None });
        }
        let evaluation = if self.state.newest_is_best {
            None
        } else {
            let evaluation = self.evaluate(&self.data.held)?;
            if self.checkpoints.is_some() {
                lowkey_files::write_json(&self.options.out.join(run_dir::EVALUATION), &evaluation)?;
            }
            observe(Event::Finished { evaluation: &evaluation, on: &self.data.held_part() });
            Some(evaluation)
        };
        Ok(Outcome { step: self.state.step, finished: true, evaluation })
    }

    /// Whether so many evaluations that it is asked to end have brought no lower held-out loss. Told by the state alone, so that a run
    /// that was stopped after the last of them does not go on either.
    fn stalls(&self) -> bool {
        let (every, step) = (self.config.eval.every.max(1), self.state.step);
        match (self.config.eval.patience, self.state.best) {
            (Some(patience), Some((best, _))) if self.queued.is_empty() => {
                step / every >= best.div_ceil(every) + patience
            }
            _ => false,
        }
    }

    /// Queues an optimiser step; on the CPU, takes it.
    fn queue(&mut self) -> Result<()> {
        let config = self.config;
        let step = self.state.step;
        let batch = self.ahead.next()?;
        let lr = config.rate(step);
        let terms = self.passes.terms(step);
        let scale = self.state.loss_scale.as_mut();
        let taken = settings(config, &terms, step).step(&mut self.world, &batch, step, lr, scale)?;
        self.state.step += 1;
        if let Some(average) = &mut self.average {
            let (Replica { model, workers, .. }, taken) = (self.world.main(), self.state.step);
            workers.together(|| average.update(model, taken));
        }
        self.state.tokens += taken.targets as u64;
        let flops = (batch.rows * batch.seq_len) as f64 * self.passes.flops_per_token(step);
        self.queued.push_back(Queued { taken, step: self.state.step, tokens: self.state.tokens, lr, flops });
        Ok(())
    }

    /// Waits until fewer than `most` steps are queued, and returns the figures of the newest of those waited for; those before it are
    /// reported.
    fn settle(&mut self, most: usize, observe: &mut dyn FnMut(Event)) -> Result<Option<Metrics>> {
        let (mut known, mut targets, mut flops, mut refused) = (Vec::new(), 0, 0.0, None);
        while refused.is_none() && self.queued.len() >= most.max(1) {
            let Some(Queued { taken, step, tokens, lr, flops: of_step }) = self.queued.pop_front() else { break };
            let more = taken.targets;
            match taken.wait(&self.world.main().model) {
                Ok(figures) => known.push((figures, step, tokens, lr)),
                Err(error) => refused = Some(error),
            }
            targets += more;
            flops += of_step;
        }
        // Several may be over by the time that the first is asked for: they share its time.
        let elapsed = self.counted.elapsed().as_secs_f64();
        let (tokens_per_s, flops_per_s) = (targets as f64 / elapsed, flops / elapsed);
        // What the run itself reaches is a rate that this machine has: the ceiling was measured in a busy moment.
        self.plan.matmul_flops_per_s = self.plan.matmul_flops_per_s.max(flops_per_s);
        self.counted = Instant::now();
        self.state.time_s = self.earlier_s + self.started.elapsed().as_secs_f64();
        let line = |(figures, step, tokens, lr): (StepFigures, u64, u64, f64)| Metrics {
            step,
            tokens,
            time_s: self.state.time_s,
            train_loss: figures.loss,
            lr,
            grad_norm: figures.norm,
            tokens_per_s,
            mfu: flops_per_s / self.plan.matmul_flops_per_s,
            epoch: self.batches.epoch(step),
            figures: figures.named,
            ..Metrics::default()
        };
        let mut known: Vec<Metrics> = known.into_iter().map(line).collect();
        let newest = if refused.is_none() { known.pop() } else { None };
        for metrics in &known {
            self.report(metrics, observe)?;
        }
        refused.map_or(Ok(newest), Err)
    }

    /// Shows a step that no evaluation follows, and logs it where it is its turn.
    fn report(&mut self, metrics: &Metrics, observe: &mut dyn FnMut(Event)) -> Result<()> {
        observe(Event::Step(metrics));
        let every = self.config.metrics.every;
        if every > 0 && metrics.step.is_multiple_of(every) { self.log(metrics) } else { Ok(()) }
    }

    /// The figures of a model.
    fn measure(&self, model: &CausalLm, held: &Held) -> Result<Evaluation> {
        let Replica { workers, device, other, .. } = self.world.main();
        match (self.config.first_term(), held) {
            (Term::Preference(preference), Held::Batches(batches)) => {
                evaluate_pairs(model, &preference, other.as_ref(), batches, workers, device)
            }
            _ => evaluate(model, held, &self.byte_lengths, workers, device),
        }
    }

    /// The figures of the model that is trained, and of the average of its weights.
    fn evaluate(&self, held: &Held) -> Result<Evaluation> {
        let model = &self.world.main().model;
        let mut evaluation = self.measure(model, held)?;
        if let Some(average) = &self.average {
            evaluation.ema = Some(self.measure(&average.of(model), held)?.into());
        }
        if !evaluation.loss.is_finite() {
            return Err(Error::Diverged {
                step: self.state.step,
                what: "the held-out loss".into(),
                value: evaluation.loss,
                kept: None,
            });
        }
        Ok(evaluation)
    }

    fn sample(&mut self, observe: &mut dyn FnMut(Event)) -> Result<()> {
        let (Some(tokenizer), Some(_)) = (&self.data.tokenizer, &self.checkpoints) else { return Ok(()) };
        let Replica { model, device, .. } = self.world.main();
        for prompt in &self.prompts {
            let written = prompt.written(model, &self.config.eval, self.config.run.seed, tokenizer, device)?;
            let (text, chat) = (&written, prompt.chat);
            if let Some(file) = &mut self.samples {
                file.write(self.state.step, &prompt.text, text, chat)?;
            }
            observe(Event::Sample { prompt: &prompt.text, text, chat });
        }
        Ok(())
    }

    fn log(&mut self, metrics: &Metrics) -> Result<()> {
        if let Some(file) = &mut self.metrics {
            file.write(metrics)?;
        }
        if let Some(events) = &mut self.events {
            events.scalars(metrics.step, &metrics.scalars())?;
        }
        Ok(())
    }

    fn save(&mut self, best: bool, observe: &mut dyn FnMut(Event)) -> Result<()> {
        let Replica { model, optimizer, workers, .. } = self.world.main();
        let (names, values): (Vec<_>, Vec<_>) = model.parameters().into_iter().map(|p| (p.name, p.value)).unzip();
        if let Err((i, value)) = workers.together(|| global_norm(&values)) {
            let what = names.into_iter().nth(i).unwrap_or_default();
            return Err(Error::Diverged { step: self.state.step, what, value, kept: None });
        }
        drop(values);
        if !self.world.agree() {
            return Err(Error::Device {
                what: "the same weights from every device",
                why: "they have drifted apart".into(),
            });
        }
        self.world.agree_with_ranks()?;
        let whole = self.world.whole_optimizer(&self.config.optimizer)?;
        self.state.kernels = chosen_kernels();
        let Some(checkpoints) = &self.checkpoints else {
            self.saved = Some(self.state.step);
            return Ok(());
        };
        let RunData { tokenizer, generation, .. } = &self.data;
        let averaged = self.average.as_ref().map(|average| average.of(model));
        let beside =
            Beside { tokenizer: tokenizer.as_ref(), generation, companions: &self.companions, ema: averaged.as_ref() };
        let path = checkpoints.save(model, beside, whole.as_ref().unwrap_or(optimizer), &self.state)?;
        self.saved = Some(self.state.step);
        observe(Event::Saved { path: &path, best });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
