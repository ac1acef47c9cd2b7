//! A conversion that holds one layer at a time: for models that do not fit into memory, which nobody can try things on either.

use std::ops::Range;

use burn::tensor::Device;
use lowkey_model::attention::GroupedConfig;
use lowkey_model::checkpoint::{LayerReader, NewCheckpoint};
use lowkey_model::{CausalLm, ModelConfig};

use super::absorb::absorb_in_layer;
use super::build::Common;
use super::fit::{Wanted, Width, check_budget};
use super::stages::{Loss, Stage, Texts};
use super::turning::bands;
use super::{Inputs, Keep, Narrowing, counts, exact_padded, one_head, sizes_of};
use crate::allocation::{Curve, allocate};
use crate::cut::Measured;
use crate::error::{Error, Result};
use crate::importance::Importance;
use crate::matrix::check_finite;
use crate::moments::check_text;
use crate::stream::Stream;
use crate::trim::trimmed_to;
use crate::{Observer, Progress};

/// A model that was converted layer by layer.
#[derive(Clone, Debug)]
pub struct ByLayer {
    /// Its configuration; its weights are in the checkpoint.
    pub config: ModelConfig,
    /// Numbers of its shared key.
    pub rotated: usize,
    /// Numbers of each layer's latent.
    pub ranks: Vec<usize>,
    /// What each step has cost, the model that was given first.
    pub stages: Vec<Loss>,
    /// Largest difference of a logit between first and last stage over the first sequence, and the largest logit.
    pub apart: [f32; 2],
    /// Where layers share a budget: of each the share of what its readers see that a latent of each width leaves out.
    pub curves: Vec<Curve>,
}

/// Converts the layers of `reader` one by one into `new`, which the caller commits. Without `wanted` the model is the same; with it
/// nothing is tried: [`Wanted::rotated`] is as many numbers as turn in one head, [`Wanted::keep`] is [`Keep::Energy`] and
/// [`Wanted::importance`] is [`Importance::Readers`] where they are absent, and a budget is shared out by what readers lose of each
/// layer's latents, as of CARE's spectra, and not by losses. Moments are those that [`fit`](super::fit()) takes, so that what it is told
/// to do comes to the same.
///
/// The text goes through the layers as they were, as they are with fewer turning keys, and as they are with cut latents: three times the
/// products of a forward pass. Where [`Keep::Energy`] has to choose it goes through all layers once more before, and for a budget
/// another time.
///
/// # Errors
/// As [`exact`](super::exact) and [`fit`](super::fit()); [`Error::Model`] where a layer cannot be read or written.
pub fn by_layer(
    reader: &LayerReader,
    wanted: Option<Wanted>,
    texts: Texts,
    new: &mut NewCheckpoint,
    device: &Device,
    observe: Observer,
) -> Result<ByLayer> {
    let work = Work::new(reader, wanted, texts, device)?;
    let counts = work.counts(observe)?;
    let (ranks, curves) = work.ranks(&counts, observe)?;
    work.write(&counts, &ranks, curves, new, observe)
}

/// What does not change from layer to layer.
struct Work<'a> {
    reader: &'a LayerReader,
    ends: CausalLm,
    texts: Texts<'a>,
    narrow: Option<Narrow>,
    device: &'a Device,
}

/// What is asked of a narrower model, nothing left open.
#[derive(Clone, Copy)]
struct Narrow {
    width: Width,
    rotated: usize,
    keep: Keep,
    fold: usize,
    centred: bool,
    importance: Importance,
}

/// A text in a model as it was, and without norms on its heads.
#[derive(Clone)]
struct Sources {
    source: Stream,
    plain: Stream,
}

impl Sources {
    fn begin(ends: &CausalLm, text: &[Vec<u32>], device: &Device) -> Self {
        let source = Stream::begin(ends, text, device);
        Self { plain: source.clone(), source }
    }

    /// Through one layer, once where both are the same.
    fn pass(&mut self, source: &CausalLm, plain: &CausalLm, device: &Device) {
        self.source.pass(source, block(source), device);
        if source.config.attention() == plain.config.attention() {
            self.plain = self.source.clone();
        } else {
            self.plain.pass(plain, block(plain), device);
        }
    }
}

/// A text in all forms of a model.
struct Streams {
    before: Sources,
    narrowed: Stream,
    made: Stream,
}

