use super::*;

const FILE: &str = r#"
name = "tiny"
question = "?"
base = "run.toml"
seeds = [1, 2]
metric = "gap"
baseline = "mha"

[match]
by = "parameters"
with = "model.intermediate_size"

[budget]
runs = 60
hours = 3.0

[rule]
kind = "margin"
margin = 0.01

[[arms]]
name = "mha"
x = 2.0
set = { "model.attention" = "mha" }

[[axes]]
key = "model.kv_lora_rank"
values = [2, 8]

[[theory]]
name = "line"
points = [[0.0, 1.0], [2.0, 0.0]]
"#;

fn load(text: &str) -> Result<Experiment> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("experiment.toml");
    std::fs::write(&path, text).unwrap();
    Experiment::load(&path)
}

#[test]
fn every_number_makes_sense_or_is_refused() {
    load(FILE).unwrap();
    let cases: &[(&str, &str, &str)] = &[
        ("margin = 0.01", "margin = -1", "rule.margin = -1"),
        ("margin = 0.01", "margin = inf", "rule.margin = inf"),
        ("margin = 0.01", "margin = nan", "rule.margin = NaN"),
        ("margin = 0.01", "margin = 0.01\nconfidence = nan", "rule.confidence = NaN"),
        ("margin = 0.01", "margin = 0.01\nconfidence = 1.0", "rule.confidence = 1"),
        ("kind = \"margin\"\nmargin = 0.01", "kind = \"knee\"\npercent = -1.0", "rule.percent = -1"),
        ("kind = \"margin\"\nmargin = 0.01", "kind = \"knee\"\npercent = nan", "rule.percent = NaN"),
        ("hours = 3.0", "hours = nan", "budget.hours = NaN"),
        ("hours = 3.0", "hours = -2.0", "budget.hours = -2"),
        ("hours = 3.0", "hours = inf", "budget.hours = inf"),
        ("runs = 60", "runs = 0", "budget.runs = 0"),
        ("x = 2.0", "x = nan", "arm mha: x = NaN"),
        ("[2.0, 0.0]", "[2.0, inf]", "[[theory]] \"line\": finite"),
        ("[2.0, 0.0]", "[0.0, 0.0]", "by rising x"),
        ("with = ", "multiple_of = 0\nwith = ", "match.multiple_of = 0"),
        ("with = ", "multiple_of = 9000000000000000000\nwith = ", "match.multiple_of = 9000000000000000000"),
        ("with = ", "values = [0]\nwith = ", "match.values: 0"),
        ("seeds = [1, 2]", "seeds = [1, 2]\nthreads = 0", "threads = 0"),
    ];
    for (from, to, says) in cases {
        assert!(FILE.contains(from), "{from}");
        let why = load(&FILE.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(why.contains(says) && why.contains("experiment.toml"), "{to}: {why}");
    }
}

#[test]
fn a_metric_that_is_none_is_refused_with_those_there_are() {
    let with = |metric: &str| load(&FILE.replace("metric = \"gap\"", metric));
    for metric in ["gapp", "class.gap", "class..gap", "class.answer.gapp", "rank.four.gap", "rank.4", ""] {
        let why = with(&format!("metric = {metric:?}")).unwrap_err().to_string();
        assert!(why.contains(&format!("metric = {metric:?}")) && why.contains("bits_per_byte"), "{why}");
    }
    for metric in ["val_loss", "class.a.b.gap", "rank.4.val_loss", "int4.val_loss", "max_logit"] {
        with(&format!("metric = {metric:?}")).unwrap();
    }
    // Turned the wrong way, better would be worse.
    for (metric, better) in [("accuracy", "lower"), ("gap", "higher"), ("class.answer.accuracy", "lower")] {
        let why = with(&format!("metric = {metric:?}\nbetter = {better:?}")).unwrap_err().to_string();
        assert!(why.contains(&format!("better = {better:?}: {metric} is better the")), "{why}");
    }
    with("metric = \"accuracy\"\nbetter = \"higher\"").unwrap();
    with("metric = \"max_logit\"\nbetter = \"higher\"").unwrap();
}

/// Said from the lengths of the axes alone: what they would make is never made.
#[test]
fn axes_of_too_many_combinations_are_refused_before_they_are_made() {
    let axis = |key: &str, n: usize| {
        let values: Vec<String> = (1..=n).map(|i| i.to_string()).collect();
        format!("[[axes]]\nkey = \"model.{key}\"\nvalues = [{}]\n", values.join(", "))
    };
    let started = std::time::Instant::now();
    for (axes, n, says) in
        [(2, 1000, "2000001 arms"), (20, 1000, "more arms than can be counted"), (12, 2, "8193 arms")]
    {
        let text = (0..axes).map(|i| axis(&format!("key_{i}"), n)).collect::<String>();
        let why = load(&(FILE.to_string() + &text)).unwrap_err().to_string();
        assert!(why.contains(says) && why.contains("4096 are the most"), "{why}");
        assert!(why.contains(&format!("model.key_0 with {n} values")), "{why}");
    }
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
    let seeds: Vec<String> = (1..=30_000).map(|i| i.to_string()).collect();
    let why =
        load(&FILE.replace("seeds = [1, 2]", &format!("seeds = [{}]", seeds.join(", ")))).unwrap_err().to_string();
    assert!(why.contains("3 arms of 30000 seeds are more runs than 65536"), "{why}");
    let twice = FILE.to_string() + &axis("kv_lora_rank", 3);
    assert!(load(&twice).unwrap_err().to_string().contains("model.kv_lora_rank: stands there twice"));
}
