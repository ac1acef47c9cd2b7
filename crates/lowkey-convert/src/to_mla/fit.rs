//! From a model with full keys and values to latents of a given width, in one go.

use burn::tensor::Device;
use lowkey_model::{CausalLm, ModelConfig};

use super::{Inputs, Keep, Narrowing, one_head, widths};
use crate::allocation::Curve;
use crate::cut::{Measured, Rotated, loss};
use crate::error::{Error, Result};
use crate::importance::Importance;
use crate::trim::trimmed;
use crate::{Observer, Progress};

/// How wide latents become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Each this wide.
    Rank(usize),
    /// All layers together cache so many numbers per token, rotated keys included: where a layer's loss falls fastest there are more.
    Budget(usize),
}

/// What is asked of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Width of the latents.
    pub width: Width,
    /// Numbers of the shared key that turn with its position. Absent: under a budget as many as lose least on the text, otherwise as
    /// many as one head had.
    pub rotated: Option<usize>,
    /// Which these are. Absent: of the strongest and as many of each frequency what loses less on the text.
    pub keep: Option<Keep>,
    /// So many neighbouring frequencies are taken for one, so that what turns can be chosen among the keys of all of them (TransMLA's
    /// FreqFold); 1 leaves each by itself.
    pub fold: usize,
    /// Whether the mean of keys and values goes from the latents into a bias of the output, which loses less.
    pub centred: bool,
    /// What decides which directions of a latent stay. Absent: of what readers see and of what latents make what loses less on the text.
    pub importance: Option<Importance>,
}

/// A model that was converted, and what it cost.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The model.
    pub model: CausalLm,
    /// What it was before its latents were cut.
    pub whole: CausalLm,
    /// Numbers of its shared key.
    pub rotated: usize,
    /// Numbers of each layer's latent.
    pub ranks: Vec<usize>,
    /// What has decided which directions of latents stay.
    pub importance: Importance,
    /// Loss on the calibration text before, nats per token.
    pub loss_before: f64,
    /// And after.
    pub loss_after: f64,
    /// Shared keys that were tried.
    pub tried: Vec<Tried>,
    /// What cutting each layer alone costs, where layers share a budget.
    pub curves: Vec<Curve>,
}

/// A shared key that was tried.
#[derive(Clone, Copy, Debug)]
pub struct Tried {
    /// Numbers that turn.
    pub rotated: usize,
    /// Which.
    pub keep: Keep,
    /// The loss with equal latents beside it.
    pub loss: f64,
}

/// Converts a model without norms on its heads.
///
/// # Errors
/// As [`narrowed`](super::narrowed); [`Error::Setting`] where a latent is to be wider than what there is to put into it, or a budget does
/// not reach.
pub fn fit(
    model: &CausalLm,
    wanted: Wanted,
    text: &[Vec<u32>],
    device: &Device,
    observe: Observer,
) -> Result<Converted> {
    check_budget(&model.config, wanted)?;
    let [most, _] = widths(&model.config)?;
    let layers = model.config.layers.len();
    let inputs = Inputs::measure(model, text, device, observe)?;
    let inputs = if wanted.centred { inputs } else { inputs.uncentred() };
    let loss_before = loss(model, text, device)?;
    let importances = wanted.importance.map_or(vec![Importance::Readers, Importance::Activations], |by| vec![by]);
    let mut ways: Vec<Way> = importances.into_iter().map(Way::new).collect();
    let candidates = match (wanted.rotated, wanted.width) {
        (Some(rotated), _) => vec![rotated],
        (None, Width::Rank(_)) => vec![one_head(&model.config)],
        (None, Width::Budget(budget)) => candidates(one_head(&model.config), most, budget / layers - 1),
    };
    let keeps = wanted.keep.map_or(vec![Keep::Energy, Keep::Uniform], |keep| vec![keep]);
    // Where all or none turn it is the same for each.
    let keeps = |rotated: usize| if (1..most).contains(&rotated) { &keeps[..] } else { &keeps[..1] };
    let candidates: Vec<(usize, Keep)> =
        candidates.iter().flat_map(|rotated| keeps(*rotated).iter().map(|keep| (*rotated, *keep))).collect();
    let narrowing = Narrowing::new(model, wanted.fold, &inputs)?;
    for (done, (rotated, keep)) in candidates.iter().copied().enumerate() {
        observe(Progress { doing: "rotated keys", done, of: candidates.len() });
        let latent = narrowing.narrowed(model, rotated, keep, device)?;
        let whole = latent.config.kv_ranks().into_iter().min().unwrap_or(0);
        let rank = match wanted.width {
            Width::Rank(rank) if rank == 0 || rank > whole => {
                let why = format!("with {rotated} numbers that turn there are {whole} for a latent to hold");
                return Err(Error::Setting { field: "kv_rank", value: rank.to_string(), why });
            }
            Width::Rank(rank) => rank,
            Width::Budget(budget) => (budget / layers).saturating_sub(rotated).min(whole),
        };
        let measured = Measured::of(&latent, text, device, observe)?;
        for way in &mut ways {
            let latents = measured.rotated(way.importance, device, observe)?;
            let cut = latents.cut(&vec![rank; layers], device)?;
            let loss = loss(&cut, text, device)?;
            way.tried.push(Tried { rotated, keep, loss });
            if way.best.as_ref().is_none_or(|best| loss < best.loss) {
                way.best = Some(Attempt { rotated, latents, cut, loss });
            }
        }
    }
    let mut best: Option<Converted> = None;
    for way in ways {
        let found = way.converted(wanted.width, loss_before, text, device, observe)?;
        if best.as_ref().is_none_or(|best| found.loss_after < best.loss_after) {
            best = Some(found);
        }
    }
    best.ok_or_else(none)
}

