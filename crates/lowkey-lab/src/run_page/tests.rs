use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;
use tempfile::TempDir;

use super::*;

const ENVIRONMENT: &str = r#"{"lowkey":"0.1.0","devices":[],"cores":2,"plan":{"parameters":1000,"train_flops_per_token":6000.0,
    "flops":1e9,"seconds":5.0,"matmul_flops_per_s":1e10,"train_bytes":1048576,"cache_bytes_latent":96,"cache_bytes_expanded":320}}"#;

fn folder(dir: &Path, name: &str, lr: &str, metrics: &str) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.join("checkpoints/step-000040")).unwrap();
    let run = format!(
        "[run]\nname = \"{name}\"\nseed = 1\n[optimizer]\nlr = {lr}\nbetas = [0.9, 0.95]\n[training]\nsteps = 40\n"
    );
    fs::write(path.join("run.toml"), run).unwrap();
    fs::write(path.join("environment.json"), ENVIRONMENT).unwrap();
    fs::write(path.join("metrics.jsonl"), metrics).unwrap();
    path
}

/// Lines of a run of so many steps, with an evaluation every tenth.
fn metrics(steps: u64) -> String {
    let line = |step: u64| {
        let loss = 5.0 / (step as f64).sqrt() + 0.123_456_789_012 * (step % 3) as f64;
        let mut line = serde_json::json!({
            "step": step, "tokens": step * 512, "time_s": step as f64 * 0.31, "train_loss": loss, "lr": 1e-3,
            "grad_norm": 1.0 + (step % 7) as f64, "tokens_per_s": 900.5, "mfu": 0.4, "epoch": 0.1
        });
        if step.is_multiple_of(10) {
            let more = serde_json::json!({
                "val_loss": loss + 0.1, "bits_per_byte": loss * 1.4, "gap": loss / 2.0, "max_attention_logit": 7.5,
                "class_gap": { "answer": 0.5 * loss, "<b>syntax": 0.1 }, "latent_effective_rank": [3.5, 4.25],
                "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0, "rewards/accuracies": 0.75,
                "kl": 0.01
            });
            line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        }
        format!("{line}\n")
    };
    (1..=steps).map(line).collect()
}

fn two() -> (TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let runs = vec![
        folder(dir.path(), "first", "0.001", &metrics(40)),
        folder(dir.path(), "second", "0.002", &metrics(30).replace("\"kl\":0.01", "\"kl\":null")),
    ];
    fs::write(
        runs[0].join("samples.jsonl"),
        "{\"step\":10,\"prompt\":\"Once\",\"text\":\" upon <i>a</i>\\ntime\"}\n{\"step\":20,\"prompt\":\"Once\",\"text\":\" more\"}\n\
         {\"step\":20,\"prompt\":\"Who?\",\"text\":\"<b>\",\"chat\":true}\n",
    )
    .unwrap();
    (dir, runs)
}

fn figures(page: &str) -> Value {
    let begin = "<script type=\"application/json\" id=\"figures\">";
    let from = page.find(begin).unwrap() + begin.len();
    let to = page[from..].find("</script>").unwrap() + from;
    serde_json::from_str(&page[from..to]).unwrap()
}

/// The value of a key, `key` or `key/part`, in each line of metrics.
fn written(path: &Path, key: &str, part: &str) -> BTreeMap<u64, f64> {
    let text = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let value = |line: &Value| match part.parse::<usize>() {
        Ok(i) => line[key][i].as_f64(),
        Err(_) if part.is_empty() => line[key].as_f64(),
        Err(_) => line[key][part].as_f64(),
    };
    lines.filter_map(|line| Some((line["step"].as_u64()?, value(&line)?))).collect()
}

