//! From logits to a token, on the host.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// How tokens are chosen. The filters apply in the order of transformers: repetition penalty, temperature, `top_k`, `top_p`,
/// `min_p`, each on what the one before has left.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the most probable token each time.
    pub temperature: f64,
    /// Keeps the k most probable tokens.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of most probable tokens whose mass reaches p (nucleus sampling, arXiv 1904.09751).
    pub top_p: Option<f64>,
    /// Keeps the tokens with at least this fraction of the largest probability (arXiv 2407.01082).
    pub min_p: Option<f64>,
    /// Divides positive logits and multiplies negative ones of tokens that have occurred (CTRL, arXiv 1909.05858 §4.1, with
    /// the sign rule of transformers: a logit always falls where the penalty exceeds 1). 1 changes nothing.
    pub repetition_penalty: f64,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for SamplingConfig {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first field out of range, its value and the range.
    pub fn check(&self) -> Result<()> {
        let rule = |ok: bool, field, value: f64, allowed| {
            if ok { Ok(()) } else { Err(Error::setting(field, &value, allowed)) }
        };
        let (t, r) = (self.temperature, self.repetition_penalty);
        rule(t.is_finite() && t >= 0.0, "temperature", t, "a finite number ≥ 0 (0 is greedy)")?;
        rule(r.is_finite() && r > 0.0, "repetition_penalty", r, "a finite number > 0 (1 is none)")?;
        if let Some(p) = self.top_p {
            rule(p > 0.0 && p <= 1.0, "top_p", p, "greater than 0 and at most 1")?;
        }
        if let Some(p) = self.min_p {
            rule((0.0..=1.0).contains(&p), "min_p", p, "between 0 and 1")?;
        }
        match self.top_k {
            Some(0) => Err(Error::setting("top_k", &0, "at least 1 (leave it out to keep all tokens)")),
            _ => Ok(()),
        }
    }
}

/// Chooses tokens; the same configuration, stream and logits give the same tokens on every machine.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplingConfig,
    random: ChaCha8Rng,
}

/// A token that may still be chosen.
#[derive(Clone, Copy)]
struct Candidate {
    token: usize,
    logit: f64,
    /// exp(logit − largest logit)
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of random stream `stream` of the seed. Rows of a batch take one stream each, so that equal prompts
    /// differ.
    ///
    /// # Errors
    /// As [`SamplingConfig::check`].
    pub fn new(config: &SamplingConfig, stream: u64) -> Result<Self> {
        config.check()?;
        let mut random = ChaCha8Rng::seed_from_u64(config.seed);
        random.set_stream(stream);
        Ok(Self { config: config.clone(), random })
    }

    /// Chooses the token after `history` (prompt and continuation, for the repetition penalty) from its logits.
    ///
    /// # Shapes
    /// `logits [vocab]`
    ///
    /// # Errors
    /// [`Error::Logit`] for a NaN or +∞, [`Error::NoCandidate`] where no logit is above −∞.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        if let Some((token, value)) = logits.iter().enumerate().find(|(_, x)| x.is_nan() || **x == f32::INFINITY) {
            return Err(Error::Logit { token, value: *value });
        }
        let penalised = self.penalised(logits, history);
        let mut best = Candidate { token: 0, logit: f64::NEG_INFINITY, weight: 1.0 };
        for (token, logit) in penalised.iter().copied().enumerate() {
            // Strictly greater: a tie goes to the lowest id.
            if logit > best.logit {
                best = Candidate { token, logit, weight: 1.0 };
            }
        }
        if best.logit == f64::NEG_INFINITY {
            return Err(Error::NoCandidate { vocab_size: logits.len() });
        }
        if self.config.temperature == 0.0 {
            return Ok(best.token as u32);
        }
        let candidates = self.candidates(&penalised, best);
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut left = self.random.random::<f64>() * total;
        for candidate in &candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.token as u32);
            }
        }
        // Rounding can leave a crumb of the mass behind the last candidate.
        Ok(best.token as u32)
    }

    fn penalised(&self, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut penalised: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
        let penalty = self.config.repetition_penalty;
        if penalty != 1.0 {
            // From the untouched logits, so that a token that occurred twice is penalised once.
            for token in history.iter().map(|token| *token as usize) {
                if let Some(logit) = logits.get(token).copied().map(f64::from) {
                    penalised[token] = if logit > 0.0 { logit / penalty } else { logit * penalty };
                }
            }
        }
        penalised
    }

    /// The tokens that pass the filters.
    fn candidates(&self, penalised: &[f64], best: Candidate) -> Vec<Candidate> {
        let SamplingConfig { temperature, top_k, top_p, min_p, .. } = self.config;
        let weight = |logit: f64| ((logit - best.logit) / temperature).exp();
        let mut candidates: Vec<Candidate> = penalised
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit > f64::NEG_INFINITY)
            .map(|(token, logit)| Candidate { token, logit: *logit, weight: weight(*logit) })
            .collect();
        // Most probable first; a tie goes to the lowest id, so that the order is one and the same everywhere.
        let order = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        if let Some(k) = top_k
            && k < candidates.len()
        {
            candidates.select_nth_unstable_by(k, order);
            candidates.truncate(k);
        }
        // A selection leaves its halves in an order that is an implementation detail; the draw needs a fixed one.
        if top_k.is_some() || top_p.is_some() {
            candidates.sort_unstable_by(order);
        }
        if let Some(p) = top_p {
            let enough = p * candidates.iter().map(|c| c.weight).sum::<f64>();
            let mut mass = 0.0;
            let kept = candidates.iter().take_while(|c| {
                let needed = mass < enough;
                mass += c.weight;
                needed
            });
            let kept = kept.count();
            candidates.truncate(kept);
        }
        if let Some(fraction) = min_p {
            candidates.retain(|c| c.weight >= fraction);
        }
        candidates
    }
}

#[cfg(test)]
mod tests;