impl Streams {
    fn begin(ends: &CausalLm, text: &[Vec<u32>], device: &Device) -> Self {
        let before = Sources::begin(ends, text, device);
        Self { narrowed: before.source.clone(), made: before.source.clone(), before }
    }

    /// Through one layer in each form; forms that are the same are computed once.
    fn pass(&mut self, [source, plain, narrowed, made]: [&CausalLm; 4], narrowing: bool, device: &Device) {
        self.made.pass(made, block(made), device);
        self.before.pass(source, plain, device);
        if narrowing {
            self.narrowed.pass(narrowed, block(narrowed), device);
        }
    }
}

impl<'a> Work<'a> {
    fn new(reader: &'a LayerReader, wanted: Option<Wanted>, texts: Texts<'a>, device: &'a Device) -> Result<Self> {
        let config = reader.config();
        let grouped = sizes_of(config)?;
        if let (None, true) = (wanted, grouped.qk_norm) {
            return Err(super::normed());
        }
        let narrow = wanted.map(|wanted| Narrow {
            width: wanted.width,
            rotated: wanted.rotated.unwrap_or_else(|| one_head(config)),
            keep: wanted.keep.unwrap_or(Keep::Energy),
            fold: wanted.fold,
            centred: wanted.centred,
            importance: wanted.importance.unwrap_or_default(),
        });
        if let (Some(wanted), Some(narrow)) = (wanted, narrow) {
            check_budget(config, Wanted { rotated: Some(narrow.rotated), ..wanted })?;
            counts(&grouped, &no_costs(&grouped, narrow), narrow.rotated, narrow.keep)?;
        }
        let ends = reader.ends(device)?;
        check_text(&ends, texts.train)?;
        if !texts.held_out.is_empty() {
            check_text(&ends, texts.held_out)?;
        }
        Ok(Self { reader, ends, texts, narrow, device })
    }

    /// Layer `layer` as a model of its own.
    fn layer(&self, layer: usize) -> Result<CausalLm> {
        let model = self.reader.layer(layer, self.device)?;
        check_finite(&model).map_err(|e| in_layer(e, layer))?;
        Ok(model)
    }

    fn layers(&self) -> usize {
        self.reader.config().layers.len()
    }

    /// A layer without norms on its heads; itself where it has none.
    fn plain(&self, source: &CausalLm, stream: &Stream, layer: usize) -> Result<CausalLm> {
        absorb_in_layer(source, stream, self.device).map_err(|e| in_layer(e, layer))
    }

    fn inputs(&self, plain: &CausalLm, stream: &Stream, narrow: Narrow, layer: usize) -> Result<Inputs> {
        let inputs = Inputs::of_layer(block(plain), stream, self.texts.train).map_err(|e| in_layer(e, layer))?;
        Ok(if narrow.centred { inputs } else { inputs.uncentred() })
    }

    /// How many directions of each band go on turning in all layers.
    fn counts(&self, observe: Observer) -> Result<Vec<usize>> {
        let config = self.reader.config();
        let grouped = sizes_of(config)?;
        let Some(narrow) = self.narrow else { return Ok(Vec::new()) };
        let mut costs = no_costs(&grouped, narrow);
        let most = grouped.num_key_value_heads * grouped.rotary_dim;
        if narrow.keep == Keep::Energy && (1..most).contains(&narrow.rotated) {
            let mut text = Sources::begin(&self.ends, self.texts.train, self.device);
            for layer in 0..self.layers() {
                observe(Progress { doing: "energies", done: layer, of: self.layers() });
                let source = self.layer(layer)?;
                let plain = self.plain(&source, &text.source, layer)?;
                let inputs = self.inputs(&plain, &text.plain, narrow, layer)?;
                let found = Narrowing::new(&plain, narrow.fold, &inputs).map_err(|e| in_layer(e, layer))?;
                for (cost, more) in costs.iter_mut().zip(&found.costs) {
                    cost.iter_mut().zip(more).for_each(|(cost, more)| *cost += more);
                }
                text.pass(&source, &plain, self.device);
            }
        }
        counts(&grouped, &costs, narrow.rotated, narrow.keep)
    }

