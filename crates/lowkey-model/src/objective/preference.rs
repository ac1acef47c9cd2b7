//! Preference optimisation: losses of a pair of answers from their log-probabilities, as plain numbers.
//!
//! Everything here is a function of four sums, those of the chosen and of the rejected answer under the model that is trained and under
//! a reference, and of the answers' lengths. A loss gives its slope with it: d loss / d log p(token), one number for all tokens of an
//! answer, which is the weight of the cross entropy whose gradient is that of the loss. So there is no kernel of its own for any of
//! them, and nothing of the size of a vocabulary is kept.
//!
//! Losses and names are TRL's: DPO (Rafailov et al., arXiv 2305.18290), hinge (SLiC, arXiv 2305.10425), IPO (arXiv 2310.12036), robust
//! DPO (arXiv 2403.00409), SimPO (arXiv 2405.14734), ORPO (arXiv 2403.07691), and weighted sums of them (MPO, arXiv 2411.10442).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::figures::Figures;

/// What is lost where the margin between two answers is too small. Δ is the log-probability of the chosen answer above that of the
/// rejected one, less the same of the reference; a bar denotes means over the tokens of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// DPO: −log σ(β Δ).
    Sigmoid,
    /// The same of means over tokens, so that long answers weigh no more than short ones: −log σ(β Δ̄).
    SigmoidNorm,
    /// IPO: (Δ̄ − 1/(2β))².
    Ipo,
    /// SLiC: max(0, 1 − β Δ).
    Hinge,
    /// DPO where a share `label_smoothing` of the pairs is the wrong way round; of those the loss is unbiased.
    Robust,
    /// SimPO: −log σ(β Δ̄ − γ) of the model alone, without a reference, and `cpo_alpha` times the mean loss on the chosen answer.
    Simpo,
    /// ORPO: the mean loss on the chosen answer, and β times −log σ of the log odds ratio. Without a reference.
    Orpo,
}

impl PreferenceLoss {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Sigmoid, Self::SigmoidNorm, Self::Ipo, Self::Hinge, Self::Robust, Self::Simpo, Self::Orpo];

    /// Whether it is held against a reference.
    pub fn needs_reference(self) -> bool {
        !matches!(self, Self::Simpo | Self::Orpo)
    }
}

/// A sum of losses of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// The losses with their weights.
    pub losses: Vec<(PreferenceLoss, f64)>,
    /// How strongly a margin counts, above 0.
    pub beta: f64,
    /// [`PreferenceLoss::Robust`]: the share of pairs taken to be the wrong way round, from 0 to below 1/2.
    pub label_smoothing: f64,
    /// [`PreferenceLoss::Simpo`]: the margin γ that is asked for.
    pub gamma: f64,
    /// [`PreferenceLoss::Simpo`]: factor on the mean loss on the chosen answer.
    pub cpo_alpha: f64,
}

/// An answer: the sum of its tokens' log-probabilities, their number, and the same sum under the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Under the model that is trained.
    pub log_p: f64,
    /// Under the reference; 0 where there is none.
    pub reference: f64,
    /// Number of tokens.
    pub tokens: usize,
}

/// A loss with its slopes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// The loss.
    pub loss: f64,
    /// d loss / d log p of each token of the chosen answer.
    pub chosen: f64,
    /// The same of the rejected answer.
    pub rejected: f64,
}

/// −log σ(x), and its slope −σ(−x); exact far from 0.
fn log_sigmoid_loss(x: f64) -> (f64, f64) {
    let small = (-x.abs()).exp();
    let loss = small.ln_1p() + (-x).max(0.0);
    let opposite = if x > 0.0 { small / (1.0 + small) } else { 1.0 / (1.0 + small) };
    (loss, -opposite)
}

/// log(1 − eˡ) of a log-probability, and the slope of l − log(1 − eˡ), which is 1 / (1 − eˡ).
///
/// A certainty has infinite odds: what is closer to it than f32 can tell is taken to be that close.
fn log_rest(l: f64) -> (f64, f64) {
    let l = l.min(-f64::from(f32::EPSILON));
    let rest = -l.exp_m1();
    let log = if l > -std::f64::consts::LN_2 { rest.ln() } else { (-l.exp()).ln_1p() };
    (log, 1.0 / rest)
}

impl Answer {
    fn length(self) -> f64 {
        self.tokens.max(1) as f64
    }

    /// Log-probability above the reference's.
    fn above(self) -> f64 {
        self.log_p - self.reference
    }

    /// Mean log-probability of a token.
    fn mean(self) -> f64 {
        self.log_p / self.length()
    }
}

impl Preference {
    /// Whether any of its losses is held against a reference.
    pub fn needs_reference(&self) -> bool {
        self.losses.iter().any(|(loss, _)| loss.needs_reference())
    }

    /// The loss of a pair.
    pub fn judge(&self, chosen: Answer, rejected: Answer) -> Judged {
        let mut sum = Judged::default();
        for (loss, weight) in &self.losses {
            let one = self.judge_by(*loss, chosen, rejected);
            sum.loss += weight * one.loss;
            sum.chosen += weight * one.chosen;
            sum.rejected += weight * one.rejected;
        }
        sum
    }

