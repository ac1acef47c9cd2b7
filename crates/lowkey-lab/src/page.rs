//! The report as one HTML page that needs nothing beside it: the answer first, then what it rests on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::axis::short;
use crate::fit::PowerLaw;
use crate::html::{escaped, table};
use crate::plot::{Plot, Point, Series, Style};
use crate::stats::Mean;
use crate::study::{Arm, Study};
use crate::summary::{ArmSummary, Summary};
use crate::verdict::line;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#111}\
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}.question{font-size:1.1rem;color:#333}\
.verdict{border-left:4px solid #0072b2;background:#f3f7fa;padding:.6rem 1rem;margin:1rem 0}.verdict ul{margin:0;padding-left:1.1rem}\
table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums}\
th,td{white-space:nowrap;padding:.2rem .45rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}\
figure{margin:1rem 0}figure svg{max-width:100%;height:auto}figcaption{font-size:.85rem;color:#444}code{font-size:.85rem}\
.scroll{overflow-x:auto}@media print{body{margin:0;max-width:none}figure,tr{break-inside:avoid}}";

/// Name of the curve of arms that differ in the axis alone.
const MEASURED: &str = "measured";

/// The report.
pub(crate) fn page(study: &Study, summary: &Summary) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>{name}</title>\n<style>{STYLE}</style></head>\n\
         <body>\n<h1>{name}</h1>\n<p class=\"question\">{question}</p>\n<div class=\"verdict\"><ul>\n",
        name = escaped(&study.name),
        question = escaped(&study.question)
    );
    for sentence in &summary.verdict {
        let _ = writeln!(out, "<li>{}</li>", escaped(sentence));
    }
    let _ = write!(
        out,
        "</ul></div>\n<p>{}: <code>{}</code>. {} of {} runs are finished. Intervals are Student's \
         at {} % over seeds, each for itself; differences are to {} in pairs of the same seed; <em>detectable</em> is the true difference that \
         would be found in four of five repetitions.</p>\n",
        study.rule_is(),
        escaped(&serde_json::to_string(&study.rule).unwrap_or_default()),
        summary.finished,
        summary.planned,
        study.confidence() * 100.0,
        escaped(&study.arms[study.baseline].name),
    );
    out += &arms_table(study, summary);
    let drawing = Drawing { study, summary };
    let sections = [
        drawing.over_x(),
        drawing.over_cache(),
        drawing.by_class(),
        drawing.learning_curves(),
        drawing.spectra(),
        drawing.decoding(),
        drawing.decoding_speed(),
    ];
    out += &sections.into_iter().flatten().collect::<String>();
    out + "</body>\n</html>\n"
}

fn figure(title: &str, plot: &Plot, caption: &str) -> String {
    let (title, caption) = (escaped(title), escaped(caption));
    format!("<h2>{title}</h2>\n<figure>\n{}<figcaption>{caption}</figcaption></figure>\n", plot.svg())
}

fn plus_minus(mean: Option<Mean>, sign: bool) -> String {
    let Some(Mean { mean, half, .. }) = mean else { return "—".into() };
    let mean = if sign { format!("{mean:+.4}") } else { format!("{mean:.4}") };
    half.map_or(mean.clone(), |half| format!("{mean} ± {half:.4}"))
}

fn arms_table(study: &Study, summary: &Summary) -> String {
    let number = |x: Option<f64>| x.map_or_else(|| "—".into(), |x| format!("{x:.4}"));
    let rows = summary.arms.iter().map(|ArmSummary { arm, metric, difference, .. }| {
        vec![
            arm.name.clone(),
            metric.map_or(0, |m| m.n).to_string(),
            plus_minus(*metric, false),
            number(metric.and_then(|m| m.sd)),
            plus_minus(*difference, true),
            number(difference.and_then(|d| d.detectable)),
            arm.parameters.to_string(),
            arm.mismatch.map_or_else(|| "—".into(), |m| format!("{:+.2} %", m * 100.0)),
            arm.cache_bytes_per_token.to_string(),
        ]
    });
    let header = [
        "arm",
        "seeds",
        &study.metric,
        "sd",
        "difference",
        "detectable",
        "parameters",
        "mismatch",
        "cache B/token (f32)",
    ];
    table(&header, rows)
}

struct Drawing<'a> {
    study: &'a Study,
    summary: &'a Summary,
}

