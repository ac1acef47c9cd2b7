//! `lowkey convert --to mla`.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowkey_convert::Progress;
use lowkey_convert::to_mla::{Converted, Loss, Stage, Texts, Wanted, Width, absorb_head_norms, exact, fit, widths};
use lowkey_files::mark::Kind;
use lowkey_model::attention::AttentionConfig;
use lowkey_model::{CausalLm, ModelConfig, ModelDir, NewModelDir};
use serde_json::{Value, json};

use super::same::Same;
use super::{TOKENS, dtype, share_of, write};
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
    /// What each step has cost, where there is a text.
    losses: Vec<Loss>,
    absorbed: bool,
}

pub(super) fn convert(
    arguments: &ConvertArguments,
    source: &ModelDir,
    model: &CausalLm,
    device: &Device,
) -> anyhow::Result<()> {
    widths(&model.config)?;
    let width = width(arguments, &model.config)?;
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
            Some(text::Calibration::find(arguments.data.as_deref(), &arguments.model, &model.config, tokens)?)
        }
        false => None,
    };
    let made = make(arguments, model, width, text.as_ref(), device)?;
    let report = report(model, &made, text.as_ref());
    write(new, source, (&made.model, dtype(arguments)), &report)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "report": report }));
    }
    say(&describe(&out, model, &made, text.as_ref()));
    Ok(())
}

/// How wide latents are to be; none where the model is to stay what it is.
pub(super) fn width(arguments: &ConvertArguments, model: &ModelConfig) -> anyhow::Result<Option<Width>> {
    Ok(match (&arguments.kv_rank_budget, arguments.kv_rank) {
        (Some(asked), _) => Some(Width::Budget(match asked.strip_suffix('B') {
            // In bf16.
            Some(bytes) => bytes.trim().parse::<usize>().map_err(|_| wrong_budget(asked))? / 2,
            None => share_of(asked, model.cache_numbers(), "numbers cached per token")?,
        })),
        (None, Some(rank)) => Some(Width::Rank(rank)),
        (None, None) if arguments.rope_dim.is_some() => {
            return Err(WrongUse("--rope-dim needs --kv-rank or --kv-rank-budget beside it".into()).into());
        }
        (None, None) => None,
    })
}

fn wrong_budget(asked: &str) -> WrongUse {
    WrongUse(format!("--kv-rank-budget {asked}: bytes per token in bf16 such as 512B, numbers, or a share such as 50%"))
}

/// What is asked of a model whose latents are to be so wide.
pub(super) fn wanted(arguments: &ConvertArguments, width: Width) -> Wanted {
    Wanted {
        width,
        rotated: arguments.rope_dim,
        keep: arguments.rope_keep.map(Into::into),
        fold: arguments.rope_fold,
        centred: !arguments.no_bias,
        importance: arguments.importance.map(Into::into),
    }
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
        Some(width) => Some(fit(&plain, wanted(arguments, width), train, device, observe)?),
        None => None,
    };
    let made = match &fitted {
        Some(fitted) => fitted.model.clone(),
        None => exact(&plain, device)?,
    };
    let exact = fitted.is_none();
    let same = Same::of(&plain, &made, train, device)?;
    if exact {
        same.logits.check()?;
    }
    drop(bar);
    let mut losses = Vec::new();
    if let Some(text) = text {
        let texts = Texts { train: &text.train, held_out: &text.held_out };
        let mut stages = vec![(Stage::Source, model)];
        if absorbed {
            stages.push((Stage::HeadNormsAbsorbed, &plain));
        }
        match &fitted {
            Some(fitted) => {
                stages.extend([(Stage::RotatedKeysNarrowed, &fitted.whole), (Stage::LatentsCut, &fitted.model)]);
            }
            None => stages.push((Stage::Exact, &made)),
        }
        for (stage, model) in stages {
            losses.push(Loss::of(stage, model, texts, device)?);
        }
    }
    Ok(Made { model: made, same, exact, fitted, losses, absorbed })
}

pub(super) fn out(arguments: &ConvertArguments) -> PathBuf {
    let name = text::name(&arguments.model);
    let of_width = match (&arguments.kv_rank_budget, arguments.kv_rank) {
        (Some(budget), _) => format!("-{}", budget.trim_end_matches('%')),
        (None, Some(rank)) => format!("-r{rank}"),
        (None, None) => String::new(),
    };
    arguments.out.clone().unwrap_or_else(|| Path::new("models").join(format!("{name}-mla{of_width}")))
}

fn report(model: &CausalLm, made: &Made, text: Option<&text::Calibration>) -> Value {
    let mla = made.model.config.attention().latent();
    json!({
        "from": model.config.attention_name(),
        "exact": made.exact.then(|| made.same.logits.report()),
        "greedy_tokens": made.same.greedy_report(),
        "head_norms_absorbed": made.absorbed,
        "cache_numbers_before": model.config.cache_numbers(),
        "cache_numbers": made.model.config.cache_numbers(),
        "qk_rope_head_dim": mla.map(|mla| mla.qk_rope_head_dim),
        "kv_ranks": made.model.config.kv_ranks(),
        "importance": made.fitted.as_ref().map(|fitted| fitted.importance),
        "calibration": calibration(&made.losses, text),
        "held_out": ends(&made.losses, |loss| loss.held_out),
        "stages": made.losses,
        "rotated_keys_tried": made.fitted.as_ref().map(|fitted| {
            let tried = fitted.tried.iter().map(|tried| {
                json!({ "qk_rope_head_dim": tried.rotated, "keep": tried.keep, "loss": tried.loss })
            });
            tried.collect::<Vec<_>>()
        }),
        "curves": made.fitted.as_ref().map(|fitted| &fitted.curves),
    })
}

/// The loss of the first and of the last stage.
pub(super) fn ends(losses: &[Loss], of: impl Fn(&Loss) -> Option<f64>) -> Option<Value> {
    let (first, last) = (losses.first().and_then(&of)?, losses.last().and_then(&of)?);
    Some(json!({ "loss_before": first, "loss_after": last }))
}

/// The same of the calibration text, and what that is; none where there is no text.
pub(super) fn calibration(losses: &[Loss], text: Option<&text::Calibration>) -> Option<Value> {
    let (mut ends, text) = ends(losses, |loss| Some(loss.calibration)).zip(text)?;
    ends["text"] = json!(text.name);
    ends["tokens"] = json!(text.tokens());
    Some(ends)
}

/// Loss and perplexity after each stage.
pub(super) fn stages(losses: &[Loss]) -> String {
    let number = |loss: f64| [format!("{loss:.4}"), format!("{:.3}", loss.exp())];
    let row = |loss: &Loss| {
        let held_out = loss.held_out.map_or_else(|| [String::from("—"), String::from("—")], number);
        let numbers = [number(loss.calibration), held_out].into_iter().flatten();
        [loss.stage.words().to_owned()].into_iter().chain(numbers).collect()
    };
    let header = ["stage", "calibration", "perplexity", "held out", "perplexity"];
    table(&header, &losses.iter().map(row).collect::<Vec<_>>())
}

fn describe(out: &Path, model: &CausalLm, made: &Made, text: Option<&text::Calibration>) -> String {
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
    facts.extend(text.map(|text| ("calibration", format!("{}, {} tokens", text.name, text.tokens()))));
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
    ) + &text.map_or_else(String::new, |_| format!("\n{}", stages(&made.losses)))
}