/// Refuses a budget that does not reach, or is none.
pub(super) fn check_budget(config: &ModelConfig, wanted: Wanted) -> Result<()> {
    let Width::Budget(budget) = wanted.width else { return Ok(()) };
    let (layers, cache) = (config.layers.len(), config.cache_numbers());
    let least = layers * (wanted.rotated.unwrap_or(0) + 1);
    let refuse = |why| Err(Error::Setting { field: "kv_rank_budget", value: budget.to_string(), why });
    if budget < least {
        let turns = wanted.rotated.map_or_else(String::new, |n| format!("{n} that turn and "));
        return refuse(format!("{layers} layers with {turns}at least 1 of a latent need {least} numbers per token"));
    }
    if budget > cache {
        return refuse(format!("the model caches {cache} numbers per token now"));
    }
    Ok(())
}

/// No way that was tried is one.
fn none() -> Error {
    Error::Text { why: "no width of the rotated key gave a loss that is a number".into() }
}

/// What was tried with directions in the order of one importance.
struct Way {
    importance: Importance,
    tried: Vec<Tried>,
    best: Option<Attempt>,
}

/// A shared key with equal latents beside it.
struct Attempt {
    rotated: usize,
    latents: Rotated,
    cut: CausalLm,
    loss: f64,
}

impl Way {
    fn new(importance: Importance) -> Self {
        Self { importance, tried: Vec::new(), best: None }
    }

    /// Its best attempt, with the budget shared among layers where that loses less.
    fn converted(
        self,
        width: Width,
        loss_before: f64,
        text: &[Vec<u32>],
        device: &Device,
        observe: Observer,
    ) -> Result<Converted> {
        let Self { importance, tried, best } = self;
        let Attempt { rotated, latents, cut, loss } = best.ok_or_else(none)?;
        let (cut, loss_after, curves) = match width {
            Width::Rank(_) => (cut, loss, Vec::new()),
            Width::Budget(budget) => {
                let full = latents.model.config.kv_ranks();
                let left = (budget - full.len() * rotated).min(full.iter().sum());
                let filled = latents.cut_to(left, text, device, observe)?;
                // What is best layer by layer need not be best together.
                if filled.loss_after < loss {
                    (filled.model, filled.loss_after, filled.curves)
                } else {
                    (cut, loss, filled.curves)
                }
            }
        };
        let model = trimmed(&cut, device)?;
        let ranks = model.config.kv_ranks();
        Ok(Converted {
            whole: latents.model,
            rotated,
            ranks,
            importance,
            model,
            loss_before,
            loss_after,
            tried,
            curves,
        })
    }
}

/// Even widths from 0 to `most`: parts and multiples of the `head` numbers that turn in one head, and `all` of them where that many are
/// to be had.
fn candidates(head: usize, all: usize, most: usize) -> Vec<usize> {
    let quarters = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32].map(|quarters| head * quarters / 4 / 2 * 2);
    let mut widths: Vec<usize> = quarters.into_iter().chain([all]).filter(|width| *width <= most.min(all)).collect();
    widths.sort_unstable();
    widths.dedup();
    widths
}
