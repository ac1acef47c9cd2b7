//! `lowkey bench` on steps of an instant: figures that fit together, whatever the machine's speed.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::commands::{best, best_of, json, lowkey, succeed, text};

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
    // Of frozen matrices no gradient is formed; six operations for each number of A and B.
    let whole = number(&f, "flops_per_token") - 2.0 * 5_595_136.0;
    let lora = |more: &[&str]| json(&[&["bench", "train", "--json", "--lora-rank", "4"][..], &TINY, more].concat());
    let (q, o) = ((256 + 8 * 48) as f64, (8 * 32 + 256) as f64);
    let rest = (256 + 80 + 64 + 8 * 64 + 3 * (256 + 704)) as f64;
    let f = lora(&[]);
    assert_eq!(number(&f, "flops_per_token"), whole + 6.0 * 6.0 * 4.0 * (q + o + rest));
    assert!(f.get("lora_modules").is_none());
    let f = lora(&["--lora-modules", "q_proj,o_proj"]);
    assert_eq!(number(&f, "flops_per_token"), whole + 6.0 * 6.0 * 4.0 * (q + o));
    assert_eq!(f["lora_modules"].as_array().unwrap().len(), 2);
    let (code, _, message) = lowkey(&["bench", "train", "--lora-rank", "4", "--lora-modules", "k_proj"]);
    assert!(code != 0 && message.contains("k_proj") && message.contains("kv_b_proj"), "{message}");
}

#[test]
fn the_figures_of_decoding_fit_together() {
    for (batch, dtype, bytes_per_cached_token) in
        [(1.0, "f32", 480.0 * 4.0), (2.0, "bf16", 480.0 * 2.0), (2.0, "int8", 480.0 + 6.0 * 2.0 * 4.0)]
    {
        let (batch_text, at) = (batch.to_string(), ["--context", "40,9", "--new", "4", "--cache-dtype", dtype]);
        let f = json(&[&["bench", "decode", "--json", "--threads", "2", "--batch", &batch_text][..], &at].concat());
        assert_eq!((&f["what"], &f["model"], &f["cache_dtype"]), (&"decode".into(), &"d256".into(), &dtype.into()));
        // Six layers of L + R.
        assert_eq!(f["cache_numbers_per_token"], 6 * (64 + 16));
        let rows = f["rows"].as_array().unwrap();
        let cases: Vec<(u64, &str)> =
            rows.iter().map(|r| (r["context"].as_u64().unwrap(), r["way"].as_str().unwrap())).collect();
        let ways = ["expanded", "absorbed", "fused"];
        assert_eq!(cases, [40, 9].map(|context| ways.map(|way| (context, way))).concat());
        for (row, (context, way)) in rows.iter().zip(cases) {
            let (tokens, held) = (context as f64 + 4.0, context as f64 + 2.0);
            assert_eq!(positive(row, "cache_bytes"), batch * tokens * bytes_per_cached_token);
            // All weights but the embedding, of which a row for each sequence; the cache half-way; rebuilt keys and values.
            let rebuilt = if way == "expanded" { 6.0 * 8.0 * (32.0 + 16.0 + 32.0) } else { 0.0 };
            // W_UKᵀ·W_UQ and W_O·W_UV in place of W_UQ, W_UK, W_UV and W_O.
            let more = 256.0 * 8.0 * 64.0 * 2.0 - (256.0 * 8.0 * 32.0 + 64.0 * 8.0 * 64.0 + 8.0 * 32.0 * 256.0);
            let weights = 6_647_424.0 - (4096.0 - batch) * 256.0 + if way == "fused" { 6.0 * more } else { 0.0 };
            let expected = 4.0 * (weights / batch + held * rebuilt) + held * bytes_per_cached_token;
            close(positive(row, "bytes_per_token"), expected);
            ascending(row, ["step_ms_min", "step_ms", "step_ms_max"]);
            close(positive(row, "tokens_per_s") * number(row, "step_ms"), 1e3 * batch);
            close(positive(row, "bytes_per_s"), number(row, "bytes_per_token") * number(row, "tokens_per_s"));
            close(positive(row, "flops_per_s"), positive(row, "flops_per_token") * number(row, "tokens_per_s"));
            let reading = number(row, "bytes_per_s") / positive(&f, "memory_bytes_per_s");
            let computing = number(row, "flops_per_s") / positive(&f, "matmul_flops_per_s");
            close(positive(row, "bound_fraction"), reading.max(computing));
            assert_eq!(row["bound"], if reading > computing { "memory" } else { "arithmetic" });
            positive(row, "prefill_tokens_per_s");
        }
    }
}

