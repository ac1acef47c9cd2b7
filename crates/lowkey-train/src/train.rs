//! The one training loop.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_infer::{Form, GenerateConfig, SamplingConfig, generate};
use lowkey_kernels::Precision;
use lowkey_kernels::device::{choose_kernels, chosen_kernels};
use lowkey_model::{CausalLm, ModelConfig, Parameter};
use serde_json::json;

use crate::checkpoint::{self, Checkpoints, TrainerState, write_file, write_json};
use crate::elastic::narrow_ranks;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Held, evaluate};
use crate::metrics::{Metrics, MetricsFile};
use crate::optimizer::{Optimizer, global_norm};
use crate::plan::Plan;
use crate::resume;
use crate::run_config::RunConfig;
use crate::run_data::{RunData, TrainBatches};
use crate::setup::{Setup, check_memory, check_precision, check_tensors, device, setup};
use crate::step::StepSettings;
use crate::tensorboard::EventWriter;
use crate::workers::{Workers, matmul_ceiling};

/// Where a run writes, and how it starts.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run file, for paths that are relative to it.
    pub run_file: PathBuf,
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Replace a run that is already there.
    pub overwrite: bool,
    /// Facts for `environment.json`: version, commit.
    pub environment: serde_json::Map<String, serde_json::Value>,
}

/// What a run tells whoever watches it.
#[derive(Debug)]
pub enum Event<'a> {
    /// The corpus is being read.
    Preparing(lowkey_data::Progress),
    /// Something worth a line.
    Note(String),
    /// All is set; `step` is where it starts.
    Ready {
        /// What it will cost.
        plan: &'a Plan,
        /// Steps already taken.
        step: u64,
    },
    /// A step was taken.
    Step(&'a Metrics),
    /// An evaluation ended.
    Evaluated {
        /// Steps taken.
        step: u64,
        /// Its figures, on the same part of the held-out split each time.
        evaluation: &'a Evaluation,
    },
    /// All steps are taken; the model as it now is, on the whole held-out split.
    Finished(&'a Evaluation),
    /// A prompt was continued.
    Sample {
        /// The prompt.
        prompt: &'a str,
        /// Its continuation.
        text: &'a str,
    },
    /// A checkpoint was written.
    Saved {
        /// Its folder.
        path: &'a Path,
        /// Whether it has the lowest held-out loss so far.
        best: bool,
    },
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Steps taken.
    pub step: u64,
    /// The model on the whole held-out split, where all steps of the run file were taken.
    pub evaluation: Option<Evaluation>,
}

/// Trains as the run file says. `interrupt` stops it after the current step, with a checkpoint.
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
    let device = device(&config.run.device)?.autodiff();
    check_precision(config.training.dtype, &device)?;
    let checkpoints_dir = options.out.join("checkpoints");
    resume::refuse_to_lose_a_run(&checkpoints_dir, options)?;
    std::fs::create_dir_all(&options.out).map_err(|e| Error::io(&options.out, e))?;
    let _lock = resume::lock(&options.out)?;
    let checkpoints = Checkpoints::open(&checkpoints_dir, config.checkpoint.keep)?;
    let (found, damaged) = if options.resume { checkpoints.latest()? } else { (None, Vec::new()) };
    if let (None, Some(first)) = (&found, damaged.first()) {
        // Starting anew would write over what may still be mended.
        let why =
            format!("no checkpoint here is whole ({first}); put one back from a copy, or start anew with --overwrite");
        return Err(Error::file(checkpoints_dir, why));
    }
    let config = &resume::with_threads(config, options, found.is_some())?;
    let Setup { model: model_config, data, notes } = setup(config, options, observe)?;
    for note in notes.into_iter().chain(damaged) {
        observe(Event::Note(note));
    }
    if options.resume && found.is_none() {
        observe(Event::Note("no checkpoint to resume from; starting at step 0".into()));
    }
    let mut run = Run::start(config, options, model_config, data, checkpoints, found.as_deref(), device)?;
    match found {
        // A process may have been killed between a checkpoint and what follows it.
        Some(_) => run.checkpoints.settle(&run.state)?,
        // Only now: whatever is wrong with the new run, the old one would be gone.
        None if options.overwrite => run.checkpoints.clear()?,
        None => {}
    }
    run.open_logs()?;
    run.write_head(found.is_some())?;
    observe(Event::Ready { plan: &run.plan, step: run.state.step });
    run.steps(interrupt, observe)
}

/// A run in progress.
struct Run<'a> {
    config: &'a RunConfig,
    options: &'a RunOptions,
    device: Device,
    data: RunData,
    batches: TrainBatches,
    byte_lengths: Vec<u32>,
    workers: Workers,
    model: CausalLm,
    optimizer: Optimizer,
    checkpoints: Checkpoints,
    state: TrainerState,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    plan: Plan,
    metrics: Option<MetricsFile>,
    events: Option<EventWriter>,
    /// Time of earlier sessions.
    earlier_s: f64,
    started: Instant,
}

