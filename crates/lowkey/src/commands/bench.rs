//! `lowkey bench`.

mod peer;

use burn::tensor::Device;
use lowkey_infer::{CacheDtype, Form};
use lowkey_kernels::Precision;
use lowkey_model::Recompute;
use lowkey_train::bench::{
    self, DecodeFigures, DecodeOptions, DecodeRow, OpFigures, OpsFigures, OpsOptions, PrefillFigures, PrefillOptions,
    PrefillRow, Subject, TrainFigures, TrainOptions,
};

use super::WrongUse;
use crate::cli::{
    BenchCacheArguments, BenchCommand, BenchDecodeArguments, BenchOpsArguments, BenchPrefillArguments,
    BenchStepArguments, BenchTrainArguments,
};
use crate::output::{bytes, count, pairs, say, say_json, table};
use crate::progress::{Measuring, spaced};

pub(crate) fn bench(command: BenchCommand) -> anyhow::Result<()> {
    let bar = Measuring::new();
    let observe = &mut |p: bench::Progress| bar.show(p.doing, p.done, p.of);
    match command {
        BenchCommand::Train(BenchTrainArguments { step, steps, warmup, json }) => {
            let figures = bench::train(&options(step, steps, warmup)?, observe);
            report(bar, figures, json, train_text)
        }
        BenchCommand::Decode(arguments) => {
            let (subject, options) = decode_subject(&arguments)?;
            let figures = bench::decode(subject, &options, observe);
            report(bar, figures, arguments.over.json, decode_text)
        }
        BenchCommand::Prefill(arguments) => {
            let (subject, options) = prefill_subject(&arguments)?;
            let figures = bench::prefill(subject, &options, observe);
            report(bar, figures, arguments.over.json, prefill_text)
        }
        BenchCommand::Ops(BenchOpsArguments { step, steps, warmup, json }) => {
            let figures = bench::ops(&OpsOptions { step: options(step, steps, warmup)? }, observe);
            report(bar, figures, json, ops_text)
        }
        BenchCommand::Peer(arguments) => {
            drop(bar);
            peer::peer(arguments)
        }
    }
}

fn options(step: BenchStepArguments, steps: usize, warmup: usize) -> Result<TrainOptions, WrongUse> {
    let BenchStepArguments {
        shape,
        batch,
        seq,
        threads,
        optimizer,
        recompute,
        device,
        dtype,
        lora_rank,
        lora_modules,
        weights,
    } = step;
    let quantization = super::packing(&weights)?;
    let recompute = if recompute { Recompute::Block } else { Recompute::None };
    let dtype = match dtype.as_str() {
        "tf32" => Precision::Tf32,
        "bf16" => Precision::Bf16,
        "f16" => Precision::F16,
        _ => Precision::F32,
    };
    Ok(TrainOptions {
        shape,
        batch,
        seq,
        threads,
        steps,
        warmup,
        optimizer,
        recompute,
        device,
        dtype,
        lora_rank,
        lora_modules,
        quantization,
    })
}

/// Prints what was measured, the bar out of the way.
fn report<F: serde::Serialize>(
    bar: Measuring,
    figures: lowkey_train::Result<F>,
    json: bool,
    text: fn(&F) -> String,
) -> anyhow::Result<()> {
    drop(bar);
    let figures = figures?;
    if json {
        return say_json(&figures);
    }
    say(&text(&figures));
    Ok(())
}

/// `1234.5` operations as `1.23 kFLOP`.
fn flops(n: f64) -> String {
    spaced(count(n)) + "FLOP"
}

fn peak(mb: Option<f64>) -> Option<(&'static str, String)> {
    mb.map(|mb| ("peak memory", format!("{mb:.0} MiB")))
}

fn train_text(f: &TrainFigures) -> String {
    let mut rows = vec![
        ("tokens/s", format!("{:.0} ({:.0}..{:.0})", f.tokens_per_s, f.tokens_per_s_min, f.tokens_per_s_max)),
        (
            "step",
            format!(
                "{:.1} ms ({:.1}..{:.1}), median of {} after {} in {:.1} s",
                f.step_ms, f.step_ms_min, f.step_ms_max, f.steps, f.warmup, f.warm_up_s
            ),
        ),
        ("work", format!("{} per token, {}/s", flops(f.flops_per_token), flops(f.model_flops_per_s))),
        ("matmul", format!("{}/s, the ceiling", flops(f.matmul_flops_per_s))),
        ("MFU", format!("{:.1} %", f.mfu * 100.0)),
        ("loss", format!("{:.4}, then {:.4}", f.loss_first, f.loss_last)),
    ];
    rows.extend(peak(f.peak_rss_mb));
    rows.extend(f.gpu_mb.map(|mb| ("GPU memory", format!("{mb:.0} MiB"))));
    let where_to = place(&f.device, f.threads);
    let beside = f.quantization.map(|packed| format!(" beside matrices in {}", packed.name())).unwrap_or_default();
    let on = match &f.lora_modules[..] {
        [] => String::new(),
        some => format!(" on {}", some.join(", ")),
    };
    let head = format!(
        "{}: {} parameters, {} × {} tokens per step, {}, {where_to}{}{}",
        f.shape,
        count(f.params as f64),
        f.batch,
        f.seq,
        f.optimizer,
        if f.recompute == Recompute::Block { ", blocks recomputed" } else { "" },
        f.lora_rank.map(|r| format!(", adapters of width {r}{on} alone trained{beside}")).unwrap_or_default()
    );
    format!("{head}\n{}", pairs(&rows))
}