#[test]
fn packed_matrices_spare_the_bytes_that_they_spare() {
    let run = |weights: &str| {
        let at = ["--context", "9", "--new", "3", "--way", "absorbed", "--weights", weights];
        let f = json(&[&["bench", "decode", "--json", "--threads", "2"][..], &at].concat());
        assert_eq!(f["weights"], weights);
        number(&f["rows"][0], "bytes_per_token")
    };
    // Queries, the latent with the shared key, the output and the feed-forward layer of six layers, and of the head in bf16.
    let packed = 6.0 * 256.0 * (8.0 * 48.0 + 80.0 + 8.0 * 32.0 + 3.0 * 704.0);
    let whole = run("f32");
    close(whole - run("bf16"), 2.0 * (packed + 4096.0 * 256.0) - 4.0 * (6.0 * 7.0 + 1.0));
    let scales = 4.0 * 6.0 * (8.0 * 48.0 + 80.0 + 256.0 + 2.0 * 704.0 + 256.0);
    close(whole - run("int8"), 3.0 * packed - scales);
}

#[test]
fn the_figures_of_prompts_fit_together() {
    let at = ["--context", "70,9", "--rounds", "2", "--chunk", "33", "--batch", "2", "--way", "auto,fused"];
    let f = json(&[&["bench", "prefill", "--json", "--threads", "2", "--cache-dtype", "bf16"][..], &at].concat());
    assert_eq!((&f["what"], &f["model"], &f["chunk"]), (&"prefill".into(), &"d256".into(), &33.into()));
    let rows = f["rows"].as_array().unwrap();
    let case = |row: &Value| (row["context"].as_u64().unwrap(), row["way"].as_str().unwrap().to_owned());
    let cases: Vec<_> = rows.iter().map(case).collect();
    assert_eq!(cases, [9, 70].map(|n| ["auto", "fused"].map(|way| (n, way.to_owned()))).concat());
    for row in rows {
        let tokens = 2.0 * number(row, "context");
        ascending(row, ["ms_min", "ms", "ms_max"]);
        close(positive(row, "tokens_per_s") * number(row, "ms"), tokens * 1e3);
        close(positive(row, "training_tokens_per_s") * positive(row, "training_ms"), tokens * 1e3);
        positive(row, "ratio");
        assert_eq!((&row["rounds"], number(row, "cache_bytes")), (&2.into(), tokens * 480.0 * 2.0));
        if cfg!(target_os = "linux") {
            assert!(positive(row, "peak_rss_mb") > 4.0 * 6.6);
        }
    }
    let (code, _, message) = lowkey(&["bench", "prefill", "--way", "latent"]);
    assert!(code == 2 && message.contains("--way latent"), "{message}");
    let grouped = best_of("prompts", &["model.attention=gqa"]);
    let f = json(&["bench", "prefill", text(&grouped), "--context", "300", "--rounds", "1", "--json"]);
    assert_eq!((&f["rows"][0]["way"], &f["max_position_embeddings"]), (&"auto".into(), &300.into()));
}

