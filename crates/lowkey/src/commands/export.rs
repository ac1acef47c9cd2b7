//! `lowkey export` and `lowkey verify`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use lowkey_data::Prepared;
use lowkey_export::{
    Certificate, Options, Progress, Source, Target, Text,
    adapter::Engine,
    certificate::Evidence,
    export::FUSED,
    plan::{LayerForm, LayerPlan},
};
use lowkey_model::{CausalLm, ModelConfig, ModelDir, attention::FusedMla};
use serde_json::json;

use super::{WrongUse, text};
use crate::cli::{ExportArguments, MergeArguments, VerifyArguments, WeightedAdapter};
use crate::output::{bytes, complain, count, pairs, say, say_json, table};
use crate::progress::Measuring;

/// Weights above this are cut into shards, where nothing else is asked for.
const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Held-out sequences.
const SEQUENCES: usize = 4;

pub(crate) fn export(arguments: &ExportArguments) -> anyhow::Result<()> {
    let out = |kind: &str| arguments.out.clone().unwrap_or_else(|| default_out(&arguments.model, kind));
    let to = match (&arguments.engine, &arguments.to) {
        (Some(engine), _) => return export_adapter(arguments, engine, &out(engine)),
        (None, Some(to)) => to,
        (None, None) => return Err(WrongUse("--to LAYOUT, or --for ENGINE".into()).into()),
    };
    let target = Target::parse(to, &arguments.dtype).map_err(wrong_use)?;
    let form = arguments.form.as_deref().map(str::parse::<LayerForm>).transpose().map_err(wrong_use)?;
    let mut bounds = target.bounds();
    for bound in &arguments.bounds {
        bounds.set(bound).map_err(wrong_use)?;
    }
    if arguments.shard_size == 0 || arguments.context == Some(0) {
        return Err(WrongUse("--shard-size and --context must be at least 1".into()).into());
    }
    let source = open(&arguments.model, &arguments.adapter)?;
    let options = Options {
        out: out(to),
        overwrite: arguments.overwrite,
        form,
        context: arguments.context,
        text: certificate_text(arguments.data.as_deref(), &source)?,
        bounds,
        max_shard_bytes: arguments.shard_size.saturating_mul(1_000_000),
        target,
    };
    certified(&source, &options, arguments.json)
}

fn export_adapter(arguments: &ExportArguments, engine: &str, out: &Path) -> anyhow::Result<()> {
    let engine: Engine = engine.parse().map_err(wrong_use)?;
    let source = open(&arguments.model, &arguments.adapter)?;
    lowkey_export::adapter::export_adapter(&source, engine, out, arguments.overwrite)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "for": engine.to_string() }));
    }
    say(&format!("{}: the adapter for {engine}", out.display()));
    Ok(())
}

/// `lowkey merge`: an export of an adapted model in the layout that it came in.
pub(crate) fn merge(arguments: &MergeArguments) -> anyhow::Result<()> {
    let target = Target::parse("hf", &arguments.dtype).map_err(wrong_use)?;
    let source = open(&arguments.model, &arguments.adapter)?;
    let options = Options {
        out: arguments.out.clone(),
        overwrite: arguments.overwrite,
        form: None,
        context: None,
        text: certificate_text(arguments.data.as_deref(), &source)?,
        bounds: target.bounds(),
        max_shard_bytes: MAX_SHARD_BYTES,
        target,
    };
    certified(&source, &options, arguments.json)
}

fn certified(source: &Source, options: &Options, as_json: bool) -> anyhow::Result<()> {
    let bar = Measuring::new();
    let observe = &mut |p: Progress| bar.show(p.doing, p.done, p.of);
    let certificate = lowkey_export::export(source, options, &Device::flex(), observe);
    drop(bar);
    let certificate = certificate?;
    if as_json {
        return say_json(&certificate);
    }
    say(&report(&options.out, &certificate));
    Ok(())
}

