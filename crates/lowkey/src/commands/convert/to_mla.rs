//! `lowkey convert --to mla`.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowkey_convert::Progress;
use lowkey_convert::to_mla::{Converted, Wanted, Width, absorb_head_norms, exact, fit, widths};
use lowkey_files::mark::Kind;
use lowkey_model::attention::AttentionConfig;
use lowkey_model::{CausalLm, ModelDir, NewModelDir};
use serde_json::{Value, json};

use super::same::Same;
use super::{TOKENS, share_of, write};
use crate::cli::ConvertArguments;
use crate::commands::{WrongUse, text};
use crate::output::{bytes, pairs, say, say_json, table};
use crate::progress::Measuring;

/// What became of a model.
struct Made {
    model: CausalLm,
    /// How it compares with what it was made of.
    same: Same,
    /// Whether it is to compute the same.
    exact: bool,
    /// What a narrower one came to.
    fitted: Option<Converted>,
    /// Loss before and after on held-out text, and on the calibration text.
    held_out: Option<[f64; 2]>,
    calibration: Option<[f64; 2]>,
    absorbed: bool,
}

pub(super) fn convert(
    arguments: &ConvertArguments,
    source: &ModelDir,
    model: &CausalLm,
    device: &Device,
) -> anyhow::Result<()> {
    let [_, cache] = widths(model)?;
    let width = match (&arguments.kv_rank_budget, arguments.kv_rank) {
        (Some(asked), _) => {
            Some(Width::Budget(share_of(asked, cache * model.config.layers.len(), "numbers cached per token")?))
        }
        (None, Some(rank)) => Some(Width::Rank(rank)),
        (None, None) if arguments.rope_dim.is_some() => {
            return Err(WrongUse("--rope-dim needs --kv-rank or --kv-rank-budget beside it".into()).into());
        }
        (None, None) => None,
    };
    let normed = matches!(model.config.attention(), AttentionConfig::Grouped(grouped) if grouped.qk_norm);
    if normed && width.is_none() && arguments.data.is_none() {
        // Said before anything is read: only who gives a text means the nearest model instead.
        exact(model, device)?;
    }
    let out = out(arguments);
    let new = NewModelDir::begin(&out, Kind::Model, arguments.overwrite, source)?;
    let text = match width.is_some() || arguments.data.is_some() {
        true => {
            let tokens = arguments.tokens.unwrap_or(TOKENS);
            Some(text::Calibration::find(arguments.data.as_deref(), &arguments.model, model, tokens)?)
        }
        false => None,
    };
    let made = make(arguments, model, width, text.as_ref(), device)?;
    let report = report(model, &made, text.as_ref());
    write(new, source, &made.model, &report)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "report": report }));
    }
    say(&describe(&out, model, &made, text.as_ref()));
    Ok(())
}

fn make(
    arguments: &ConvertArguments,
    model: &CausalLm,
    width: Option<Width>,
    text: Option<&text::Calibration>,
    device: &Device,
) -> anyhow::Result<Made> {
    let bar = Measuring::new();
    let observe = &mut |p: Progress| bar.show(p.doing, p.done, p.of);
    let train = text.map_or(&[][..], |text| &text.train);
    let plain = match text {
        Some(_) => absorb_head_norms(model, train, device, observe)?,
        None => model.clone(),
    };
    let absorbed = plain.config.attention() != model.config.attention();
    let fitted = match width {
        Some(width) => {
            let wanted = Wanted {
                width,
                rotated: arguments.rope_dim,
                keep: arguments.rope_keep.map(Into::into),
                centred: !arguments.no_bias,
                importance: arguments.importance.map(Into::into),
            };
            Some(fit(&plain, wanted, train, device, observe)?)
        }
        None => None,
    };
    let made = match &fitted {
        Some(fitted) => fitted.model.clone(),
        None => exact(&plain, device)?,
    };
    let exact = fitted.is_none();
    let same = Same::of(&plain, &made, train, device)?;
    if exact {
        same.check()?;
    }
    drop(bar);
    let losses = |text: &[Vec<u32>]| -> anyhow::Result<[f64; 2]> {
        Ok([lowkey_convert::loss(model, text, device)?, lowkey_convert::loss(&made, text, device)?])
    };
    let calibration = text.map(|text| losses(&text.train)).transpose()?;
    let held_out = text.filter(|text| !text.held_out.is_empty()).map(|text| losses(&text.held_out)).transpose()?;
    Ok(Made { model: made, same, exact, fitted, held_out, calibration, absorbed })
}

