//! Whole optimiser steps.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use lowkey_batch::Batch;
use lowkey_kernels::Precision;
use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{
    CausalLm, Parameter, Recompute,
    adapter::{AdapterConfig, Modules},
    cost::Training,
    objective::Term,
    tensor::TensorSpec,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Serialize};

use super::machine::{Spread, below_ceiling, peak_rss_mb, thousandths};
use super::shapes::Shape;
use super::{MOST_ROUNDS, Observer, Progress};
use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer::Optimizer;
use crate::run_config::{OptimizerKind, OptimizerSection, at_least_one, flops_beside};
use crate::setup::{check_bytes, check_precision};
use crate::step::{StepSettings, StepTaken};
use crate::workers::{PassSettings, Workers};
use crate::world::{Replica, World};

/// Seed of weights and tokens.
const SEED: u64 = 1;

/// What to measure.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Name of a [`Shape`].
    pub shape: String,
    /// Sequences per step; absent: the shape's.
    pub batch: Option<usize>,
    /// Tokens per sequence; absent: the shape's.
    pub seq: Option<usize>,
    /// Threads; absent: one per core.
    pub threads: Option<usize>,
    /// Steps that are timed.
    pub steps: usize,
    /// Steps before them.
    pub warmup: usize,
    /// Name of an [`OptimizerKind`], as in a run file.
    pub optimizer: String,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Name of the device, as in a run file.
    pub device: String,
    /// What products are computed in, on a GPU.
    pub dtype: Precision,
    /// Width of the adapters, which alone are trained; absent: the whole model is.
    pub lora_rank: Option<usize>,
    /// Ends of the names of the maps that have them; none: all.
    pub lora_modules: Vec<String>,
    /// How the frozen matrices beside adapters are packed; absent: they are f32.
    pub quantization: Option<Quantization>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            shape: "d256".into(),
            batch: None,
            seq: None,
            threads: None,
            steps: 20,
            warmup: 5,
            optimizer: "adamw".into(),
            recompute: Recompute::None,
            device: "cpu".into(),
            dtype: Precision::F32,
            lora_rank: None,
            lora_modules: Vec::new(),
            quantization: None,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct TrainFigures {
    /// `train`
    pub what: &'static str,
    /// Name of the shape.
    pub shape: &'static str,
    /// Sequences per step.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Threads.
    pub threads: usize,
    /// Name of the optimiser.
    pub optimizer: String,
    /// What the backward pass computed again.
    pub recompute: Recompute,
    /// Name of the device.
    pub device: String,
    /// What products were computed in.
    pub dtype: Precision,
    /// Width of the adapters that alone were trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<usize>,
    /// Ends of the names of the maps that had them; none: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora_modules: Vec<String>,
    /// How the frozen matrices beside them were packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Steps before the timed ones.
    pub warmup: usize,
    /// What those took together, with compiling kernels and finding the fastest.
    pub warm_up_s: f64,
    /// Timed steps.
    pub steps: usize,
    /// Parameters.
    pub params: usize,
    /// Loss of the first step, nats per token, before any training.
    pub loss_first: f64,
    /// Loss of the last step.
    pub loss_last: f64,
    /// Median time of a step.
    pub step_ms: f64,
    /// The shortest.
    pub step_ms_min: f64,
    /// The longest.
    pub step_ms_max: f64,
    /// Tokens per second of the median step.
    pub tokens_per_s: f64,
    /// Of the longest step.
    pub tokens_per_s_min: f64,
    /// Of the shortest step.
    pub tokens_per_s_max: f64,
    /// Operations per token, see [`lowkey_model::ModelConfig::causal_pass_flops_per_token`]; beside adapters without the gradients of frozen
    /// matrices, and with those of the adapters.
    pub flops_per_token: f64,
    /// Their product: operations of the model per second.
    pub model_flops_per_s: f64,
    /// Rate of plain matrix products on as many threads, operations per second.
    pub matmul_flops_per_s: f64,
    /// `model_flops_per_s / matmul_flops_per_s`.
    pub mfu: f64,
    /// Largest resident memory of the process, MiB; absent where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_mb: Option<f64>,
    /// Memory that was taken from the GPU and is kept for further steps, MiB; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_mb: Option<f64>,
}

/// A model in training on random tokens.
pub(super) struct Session {
    pub(super) shape: Shape,
    pub(super) batch: usize,
    pub(super) seq: usize,
    pub(super) threads: usize,
    pub(super) optimizer_section: OptimizerSection,
    pub(super) world: World,
    pub(super) recompute: Recompute,
    pub(super) precision: Precision,
    loss_scale: Option<LossScale>,
    random: ChaCha8Rng,
    steps: u64,
}