    /// What layer `layer` becomes with so many turning keys, before its latent is cut.
    fn narrowed(
        &self,
        plain: &CausalLm,
        counts: &[usize],
        stream: &Stream,
        narrow: Narrow,
        (layer, rank): (usize, usize),
    ) -> Result<CausalLm> {
        let inputs = self.inputs(plain, stream, narrow, layer)?;
        let biases = sizes_of(&plain.config)?;
        let common = Common {
            rank,
            attention_bias: narrow.centred || biases.qkv_bias || biases.o_bias,
            query_bias: biases.qkv_bias,
        };
        let narrowed = Narrowing::new(plain, narrow.fold, &inputs)
            .and_then(|found| found.turning(plain, counts, Some(common), self.device));
        narrowed.map_err(|e| in_layer(e, layer))
    }

    /// How wide each layer's latent becomes; of a budget with what readers lose.
    fn ranks(&self, counts: &[usize], observe: Observer) -> Result<(Vec<usize>, Vec<Curve>)> {
        let layers = self.layers();
        let Some(narrow) = self.narrow else { return Ok((Vec::new(), Vec::new())) };
        let budget = match narrow.width {
            Width::Rank(rank) => {
                let room = room(self.reader.config(), counts, narrow.fold)?;
                if !(1..=room).contains(&rank) {
                    let why =
                        format!("with {} numbers that turn there are {room} for a latent to hold", narrow.rotated);
                    return Err(Error::Setting { field: "kv_rank", value: rank.to_string(), why });
                }
                return Ok((vec![rank; layers], Vec::new()));
            }
            Width::Budget(budget) => budget,
        };
        let mut text = Sources::begin(&self.ends, self.texts.train, self.device);
        let mut narrowed = text.source.clone();
        let mut curves = Vec::with_capacity(layers);
        for layer in 0..layers {
            observe(Progress { doing: "spectra", done: layer, of: layers });
            let source = self.layer(layer)?;
            let plain = self.plain(&source, &text.source, layer)?;
            let latent = self.narrowed(&plain, counts, &text.plain, narrow, (layer, 0))?;
            let measured = Measured::of_layer(&latent, &narrowed, self.device).map_err(|e| in_layer(e, layer))?;
            curves.push(Curve { layer, points: measured.left_out(narrow.importance).map_err(|e| in_layer(e, layer))? });
            text.pass(&source, &plain, self.device);
            narrowed.pass(&latent, block(&latent), self.device);
        }
        let most: usize = curves.iter().filter_map(|curve| curve.points.last()).map(|(rank, _)| rank).sum();
        Ok((allocate(&curves, (budget - layers * narrow.rotated).min(most)), curves))
    }

    /// Converts and writes all layers.
    fn write(
        &self,
        counts: &[usize],
        ranks: &[usize],
        curves: Vec<Curve>,
        new: &mut NewCheckpoint,
        observe: Observer,
    ) -> Result<ByLayer> {
        let mut texts =
            [self.texts.train, self.texts.held_out].map(|text| Streams::begin(&self.ends, text, self.device));
        let mut config = self.reader.config().clone();
        let most = ranks.iter().copied().max().unwrap_or(0);
        new.add_ends(&self.ends)?;
        for layer in 0..self.layers() {
            observe(Progress { doing: "layers", done: layer, of: self.layers() });
            let source = self.layer(layer)?;
            let train = &texts[0];
            let (plain, narrowed, made) = match (self.narrow, ranks.get(layer)) {
                (Some(narrow), Some(rank)) => {
                    let plain = self.plain(&source, &train.before.source, layer)?;
                    let narrowed = self.narrowed(&plain, counts, &train.before.plain, narrow, (layer, most))?;
                    let made = self.cut(&narrowed, &train.narrowed, narrow.importance, *rank, most);
                    (plain, narrowed, made.map_err(|e| in_layer(e, layer))?)
                }
                _ => {
                    let made = self.exact(&source).map_err(|e| in_layer(e, layer))?;
                    (source.clone(), made.clone(), made)
                }
            };
            for streams in &mut texts {
                streams.pass([&source, &plain, &narrowed, &made], self.narrow.is_some(), self.device);
            }
            new.add_layer(&made, layer)?;
            if let (Some(own), Some(of)) = (config.layers.get_mut(layer), made.config.layers.first()) {
                own.attention = of.attention.clone();
            }
        }
        let alike = ranks.iter().all(|rank| *rank == most);
        for (mla, rank) in config.latents_mut().zip(ranks) {
            mla.kv_cache_rank = (!alike).then_some(*rank);
        }
        config.family = config.natural_family();
        config.check()?;
        let [train, _] = &texts;
        let apart = match (train.before.source.first_logits(&self.ends), train.made.first_logits(&self.ends)) {
            (Some(source), Some(made)) => {
                let most = |x: burn::tensor::Tensor<3>| x.abs().max().into_scalar::<f32>();
                [most(source.clone() - made), most(source)]
            }
            _ => [0.0; 2],
        };
        Ok(ByLayer {
            rotated: config.attention().latent().map_or(0, |mla| mla.qk_rope_head_dim),
            ranks: config.kv_ranks(),
            stages: self.stages(&texts)?,
            config,
            apart,
            curves,
        })
    }

