//! `lowkey bench` on steps of an instant: figures that fit together, whatever the machine's speed.

use serde_json::Value;

use crate::commands::{json, succeed};

/// The smallest step that the smallest shape allows.
const TINY: [&str; 10] = ["--batch", "2", "--seq", "32", "--steps", "2", "--warmup", "1", "--threads", "2"];

fn number(value: &Value, key: &str) -> f64 {
    let number = value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {value}"));
    assert!(number.is_finite(), "{key} in {value}");
    number
}

fn positive(value: &Value, key: &str) -> f64 {
    let number = number(value, key);
    assert!(number > 0.0, "{key} = {number}");
    number
}

/// Equal but for the digits that the figures are rounded to.
fn close(a: f64, b: f64) {
    assert!((a / b - 1.0).abs() < 1e-2, "{a} and {b}");
}

fn ascending(value: &Value, keys: [&str; 3]) {
    let [a, b, c] = keys.map(|key| positive(value, key));
    assert!(a <= b && b <= c, "{keys:?}: {a}, {b}, {c}");
}

#[test]
fn the_figures_of_training_fit_together() {
    let f = json(&[&["bench", "train", "--json"][..], &TINY].concat());
    assert_eq!((&f["what"], &f["shape"], &f["optimizer"]), (&"train".into(), &"d256".into(), &"adamw".into()));
    assert_eq!((&f["batch"], &f["seq"], &f["steps"], &f["warmup"]), (&2.into(), &32.into(), &2.into(), &1.into()));
    assert_eq!(f["params"], 6_647_424);
    // 6 · (weights that multiply) + 3 · layers · heads · (N + R + V) · seq, as by hand.
    assert_eq!(number(&f, "flops_per_token"), 6.0 * 5_595_136.0 + (3 * 6 * 8 * 80 * 32) as f64);
    ascending(&f, ["step_ms_min", "step_ms", "step_ms_max"]);
    ascending(&f, ["tokens_per_s_min", "tokens_per_s", "tokens_per_s_max"]);
    close(positive(&f, "tokens_per_s") * positive(&f, "step_ms"), 2.0 * 32.0 * 1e3);
    close(positive(&f, "model_flops_per_s"), number(&f, "tokens_per_s") * number(&f, "flops_per_token"));
    close(positive(&f, "mfu"), number(&f, "model_flops_per_s") / positive(&f, "matmul_flops_per_s"));
    // ln 4096 = 8.3 before the first step.
    assert!((number(&f, "loss_first") - 8.3).abs() < 0.5 && number(&f, "loss_last") < number(&f, "loss_first"));
    if cfg!(target_os = "linux") {
        // Weights, gradients and two moments at least.
        assert!(positive(&f, "peak_rss_mb") > 4.0 * 4.0 * 6.6);
    }
}

#[test]
fn the_figures_of_decoding_fit_together() {
    for (way, batch) in [("absorbed", 1.0), ("expanded", 2.0)] {
        let batch_text = batch.to_string();
        let arguments = ["--context", "40", "--new", "4", "--way", way, "--batch", &batch_text, "--threads", "2"];
        let f = json(&[&["bench", "decode", "--json"][..], &arguments].concat());
        assert_eq!((&f["what"], &f["way"], &f["context"]), (&"decode".into(), &way.into(), &40.into()));
        // Six layers of L + R.
        assert_eq!(f["cache_numbers_per_token"], 6 * (64 + 16));
        assert_eq!(positive(&f, "cache_bytes"), batch * 44.0 * 480.0 * 4.0);
        // All weights but the embedding, of which a row for each sequence; the cache half-way; rebuilt keys and values.
        let rebuilt = if way == "expanded" { 6.0 * 8.0 * (32.0 + 16.0 + 32.0) } else { 0.0 };
        let numbers = (6_647_424.0 - (4096.0 - batch) * 256.0) / batch + 42.0 * (480.0 + rebuilt);
        assert_eq!(positive(&f, "bytes_per_token"), 4.0 * numbers);
        ascending(&f, ["step_ms_min", "step_ms", "step_ms_max"]);
        close(positive(&f, "ms_per_token") * batch, number(&f, "step_ms"));
        close(positive(&f, "tokens_per_s") * number(&f, "ms_per_token"), 1e3);
        close(positive(&f, "bytes_per_s"), number(&f, "bytes_per_token") * number(&f, "tokens_per_s"));
        close(positive(&f, "bandwidth_fraction"), number(&f, "bytes_per_s") / positive(&f, "memory_bytes_per_s"));
        positive(&f, "prefill_tokens_per_s");
    }
}

#[test]
fn the_operations_of_a_step_make_the_whole_of_it() {
    let f = json(&[&["bench", "ops", "--json"][..], &TINY].concat());
    let (ops, step_ms) = (f["ops"].as_array().unwrap(), positive(&f, "step_ms"));
    let mut names: Vec<&str> = ops.iter().map(|op| op["name"].as_str().unwrap()).collect();
    for name in ["q_proj", "latent_attention", "gated_mlp", "embedding", "head, loss", "optimiser"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    assert_eq!(names.last(), Some(&"other"));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ops.len(), "a name twice");
    let sum = |key: &str| ops.iter().map(|op| number(op, key)).sum::<f64>();
    assert!((sum("share") - 1.0).abs() < 1e-9 && (sum("ms") / step_ms - 1.0).abs() < 1e-9);
    for op in ops {
        close(1.0 + number(op, "share"), 1.0 + number(op, "ms") / step_ms);
        if !op["forward_ms"].is_null() {
            close(positive(op, "forward_ms") + number(op, "backward_ms"), number(op, "ms"));
        }
    }
}

#[test]
fn the_tables_fit_a_hundred_columns() {
    let decode = ["--context", "40", "--new", "2", "--threads", "2"];
    for (command, arguments) in [("train", &TINY[..]), ("decode", &decode), ("ops", &TINY)] {
        let text = succeed(&[&["bench", command][..], arguments].concat());
        assert!(text.starts_with("d256: ") && text.lines().count() > 5, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let help = succeed(&["bench", command, "--help"]);
        assert!(help.contains("Examples") && help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
}