impl Session {
    /// Checks the options and builds the model.
    pub(super) fn new(options: &TrainOptions) -> Result<Self> {
        let shape = Shape::named(&options.shape)?;
        let (batch, seq) = (options.batch.unwrap_or(shape.batch), options.seq.unwrap_or(shape.seq));
        super::check_tokens(batch, "seq", seq)?;
        let threads = super::threads(options.threads)?;
        at_least_one("steps", options.steps, MOST_ROUNDS)?;
        if options.warmup > MOST_ROUNDS {
            return Err(Error::config("warmup", options.warmup, format!("must be at most {MOST_ROUNDS}")));
        }
        let kind = OptimizerKind::deserialize(options.optimizer.as_str().into_deserializer())
            .map_err(|e: serde::de::value::Error| Error::config("optimizer", &options.optimizer, e.to_string()))?;
        let config = shape.config(seq)?;
        let device = crate::setup::device(&options.device)?;
        check_precision(options.dtype, false, &device)?;
        let recompute = options.recompute;
        let training = Training { micro_batch: batch, seq, threads, recompute, terms: 1, ..Training::default() };
        check_bytes("training", config.train_bytes(training), "the shape, the batch or the length", &config)?;
        let device = device.autodiff();
        let quantization = options.quantization;
        let model = match options.lora_rank {
            Some(r) => {
                at_least_one("lora_rank", r, config.hidden_size)?;
                let all = AdapterConfig::all_linear(r);
                let target_modules = match &options.lora_modules[..] {
                    [] => all.target_modules.clone(),
                    some => Modules::Ends(some.to_vec()),
                };
                let adapter = AdapterConfig { quantization, target_modules, ..all };
                CausalLm::init_adapted(&config, &adapter, SEED, &device)?
            }
            None => match quantization {
                Some(packed) => {
                    let why = "is of frozen matrices beside adapters: give lora_rank, too";
                    return Err(Error::config("quantization", packed.name(), why));
                }
                None => CausalLm::init(&config, SEED, &device),
            },
        };
        let optimizer_section = OptimizerSection {
            kind,
            lr: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: Some(1.0),
            layer_lr_decay: None,
            loraplus_lr_ratio: None,
            momentum: None,
        };
        let optimizer = Optimizer::new(&optimizer_section, &model.trained_parameters(), Parameter::is_matrix);
        let (workers, random) = (Workers::for_device(threads, batch, &device)?, ChaCha8Rng::seed_from_u64(SEED));
        Ok(Self {
            shape,
            batch,
            seq,
            threads,
            optimizer_section,
            world: World::new(Replica { device, model, optimizer, workers, gate: None, other: None }, Vec::new()),
            recompute: options.recompute,
            precision: options.dtype,
            loss_scale: (options.dtype == Precision::F16).then(LossScale::default),
            random,
            steps: 0,
        })
    }

    /// The only replica.
    pub(super) fn replica(&self) -> &Replica {
        self.world.main()
    }

    /// The next step's tokens.
    pub(super) fn batch(&mut self) -> Batch {
        random_batch(&mut self.random, self.batch, self.seq, self.shape.vocab)
    }

    /// One step as `lowkey train` takes it.
    pub(super) fn step(&mut self, batch: &Batch) -> Result<StepTaken> {
        let settings = StepSettings {
            passes: PassSettings {
                micro_batch: self.batch,
                recompute: self.recompute,
                terms: &[Term::NEXT],
                precision: self.precision,
                loss_scale: 1.0,
                seed: 0,
                step: 0,
                noise: None,
                other: None,
            },
            grad_clip: self.optimizer_section.grad_clip,
        };
        let lr = self.optimizer_section.lr;
        let taken = settings.step(&mut self.world, batch, self.steps, lr, self.loss_scale.as_mut())?;
        self.steps += 1;
        Ok(taken)
    }

