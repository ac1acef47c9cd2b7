//! Model directories, and what is asked of a model.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::fixture::{edit, edit_json};
use super::{Case, case};

/// A tensor taken out of its file.
type Parts = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn edit_tensors(path: &Path, change: impl FnOnce(&mut Parts)) {
    let bytes = fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let mut parts: Parts =
        parsed.tensors().into_iter().map(|(n, v)| (n, v.dtype(), v.shape().to_vec(), v.data().to_vec())).collect();
    change(&mut parts);
    fs::write(path, tensors(&parts)).unwrap();
}

fn tensors(parts: &Parts) -> Vec<u8> {
    let views =
        parts.iter().map(|(n, dtype, shape, b)| (n.as_str(), TensorView::new(*dtype, shape.clone(), b).unwrap()));
    safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()
}

/// Asks a damaged copy of a trained model to continue a text.
fn model(name: &str, damage: impl Fn(&Path) + Send + Sync + 'static, fragments: &[&str]) -> Case {
    case(name, &["generate", "model", "--prompt", "the", "--max-new-tokens", "2"])
        .with(move |fixture, dir| {
            fixture.give_model("run", dir);
            damage(&dir.join("model"));
        })
        .says(fragments)
}

/// A changed key of `config.json`.
fn config(key: &'static str, value: Value, fragments: &[&str]) -> Case {
    let change = move |dir: &Path| edit_json(&dir.join("config.json"), |config| config[key] = value.clone());
    model(&format!("config.json: {key}"), change, &["model/config.json"]).says(&[key]).says(fragments)
}

fn weights(name: &str, change: impl Fn(&mut Parts) + Send + Sync + 'static, fragments: &[&str]) -> Case {
    model(name, move |dir| edit_tensors(&dir.join("model.safetensors"), |parts| change(parts)), fragments)
}

/// `lowkey generate` on a good model with a wrong flag. Wrong use.
fn generate(flags: &[&str], fragments: &[&str]) -> Case {
    let arguments = [&["generate", "model", "--prompt", "the", "--max-new-tokens", "2"], flags].concat();
    case(format!("generate {}", flags.join(" ")), &arguments)
        .with(|fixture, dir| fixture.give_model("run", dir))
        .code(2)
        .says(fragments)
}

fn eval(flags: &[&str], fragments: &[&str]) -> Case {
    case(format!("eval {}", flags.join(" ")), &[&["eval", "model"], flags].concat())
        .with(|fixture, dir| fixture.give_model("run", dir))
        .says(fragments)
}

/// `lowkey logits` on a good model with these ids.
fn logits(name: &str, ids: Vec<u8>, fragments: &[&str]) -> Case {
    case(name, &["logits", "model", "--ids", "in.safetensors", "--out", "out.safetensors"])
        .with(|fixture, dir| fixture.give_model("run", dir))
        .file("in.safetensors", ids)
        .says(&["in.safetensors"])
        .says(fragments)
}

fn ids(name: &str, shape: &[usize], values: &[i64]) -> Vec<u8> {
    tensors(&vec![(name.into(), Dtype::I64, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())])
}

