//! `lowkey bench`.

use lowkey_model::Recompute;
use lowkey_train::bench::{
    self, DecodeFigures, DecodeOptions, OpFigures, OpsFigures, OpsOptions, TrainFigures, TrainOptions,
};

use crate::cli::{BenchCommand, BenchDecodeArguments, BenchOpsArguments, BenchStepArguments, BenchTrainArguments};
use crate::output::{bytes, count, pairs, say, say_json, table};
use crate::progress::{Measuring, spaced};

pub(crate) fn bench(command: BenchCommand) -> anyhow::Result<()> {
    let bar = Measuring::new();
    let observe = &mut |p: bench::Progress| bar.show(p.doing, p.done, p.of);
    match command {
        BenchCommand::Train(BenchTrainArguments { step, steps, warmup, json }) => {
            let figures = bench::train(&options(step, steps, warmup), observe);
            report(bar, figures, json, train_text)
        }
        BenchCommand::Decode(BenchDecodeArguments { shape, context, new, batch, way, threads, json }) => {
            let figures = bench::decode(&DecodeOptions { shape, batch, context, new, way, threads }, observe);
            report(bar, figures, json, decode_text)
        }
        BenchCommand::Ops(BenchOpsArguments { step, steps, warmup, json }) => {
            let figures = bench::ops(&OpsOptions { step: options(step, steps, warmup) }, observe);
            report(bar, figures, json, ops_text)
        }
    }
}

fn options(step: BenchStepArguments, steps: usize, warmup: usize) -> TrainOptions {
    let BenchStepArguments { shape, batch, seq, threads, optimizer, recompute } = step;
    let recompute = if recompute { Recompute::Block } else { Recompute::None };
    TrainOptions { shape, batch, seq, threads, steps, warmup, optimizer, recompute }
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
                "{:.1} ms ({:.1}..{:.1}), median of {} after {}",
                f.step_ms, f.step_ms_min, f.step_ms_max, f.steps, f.warmup
            ),
        ),
        ("work", format!("{} per token, {}/s", flops(f.flops_per_token), flops(f.model_flops_per_s))),
        ("matmul", format!("{}/s, the ceiling", flops(f.matmul_flops_per_s))),
        ("MFU", format!("{:.1} %", f.mfu * 100.0)),
        ("loss", format!("{:.4}, then {:.4}", f.loss_first, f.loss_last)),
    ];
    rows.extend(peak(f.peak_rss_mb));
    let head = format!(
        "{}: {} parameters, {} × {} tokens per step, {}, {} threads{}",
        f.shape,
        count(f.params as f64),
        f.batch,
        f.seq,
        f.optimizer,
        f.threads,
        if f.recompute == Recompute::Block { ", blocks recomputed" } else { "" }
    );
    format!("{head}\n{}", pairs(&rows))
}

fn decode_text(f: &DecodeFigures) -> String {
    let rate = |per_s: f64| format!("{:.2} GB/s", per_s / 1e9);
    let mut rows = vec![
        ("per token", format!("{:.3} ms, {:.1} tokens/s", f.ms_per_token, f.tokens_per_s)),
        ("step", format!("{:.3} ms ({:.3}..{:.3}), median of {}", f.step_ms, f.step_ms_min, f.step_ms_max, f.new)),
        ("prefill", format!("{:.0} tokens/s", f.prefill_tokens_per_s)),
        ("cache", format!("{} numbers per token, {} in all", f.cache_numbers_per_token, bytes(f.cache_bytes))),
        ("reads", format!("{} per token, {}", bytes(f.bytes_per_token as usize), rate(f.bytes_per_s))),
        ("memory", format!("{}, of which {:.0} % are used", rate(f.memory_bytes_per_s), f.bandwidth_fraction * 100.0)),
    ];
    rows.extend(peak(f.peak_rss_mb));
    let head = format!(
        "{}: {} parameters, {}, {} × {} tokens in the cache, {} threads",
        f.shape,
        count(f.params as f64),
        f.way,
        f.batch,
        f.context,
        f.threads
    );
    format!("{head}\n{}", pairs(&rows))
}

fn ops_text(f: &OpsFigures) -> String {
    let ms = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.2}"));
    let row = |op: &OpFigures| {
        vec![
            op.name.to_string(),
            op.size.clone(),
            op.calls.to_string(),
            ms(op.forward_ms),
            ms(op.backward_ms),
            ms(Some(op.ms)),
            op.rate.zip(op.unit).map_or_else(String::new, |(rate, unit)| format!("{rate:.1} {unit:<8}")),
            format!("{:.1} %", op.share * 100.0),
        ]
    };
    let header = ["operation", "size", "calls", "forward", "backward", "ms/step", "rate         ", "share"];
    let rows: Vec<Vec<String>> = f.ops.iter().map(row).collect();
    format!(
        "{}: {} × {} tokens per step, {} threads; a step takes {:.1} ms; matrix products {}/s\n{}",
        f.shape,
        f.batch,
        f.seq,
        f.threads,
        f.step_ms,
        flops(f.matmul_flops_per_s),
        table(&header, &rows)
    )
}