fn out(arguments: &ConvertArguments) -> PathBuf {
    let name = text::name(&arguments.model);
    let of_width = match (&arguments.kv_rank_budget, arguments.kv_rank) {
        (Some(budget), _) => format!("-{}", budget.trim_end_matches('%')),
        (None, Some(rank)) => format!("-r{rank}"),
        (None, None) => String::new(),
    };
    arguments.out.clone().unwrap_or_else(|| Path::new("models").join(format!("{name}-mla{of_width}")))
}

fn report(model: &CausalLm, made: &Made, text: Option<&text::Calibration>) -> Value {
    let losses = |losses: [f64; 2]| json!({ "loss_before": losses[0], "loss_after": losses[1] });
    let mut calibration = made.calibration.map(losses);
    if let (Some(Value::Object(map)), Some(text)) = (&mut calibration, text) {
        map.insert("text".into(), json!(text.name));
        map.insert("tokens".into(), json!(text.tokens()));
    }
    let mla = made.model.config.attention().latent();
    json!({
        "from": model.config.attention_name(),
        "exact": made.exact.then(|| made.same.report()),
        "greedy_tokens": made.same.greedy_report(),
        "head_norms_absorbed": made.absorbed,
        "cache_numbers_before": model.config.cache_numbers(),
        "cache_numbers": made.model.config.cache_numbers(),
        "qk_rope_head_dim": mla.map(|mla| mla.qk_rope_head_dim),
        "kv_ranks": made.model.config.kv_ranks(),
        "importance": made.fitted.as_ref().map(|fitted| fitted.importance),
        "calibration": calibration,
        "held_out": made.held_out.map(losses),
        "rotated_keys_tried": made.fitted.as_ref().map(|fitted| {
            let tried = fitted.tried.iter().map(|tried| {
                json!({ "qk_rope_head_dim": tried.rotated, "keep": tried.keep, "loss": tried.loss })
            });
            tried.collect::<Vec<_>>()
        }),
        "curves": made.fitted.as_ref().map(|fitted| &fitted.curves),
    })
}

fn describe(out: &Path, model: &CausalLm, made: &Made, text: Option<&text::Calibration>) -> String {
    let change = |[before, after]: [f64; 2]| {
        let perplexities = format!("perplexity {:.3} → {:.3}", before.exp(), after.exp());
        format!("{before:.4} → {after:.4} nats ({:+.4}), {perplexities}", after - before)
    };
    // In bf16.
    let cache = |model: &CausalLm| bytes(2 * model.config.cache_numbers());
    let rotated = made.model.config.attention().latent().map_or(0, |mla| mla.qk_rope_head_dim);
    let mut facts = vec![("cache", format!("{} → {} per token in bf16", cache(model), cache(&made.model)))];
    facts.extend(made.same.facts());
    if made.absorbed {
        facts.push((
            "norms",
            "those of query and key heads became constants, so that this is not the same model".into(),
        ));
    }
    facts.extend(
        made.calibration.zip(text).map(|(losses, text)| ("calibration", format!("{}: {}", text.name, change(losses)))),
    );
    facts.extend(made.held_out.map(|losses| ("held out", change(losses))));
    let rows: Vec<Vec<String>> = made
        .model
        .config
        .kv_ranks()
        .iter()
        .enumerate()
        .map(|(layer, rank)| vec![layer.to_string(), rotated.to_string(), rank.to_string()])
        .collect();
    format!(
        "{}: {} as MLA\n{}\n{}",
        out.display(),
        model.config.attention_name(),
        table(&["layer", "rotated key", "latent"], &rows),
        pairs(&facts)
    )
}
