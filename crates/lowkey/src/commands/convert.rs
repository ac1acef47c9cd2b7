//! `lowkey convert`.

mod by_layer;
mod same;
mod to_mha;
mod to_mla;

use std::path::Path;

use burn::tensor::Device;
use lowkey_convert::to_mha::Form;
use lowkey_convert::{Reduction, Rotated};
use lowkey_files::mark::Kind;
use lowkey_model::{CausalLm, ModelDir, NewModelDir, checkpoint::WeightDtype};
use serde_json::{Value, json};

use super::{WrongUse, text};
use crate::cli::{Attention, ConvertArguments};
use crate::output::{bytes, complain, pairs, say, say_json, table};
use crate::progress::Measuring;

/// Tokens to calibrate with where the command line does not say.
const TOKENS: usize = 16_384;

/// What was done, beside the model.
const REPORT: &str = "convert.json";

pub(crate) fn convert(arguments: &ConvertArguments) -> anyhow::Result<()> {
    let device = Device::flex();
    if arguments.tokens.is_some_and(|tokens| tokens < 2) {
        return Err(WrongUse("--tokens must be at least 2".into()).into());
    }
    if arguments.to.is_none() && arguments.kv_rank.is_none() && arguments.kv_rank_budget.is_none() {
        let why = "give --kv-rank-budget or --kv-rank to narrow a latent, --to mla to make one of full keys and values, or --to mha for the \
             other way round";
        return Err(WrongUse(why.into()).into());
    }
    if arguments.to.is_none() && arguments.kv_rank.is_some() && (arguments.data.is_some() || arguments.tokens.is_some())
    {
        return Err(WrongUse(
            "--kv-rank keeps directions as they are: --data and --tokens have no use beside it".into(),
        )
        .into());
    }
    let source = ModelDir::open(&arguments.model)?;
    if arguments.by_layer {
        return by_layer::convert(arguments, &source, &device);
    }
    let model = source.load(&device)?.merged();
    lowkey_convert::check_finite(&model)?;
    match arguments.to {
        Some(Attention::Mla) => return to_mla::convert(arguments, &source, &model, &device),
        Some(Attention::Mha) => return to_mha::convert(arguments, Form::Heads, &source, &model, &device),
        Some(Attention::Mqa) => return to_mha::convert(arguments, Form::Single, &source, &model, &device),
        None => {}
    }
    if model.config.attention().latent().is_none() {
        anyhow::bail!(
            "{} attention has no latent; --to mla makes one of its keys and values",
            model.config.attention_name()
        );
    }
    let (budget, prefix) = match (&arguments.kv_rank_budget, arguments.kv_rank) {
        (Some(asked), _) => (share_of(asked, model.config.kv_ranks().iter().sum(), "directions")?, None),
        (None, rank) => {
            let narrow = super::read_at(model.clone(), rank)?;
            (narrow.config.kv_ranks().iter().sum(), Some(narrow))
        }
    };
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| Path::new("models").join(format!("{}-kv{budget}", text::name(&arguments.model))));
    // Now rather than after an hour of work: what may not be replaced, and who else is writing it.
    let new = NewModelDir::begin(&out, Kind::Model, arguments.overwrite, &source)?;
    if let Some(narrow) = prefix {
        let report = json!({ "kv_lora_ranks": model.config.kv_ranks(), "kept": narrow.config.kv_ranks() });
        write(new, &source, (&narrow, dtype(arguments)), &report)?;
        if arguments.json {
            return say_json(&json!({ "out": out, "report": report }));
        }
        let all: usize = model.config.kv_ranks().iter().sum();
        let cache = [&model, &narrow].map(|model| bytes(2 * model.config.cache_numbers()));
        let [before, after] = cache;
        say(&format!(
            "{}: the first {budget} of {all} latent directions\ncache  {before} → {after} per token in bf16",
            out.display()
        ));
        return Ok(());
    }
    let calibration = text::Calibration::find(
        arguments.data.as_deref(),
        &arguments.model,
        &model.config,
        arguments.tokens.unwrap_or(TOKENS),
    )?;
    let bar = Measuring::new();
    let observe = &mut |p: lowkey_convert::Progress| bar.show(p.doing, p.done, p.of);
    let rotated = Rotated::new(&model, &calibration.train, &device, observe)?;
    let reduction = rotated.cut_to(budget, &calibration.train, &device, observe)?;
    drop(bar);
    let held_out = if calibration.held_out.is_empty() {
        None
    } else {
        let loss = |model| lowkey_convert::loss(model, &calibration.held_out, &device);
        Some([loss(&model)?, loss(&reduction.model)?])
    };
    let report = report(&model, &reduction, held_out, &calibration);
    write(new, &source, (&reduction.model, dtype(arguments)), &report)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "report": report }));
    }
    say(&describe(&out, &model, &reduction, held_out, &calibration.name));
    Ok(())
}