/// The model to decode with, and how.
fn decode_subject(arguments: &BenchDecodeArguments) -> anyhow::Result<(Subject, DecodeOptions)> {
    let BenchDecodeArguments { over, context, new, way, weights } = arguments;
    let weights = super::packing(weights)?;
    let positions = context.iter().max().map_or(1, |longest| longest.saturating_add(*new));
    let (subject, ways, cache_dtype) = decoding(over, positions, Ways { asked: way, auto: false })?;
    let (contexts, new, batch, threads) = (context.clone(), *new, over.batch, over.threads);
    Ok((subject, DecodeOptions { batch, contexts, new, ways, cache_dtype, weights, threads }))
}

/// The forms that are asked for, and whether the choice between them is one of them.
struct Ways<'a> {
    asked: &'a [String],
    auto: bool,
}

/// A model of a directory or a shape, for sequences of so many tokens, with the ways to be measured of it, all where none is asked for, and
/// what these need.
fn decoding(
    over: &BenchCacheArguments,
    positions: usize,
    ways: Ways,
) -> anyhow::Result<(Subject, Vec<Form>, CacheDtype)> {
    let BenchCacheArguments { model, shape, batch, cache_dtype, threads: _, json: _ } = over;
    let wrong = |flag: &str, value: &str, e: &dyn std::fmt::Display| WrongUse(format!("{flag} {value}: {e}"));
    let cache_dtype: CacheDtype = cache_dtype.parse().map_err(|e| wrong("--cache-dtype", cache_dtype, &e))?;
    let parsed = ways.asked.iter().map(|way| way.parse().map_err(|e| wrong("--way", way, &e)));
    let asked = parsed.collect::<Result<Vec<Form>, _>>()?;
    let device = Device::flex();
    let mut subject = match model {
        Some(path) => {
            let model = super::load_model(path, &device)?;
            Subject { name: path.display().to_string(), model, fused: Vec::new() }
        }
        None => Subject::shape(shape, *batch, positions)?,
    };
    let attention = subject.model.config.attention();
    let mut forms = vec![Form::Expanded];
    forms.extend(attention.latent().map(|_| Form::Absorbed));
    forms.extend(attention.fuses().then_some(Form::Fused));
    let known = |way: &Form| forms.contains(way) || ways.auto && *way == Form::Auto;
    if let Some(way) = asked.iter().find(|way| !known(way)) {
        let known: Vec<String> = forms.iter().map(Form::to_string).collect();
        let name = subject.model.config.attention_name();
        return Err(WrongUse(format!("--way {way}: {name} attention decodes in: {}", known.join(", "))).into());
    }
    let asked = if asked.is_empty() { forms } else { asked };
    if asked.contains(&Form::Fused) {
        subject.fused = lowkey_export::export::fused_layers(&subject.model, &device)?;
    }
    Ok((subject, asked, cache_dtype))
}

/// The model whose prompts are measured, and how.
fn prefill_subject(arguments: &BenchPrefillArguments) -> anyhow::Result<(Subject, PrefillOptions)> {
    let BenchPrefillArguments { over, context, rounds, chunk, way } = arguments;
    let positions = context.iter().max().copied().unwrap_or(1);
    let (subject, ways, cache_dtype) = decoding(over, positions, Ways { asked: way, auto: true })?;
    let (contexts, rounds, batch, chunk, threads) = (context.clone(), *rounds, over.batch, *chunk, over.threads);
    Ok((subject, PrefillOptions { batch, contexts, chunk, rounds, ways, cache_dtype, threads }))
}