    fn judge_by(&self, loss: PreferenceLoss, chosen: Answer, rejected: Answer) -> Judged {
        let beta = self.beta;
        // Of a loss of the margin: both answers have its slope, the rejected one with the other sign.
        let of_sums = |(loss, slope): (f64, f64)| Judged { loss, chosen: slope, rejected: -slope };
        let of_means = |(loss, slope): (f64, f64)| Judged {
            loss,
            chosen: slope / chosen.length(),
            rejected: -slope / rejected.length(),
        };
        let margin = chosen.above() - rejected.above();
        let mean_margin = chosen.above() / chosen.length() - rejected.above() / rejected.length();
        let scaled = |(loss, slope): (f64, f64)| (loss, slope * beta);
        match loss {
            PreferenceLoss::Sigmoid => of_sums(scaled(log_sigmoid_loss(beta * margin))),
            PreferenceLoss::SigmoidNorm => of_means(scaled(log_sigmoid_loss(beta * mean_margin))),
            PreferenceLoss::Ipo => {
                let off = mean_margin - 0.5 / beta;
                of_means((off * off, 2.0 * off))
            }
            PreferenceLoss::Hinge => {
                let lacking = 1.0 - beta * margin;
                of_sums(if lacking > 0.0 { (lacking, -beta) } else { (0.0, 0.0) })
            }
            PreferenceLoss::Robust => {
                let wrong = self.label_smoothing;
                let (right_way, slope) = log_sigmoid_loss(beta * margin);
                let (other_way, other_slope) = log_sigmoid_loss(-beta * margin);
                let unbiased = |a: f64, b: f64| ((1.0 - wrong) * a - wrong * b) / (1.0 - 2.0 * wrong);
                of_sums(scaled((unbiased(right_way, other_way), unbiased(slope, -other_slope))))
            }
            PreferenceLoss::Simpo => {
                let own = chosen.mean() - rejected.mean();
                let mut judged = of_means(scaled(log_sigmoid_loss(beta * own - self.gamma)));
                judged.loss -= self.cpo_alpha * chosen.mean();
                judged.chosen -= self.cpo_alpha / chosen.length();
                judged
            }
            PreferenceLoss::Orpo => {
                let ((rest_chosen, slope_chosen), (rest_rejected, slope_rejected)) =
                    (log_rest(chosen.mean()), log_rest(rejected.mean()));
                let log_odds = chosen.mean() - rejected.mean() - (rest_chosen - rest_rejected);
                let (loss, slope) = log_sigmoid_loss(log_odds);
                Judged {
                    loss: beta * loss - chosen.mean(),
                    chosen: (beta * slope * slope_chosen - 1.0) / chosen.length(),
                    rejected: -beta * slope * slope_rejected / rejected.length(),
                }
            }
        }
    }

    /// What a dashboard shows of a pair.
    fn figures(&self, chosen: Answer, rejected: Answer, loss: f64) -> PairFigures {
        // As TRL: sums where there is a reference, means where there is none.
        let referenced = self.needs_reference();
        let log_p = |answer: Answer| if referenced { answer.log_p } else { answer.mean() };
        let reward = |answer: Answer| self.beta * if referenced { answer.above() } else { answer.mean() };
        let rewards = [reward(chosen), reward(rejected)];
        PairFigures {
            pairs: 1,
            loss,
            rewards,
            preferred: usize::from(rewards[0] > rewards[1]),
            log_p: [log_p(chosen), log_p(rejected)],
        }
    }

    /// Judges rows of which 2i is the chosen and 2i + 1 the rejected answer of a pair: the slope of the summed loss for each token of
    /// each row, and the figures of all pairs together. `sums` are the rows' log-probabilities, `reference` the reference's.
    pub fn judge_rows(&self, sums: &[f64], tokens: &[usize], reference: Option<&[f64]>) -> (Vec<f64>, PairFigures) {
        let answer = |row: usize| Answer {
            log_p: sums[row],
            reference: reference.and_then(|reference| reference.get(row)).copied().unwrap_or(0.0),
            tokens: tokens[row],
        };
        let (mut slopes, mut figures) = (vec![0.0; sums.len()], PairFigures::default());
        for (pair, slopes) in slopes.chunks_exact_mut(2).enumerate() {
            let (chosen, rejected) = (answer(2 * pair), answer(2 * pair + 1));
            let judged = self.judge(chosen, rejected);
            slopes.copy_from_slice(&[judged.chosen, judged.rejected]);
            figures.add(self.figures(chosen, rejected, judged.loss));
        }
        (slopes, figures)
    }
}

/// Sums over pairs of what a dashboard shows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairFigures {
    /// Number of pairs.
    pub pairs: usize,
    /// Their losses.
    pub loss: f64,
    /// β times the log-probability above the reference's, of the chosen and of the rejected answers.
    pub rewards: [f64; 2],
    /// Pairs whose chosen answer has the higher reward.
    pub preferred: usize,
    /// Log-probabilities of the chosen and of the rejected answers.
    pub log_p: [f64; 2],
}

impl PairFigures {
    /// Adds those of other pairs.
    pub fn add(&mut self, other: Self) {
        let sum = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
        *self = Self {
            pairs: self.pairs + other.pairs,
            loss: self.loss + other.loss,
            rewards: sum(self.rewards, other.rewards),
            preferred: self.preferred + other.preferred,
            log_p: sum(self.log_p, other.log_p),
        };
    }

    /// Mean loss of a pair.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.pairs.max(1) as f64
    }
}

/// By the names that TRL gives them.
impl From<PairFigures> for Figures {
    fn from(sums: PairFigures) -> Self {
        Self::default()
            .with("rewards/chosen", sums.rewards[0])
            .with("rewards/rejected", sums.rewards[1])
            .with("rewards/accuracies", sums.preferred as f64)
            .with_difference("rewards/margins", ["rewards/chosen", "rewards/rejected"])
            .with("logps/chosen", sums.log_p[0])
            .with("logps/rejected", sums.log_p[1])
    }
}

#[cfg(test)]
mod tests;