    /// Losses and times of so many steps, on new tokens that are made before the clock starts.
    ///
    /// On a GPU the next step is queued before the last one is waited for, and a step's time is that since the one before it was over:
    /// the first one's is then that of a step and of all that was not ready.
    pub(super) fn run(&mut self, count: usize, mut tell: impl FnMut(usize)) -> Result<(Vec<f64>, Vec<Duration>)> {
        let (mut losses, mut times) = (Vec::new(), Vec::new());
        let mut queued = VecDeque::new();
        let mut started = Instant::now();
        for done in 0..count {
            tell(done);
            let batch = self.batch();
            if queued.is_empty() {
                started = Instant::now();
            }
            let taken = self.step(&batch)?;
            let behind = usize::from(!taken.is_known() && done + 1 < count);
            queued.push_back(taken);
            while queued.len() > behind {
                let Some(taken) = queued.pop_front() else { break };
                losses.push(taken.wait(&self.replica().model)?.loss);
                times.push(started.elapsed());
                started = Instant::now();
            }
        }
        Ok((losses, times))
    }
}

/// Rows of random tokens in which every second one repeats the one before it: half of the targets can be learnt, so that a
/// loss that does not fall means that nothing was trained.
pub(super) fn random_batch(random: &mut ChaCha8Rng, rows: usize, seq_len: usize, vocab: usize) -> Batch {
    let (mut input_ids, mut targets) = (Vec::with_capacity(rows * seq_len), Vec::with_capacity(rows * seq_len));
    for _ in 0..rows {
        let mut tokens: Vec<u32> = (0..=seq_len).map(|_| random.random_range(0..vocab as u32)).collect();
        for pair in tokens.chunks_exact_mut(2) {
            pair[1] = pair[0];
        }
        input_ids.extend(&tokens[..seq_len]);
        targets.extend(tokens[1..].iter().map(|token| i64::from(*token)));
    }
    Batch { rows, seq_len, input_ids, targets, document_starts: vec![0; rows * seq_len], ..Batch::default() }
}

/// Times whole optimiser steps.
///
/// # Errors
/// [`Error::Config`] for options out of range, [`Error::Memory`] for a model that this machine cannot hold.
pub fn train(options: &TrainOptions, observe: Observer) -> Result<TrainFigures> {
    let mut session = Session::new(options)?;
    let (threads, device) = (session.threads, session.replica().device.clone());
    let of = options.warmup + options.steps;
    let mut observe = |done| observe(Progress { doing: "steps", done, of });
    let ((warm_up_s, times, losses, peak_rss_mb), ceiling) = below_ceiling(threads, &device, options.dtype, || {
        let started = Instant::now();
        let (mut losses, _) = session.run(options.warmup, &mut observe)?;
        session.world.finish()?;
        let warm_up_s = started.elapsed().as_secs_f64();
        let (more, times) = session.run(options.steps, |done| observe(options.warmup + done))?;
        losses.extend(more);
        Ok((warm_up_s, times, losses, peak_rss_mb()))
    })?;
    let Spread { median, min, max } = Spread::milliseconds(&times);
    let (batch, seq, model) = (session.batch, session.seq, &session.replica().model);
    let config = &model.config;
    let adapters = model.adapter().map(|keys| keys.plan(config)).transpose()?;
    let trained = |spec: &TensorSpec| adapters.as_ref().is_none_or(|plan| plan.trains(spec));
    let rate = |ms: f64| (batch * seq) as f64 / ms * 1e3;
    let flops_per_token = config.causal_pass_flops_per_token(seq) + flops_beside(config, trained, adapters.as_ref());
    let model_flops_per_s = rate(median) * flops_per_token;
    Ok(TrainFigures {
        what: "train",
        shape: session.shape.name,
        batch,
        seq,
        threads,
        optimizer: options.optimizer.clone(),
        recompute: options.recompute,
        device: options.device.clone(),
        dtype: options.dtype,
        lora_rank: options.lora_rank,
        lora_modules: options.lora_modules.clone(),
        quantization: options.quantization,
        warmup: options.warmup,
        warm_up_s: thousandths(warm_up_s),
        steps: options.steps,
        params: config.parameter_count().total,
        loss_first: losses.first().copied().unwrap_or(0.0),
        loss_last: losses.last().copied().unwrap_or(0.0),
        step_ms: thousandths(median),
        step_ms_min: thousandths(min),
        step_ms_max: thousandths(max),
        tokens_per_s: thousandths(rate(median)),
        tokens_per_s_min: thousandths(rate(max)),
        tokens_per_s_max: thousandths(rate(min)),
        flops_per_token,
        model_flops_per_s,
        matmul_flops_per_s: ceiling,
        mfu: model_flops_per_s / ceiling,
        peak_rss_mb,
        gpu_mb: device.memory_pool_usage().map(|usage| (usage.bytes_reserved as f64 / f64::from(1 << 20)).round()),
    })
}