pub(crate) fn verify(arguments: &VerifyArguments) -> anyhow::Result<ExitCode> {
    let source = arguments.source.as_deref().map(|source| open(source, &arguments.adapter)).transpose()?;
    let bar = Measuring::new();
    let observe = &mut |p: Progress| bar.show(p.doing, p.done, p.of);
    let verdict = lowkey_export::verify(&arguments.export, source.as_ref(), &Device::flex(), observe);
    drop(bar);
    let verdict = verdict?;
    let holds = verdict.failures.is_empty();
    if arguments.json {
        say_json(&json!({
            "holds": holds,
            "failures": verdict.failures,
            "notes": verdict.notes,
            "bounds": verdict.certificate.bounds,
            "evidence": verdict.evidence,
        }))?;
    } else {
        if let Some(evidence) = &verdict.evidence {
            say(&figures(evidence, &verdict.certificate));
        }
        verdict.notes.iter().for_each(|note| say(&format!("note: {note}")));
        let path = arguments.export.display();
        match holds {
            true => say(&format!("{path}: the certificate holds")),
            false => complain(&format!("{path}: the certificate does NOT hold\n  {}", verdict.failures.join("\n  "))),
        }
    }
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The layers' fused weights, where the model directory holds them.
pub(crate) fn fused_weights(dir: &Path, model: &CausalLm, device: &Device) -> anyhow::Result<Vec<Option<FusedMla>>> {
    // Whatever bears the name is meant to be read: a pipe or a broken link is an error, not an absence.
    if dir.join(FUSED).symlink_metadata().is_ok() {
        return Ok(lowkey_export::export::load_fused(dir, model, device)?);
    }
    Ok(Vec::new())
}

fn wrong_use(error: lowkey_export::Error) -> anyhow::Error {
    WrongUse(error.to_string()).into()
}

/// A model directory, with adapters beside it or without; one that carries checksums only if they match.
fn open(dir: &Path, adapters: &[WeightedAdapter]) -> anyhow::Result<Source> {
    let adapters: Vec<(PathBuf, f64)> = adapters.iter().map(|one| (one.dir.clone(), one.weight)).collect();
    let dir = ModelDir::open(dir)?;
    let dir = if adapters.is_empty() { dir } else { dir.with_adapters(&adapters)? };
    Ok(Source::read(dir, &Device::flex())?)
}

/// `exports/RUN-LAYOUT` for a run's checkpoint, `exports/FOLDER-LAYOUT` otherwise.
fn default_out(model: &Path, to: &str) -> PathBuf {
    Path::new("exports").join(format!("{}-{to}", text::name(model)))
}

/// Held-out text of `--data`, else of the run that the model belongs to, else random tokens, which is said.
fn certificate_text(data: Option<&Path>, source: &Source) -> anyhow::Result<Text> {
    let config = &source.model.config;
    Ok(match text::find(data, source.dir.given(), source.tokenizer.as_ref())? {
        Ok(prepared) => held_out(&prepared, config)?,
        Err(why) => {
            complain(&format!("note: {why}; the certificate uses random tokens unless --data gives a text"));
            random(config)
        }
    })
}

fn held_out(prepared: &Prepared, config: &ModelConfig) -> lowkey_data::Result<Text> {
    let sequences = text::windows(&prepared.validation, config.max_position_embeddings.min(text::LONGEST), SEQUENCES)?;
    Ok(Text { description: format!("held-out split of {}", prepared.manifest.dataset.name), sequences })
}

/// Tokens of a fixed linear congruential sequence (Knuth's MMIX constants): the same ones for everybody.
fn random(config: &ModelConfig) -> Text {
    let len = config.max_position_embeddings.min(text::LONGEST);
    let mut state = 1u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % config.vocab_size as u64) as u32
    };
    let sequences = (0..SEQUENCES).map(|_| (0..len).map(|_| token()).collect()).collect();
    Text { description: "random tokens, as no text was given".into(), sequences }
}

fn report(out: &Path, certificate: &Certificate) -> String {
    let size: u64 = certificate.outputs.iter().map(|file| file.bytes).sum();
    let mut text = format!(
        "{}: {} in {}, {} files, {}\n",
        out.display(),
        certificate.target.to,
        certificate.target.dtype,
        certificate.outputs.len(),
        bytes(size as usize)
    );
    if !certificate.plan.is_empty() {
        text += &(plan(&certificate.plan) + "\n");
    }
    text += &figures(&certificate.evidence, certificate);
    certificate.notes.iter().fold(text, |text, note| text + "\n  note        " + note)
}

/// One row per form and run of equal layers.
fn plan(plan: &[LayerPlan]) -> String {
    let mut rows = Vec::new();
    let mut from = 0;
    while let Some(first) = plan.get(from) {
        let same = plan[from..].iter().take_while(|p| p.form == first.form && p.costs == first.costs).count();
        for cost in &first.costs {
            let mark = match (cost.form == first.form, first.forced) {
                (false, _) => "",
                (true, true) => "forced",
                (true, false) => "chosen",
            };
            rows.push(vec![
                format!("{from}..{}", from + same - 1),
                format!("{:<8}", cost.form.to_string()),
                count(cost.weights as f64),
                bytes(cost.bytes_per_token as usize),
                count(cost.flops_per_token as f64),
                format!("{mark:<6}"),
            ]);
        }
        from += same;
    }
    table(&["layers", "form    ", "weights", "read/token", "FLOPs/token", "      "], &rows)
}

/// What was found, now or when the certificate was written, beside what it demands.
fn figures(evidence: &Evidence, certificate: &Certificate) -> String {
    let (l, bounds) = (&evidence.logits, &certificate.bounds);
    let worst = |errors: &mut dyn Iterator<Item = f64>| errors.fold(0.0, f64::max);
    let mut rows = vec![
        ("text", certificate.text.description.clone()),
        (
            "weights",
            format!(
                "max relative error {:.2e} (demanded ≤ {:.1e})",
                worst(&mut evidence.weights.iter().map(|w| w.error.max)),
                bounds.weight_max
            ),
        ),
    ];
    if !evidence.products.is_empty() {
        let error = worst(&mut evidence.products.iter().map(|p| p.error.max));
        rows.push(("products", format!("{}, max relative error against f64 {error:.2e}", evidence.products.len())));
    }
    let greedy = &evidence.greedy;
    let (agree, all) = greedy.iter().fold((0, 0), |(a, n), g| (a + g.agree, n + g.source.len()));
    let same = greedy.iter().filter(|g| g.agree == g.source.len()).count();
    rows.extend([
        (
            "logits",
            format!("max relative error {:.2e} (≤ {:.1e}) at {} positions", l.max_relative, bounds.logit, l.positions),
        ),
        ("mean KL", format!("{:.2e} nats (≤ {:.1e})", l.mean_kl, bounds.kl)),
        ("top token", format!("the same at {:.2} % (≥ {:.2} %)", l.top1_agreement * 100.0, bounds.top1 * 100.0)),
        ("perplexity", format!("{:.5}, the source's {:.5}", l.perplexity_export, l.perplexity_source)),
        ("greedy", format!("{same} of {} continuations the same, {agree} of {all} tokens", greedy.len())),
    ]);
    pairs(&rows)
}