#[test]
fn every_figure_of_the_page_is_one_of_the_metrics_to_the_last_bit() {
    let (_dir, runs) = two();
    let page = page(&runs).unwrap();
    let figures = figures(&page);
    let charts = figures["charts"].as_array().unwrap();
    let mut compared = 0;
    for (title, key) in [
        ("Training loss", "train_loss"),
        ("Held-out loss", "val_loss"),
        ("Held-out bits per byte", "bits_per_byte"),
        ("Gap to the true entropy", "gap"),
        ("Learning rate", "lr"),
        ("Gradient norm", "grad_norm"),
        ("Tokens per second", "tokens_per_s"),
        ("Model FLOPs utilisation", "mfu"),
        ("Largest attention logit", "max_attention_logit"),
        ("Reward of chosen answers", "rewards/chosen"),
        ("Reward of rejected answers", "rewards/rejected"),
        ("Margin between the two", "rewards/margins"),
        ("Pairs in the right order", "rewards/accuracies"),
        ("kl", "kl"),
    ] {
        let chart = charts.iter().find(|chart| chart["title"] == title).unwrap_or_else(|| panic!("{title}"));
        for series in chart["series"].as_array().unwrap() {
            let run = runs.iter().find(|run| run.ends_with(series["name"].as_str().unwrap())).unwrap();
            let (tokens, times) = (written(run, "tokens", ""), written(run, "time_s", ""));
            let drawn: BTreeMap<u64, f64> = series["points"]
                .as_array()
                .unwrap()
                .iter()
                .map(|point| {
                    let step = point[0].as_u64().unwrap();
                    assert_eq!((point[1].as_f64(), point[2].as_f64()), (Some(tokens[&step]), Some(times[&step])));
                    (step, point[3].as_f64().unwrap())
                })
                .collect();
            assert_eq!(drawn, written(run, key, ""), "{title}");
            compared += 1;
        }
    }
    // The other run's are no numbers.
    assert_eq!(compared, 2 * 14 - 1);
    for (title, key, part, name) in [
        ("Gap by class of token: first", "class_gap", "answer", "answer"),
        ("Gap by class of token: second", "class_gap", "<b>syntax", "<b>syntax"),
        ("Effective rank of the latents: second", "latent_effective_rank", "1", "layer 1"),
    ] {
        let chart = charts.iter().find(|chart| chart["title"] == title).unwrap_or_else(|| panic!("{title}"));
        let series = chart["series"].as_array().unwrap().iter().find(|series| series["name"] == name).unwrap();
        let drawn: Vec<f64> =
            series["points"].as_array().unwrap().iter().map(|point| point[3].as_f64().unwrap()).collect();
        let run = if title.ends_with("first") { &runs[0] } else { &runs[1] };
        assert_eq!(drawn, written(run, key, part).into_values().collect::<Vec<_>>());
    }
    // The tables say the same, to four places.
    for (step, value) in written(&runs[0], "val_loss", "") {
        assert!(page.contains(&format!("<td>{step}</td>")) && page.contains(&format!("<td>{value:.4}</td>")));
    }
}

#[test]
fn the_page_stands_alone_and_all_text_in_it_is_escaped() {
    let (dir, mut runs) = two();
    let evil = dir.path().join("evil");
    fs::create_dir(&evil).unwrap();
    let script = "</script><script>alert(1)</script><img src=http://x onerror=y>\\u001b[2J";
    fs::write(evil.join("run.toml"), format!("\"{script}\" = 1\n[run]\nname = \"{script}\"\n")).unwrap();
    let script = script.replace("\"", "");
    fs::write(
        evil.join("metrics.jsonl"),
        format!("{{\"step\":1,\"tokens\":5,\"{script}\":1.5,\"class_gap\":{{\"{script}\":2}},\"train_loss\":1e400}}\n{{\"step\":2,\"train_loss\":-1e308,\"{script}\":1e308}}\n"),
    )
    .unwrap();
    fs::write(evil.join("environment.json"), format!("{{\"{script}\":\"{script}\"}}")).unwrap();
    fs::write(evil.join("outcome.json"), format!("{{\"state\":\"failed\",\"step\":1,\"why\":\"{script}\"}}")).unwrap();
    fs::write(evil.join("samples.jsonl"), format!("{{\"step\":1,\"prompt\":\"{script}\",\"text\":\"{script}\"}}\n"))
        .unwrap();
    runs.push(evil);
    let page = page(&runs).unwrap();
    // Two scripts, ours, and nothing that asks for anything.
    assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2));
    for mark in ["<img", "src=\"", "url(", "@import", "href=\"http", "\u{1b}"] {
        assert!(!page.contains(mark), "{mark}");
    }
    assert!(
        page.contains("&lt;img src=http://x onerror=y&gt;\\x1b[2J")
            && page.contains("<q>Once</q> upon &lt;i&gt;a&lt;/i&gt;\ntime")
            // An answer stands beneath what it answers.
            && page.contains("<q>Who?</q></p><p>&lt;b&gt;</p>")
    );
    let html = &page[..page.find("<script").unwrap()];
    for tag in
        ["table", "figure", "h2", "h3", "ul", "li", "div", "svg", "g", "section", "dl", "p", "figcaption", "span"]
    {
        let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    assert!(!html.contains("NaN") && !html.contains("inf "));
}

#[test]
fn the_policy_lets_the_browser_run_this_script_and_nothing_else() {
    use sha2::{Digest, Sha256};
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let hash = Sha256::digest(SCRIPT.as_bytes());
    let mut encoded = String::new();
    for three in hash.chunks(3) {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let letter = if i > three.len() { b'=' } else { LETTERS[(bits >> (18 - 6 * i)) as usize & 63] };
            encoded.push(char::from(letter));
        }
    }
    assert_eq!(SCRIPT_HASH, format!("sha256-{encoded}"));
    assert!(!SCRIPT.contains("innerHTML") && !SCRIPT.contains("fetch"));
}