    /// The same function, as wide as any layer may need.
    fn exact(&self, source: &CausalLm) -> Result<CausalLm> {
        let grouped = sizes_of(&source.config)?;
        let all = vec![grouped.num_key_value_heads; grouped.rotary_dim / 2];
        let rank = room(&source.config, &all, 1)?;
        let common = Common { rank, attention_bias: grouped.qkv_bias || grouped.o_bias, query_bias: grouped.qkv_bias };
        exact_padded(source, Some(common), self.device)
    }

    /// The first `rank` directions of a layer's latent, of `most` that other layers have.
    fn cut(
        &self,
        narrowed: &CausalLm,
        stream: &Stream,
        importance: Importance,
        rank: usize,
        most: usize,
    ) -> Result<CausalLm> {
        let measured = Measured::of_layer(narrowed, stream, self.device)?;
        let cut = measured.rotated(importance, self.device, &mut |_| {})?.cut(&[rank], self.device)?;
        trimmed_to(&cut, most, self.device)
    }

    fn stages(&self, [train, held_out]: &[Streams; 2]) -> Result<Vec<Loss>> {
        let of = |stage, pick: fn(&Streams) -> &Stream| -> Result<Loss> {
            let Texts { train: text, held_out: held } = self.texts;
            let held =
                held.iter().any(|ids| ids.len() > 1).then(|| pick(held_out).loss(&self.ends, held)).transpose()?;
            Ok(Loss { stage, calibration: pick(train).loss(&self.ends, text)?, held_out: held })
        };
        let mut stages = vec![of(Stage::Source, |streams| &streams.before.source)?];
        if self.narrow.is_none() {
            stages.push(of(Stage::Exact, |streams| &streams.made)?);
            return Ok(stages);
        }
        if sizes_of(self.reader.config())?.qk_norm {
            stages.push(of(Stage::HeadNormsAbsorbed, |streams| &streams.before.plain)?);
        }
        stages.push(of(Stage::RotatedKeysNarrowed, |streams| &streams.narrowed)?);
        stages.push(of(Stage::LatentsCut, |streams| &streams.made)?);
        Ok(stages)
    }
}

/// Zero for each direction of each band.
fn no_costs(grouped: &GroupedConfig, narrow: Narrow) -> Vec<Vec<f64>> {
    let of_band = |members: Range<usize>| vec![0.0; members.len() * grouped.num_key_value_heads];
    bands(grouped.rotary_dim / 2, narrow.fold).map(of_band).collect()
}

/// Most numbers that the latent of a layer can need, with so many directions of each band that turn.
fn room(config: &ModelConfig, counts: &[usize], fold: usize) -> Result<usize> {
    let GroupedConfig { num_key_value_heads: groups, head_dim, rotary_dim, .. } = sizes_of(config)?;
    let cut = bands(rotary_dim / 2, fold).zip(counts).filter(|(members, count)| **count < members.len() * groups);
    let still: usize = cut.map(|(members, _)| members.len()).sum();
    Ok((groups * (2 * still + 2 * head_dim - rotary_dim)).min(config.hidden_size))
}

/// The one block of a model of one layer.
fn block(model: &CausalLm) -> &lowkey_model::model::Block {
    &model.model.layers[0]
}

/// An error of the only layer of a model as that of the layer which it was.
fn in_layer(error: Error, layer: usize) -> Error {
    match error {
        Error::NotFinite { tensor, value } => {
            Error::NotFinite { tensor: tensor.replacen("layers.0.", &format!("layers.{layer}."), 1), value }
        }
        Error::Overflow { what, .. } => Error::Overflow { layer, what },
        Error::Decomposition { what, .. } => Error::Decomposition { layer, what },
        other => other,
    }
}
