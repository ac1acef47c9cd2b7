//! One model, read at several ranks.

use crate::commands::{best, best_of, json, lowkey, succeed, text};

#[test]
fn a_checkpoint_is_evaluated_run_cut_and_exported_at_any_of_its_ranks() {
    let model = best_of("elastic", &["model.elastic.ranks=[2, 5]"]);
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(model.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["model_type"], &config["kv_elastic_ranks"]), (&"deepseek_v3".into(), &vec![2, 5].into()));
    let data = model.ancestors().nth(3).unwrap().join("story.txt");
    let eval = |model, more: &[&str]| json(&[&["eval", text(model), "--data", text(&data), "--json"], more].concat());
    let whole = eval(&model, &[]);
    for (at, rank) in whole["ranks"].as_array().unwrap().iter().zip(["2", "5"]) {
        assert_eq!(at["rank"].to_string(), rank);
        assert_eq!(eval(&model, &["--kv-rank", rank])["loss"], at["loss"]);
    }
    let greedy = ["generate", text(&model), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "20"];
    let at_5 = succeed(&[&greedy[..], &["--kv-rank", "5", "--decode", "absorbed"]].concat());
    assert_eq!(succeed(&[&greedy[..], &["--kv-rank", "5", "--decode", "expanded"]].concat()), at_5);

    let dir = tempfile::tempdir().unwrap();
    let (cut, export) = (dir.path().join("cut"), dir.path().join("hf"));
    let said = succeed(&["convert", text(&model), "--kv-rank", "5", "--out", text(&cut)]);
    assert!(said.contains("the first 10 of 20"), "{said}");
    // In bf16, with the two rotated keys of 4.
    assert_eq!(json(&["info", text(&cut), "--json"])["cache_bytes_per_token_bf16"], 2 * (10 + 8));
    assert_eq!(eval(&cut, &[])["loss"], whole["ranks"][1]["loss"]);
    succeed(&["export", text(&cut), "--to", "hf", "--out", text(&export)]);
    let of_export = eval(&export, &[])["loss"].as_f64().unwrap();
    assert!((of_export - whole["ranks"][1]["loss"].as_f64().unwrap()).abs() < 1e-5);

    let (_, _, note) = lowkey(&[&greedy[..], &["--kv-rank", "3"]].concat());
    assert!(note.contains("not trained to be read at rank 3") && note.contains("[2, 5]"), "{note}");
    let (_, _, note) = lowkey(&["convert", text(&best()), "--kv-rank", "3", "--out", text(&dir.path().join("b"))]);
    assert!(note.contains("[model.elastic]"), "{note}");
    for rank in ["0", "11"] {
        let (code, _, message) = lowkey(&[&greedy[..], &["--kv-rank", rank]].concat());
        assert!(code == 2 && message.contains("--kv-rank"), "{message}");
    }
    let (code, _, message) = lowkey(&["convert", text(&model), "--kv-rank", "3", "--kv-rank-budget", "50%"]);
    assert!(code == 2 && message.contains("cannot be used with"), "{message}");
}

/// Narrower ranks join at a share of the run: before, a step takes one pass, and after it three.
#[test]
fn the_utilisation_of_a_step_counts_the_passes_that_it_took() {
    let run = best_of("elastic-passes", &["model.elastic.ranks=[2, 5]"]).ancestors().nth(2).unwrap().to_path_buf();
    let read = |file: &str| std::fs::read_to_string(run.join(file)).unwrap();
    let environment: serde_json::Value = serde_json::from_str(&read("environment.json")).unwrap();
    let ceiling = environment["matmul_flops_per_s"].as_f64().unwrap();
    let per_token: Vec<f64> = read("metrics.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["mfu"].as_f64().unwrap() * ceiling / line["tokens_per_s"].as_f64().unwrap())
        .collect();
    // Three steps, of which 30 % is not one.
    let passes: Vec<f64> = per_token.iter().map(|flops| flops / per_token[0]).collect();
    assert_eq!(passes.len(), 3);
    assert!(passes.iter().zip([1.0, 3.0, 3.0]).all(|(found, right)| (found - right).abs() < 1e-6), "{passes:?}");
    // The plan is the sum of the same.
    let plan = &environment["plan"];
    let of_plan = plan["train_flops_per_token"].as_f64().unwrap() / per_token[0];
    assert!((of_plan - 7.0 / 3.0).abs() < 1e-6, "{of_plan}");
    let all = plan["flops"].as_f64().unwrap() / (plan["tokens"].as_f64().unwrap() * per_token[0]);
    assert!((all - 7.0 / 3.0).abs() < 1e-6, "{all}");
}