pub(super) fn cases() -> Vec<Case> {
    let remove = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).unwrap();
    let index = |map: Value| {
        move |dir: &Path| {
            fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00002.safetensors")).unwrap();
            fs::write(dir.join("model.safetensors.index.json"), map.to_string()).unwrap();
        }
    };
    let mut cases = vec![
        case("no model", &["generate", "absent", "--prompt", "x"]).says(&["absent", "No such file"]),
        case("info on nothing", &["info", "."]).says(&["config.json", "metrics.jsonl"]),
        model("no config.json", remove("config.json"), &["model/config.json", "No such file"]),
        model("no tokenizer", remove("tokenizer.json"), &["model/tokenizer.json", "No such file"]),
        model(
            "no weights",
            remove("model.safetensors"),
            &["model: no model.safetensors and no model.safetensors.index.json"],
        ),
        model(
            "config.json not JSON",
            |dir| edit(&dir.join("config.json"), |b| b.truncate(50)),
            &["model/config.json", "not valid JSON"],
        ),
        model(
            "config.json a list",
            |dir| fs::write(dir.join("config.json"), "[]").unwrap(),
            &["model/config.json", "JSON object"],
        ),
        config("model_type", json!("mamba"), &["mamba", "known are deepseek_v2"]),
        config("first_k_dense_replace", json!(0), &["mixture-of-experts layers", "not implemented"]),
        config("hidden_size", json!("wide"), &["must be a whole number"]),
        config("hidden_size", json!(-16), &["must be a whole number"]),
        config("hidden_size", json!(1_000_000_000), &["must lie between"]),
        config("hidden_act", json!("gelu"), &["only \"silu\""]),
        config("kv_lora_rank", Value::Null, &["config.json must give it"]),
        config("quantization_config", json!({"bits": 4}), &["quantised", "convert it to bf16"]),
        model(
            "config.json of a far larger model",
            |dir| {
                edit_json(&dir.join("config.json"), |config| {
                    config["hidden_size"] = 1_000_000.into();
                    config["intermediate_size"] = 1_000_000.into();
                    config["num_hidden_layers"] = 200.into();
                    config["first_k_dense_replace"] = 200.into();
                });
            },
            &[
                "model: the weights do not fit config.json",
                "wrong shape",
                "model.embed_tokens.weight: expected [257, 1000000], found [257, 16]",
            ],
        ),
        model(
            "config.json of a far deeper model",
            |dir| {
                edit_json(&dir.join("config.json"), |config| {
                    config["num_hidden_layers"] = 4096.into();
                    config["first_k_dense_replace"] = 4096.into();
                });
            },
            &["model: the weights do not fit config.json", "missing", "layers 2 to 4095 (num_hidden_layers)"],
        ),
        config("num_hidden_layers", json!(1_000_000_000), &["1000000000"]),
        model(
            "tokenizer.json that claims gigabytes",
            |dir| {
                edit_json(&dir.join("tokenizer.json"), |json| {
                    json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "/P///wAAAAA="});
                });
            },
            &["model/tokenizer.json", "precompiled_charsmap", "cut short"],
        ),
        weights(
            "missing tensor",
            |t| t.retain(|t| t.0 != "model.norm.weight"),
            &["model", "missing (1): model.norm.weight"],
        ),
        weights(
            "extra tensor",
            |t| t.push(("model.extra.weight".into(), Dtype::F32, vec![1], vec![0; 4])),
            &["model", "unexpected (1): model.extra.weight"],
        ),
        weights(
            "wrong shape",
            |t| t.iter_mut().filter(|t| t.0 == "lm_head.weight").for_each(|t| t.2.reverse()),
            &["model", "wrong shape (1): lm_head.weight: expected [257, 16], found [16, 257]"],
        ),
        weights(
            "whole numbers as weights",
            |t| t.iter_mut().filter(|t| t.0 == "lm_head.weight").for_each(|t| t.1 = Dtype::I32),
            &["model/model.safetensors", "lm_head.weight", "I32", "only F32, BF16"],
        ),
        weights(
            "weights that are not numbers",
            |t| t.iter_mut().filter(|t| t.0 == "model.norm.weight").for_each(|t| t.3.fill(0xff)),
            &["the logit of token 0 is NaN", "overflowed"],
        ),
        model(
            "weights cut",
            |dir| edit(&dir.join("model.safetensors"), |b| b.truncate(20_000)),
            &["model/model.safetensors", "cut short", "again"],
        ),
        model(
            "weights garbage",
            |dir| fs::write(dir.join("model.safetensors"), [0xab; 500]).unwrap(),
            &["model/model.safetensors", "not a readable safetensors file"],
        ),
        model(
            "weights empty",
            |dir| fs::write(dir.join("model.safetensors"), "").unwrap(),
            &["model/model.safetensors", "not a readable safetensors file"],
        ),
        model("index not JSON", index(json!("{")), &["model.safetensors.index.json", "weight_map"]),
        model(
            "index pointing outside",
            index(json!({"weight_map": {"lm_head.weight": "../text.txt"}})),
            &["model.safetensors.index.json", "weight_map.lm_head.weight points outside the directory: ../text.txt"],
        ),
        model(
            "index naming an absent shard",
            index(json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})),
            &["model/model-00002-of-00002.safetensors", "No such file"],
        ),
        model(
            "tokenizer_config.json not JSON",
            |dir| fs::write(dir.join("tokenizer_config.json"), "{").unwrap(),
            &["model/tokenizer_config.json", "not valid JSON"],
        ),
        // What is asked of a good model.
        generate(&["--decode", "sideways"], &["--decode sideways", "auto, expanded, absorbed or fused"]),
        generate(&["--temperature", "-1"], &["temperature = -1: must be a finite number ≥ 0"]),
        generate(&["--temperature", "nan"], &["temperature = NaN: must be a finite number ≥ 0"]),
        generate(&["--top-p", "0"], &["top_p = 0: must be greater than 0 and at most 1"]),
        generate(&["--top-p", "2"], &["top_p = 2: must be greater than 0 and at most 1"]),
        generate(&["--top-k", "0"], &["top_k = 0: must be at least 1 (leave it out"]),
        generate(&["--top-k", "few"], &["'few'", "--top-k <K>", "--help"]),
        generate(&["--repetition-penalty", "0"], &["repetition_penalty = 0: must be a finite number > 0"]),
        generate(&["--repetition-penalty", "-2"], &["repetition_penalty = -2: must be a finite number > 0"]),
        generate(&["--stop", ""], &["--stop \"\": an empty text would stop"]),
        generate(&["--prompt-file", "text.txt"], &["--prompt", "--prompt-file", "cannot be used"]),
        case("no new tokens", &["generate", "model", "--prompt", "the", "--max-new-tokens", "0"])
            .with(|fixture, dir| fixture.give_model("run", dir))
            .code(2)
            .says(&["max_new_tokens = 0: must be at least 1"]),
        case("long prompt", &["generate", "model", "--prompt", "longer than sixteen bytes", "--max-new-tokens", "1"])
            .with(|fixture, dir| fixture.give_model("run", dir))
            .code(2)
            .says(&["needs 26 positions", "max_position_embeddings = 16", "shorten the prompt"]),
        case("prompt in another alphabet", &["generate", "model", "--prompt", "ты", "--max-new-tokens", "1"])
            .with(|fixture, dir| fixture.give_model("chars", dir))
            .code(2)
            .says(&["prompt", "'т' (U+0442)", "alphabet"]),
        case("prompt file missing", &["generate", "model", "--prompt-file", "absent.txt"])
            .with(|fixture, dir| fixture.give_model("run", dir))
            .says(&["absent.txt", "No such file"]),
        eval(&["--data", "absent.txt"], &["absent.txt", "No such file"]),
        eval(&["--data", "text.txt", "--seq-len", "0"], &["--seq-len 0: this model takes 1 to 16"]).code(2),
        eval(&["--data", "text.txt", "--seq-len", "17"], &["--seq-len 17: this model takes 1 to 16"]).code(2),
        eval(&["--data", "text.txt", "--batch-size", "0"], &["--batch-size 0: must lie between 1 and"]).code(2),
        eval(
            &["--data", "text.txt", "--batch-size", "1000000000000000000"],
            &["--batch-size 1000000000000000000: must lie"],
        )
        .code(2),
        eval(&["--data", "text.txt", "--split", "test"], &["'test'", "validation, all"]).code(2),
        eval(&["--data", "short.txt"], &["short.txt", "holds no text"]).file("short.txt", "").refused(),
        eval(&["--data", "text.txt"], &["model: the loss is NaN", "damaged or have diverged"]).with(|_, dir| {
            edit_tensors(&dir.join("model/model.safetensors"), |parts| parts.iter_mut().for_each(|t| t.3.fill(0xff)));
        }),
        case("eval with a larger tokenizer", &["eval", "model", "--data", "text.txt"])
            .with(|fixture, dir| {
                fixture.give_model("chars", dir);
                fixture.give(dir, &["run"]);
                fs::copy(dir.join("run/checkpoints/best/tokenizer.json"), dir.join("model/tokenizer.json")).unwrap();
            })
            .says(&["model: tokenizer.json has 257 tokens", "put the model's own tokenizer there"]),
        logits("logits of nothing", ids("tokens", &[1, 2], &[1, 2]), &["no tensor input_ids"]),
        logits("ids not a tensor file", b"1 2 3".to_vec(), &["not a safetensors file"]),
        logits(
            "ids of another type",
            tensors(&vec![("input_ids".into(), Dtype::F32, vec![1, 1], vec![0; 4])]),
            &["input_ids is F32 [1, 1], expected I64 [B, T]"],
        ),
        logits("ids of another rank", ids("input_ids", &[2], &[1, 2]), &["expected I64 [B, T]"]),
        logits("no ids", ids("input_ids", &[1, 0], &[]), &["input_ids is empty"]),
        logits(
            "id out of vocabulary",
            ids("input_ids", &[1, 2], &[1, 257]),
            &["token 257 is outside the vocabulary of 257"],
        ),
        logits("negative id", ids("input_ids", &[1, 2], &[1, -5]), &["-5 is no token id"]),
        logits("too many ids", ids("input_ids", &[1, 17], &[1; 17]), &["17 positions, the model takes 16"]),
        case("logits into nowhere", &["logits", "model", "--ids", "in.safetensors", "--out", "absent/out.safetensors"])
            .with(|fixture, dir| fixture.give_model("run", dir))
            .file("in.safetensors", ids("input_ids", &[1, 2], &[1, 2]))
            .says(&["absent/", "No such file"]),
    ];
    cases.push(
        case("fine-tuning from nowhere", &["train", "tune.toml", "--out", "new"])
            .file("tune.toml", "[run]\nname = \"t\"\n[init]\nfrom = \"absent\"\n[data]\npath = \"text.txt\"\nseq_len = 16\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 1\nbatch_size = 1\n")
            .says(&["absent", "No such file"]),
    );
    cases
}
