//! The rules that a run file's values must keep.

use super::{OptimizerKind, RunConfig, SchedulerKind, SchedulerSection, default_distillation, default_elastic_start};
use crate::error::{Error, Result};

impl RunConfig {
    /// Refuses values that no run can be made from.
    pub(super) fn check(&self) -> Result<()> {
        let name = &self.run.name;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || !name.chars().all(plain) || name.starts_with('.') {
            return Err(Error::config("run.name", name, "must be a folder name of letters, digits, '-', '_' and '.'"));
        }
        let devices = self.run.devices.len();
        if devices > 0 && self.run.device != "auto" {
            return Err(Error::config("run.device", &self.run.device, "run.devices is set too; keep one of them"));
        }
        if devices > 0 && !self.training.batch_size.is_multiple_of(devices) {
            let why = format!("must be a multiple of {devices}, the number of run.devices: each has as many rows");
            return Err(Error::config("training.batch_size", self.training.batch_size, why));
        }
        self.check_source()?;
        at_least_one("data.seq_len", self.data.seq_len, 1 << 20)?;
        self.init.as_ref().map_or(Ok(()), |init| init.check(self.data.seq_len))?;
        if self.model.is_none() && self.init.is_none() {
            return Err(Error::config(
                "model",
                "(absent)",
                "write a [model] section, or [init] from = a model directory",
            ));
        }
        if self.training.steps == 0 || self.training.steps > 1 << 40 {
            let why = format!("must lie between 1 and {}", 1u64 << 40);
            return Err(Error::config("training.steps", self.training.steps, why));
        }
        at_least_one("training.batch_size", self.training.batch_size, 1 << 20)?;
        // The tokens of a step lie in memory together; the largest published runs take a little less.
        at_least_one("training.batch_size · data.seq_len", self.training.batch_size * self.data.seq_len, 1 << 26)?;
        if let Some(micro) = self.training.micro_batch_size {
            at_least_one("training.micro_batch_size", micro, 1 << 20)?;
        }
        if let Some(threads) = self.training.threads {
            at_least_one("training.threads", threads, 1024)?;
        }
        if !(0.0..=1.0).contains(&self.training.z_loss) {
            return Err(Error::config(
                "training.z_loss",
                self.training.z_loss,
                "must lie between 0 and 1 (usual: 1e-4)",
            ));
        }
        if let Some(alpha) = self.training.neftune_noise_alpha
            && !(alpha.is_finite() && alpha > 0.0)
        {
            let why = "must be a finite number > 0; leave it out for no noise";
            return Err(Error::config("training.neftune_noise_alpha", alpha, why));
        }
        if let Some(decay) = self.training.ema_decay
            && !(decay > 0.0 && decay < 1.0)
        {
            let why = "must lie in 0 < decay < 1; leave it out for no average";
            return Err(Error::config("training.ema_decay", decay, why));
        }
        self.trainable()?;
        self.check_adapter()?;
        fraction("training.distillation", self.training.distillation)?;
        fraction("training.elastic_start", self.training.elastic_start)?;
        self.check_objective()?;
        self.check_optimizer()?;
        let s = &self.lr_scheduler;
        fraction("lr_scheduler.decay_fraction", s.decay_fraction)?;
        fraction("lr_scheduler.min_lr_ratio", s.min_lr_ratio)?;
        if s.warmup_steps > self.training.steps {
            let steps = self.training.steps;
            let why = format!(
                "must not exceed training.steps = {steps}; lower it, as with --set lr_scheduler.warmup_steps={}",
                steps / 10
            );
            return Err(Error::config("lr_scheduler.warmup_steps", s.warmup_steps, why));
        }
        let mut from = 0;
        for plan in &self.history {
            if plan.until <= from || plan.steps == 0 {
                let why = format!("entries of [[history]] rise, and each has steps; this one must be above {from}");
                return Err(Error::config("history.until", plan.until, why));
            }
            from = plan.until;
        }
        if from > self.training.steps {
            let why = format!("the history of this run has {from} steps already; make it at least that");
            return Err(Error::config("training.steps", self.training.steps, why));
        }
        at_least_one("eval.batches", self.eval.batches, usize::MAX)?;
        match (self.eval.patience, self.eval.every) {
            (Some(0), _) => {
                return Err(Error::config("eval.patience", 0, "must be at least 1; leave it out to take all steps"));
            }
            (Some(patience), 0) => {
                let why =
                    "nothing is measured before the end; write eval.every, the steps from one evaluation to the next";
                return Err(Error::config("eval.patience", patience, why));
            }
            _ => {}
        }
        at_least_one("eval.sample_tokens", self.eval.sample_tokens, 1 << 20)?;
        if !(self.eval.temperature.is_finite() && self.eval.temperature >= 0.0) {
            return Err(Error::config("eval.temperature", self.eval.temperature, "must be a finite number ≥ 0"));
        }
        at_least_one("checkpoint.keep", self.checkpoint.keep, usize::MAX)?;
        at_least_one("ranks.patience_s", self.ranks.patience_s as usize, 86_400)?;
        if self.ranks.zero > 1 {
            let why = "must be 0 or 1; gradients and weights are not divided";
            return Err(Error::config("ranks.zero", self.ranks.zero, why));
        }
        if self.metrics.every == 0 {
            return Err(Error::config("metrics.every", 0, "must be at least 1"));
        }
        Ok(())
    }