/// A number, or a share of `all`.
fn share_of(asked: &str, all: usize, what: &str) -> anyhow::Result<usize> {
    let wrong = || WrongUse(format!("--kv-rank-budget {asked}: a number of {what}, or a share such as 50%"));
    match asked.strip_suffix('%') {
        Some(share) => {
            let share: f64 = share.trim().parse().map_err(|_| wrong())?;
            if !(share > 0.0 && share <= 100.0) {
                return Err(wrong().into());
            }
            Ok((all as f64 * share / 100.0).round() as usize)
        }
        None => Ok(asked.parse().map_err(|_| wrong())?),
    }
}

fn report(model: &CausalLm, reduction: &Reduction, held_out: Option<[f64; 2]>, text: &text::Calibration) -> Value {
    json!({
        "kv_lora_ranks": model.config.kv_ranks(),
        "kept": reduction.ranks,
        "calibration": {
            "text": text.name,
            "tokens": text.tokens(),
            "loss_before": reduction.loss_before,
            "loss_after": reduction.loss_after,
        },
        "held_out": held_out.map(|[before, after]| json!({ "loss_before": before, "loss_after": after })),
        "curves": reduction.curves,
    })
}

fn describe(out: &Path, model: &CausalLm, reduction: &Reduction, held_out: Option<[f64; 2]>, name: &str) -> String {
    let full = model.config.kv_ranks();
    let rows: Vec<Vec<String>> = reduction
        .curves
        .iter()
        .zip(&reduction.ranks)
        .zip(&full)
        .map(|((curve, kept), full)| {
            // What the layer alone costs at about half of its width.
            let half = curve.points.iter().min_by_key(|(rank, _)| rank.abs_diff(full / 2));
            let cost = half.map_or_else(String::new, |(rank, cost)| format!("{cost:+.4} at {rank}"));
            vec![curve.layer.to_string(), full.to_string(), kept.to_string(), cost]
        })
        .collect();
    let change = |[before, after]: [f64; 2]| format!("{before:.4} → {after:.4} nats ({:+.4})", after - before);
    // In bf16.
    let cache = |model: &CausalLm| bytes(2 * model.config.cache_numbers());
    let mut facts = vec![
        ("cache", format!("{} → {} per token in bf16", cache(model), cache(&reduction.model))),
        ("calibration", format!("{name}: {}", change([reduction.loss_before, reduction.loss_after]))),
    ];
    facts.extend(held_out.map(|losses| ("held out", change(losses))));
    let header = ["layer", "directions", "kept", "cut alone, nats"];
    format!(
        "{}: {} of {} latent directions\n{}\n{}",
        out.display(),
        reduction.ranks.iter().sum::<usize>(),
        full.iter().sum::<usize>(),
        table(&header, &rows),
        pairs(&facts)
    )
}

/// Writes the model, and what came with the one that it was made from.
fn write(
    new: NewModelDir,
    source: &ModelDir,
    (model, dtype): (&CausalLm, WeightDtype),
    report: &Value,
) -> anyhow::Result<()> {
    new.save(model, dtype, usize::MAX)?;
    finish(new, source, report)
}

/// What the weights are written in.
fn dtype(arguments: &ConvertArguments) -> WeightDtype {
    if arguments.dtype == "bf16" { WeightDtype::Bf16 } else { WeightDtype::F32 }
}

/// Adds to configuration and weights what belongs to a directory, and puts it in its place.
fn finish(new: NewModelDir, source: &ModelDir, report: &Value) -> anyhow::Result<()> {
    new.carry(source)?;
    new.write_json(REPORT, report)?;
    if let Some(left) = new.commit()? {
        complain(&format!("note: what was replaced could not be removed: {}", left.display()));
    }
    Ok(())
}
