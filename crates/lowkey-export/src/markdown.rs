//! The certificate as a page for people, which is written and verified with it.

use std::fmt::Write;
use std::path::Path;

use lowkey_files::{
    hash::{FileHash, sha256},
    printable, read, write,
};

use crate::certificate::{Certificate, JSON, LARGEST, MARKDOWN, TensorError};
use crate::error::{Error, Result};
use crate::plan::{LayerForm, LayerPlan};
use crate::target::Layout;

/// Text from elsewhere (a folder's name, a tensor's, a corpus') as a page shows it: one line that ends no cell, opens no tag and
/// closes no code.
pub(crate) fn words(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('|', "&#124;").replace('<', "&lt;").replace('`', "'")
}

impl Certificate {
    /// Writes it in both forms.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(JSON);
        let value = serde_json::to_value(self).map_err(|e| Error::file(&path, e.to_string()))?;
        // A line for each part: token ids one to a line would be pages.
        let lines: Vec<String> =
            value.as_object().into_iter().flatten().map(|(key, value)| format!("  \"{key}\": {value}")).collect();
        write(&path, format!("{{\n{}\n}}\n", lines.join(",\n")).as_bytes())?;
        Ok(write(&dir.join(MARKDOWN), markdown(self, &sha256(&path)?).as_bytes())?)
    }

    /// Whether the page beside this certificate is the one that was written with it, to the byte of both.
    pub(crate) fn has_its_page(&self, dir: &Path) -> Result<bool> {
        let page = dir.join(MARKDOWN);
        let text = read(&page, LARGEST)?;
        Ok(text == markdown(self, &sha256(&dir.join(JSON))?).as_bytes())
    }
}

/// Everything in [`Certificate`], as Markdown, with the SHA-256 of its file. A pure function of both: verification compares.
pub(crate) fn markdown(c: &Certificate, sha256: &str) -> String {
    let mut page = String::new();
    let text = |page: &mut String, line: &str| {
        page.push_str(line);
        page.push('\n');
    };
    let l = &c.evidence.logits;
    let (to, dtype) = (c.target.to, &c.target.dtype);
    text(&mut page, "# Certificate\n");
    let made =
        format!("`{}` was exported to **{to}** in **{dtype}** by lowkey {}.", words(&c.source.name), words(&c.lowkey));
    text(&mut page, &made);
    text(&mut page, "The figures below were computed from the written files. To compute them again:\n");
    let source = if to == Layout::Gguf { " --source MODEL" } else { "" };
    text(&mut page, &format!("```\nlowkey verify .{source}\n```\n"));

    text(&mut page, "## Behaviour\n");
    let sizes: Vec<String> = c.text.sequences.iter().map(|ids| ids.len().to_string()).collect();
    text(
        &mut page,
        &format!(
            "Text: {}; {} positions in sequences of {} tokens.\n",
            words(&c.text.description),
            l.positions,
            sizes.join(", ")
        ),
    );
    let change = l.perplexity_export / l.perplexity_source - 1.0;
    let rows = [
        [
            "max &#124;Δlogit&#124; / max &#124;logit&#124;".into(),
            format!("{:.3e}", l.max_relative),
            format!("≤ {:.1e}", c.bounds.logit),
        ],
        ["max &#124;Δlogit&#124;".into(), format!("{:.3e}", l.max_abs), String::new()],
        ["mean KL(source‖export), nats".into(), format!("{:.3e}", l.mean_kl), format!("≤ {:.1e}", c.bounds.kl)],
        [
            "same top token".into(),
            format!("{:.2} %", l.top1_agreement * 100.0),
            format!("≥ {:.2} %", c.bounds.top1 * 100.0),
        ],
        ["perplexity of the source".into(), format!("{:.6}", l.perplexity_source), String::new()],
        [
            "perplexity of the export".into(),
            format!("{:.6} ({change:+.2e})", l.perplexity_export),
            format!("± {:.1e}", c.bounds.perplexity),
        ],
    ];
    table(&mut page, ["figure", "found", "demanded"], &rows);

    text(&mut page, "\n## Greedy continuations\n");
    let demanded = if c.bounds.greedy {
        "must agree, but for ties within the bound of the logits"
    } else {
        "reported, not bounded"
    };
    text(&mut page, &format!("Token by token, through each one's own cache; {demanded}.\n"));
    let rows: Vec<[String; 3]> = c
        .evidence
        .greedy
        .iter()
        .enumerate()
        .map(|(i, g)| {
            let margin =
                g.margin.map_or_else(String::new, |m| format!("parts where the source prefers its token by {m:.1e}"));
            [
                format!("{} ({} prompt tokens)", i + 1, g.prompt.len()),
                format!("{} of {}", g.agree, g.source.len()),
                margin,
            ]
        })
        .collect();
    table(&mut page, ["continuation", "tokens that agree", ""], &rows);

    text(&mut page, "\n## Weights\n");
    text(
        &mut page,
        &format!(
            "Against the source's; max &#124;Δ&#124; / max &#124;w&#124; and ‖Δ‖ / ‖w‖ of the worst tensor. Demanded: ≤ {:.2e} and ≤ {:.2e}.\n",
            c.bounds.weight_max, c.bounds.weight_rms
        ),
    );
    let row =
        |name: &str, error: TensorError| [words(name), format!("{:.2e}", error.max), format!("{:.2e}", error.rms)];
    let rows: Vec<_> = c.evidence.weights.iter().map(|w| row(&w.part, w.error)).collect();
    table(&mut page, ["part", "max", "RMS"], &rows);
    if !c.evidence.products.is_empty() {
        text(&mut page, "\n## Split and fused products\n");
        text(&mut page, "Against the same product of the source's weights in f64.\n");
        let rows: Vec<_> = c.evidence.products.iter().map(|p| row(&p.tensor, p.error)).collect();
        table(&mut page, ["tensor", "max", "RMS"], &rows);
    }
    if !c.plan.is_empty() {
        text(&mut page, "\n## Plan\n");
        text(
            &mut page,
            "Attention of a layer, per decoded token. The form that reads the fewest bytes is chosen unless one is forced.\n",
        );
        plan(&mut page, &c.plan);
    }
    if !c.notes.is_empty() {
        text(&mut page, "\n## Notes\n");
        c.notes.iter().for_each(|note| text(&mut page, &format!("- {}", words(note))));
    }
    text(&mut page, "\n## Files\n");
    files(&mut page, "Export", &c.outputs);
    files(&mut page, &format!("\nSource `{}`", words(&c.source.name)), &c.source.files);
    text(&mut page, &format!("\nToken ids of the text and of the continuations: `{JSON}`, SHA-256 `{sha256}`."));
    page
}

