//! `lowkey convert --to mla --by-layer`.

use std::path::Path;

use burn::tensor::Device;
use lowkey_convert::Progress;
use lowkey_convert::to_mla::{ByLayer, Texts, by_layer, widths};
use lowkey_files::mark::Kind;
use lowkey_model::checkpoint::{LayerReader, NewCheckpoint};
use lowkey_model::{ModelConfig, ModelDir, NewModelDir};
use serde_json::{Value, json};

use super::same::{Agreement, probe};
use super::to_mla::{calibration, ends, out, stages, wanted, width};
use super::{TOKENS, dtype, finish};
use crate::cli::{Attention, ConvertArguments};
use crate::commands::{WrongUse, text};
use crate::output::{bytes, pairs, say, say_json, table};
use crate::progress::Measuring;

pub(super) fn convert(arguments: &ConvertArguments, source: &ModelDir, device: &Device) -> anyhow::Result<()> {
    if arguments.to != Some(Attention::Mla) {
        return Err(WrongUse("--by-layer goes with --to mla".into()).into());
    }
    if source.adapter().is_some() {
        let why = "--by-layer reads the weights of one model, and this is an adapter beside one: merge it first";
        return Err(WrongUse(why.into()).into());
    }
    let reader = LayerReader::open(source.path())?;
    let config = reader.config();
    widths(config)?;
    let wanted = width(arguments, config)?.map(|width| wanted(arguments, width));
    let out = out(arguments);
    let new = NewModelDir::begin(&out, Kind::Model, arguments.overwrite, source)?;
    let text = match wanted.is_some() || arguments.data.is_some() {
        true => {
            let tokens = arguments.tokens.unwrap_or(TOKENS);
            Some(text::Calibration::find(arguments.data.as_deref(), &arguments.model, config, tokens)?)
        }
        false => None,
    };
    let probe = [probe(config)];
    let texts = match &text {
        Some(text) => Texts { train: &text.train, held_out: &text.held_out },
        None => Texts { train: &probe, held_out: &[] },
    };
    let bar = Measuring::new();
    let observe = &mut |p: Progress| bar.show(p.doing, p.done, p.of);
    // The ends, and each layer.
    let mut weights = NewCheckpoint::begin(new.dir(), dtype(arguments), config.layers.len() + 1)?;
    let made = by_layer(&reader, wanted, texts, &mut weights, device, observe)?;
    let [apart, largest] = made.apart;
    let agreement = Agreement { apart, largest };
    if wanted.is_none() {
        agreement.check()?;
    }
    weights.commit(&made.config)?;
    drop(bar);
    let report = report(config, &made, wanted.is_none().then_some(&agreement), text.as_ref());
    finish(new, source, &report)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "report": report }));
    }
    say(&describe(&out, config, &made, &agreement, text.as_ref()));
    Ok(())
}

fn report(config: &ModelConfig, made: &ByLayer, exact: Option<&Agreement>, text: Option<&text::Calibration>) -> Value {
    json!({
        "from": config.attention_name(),
        "by_layer": true,
        "exact": exact.map(Agreement::report),
        "cache_numbers_before": config.cache_numbers(),
        "cache_numbers": made.config.cache_numbers(),
        "qk_rope_head_dim": made.rotated,
        "kv_ranks": made.ranks,
        "calibration": calibration(&made.stages, text),
        "held_out": ends(&made.stages, |loss| loss.held_out),
        "stages": text.map(|_| &made.stages),
        "left_out": made.curves,
    })
}

fn describe(
    out: &Path,
    config: &ModelConfig,
    made: &ByLayer,
    agreement: &Agreement,
    text: Option<&text::Calibration>,
) -> String {
    // In bf16.
    let cache = |config: &ModelConfig| bytes(2 * config.cache_numbers());
    let mut facts =
        vec![("cache", format!("{} → {} per token in bf16", cache(config), cache(&made.config))), agreement.fact()];
    facts.extend(text.map(|text| ("calibration", format!("{}, {} tokens", text.name, text.tokens()))));
    let row = |(layer, rank): (usize, &usize)| vec![layer.to_string(), made.rotated.to_string(), rank.to_string()];
    let rows: Vec<Vec<String>> = made.ranks.iter().enumerate().map(row).collect();
    format!(
        "{}: {} as MLA, a layer at a time\n{}\n{}\n{}",
        out.display(),
        config.attention_name(),
        table(&["layer", "rotated key", "latent"], &rows),
        pairs(&facts),
        text.map_or_else(String::new, |_| stages(&made.stages))
    )
}