    /// Keys that were set and change nothing, each with the reason; `elastic`: the model is read at narrower ranks, too. They are no
    /// errors, so that one line turns one run into another.
    pub(crate) fn without_effect(&self, elastic: bool) -> Vec<String> {
        let (training, scheduler, usual) = (&self.training, &self.lr_scheduler, SchedulerSection::default());
        let (constant, wsd) = (scheduler.kind == SchedulerKind::Constant, scheduler.kind == SchedulerKind::Wsd);
        let keys = [
            (
                !constant,
                "lr_scheduler.min_lr_ratio",
                [scheduler.min_lr_ratio, usual.min_lr_ratio],
                "lr_scheduler.kind = \"constant\" does not fall",
            ),
            (
                wsd,
                "lr_scheduler.decay_fraction",
                [scheduler.decay_fraction, usual.decay_fraction],
                "it is for lr_scheduler.kind = \"wsd\" alone",
            ),
            (
                elastic,
                "training.distillation",
                [training.distillation, default_distillation()],
                "the model has no elastic ranks",
            ),
            (
                elastic,
                "training.elastic_start",
                [training.elastic_start, default_elastic_start()],
                "the model has no elastic ranks",
            ),
        ];
        let unused = keys.into_iter().filter(|(used, _, [found, usual], _)| !used && found != usual);
        unused.map(|(_, key, [found, _], why)| format!("{key} = {found} has no effect: {why}")).collect()
    }

    /// Refuses none and several ways to say what is trained on.
    fn check_source(&self) -> Result<()> {
        let data = &self.data;
        match (&data.dataset, &data.path, data.mixture.is_empty()) {
            (Some(_), Some(path), _) => {
                return Err(Error::config("data.path", path.display(), "data.dataset is set too; keep one of them"));
            }
            (Some(_), _, false) | (_, Some(_), false) => {
                let why = "data.dataset or data.path is set too; keep one of them";
                return Err(Error::config("data.mixture", format!("{} datasets", data.mixture.len()), why));
            }
            (None, None, true) => {
                let why = "set it to a dataset file, or data.path to a text file";
                return Err(Error::config("data.dataset", "(absent)", why));
            }
            _ => {}
        }
        for part in &data.mixture {
            if !(part.weight.is_finite() && part.weight > 0.0) {
                return Err(Error::config("data.mixture.weight", part.weight, "must be a finite number > 0"));
            }
        }
        Ok(())
    }

    fn check_optimizer(&self) -> Result<()> {
        let o = &self.optimizer;
        if !(o.lr.is_finite() && o.lr > 0.0) {
            return Err(Error::config("optimizer.lr", o.lr, "must be a finite number > 0"));
        }
        for beta in o.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::config("optimizer.betas", beta, "each must lie in 0 ≤ β < 1"));
            }
        }
        match (o.kind, o.momentum) {
            (OptimizerKind::AdamW, Some(momentum)) => {
                let why =
                    "kind = \"adamw\" has none (its betas are two of them); leave it out, or write kind = \"muon\"";
                return Err(Error::config("optimizer.momentum", momentum, why));
            }
            (OptimizerKind::Muon, Some(momentum)) if !(0.0..1.0).contains(&momentum) => {
                return Err(Error::config("optimizer.momentum", momentum, "must lie in 0 ≤ μ < 1"));
            }
            _ => {}
        }
        if !(o.eps.is_finite() && o.eps > 0.0) {
            return Err(Error::config("optimizer.eps", o.eps, "must be a finite number > 0"));
        }
        if !(o.weight_decay.is_finite() && o.weight_decay >= 0.0) {
            return Err(Error::config("optimizer.weight_decay", o.weight_decay, "must be a finite number ≥ 0"));
        }
        if let Some(decay) = o.layer_lr_decay
            && !(decay > 0.0 && decay <= 1.0)
        {
            let why = "must lie in 0 < decay ≤ 1; leave it out for one rate for all";
            return Err(Error::config("optimizer.layer_lr_decay", decay, why));
        }
        if let Some(ratio) = o.loraplus_lr_ratio
            && !(ratio.is_finite() && ratio > 0.0)
        {
            let why = "must be a finite number > 0; leave it out for one rate for both factors";
            return Err(Error::config("optimizer.loraplus_lr_ratio", ratio, why));
        }
        if let Some(clip) = o.grad_clip
            && !(clip.is_finite() && clip > 0.0)
        {
            return Err(Error::config(
                "optimizer.grad_clip",
                clip,
                "must be a finite number > 0; leave it out for none",
            ));
        }
        Ok(())
    }
}

/// Refuses 0 and what is above `most`.
pub(crate) fn at_least_one(key: &'static str, value: usize, most: usize) -> Result<()> {
    if value == 0 || value > most {
        let why =
            if most == usize::MAX { "must be at least 1".into() } else { format!("must lie between 1 and {most}") };
        return Err(Error::config(key, value, why));
    }
    Ok(())
}

pub(super) fn fraction(key: &'static str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(key, value, "must lie between 0 and 1"))
}