#[test]
fn runs_are_overlaid_and_told_apart_without_colours() {
    let (_dir, runs) = two();
    let page = page(&runs).unwrap();
    for x in ["tokens", "steps", "flops", "time"] {
        assert!(page.contains(&format!("id=\"x-{x}\"")) && page.contains(&format!("class=\"by-{x}\"")), "{x}");
    }
    let chart = &page[page.find("<figure id=\"f0\">").unwrap()..page.find("<figure id=\"f1\">").unwrap()];
    // Each with dashes and marks of its own, over four axes.
    assert_eq!(
        (chart.matches("class=\"curve c1 d0\"").count(), chart.matches("class=\"curve c2 d1\"").count()),
        (4, 4)
    );
    assert!(chart.contains("million FLOP") || chart.contains("MFLOP"), "{chart}");
    for text in
        ["<strong>first</strong>, finished", "optimizer.lr", "0.002", "What differs", "step 20", "<dt>betas</dt>"]
    {
        assert!(page.contains(text), "{text}");
    }
    // One run alone is one: nothing differs.
    let one = super::page(&runs[..1]).unwrap();
    assert!(!one.contains("What differs") && one.contains("<title>first</title>"));
    // Two of one name are told apart by their places.
    let twice = super::page(&[runs[0].clone(), runs[0].clone()]).unwrap();
    assert!(twice.contains(&format!("<strong>{}</strong> (first)", runs[0].display())));
}

#[test]
fn a_page_is_made_of_whatever_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let run = folder(dir.path(), "young", "1.0", "");
    for metrics in [
        "",
        "{\"step\":",
        "null\n[]\n{}\nnonsense\n",
        "{\"step\":1,\"train_loss\":null}\n",
        "{\"step\":1}\n{\"step\":1}\n",
        "{\"step\":18446744073709551615,\"tokens\":-5,\"time_s\":1e300,\"train_loss\":0}\n{\"step\":0,\"train_loss\":-3}\n",
    ] {
        fs::write(run.join("metrics.jsonl"), metrics).unwrap();
        let page = page(std::slice::from_ref(&run)).unwrap();
        assert!(page.contains("</html>") && page.contains("How to read this page"), "{metrics}");
        figures(&page);
    }
    fs::write(run.join("metrics.jsonl"), "{\"step\":1,\"train_loss\":4}\nbad\n{\"step\":2,\"train_loss\":null}\n{\"step\":3,\"train_loss\":3}\n{\"step\":1,\"train_loss\":5}\n").unwrap();
    let page = page(std::slice::from_ref(&run)).unwrap();
    assert!(
        page.contains("1 lines of metrics.jsonl are no steps") && page.contains("1 steps were written more than once")
    );
    assert!(page.contains("1 figures are no finite numbers"));
    assert!(super::page(&[]).is_err() && super::page(&vec![run; MOST_RUNS + 1]).is_err());
    let why = super::page(&[dir.path().to_path_buf()]).unwrap_err().to_string();
    assert!(why.contains("is no folder of a run"), "{why}");
}

#[test]
fn a_long_run_gives_a_short_page_that_says_what_it_shows() {
    let dir = tempfile::tempdir().unwrap();
    let spike = "{\"step\":7777,\"tokens\":7777,\"time_s\":7777,\"train_loss\":99.5}\n";
    let line = |step: u64| match step {
        7777 => spike.to_string(),
        _ => format!("{{\"step\":{step},\"tokens\":{step},\"time_s\":{step},\"train_loss\":{}}}\n", 2 + step % 5),
    };
    let run = folder(dir.path(), "long", "1.0", &(1..=20_000).map(line).collect::<String>());
    let page = page(&[run]).unwrap();
    assert!(page.len() < 200_000, "{}", page.len());
    assert!(
        page.contains(
            "Of up to 20000 points the first, the last, and the lowest and highest of each of 200 stretches."
        )
    );
    assert!(page.contains("means of 50 stretches") && page.contains("[7777,7777,7777,99.5]"));
}

#[test]
fn nothing_but_a_page_is_replaced_unless_it_is_named() {
    let (dir, runs) = two();
    let own = runs[0].join(REPORT);
    fs::write(&own, "<html>mine</html>").unwrap();
    let why = write(&runs[..1], None).unwrap_err().to_string();
    assert!(why.contains("is no page of lowkey's"), "{why}");
    fs::remove_file(&own).unwrap();
    for _ in 0..2 {
        assert_eq!(write(&runs[..1], None).unwrap(), own);
    }
    assert_eq!(write(&runs, None).unwrap(), dir.path().join(REPORT));
    let named = dir.path().join("named.html");
    fs::write(&named, "old").unwrap();
    write(&runs, Some(&named)).unwrap();
    assert_eq!(fs::read(&named).unwrap(), fs::read(dir.path().join(REPORT)).unwrap());
    #[cfg(unix)]
    {
        fs::remove_file(&own).unwrap();
        std::os::unix::fs::symlink(&named, &own).unwrap();
        assert!(write(&runs[..1], None).is_err());
    }
}