impl<'a> Run<'a> {
    fn start(
        config: &'a RunConfig,
        options: &'a RunOptions,
        model_config: ModelConfig,
        data: RunData,
        checkpoints: Checkpoints,
        resume: Option<&Path>,
        device: Device,
    ) -> Result<Self> {
        let threads = config.threads();
        let batches = data.batches(&config.data, config.training.batch_size, config.run.seed)?;
        check_memory(config, &model_config)?;
        check_tensors(config, &model_config, &device)?;
        let model = match (resume, &config.init) {
            // The configuration comes from the run file both times: a decimal fraction need not survive config.json to
            // the last bit.
            (Some(dir), _) => CausalLm::load_with(dir, &model_config, &device)?,
            (None, Some(init)) => {
                if checkpoint::has_checksums(&init.from) {
                    checkpoint::verify(&init.from)?;
                }
                CausalLm::load_with(&init.from, &model_config, &device)?
            }
            (None, None) => CausalLm::init(&model_config, config.run.seed, &device),
        };
        let parameters = model.parameters();
        let mut optimizer = Optimizer::new(&config.optimizer, &parameters, Parameter::is_matrix);
        let mut state = TrainerState { data: data.checksum(), ..TrainerState::default() };
        if let Some(dir) = resume {
            let (saved, states) = checkpoint::load_state(dir, &parameters, optimizer.state().0, &device)?;
            if saved.data != state.data {
                let why = "the training tokens are not those this run began with; restore the text, or start a new run";
                return Err(Error::file(dir, why));
            }
            optimizer.restore(states, saved.step);
            choose_kernels(saved.kernels.clone());
            state = saved;
        }
        if config.training.dtype == Precision::F16 {
            state.loss_scale.get_or_insert_default();
        }
        let plan = Plan::new(config, &model.config, matmul_ceiling(threads, &device, config.training.dtype)?);
        Ok(Self {
            config,
            options,
            batches,
            byte_lengths: data.tokenizer.as_ref().map(Tokenizer::byte_lengths).unwrap_or_default(),
            data,
            workers: Workers::for_device(threads, config.micro_batch_size(), &device)?,
            device,
            model,
            optimizer,
            checkpoints,
            earlier_s: state.time_s,
            saved: resume.map(|_| state.step),
            state,
            plan,
            metrics: None,
            events: None,
            started: Instant::now(),
        })
    }

    /// Opens the metrics, and removes an evaluation that is not this run's last word.
    fn open_logs(&mut self) -> Result<()> {
        let out = &self.options.out;
        self.metrics = Some(MetricsFile::open(&out.join("metrics.jsonl"), self.state.step)?);
        if self.config.metrics.tensorboard {
            self.events = Some(EventWriter::create(&out.join("tensorboard"), self.state.step)?);
        }
        let evaluation = out.join("evaluation.json");
        if self.state.step < self.config.training.steps && evaluation.exists() {
            std::fs::remove_file(&evaluation).map_err(|e| Error::io(evaluation, e))?;
        }
        Ok(())
    }

    /// `run.toml` as resolved and `environment.json`.
    fn write_head(&self, resumed: bool) -> Result<()> {
        let out = &self.options.out;
        write_file(&out.join("run.toml"), self.config.to_toml()?.as_bytes())?;
        let mut environment = self.options.environment.clone();
        environment.insert("device".into(), json!(self.config.run.device));
        environment.insert("seed".into(), json!(self.config.run.seed));
        environment.insert("threads".into(), json!(self.config.training.threads));
        environment.insert("dataset".into(), json!(self.data.name));
        environment.insert("data_sha256".into(), json!(self.state.data));
        environment.insert("matmul_flops_per_s".into(), json!(self.plan.matmul_flops_per_s));
        environment.insert("plan".into(), json!(self.plan));
        environment.insert("resumed_at_step".into(), json!(resumed.then_some(self.state.step)));
        write_json(&out.join("environment.json"), &environment.into())
    }