fn prefill_text(f: &PrefillFigures) -> String {
    let row = |r: &PrefillRow| {
        vec![
            r.context.to_string(),
            format!("{:<8}", r.way),
            format!("{:.0}", r.tokens_per_s),
            format!("{:.1}", r.ms),
            format!("{:.1}..{:.1}", r.ms_min, r.ms_max),
            format!("{:.0}", r.training_tokens_per_s),
            format!("{:.2}", r.ratio),
            bytes(r.cache_bytes),
            r.peak_rss_mb.map_or_else(String::new, |mb| format!("{mb:.0} MiB")),
        ]
    };
    let header = ["context", "way     ", "tokens/s", "ms", "range", "training", "ratio", "cache", "peak memory"];
    let rows: Vec<Vec<String>> = f.rows.iter().map(row).collect();
    let machine = format!("{:.1} GFLOP/s of matrix products, {} threads", f.matmul_flops_per_s / 1e9, f.threads);
    let mut facts = vec![("machine", machine), ("cache", f.cache_dtype.clone())];
    if let Some(positions) = f.max_position_embeddings {
        facts.push(("note", format!("max_position_embeddings raised to {positions} for this measurement")));
    }
    let head = format!(
        "{}: {} parameters, {} prompts at a time, in chunks of {} tokens",
        f.model,
        count(f.params as f64),
        f.batch,
        f.chunk
    );
    format!("{head}\n{}\n{}", pairs(&facts), table(&header, &rows))
}

fn decode_text(f: &DecodeFigures) -> String {
    let rate = |per_s: f64, unit: &str| format!("{:.1} {unit}", per_s / 1e9);
    let row = |r: &DecodeRow| {
        vec![
            r.context.to_string(),
            format!("{:<8}", r.way),
            format!("{:.1}", r.tokens_per_s),
            format!("{:.2}", r.step_ms),
            bytes(r.bytes_per_token as usize),
            count(r.flops_per_token),
            rate(r.bytes_per_s, ""),
            rate(r.flops_per_s, ""),
            format!("{:<10}", r.bound),
            format!("{:.0} %", r.bound_fraction * 100.0),
        ]
    };
    let header =
        ["context", "way     ", "tokens/s", "ms/step", "reads", "FLOPs", "GB/s", "GFLOP/s", "bound     ", "of it"];
    let rows: Vec<Vec<String>> = f.rows.iter().map(row).collect();
    let mut caches: Vec<String> = Vec::new();
    for r in &f.rows {
        let text = format!("{} at {}", bytes(r.cache_bytes), r.context);
        if !caches.contains(&text) {
            caches.push(text);
        }
    }
    let mut facts = vec![
        (
            "machine",
            format!(
                "{} read from memory, {} of matrix products, {} threads",
                rate(f.memory_bytes_per_s, "GB/s"),
                rate(f.matmul_flops_per_s, "GFLOP/s"),
                f.threads
            ),
        ),
        ("cache", format!("{}, {} numbers per token; {}", f.cache_dtype, f.cache_numbers_per_token, caches.join(", "))),
    ];
    if f.weights != "f32" {
        facts.push(("weights", format!("{}, but for the maps of latents", f.weights)));
    }
    if let Some(positions) = f.max_position_embeddings {
        facts.push(("note", format!("max_position_embeddings raised to {positions} for this measurement")));
    }
    facts.extend(peak(f.peak_rss_mb));
    let head = format!("{}: {} parameters, {} sequences at a time", f.model, count(f.params as f64), f.batch);
    format!("{head}\n{}\n{}", pairs(&facts), table(&header, &rows))
}

fn ops_text(f: &OpsFigures) -> String {
    let ms = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.2}"));
    // A GPU's kernels have their size in their name, and no telling which of them belong to the way back.
    let on_gpu = f.ops.iter().all(|op| op.size.is_empty());
    let row = |op: &OpFigures| {
        let mut row = vec![op.name.to_string(), op.calls.to_string()];
        if !on_gpu {
            row.insert(1, op.size.clone());
            row.extend([ms(op.forward_ms), ms(op.backward_ms)]);
        }
        row.extend([
            ms(Some(op.ms)),
            op.rate.zip(op.unit).map_or_else(String::new, |(rate, unit)| format!("{rate:.1} {unit:<8}")),
            format!("{:.1} %", op.share * 100.0),
        ]);
        row
    };
    let header: &[&str] = if on_gpu {
        &["kernel", "launches", "ms/step", "rate         ", "share"]
    } else {
        &["operation", "size", "calls", "forward", "backward", "ms/step", "rate         ", "share"]
    };
    let rows: Vec<Vec<String>> = f.ops.iter().map(row).collect();
    format!(
        "{}: {} × {} tokens per step, {}; a step takes {:.1} ms; matrix products {}/s\n{}",
        f.shape,
        f.batch,
        f.seq,
        place(&f.device, f.threads),
        f.step_ms,
        flops(f.matmul_flops_per_s),
        table(header, &rows)
    )
}

/// What a step was computed on.
fn place(device: &str, threads: usize) -> String {
    if device == "cpu" { format!("{threads} threads") } else { device.to_owned() }
}