impl Drawing<'_> {
    fn plot(&self, x_label: &str, y_label: &str, series: Vec<Series>) -> Plot {
        Plot {
            x_label: x_label.into(),
            y_label: y_label.into(),
            log_x: true,
            log_y: false,
            x_ticks: Vec::new(),
            series,
        }
    }

    fn mean(&self, values: &BTreeMap<u64, f64>) -> Option<Mean> {
        Mean::of(&values.values().copied().collect::<Vec<_>>(), self.study.confidence())
    }

    /// The prefixes of elastic arms, as points over their rank.
    fn elastic(&self, look: usize, x: impl Fn(usize, usize) -> Option<f64>) -> Vec<Series> {
        let mut found = Vec::new();
        for (arm, section) in self.study.arms.iter().enumerate() {
            let points: Vec<Point> = self
                .study
                .prefixes(arm)
                .into_iter()
                .filter_map(|(rank, values)| point(x(arm, rank)?, self.mean(&values)?))
                .collect();
            if !points.is_empty() {
                let name = format!("{}, cut to a prefix", section.name);
                found.push(Series { name, look: look + found.len(), style: Style::Hollow, points });
            }
        }
        found
    }

    /// The metric over the axis of the experiment, with what theory and the fit say.
    fn over_x(&self) -> Option<String> {
        let study = self.study;
        let with_x: Vec<&ArmSummary> = self.summary.arms.iter().filter(|row| row.arm.x.is_some()).collect();
        let mut groups: BTreeMap<String, Vec<Point>> = BTreeMap::new();
        for row in &with_x {
            if let (Some(x), Some(mean)) = (row.arm.x, row.metric) {
                groups.entry(self.group(row)).or_default().extend(point(x, mean));
            }
        }
        let ticks: BTreeSet<u64> = with_x.iter().filter_map(|row| row.arm.x).map(f64::to_bits).collect();
        let ticks: Vec<f64> = ticks.into_iter().map(f64::from_bits).collect();
        if ticks.len() < 2 {
            return None;
        }
        let (least, most) = (ticks.first().copied()?, ticks.last().copied()?);
        // A logarithm has no 0, and theories of straight lines look like it on straight axes only.
        let log_x = least > 0.0 && study.theory.is_empty();
        let mut series: Vec<Series> = Vec::new();
        for (i, (name, mut points)) in groups.into_iter().enumerate() {
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            series.push(Series { name, look: i + 1, style: Style::Both, points });
        }
        series.extend(self.elastic(series.len() + 1, |_, rank| Some(rank as f64)));
        for (i, theory) in study.theory.iter().enumerate() {
            let inside = theory.points.iter().map(|(x, _)| *x).filter(|x| least < *x && *x < most);
            let corners = std::iter::once(least).chain(inside).chain([most]);
            let points = corners.filter_map(|x| Some(Point::new(x, line(&theory.points, x)?))).collect();
            let look = if i == 0 { 0 } else { series.len() + 1 };
            series.push(Series { name: theory.name.clone(), look, style: Style::Dashed, points });
        }
        let mut caption = format!("{} over {}. {}", study.metric, self.axis(), study.knee(&self.summary.arms, 1.0));
        if study.theory.is_empty()
            && study.lower_is_better
            && let Some(law) = self.law(&with_x)
        {
            let steps = (0..=60).map(|i| least * (most / least).powf(f64::from(i) / 60.0));
            let points = steps.map(|x| Point::new(x, law.at(x))).collect();
            series.push(Series { name: "L∞ + a·r^−α".into(), look: 0, style: Style::Dashed, points });
            let interval = |found: Option<(f64, f64)>, digits: usize| {
                found.map_or_else(String::new, |(low, high)| format!(" ({low:.digits$} to {high:.digits$})"))
            };
            let told = match law.floor_interval {
                Some(_) => "95 % by resampling seeds".to_string(),
                None if law.seeds == 1 => "no interval from one seed".to_string(),
                None if law.seeds == 2 => "no interval from two seeds".to_string(),
                None => "no interval, as many a resample of the seeds follows no such law".to_string(),
            };
            let _ = write!(
                caption,
                " Fit: L∞ = {:.4}{}, a = {:.3}, α = {:.2}{}; {told}.",
                law.floor,
                interval(law.floor_interval, 4),
                law.factor,
                law.exponent,
                interval(law.exponent_interval, 2)
            );
        }
        let mut plot = self.plot(&self.axis(), &study.metric, series);
        (plot.log_x, plot.x_ticks) = (log_x, ticks);
        Some(figure(&format!("{} over {}", study.metric, self.axis()), &plot, &caption))
    }

    /// Name of the axis.
    fn axis(&self) -> String {
        let key = self.study.x.as_deref().unwrap_or("x");
        key.rsplit('.').next().unwrap_or(key).to_string()
    }

    /// What an arm has in common with the others of its curve: all that its name says beside the axis.
    fn group(&self, row: &ArmSummary) -> String {
        let own = format!("{}-", self.axis());
        let rest: Vec<&str> = row.arm.name.split('.').filter(|part| !part.starts_with(&own)).collect();
        if rest.is_empty() { MEASURED.into() } else { rest.join(", ") }
    }

    fn law(&self, rows: &[&ArmSummary]) -> Option<PowerLaw> {
        let arms: Vec<(f64, BTreeMap<u64, f64>)> = rows
            .iter()
            .filter(|row| self.group(row) == MEASURED)
            .filter_map(|row| {
                let arm = self.study.arms.iter().position(|arm| arm.name == row.arm.name)?;
                Some((row.arm.x?, self.study.values(arm)))
            })
            .collect();
        let ranks: Vec<f64> = arms.iter().map(|(x, _)| *x).collect();
        let of_seed =
            |seed: &u64| arms.iter().map(|(_, values)| values.get(seed).copied()).collect::<Option<Vec<f64>>>();
        let losses: Vec<Vec<f64>> = self.study.seeds.iter().filter_map(of_seed).collect();
        PowerLaw::of(&ranks, &losses)
    }

    /// The metric against what a token costs in the cache, and which arms nothing beats in both.
    fn over_cache(&self) -> Option<String> {
        let study = self.study;
        let rows: Vec<(&ArmSummary, Mean)> =
            self.summary.arms.iter().filter_map(|row| Some((row, row.metric?))).collect();
        let costs: BTreeSet<usize> = rows.iter().map(|(row, _)| row.arm.cache_bytes_per_token).collect();
        if costs.len() < 2 {
            return None;
        }
        let cost = |row: &ArmSummary| row.arm.cache_bytes_per_token as f64;
        let mut series = Vec::new();
        let mut on_axis: BTreeMap<String, Vec<Point>> = BTreeMap::new();
        for (row, mean) in rows.iter().filter(|(row, _)| row.arm.x.is_some()) {
            on_axis.entry(self.group(row)).or_default().extend(point(cost(row), *mean));
        }
        for (group, points) in on_axis {
            let name = if group == MEASURED { self.axis() } else { group };
            series.push(Series { name, look: series.len() + 1, style: Style::Marks, points });
        }
        for (row, mean) in rows.iter().filter(|(row, _)| row.arm.x.is_none()) {
            let points = point(cost(row), *mean).into_iter().collect();
            series.push(Series { name: row.arm.name.clone(), look: series.len() + 1, style: Style::Marks, points });
        }
        // One number of a latent in each layer, from the arms' own figures.
        series.extend(self.elastic(series.len() + 1, |arm, rank| {
            let arm = &study.arms[arm];
            let of_rank = |other: &&Arm| other.x == Some(rank as f64) && other.name != arm.name;
            study.arms.iter().find(of_rank).map(|other| other.cache_bytes_per_token as f64)
        }));
        let mut caption = String::from("f32 caches.");
        for (format, bytes) in [
            ("int8", (|arm| arm.int8_bytes_per_token) as fn(&Arm) -> usize),
            ("int4", |arm| arm.int4_bytes_per_token()),
        ] {
            let points = self.quantised(format, bytes);
            if !points.is_empty() {
                let look = series.len() + 1;
                series.push(Series { name: format!("cache in {format}"), look, style: Style::Hollow, points });
                caption =
                    "Filled: f32 caches. Hollow: the same models with caches in fewer bits, with a scale for every \
                           token; int4 is simulated."
                        .into();
            }
        }
        let mut all: Vec<Point> = series.iter().flat_map(|series| series.points.iter().copied()).collect();
        all.sort_by(|a, b| a.x.total_cmp(&b.x).then(a.y.total_cmp(&b.y)));
        let mut front: Vec<Point> = Vec::new();
        for at in all {
            let better = |best: &Point| if study.lower_is_better { at.y < best.y } else { at.y > best.y };
            if front.last().is_none_or(better) {
                front.push(Point { interval: None, ..at });
            }
        }
        series.push(Series { name: "Pareto front".into(), look: 0, style: Style::Dashed, points: front });
        let plot = self.plot("cache bytes per token", &study.metric, series);
        Some(figure(&format!("{} against cache bytes", study.metric), &plot, &caption))
    }

    /// The metric with quantised caches: the change of the loss on top of the metric, at the bytes of that format.
    fn quantised(&self, format: &str, bytes: fn(&Arm) -> usize) -> Vec<Point> {
        let study = self.study;
        if !matches!(study.metric.as_str(), "gap" | "val_loss") {
            return Vec::new();
        }
        let arms = study.arms.iter().enumerate().filter_map(|(i, arm)| {
            let quantised = study.values_of(i, &format!("{format}.val_loss"));
            let (float, metric) = (study.values_of(i, "val_loss"), study.values(i));
            let moved: BTreeMap<u64, f64> = quantised
                .iter()
                .filter_map(|(seed, loss)| Some((*seed, metric.get(seed)? + loss - float.get(seed)?)))
                .collect();
            point(bytes(arm) as f64, self.mean(&moved)?)
        });
        arms.collect()
    }

    /// Which tokens the arms are worse at, against the baseline.
    fn by_class(&self) -> Option<String> {
        let study = self.study;
        let classes: BTreeSet<&str> = study
            .runs
            .iter()
            .flat_map(|run| run.metrics.keys())
            .filter_map(|name| name.strip_prefix("class.")?.strip_suffix(".gap"))
            .collect();
        if classes.is_empty() {
            return None;
        }
        let header: Vec<&str> = std::iter::once("arm").chain(classes.iter().copied()).collect();
        let rows = study.arms.iter().enumerate().map(|(i, arm)| {
            let cell = |class: &&str| {
                let figure = format!("class.{class}.gap");
                let (own, base) = (study.values_of(i, &figure), study.values_of(study.baseline, &figure));
                if i == study.baseline {
                    return self.mean(&own).map_or_else(|| "—".into(), |mean| format!("{:.4}", mean.mean));
                }
                let pairs: BTreeMap<u64, f64> =
                    own.iter().filter_map(|(seed, v)| Some((*seed, v - base.get(seed)?))).collect();
                match self.mean(&pairs) {
                    Some(mean) if mean.interval().is_some_and(|(low, high)| low > 0.0 || high < 0.0) => {
                        format!("{:+.4} *", mean.mean)
                    }
                    Some(mean) => format!("{:+.4}", mean.mean),
                    None => "—".into(),
                }
            };
            let name = if i == study.baseline { format!("{} (its own gap)", arm.name) } else { arm.name.clone() };
            std::iter::once(name).chain(classes.iter().map(cell)).collect()
        });
        Some(format!(
            "<h2>By class of token: what recall costs</h2>\n{}<p>Nats per token above the true entropy: of the baseline itself, and \
             of the others the paired difference to it; * where its interval excludes 0, each for itself, so that of twenty such marks one may be chance. Classes that ask for what stands far \
             above (name, detail, fact, answer) against those that do not (syntax, agreement) are the tax on recall.</p>\n",
            table(&header, rows)
        ))
    }

    fn learning_curves(&self) -> Option<String> {
        let curves = self.study.arms.iter().enumerate().filter_map(|(i, arm)| {
            let mut sums: BTreeMap<u64, (f64, usize)> = BTreeMap::new();
            for (step, loss) in self.study.runs.iter().filter(|run| run.arm == i).flat_map(|run| &run.curve) {
                let sum = sums.entry(*step).or_default();
                (sum.0, sum.1) = (sum.0 + loss, sum.1 + 1);
            }
            let points: Vec<Point> =
                sums.iter().map(|(step, (sum, n))| Point::new(*step as f64, sum / *n as f64)).collect();
            let style = if i < 7 { Style::Line } else { Style::Dashed };
            (points.len() > 1).then(|| Series { name: arm.name.clone(), look: i, style, points })
        });
        let series: Vec<Series> = curves.take(14).collect();
        if series.is_empty() {
            return None;
        }
        let positive = series.iter().flat_map(|series| &series.points).all(|point| point.y > 0.0);
        let mut plot = self.plot("step", "held-out loss", series);
        (plot.log_x, plot.log_y) = (false, positive);
        let caption = "Mean over seeds, on the part of the held-out split that is looked at during a run.";
        Some(figure("Learning curves", &plot, caption))
    }

    /// Spectra of the widest latents, of the first seed.
    fn spectra(&self) -> Option<String> {
        let widest =
            |run: &&crate::study::RunResult| (run.spectra.first().map_or(0, Vec::len), std::cmp::Reverse(run.seed));
        let run = self.study.runs.iter().filter(|run| !run.spectra.is_empty()).max_by_key(widest)?;
        let series = run.spectra.iter().enumerate().map(|(layer, values)| {
            let most = values.first().copied().unwrap_or(1.0).max(f64::MIN_POSITIVE);
            // Below this a number is rounding.
            let kept = values.iter().take_while(|value| **value > 1e-9 * most);
            let points = kept.enumerate().map(|(i, value)| Point::new((i + 1) as f64, value / most)).collect();
            Series { name: format!("layer {layer}"), look: layer + 1, style: Style::Line, points }
        });
        let mut plot = self.plot("direction", "eigenvalue / largest", series.collect());
        (plot.log_x, plot.log_y) = (false, true);
        let rows = self.study.arms.iter().enumerate().filter_map(|(i, arm)| {
            let effective = self.mean(&self.study.values_of(i, "latent_effective_rank"))?;
            Some(vec![arm.name.clone(), plus_minus(Some(effective), false)])
        });
        let caption = format!(
            "Eigenvalues of the covariance of the normalised latent, {} seed {}, on a few held-out rows.",
            self.study.arms[run.arm].name, run.seed
        );
        let ranks = table(&["arm", "effective rank of the latent, mean over layers"], rows);
        Some(figure("Spectra of the latents", &plot, &caption) + &ranks)
    }

    /// What a decoded token reads, by context.
    fn decoding(&self) -> Option<String> {
        let contexts: Vec<usize> = self.study.arms.first()?.decode_bytes.iter().map(|(context, _)| *context).collect();
        if contexts.is_empty() {
            return None;
        }
        let header: Vec<String> =
            std::iter::once("arm".into()).chain(contexts.iter().map(|context| format!("at {context}"))).collect();
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let rows = self.study.arms.iter().map(|arm| {
            let cells =
                arm.decode_bytes.iter().map(|(_, bytes)| format!("{} MB", short((bytes / 1e4).round() / 100.0)));
            std::iter::once(arm.name.clone()).chain(cells).collect()
        });
        Some(format!(
            "<h2>Bytes that a decoded token reads</h2>\n{}<p>Weights and cache in f32 at batch 1, by tokens in the cache; MLA in its \
             absorbed form. <code>lowkey lab report --decode 512,4096</code> measures the tokens per second that come of it.</p>\n",
            table(&header, rows)
        ))
    }

    /// Decode speed on the machine that made the report.
    fn decoding_speed(&self) -> Option<String> {
        let arms = || self.study.arms.iter();
        let contexts: BTreeSet<usize> =
            arms().flat_map(|arm| &arm.decode_tokens_per_s).map(|(context, _)| *context).collect();
        if contexts.is_empty() {
            return None;
        }
        let header: Vec<String> =
            std::iter::once("arm".into()).chain(contexts.iter().map(|context| format!("at {context}"))).collect();
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let rows = arms().map(|arm| {
            let speeds: BTreeMap<usize, f64> = arm.decode_tokens_per_s.iter().copied().collect();
            let cells =
                contexts.iter().map(|at| speeds.get(at).map_or_else(|| "—".into(), |speed| format!("{speed:.0}")));
            std::iter::once(arm.name.clone()).chain(cells).collect()
        });
        Some(format!(
            "<h2>Decoded tokens per second</h2>\n{}<p>On the machine that made this page, caches in f32 at batch 1, by tokens in the \
             cache; MLA in its absorbed form.</p>\n",
            table(&header, rows)
        ))
    }
}

fn point(x: f64, mean: Mean) -> Option<Point> {
    mean.mean.is_finite().then(|| Point { x, y: mean.mean, interval: mean.interval() })
}

#[cfg(test)]
mod tests;