#[test]
fn any_model_decodes_beyond_what_it_was_made_for() {
    let latent = best();
    let path = text(&latent);
    let f = json(&["bench", "decode", path, "--context", "300", "--new", "2", "--way", "absorbed", "--json"]);
    assert_eq!((&f["model"], f["rows"].as_array().unwrap().len()), (&path.into(), 1));
    assert_eq!(f["max_position_embeddings"], 302);
    let grouped = best_of("grouped", &["model.attention=gqa"]);
    let path = text(&grouped);
    let f = json(&["bench", "decode", path, "--context", "20", "--new", "2", "--json"]);
    assert_eq!(f["rows"][0]["way"], "expanded");
    assert!(f["max_position_embeddings"].is_null());
    let (code, _, message) = lowkey(&["bench", "decode", path, "--way", "fused"]);
    assert!(code == 2 && message.contains("--way fused") && message.contains("expanded"), "{message}");
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
    let decode = ["--context", "40,32768", "--new", "2", "--threads", "2"];
    let prefill = ["--context", "40,300", "--rounds", "2", "--threads", "2"];
    for (command, arguments) in [("train", &TINY[..]), ("decode", &decode), ("prefill", &prefill), ("ops", &TINY)] {
        let text = succeed(&[&["bench", command][..], arguments].concat());
        assert!(text.starts_with("d256: ") && text.lines().count() > 5, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let help = succeed(&["bench", command, "--help"]);
        assert!(help.contains("Examples") && help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
}

/// A script that says what the other side of a comparison says.
fn peer_script(dir: &Path, says: &str) -> PathBuf {
    let path = dir.join("peer.sh");
    std::fs::write(&path, format!("echo some words of its own, and its arguments: $*\necho '{says}'\n")).unwrap();
    path
}

#[test]
fn a_peer_is_compared_in_turns() {
    let dir = tempfile::tempdir().unwrap();
    let own = json(&["bench", "train", "--json", "--batch", "1", "--seq", "8", "--steps", "1", "--warmup", "0"]);
    let csv = dir.path().join("runs.csv");
    let flops = number(&own, "flops_per_token");
    let says = format!(
        r#"{{"tokens_per_s": 1.0, "peak_rss_mb": 1, "params": {}, "flops_per_token": {flops}}}"#,
        own["params"]
    );
    let script = peer_script(dir.path(), &says);
    let tiny = ["--sizes", "1x8", "--steps", "1", "--warmup", "0", "--threads", "1", "--rounds", "2"];
    let peer = ["bench", "peer", "--python", "sh", "--script", text(&script), "--csv", text(&csv)];
    let f = json(&[&peer[..], &tiny, &["--json"]].concat());
    let sides = f[0]["sides"].as_array().unwrap();
    let names: Vec<&str> = sides.iter().map(|side| side["side"].as_str().unwrap()).collect();
    assert_eq!(names, ["lowkey", "peer, eager", "peer, compile"]);
    let rates: Vec<f64> = sides[0]["tokens_per_s"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    assert!(rates.len() == 2 && rates.iter().all(|rate| *rate > 1.0), "{f}");
    // The peer does one token per second, so that the ratio is the rate.
    let (least, most) = (rates[0].min(rates[1]), rates[0].max(rates[1]));
    assert_eq!(
        sides[1]["ratio"],
        serde_json::json!({
            "median": f64::midpoint(rates[0], rates[1]), "best": most, "rounds": [least, most]
        })
    );
    let runs = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(runs.lines().count(), 1 + 2 * 3);
    assert!(runs.contains("train,d256,1,8,\"peer, compile\",2,"), "{runs}");

    let help = succeed(&["bench", "peer", "--help"]);
    assert!(help.contains("Examples") && help.lines().all(|line| line.chars().count() <= 100), "{help}");
    let table = succeed(&[&peer[..], &tiny].concat());
    assert!(table.lines().all(|line| line.chars().count() <= 100) && table.contains("train d256, 1 × 8"), "{table}");

    let fails = |says: &str, expected: &str| {
        let script = peer_script(dir.path(), says);
        let (code, _, message) =
            lowkey(&[&["bench", "peer", "--python", "sh", "--script", text(&script)][..], &tiny].concat());
        assert!(code == 1 && message.contains(expected), "{code}: {message}");
    };
    fails(r#"{"tokens_per_s": 1.0, "params": 5}"#, "not the same work");
    fails("nothing", "does not end with a line that is a JSON object");
    fails(r#"{"steps_per_s": 1.0}"#, "tokens_per_s is not in what it prints");
    fails("'; echo out of memory >&2; exit 3; '", "out of memory");
    let (code, _, message) = lowkey(&["bench", "peer"]);
    assert!(code == 2 && message.contains("--script"), "{message}");
}