    fn steps(mut self, interrupt: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome> {
        let steps = self.config.training.steps;
        while self.state.step < steps && !interrupt.load(Ordering::Relaxed) {
            let mut metrics = self.step()?;
            let last = self.state.step == steps;
            let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
            let mut best = false;
            if last || due(self.config.eval.every, self.state.step) {
                let section = &self.config.eval;
                let measured =
                    self.evaluate(&self.data.held.first(section.batches, self.config.training.batch_size))?;
                best = self.state.best.is_none_or(|(_, loss)| measured.loss < loss);
                if best {
                    self.state.best = Some((self.state.step, measured.loss));
                }
                metrics = metrics.with_evaluation(&measured);
                observe(Event::Step(&metrics));
                observe(Event::Evaluated { step: self.state.step, evaluation: &measured });
                self.sample(observe)?;
            } else {
                observe(Event::Step(&metrics));
            }
            if metrics.val_loss.is_some() || due(self.config.metrics.every, self.state.step) {
                self.log(&metrics)?;
            }
            if last || best || due(self.config.checkpoint.every, self.state.step) {
                self.save(best, observe)?;
            }
        }
        if self.state.step < steps {
            if self.saved != Some(self.state.step) {
                self.save(false, observe)?;
            }
            return Ok(Outcome { step: self.state.step, evaluation: None });
        }
        let evaluation = self.evaluate(&self.data.held)?;
        write_json(&self.options.out.join("evaluation.json"), &json!(evaluation))?;
        observe(Event::Finished(&evaluation));
        Ok(Outcome { step: self.state.step, evaluation: Some(evaluation) })
    }

    /// One optimiser step.
    fn step(&mut self) -> Result<Metrics> {
        let started = Instant::now();
        let config = self.config;
        let step = self.state.step;
        let batch = self.batches.batch(step);
        let lr = config.lr_scheduler.rate(step, config.training.steps, config.optimizer.lr);
        let narrow = if step as f64 >= config.training.elastic_start * config.training.steps as f64 {
            narrow_ranks(&self.model.config.elastic_ranks(), config.run.seed, step)
        } else {
            Vec::new()
        };
        let settings = StepSettings {
            workers: &self.workers,
            device: &self.device,
            passes: config.passes(&narrow),
            grad_clip: config.optimizer.grad_clip,
        };
        let taken =
            settings.step(&mut self.model, &mut self.optimizer, &batch, step, lr, self.state.loss_scale.as_mut())?;
        self.state.step += 1;
        self.state.tokens += taken.targets as u64;
        self.state.time_s = self.earlier_s + self.started.elapsed().as_secs_f64();
        let tokens_per_s = taken.targets as f64 / started.elapsed().as_secs_f64();
        Ok(Metrics {
            step: self.state.step,
            tokens: self.state.tokens,
            time_s: self.state.time_s,
            train_loss: taken.loss,
            lr,
            grad_norm: taken.norm,
            tokens_per_s,
            mfu: tokens_per_s * self.plan.train_flops_per_token / self.plan.matmul_flops_per_s,
            epoch: self.batches.epoch(self.state.step),
            ..Metrics::default()
        })
    }

    fn evaluate(&self, held: &Held) -> Result<Evaluation> {
        let evaluation = evaluate(&self.model, held, &self.byte_lengths, &self.workers, &self.device)?;
        if !evaluation.loss.is_finite() {
            return Err(Error::Diverged {
                step: self.state.step,
                what: "the held-out loss".into(),
                value: evaluation.loss,
            });
        }
        Ok(evaluation)
    }

    fn sample(&self, observe: &mut dyn FnMut(Event)) -> Result<()> {
        let section = &self.config.eval;
        let Some(tokenizer) = &self.data.tokenizer else { return Ok(()) };
        for prompt in &section.prompts {
            let ids = tokenizer.encode(prompt)?;
            let room = self.model.config.max_position_embeddings.saturating_sub(ids.len());
            let generate_config = GenerateConfig {
                max_new_tokens: section.sample_tokens.min(room),
                sampling: SamplingConfig {
                    temperature: section.temperature,
                    seed: self.config.run.seed,
                    ..SamplingConfig::default()
                },
                form: Form::Absorbed,
                eos: self.model.config.eos_token_id.clone(),
                ..GenerateConfig::default()
            };
            let device = self.device.clone().without_autodiff();
            let out = generate(&self.model, &ids, &generate_config, &device, &mut |_| ControlFlow::Continue(()))?;
            let text = tokenizer.decode(&out.ids)?;
            observe(Event::Sample { prompt, text: &text });
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
        let (names, values): (Vec<_>, Vec<_>) = self.model.parameters().into_iter().map(|p| (p.name, p.value)).unzip();
        if let Err((i, value)) = self.workers.together(|| global_norm(&values)) {
            let what = names.into_iter().nth(i).unwrap_or_default();
            return Err(Error::Diverged { step: self.state.step, what, value });
        }
        drop(values);
        self.state.kernels = chosen_kernels();
        let path = self.checkpoints.save(&self.model, self.data.tokenizer.as_ref(), &self.optimizer, &self.state)?;
        self.saved = Some(self.state.step);
        observe(Event::Saved { path: &path, best });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