fn plan(page: &mut String, plan: &[LayerPlan]) {
    let mut rows = Vec::new();
    let mut from = 0;
    while let Some(first) = plan.get(from) {
        // Equal layers share their rows.
        let same = plan[from..].iter().take_while(|p| p.form == first.form && p.costs == first.costs).count();
        let layers = if same == 1 { format!("{from}") } else { format!("{from}–{}", from + same - 1) };
        for cost in &first.costs {
            let chosen = match (cost.form == first.form, first.forced) {
                (false, _) => "",
                (true, true) => " (forced)",
                (true, false) => " (chosen)",
            };
            rows.push([
                format!("{layers}: {}{chosen}", cost.form),
                format!("{} weights, {} bytes", cost.weights, cost.bytes_per_token),
                format!("{} FLOPs", cost.flops_per_token),
            ]);
        }
        from += same;
    }
    table(page, ["layers, form", "read", "computed"], &rows);
    let fused = plan.iter().filter(|layer| layer.form == LayerForm::Fused).count();
    let _ = writeln!(page, "\n{fused} of {} layers are fused.", plan.len());
}

fn files(page: &mut String, title: &str, files: &[FileHash]) {
    let _ = writeln!(page, "{title}:\n");
    let rows: Vec<_> = files
        .iter()
        .map(|f| [format!("`{}`", words(&f.name)), f.bytes.to_string(), format!("`{}`", words(&f.sha256))])
        .collect();
    table(page, ["file", "bytes", "SHA-256"], &rows);
}

fn table(page: &mut String, header: [&str; 3], rows: &[[String; 3]]) {
    let _ = writeln!(page, "| {} |\n|---|---|---|", header.join(" | "));
    for row in rows {
        let _ = writeln!(page, "| {} |", row.join(" | "));
    }
}
