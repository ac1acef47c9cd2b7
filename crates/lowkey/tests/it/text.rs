//! From text to ids and back, as a user of the program sees it: prompts, their continuations, where texts begin and end.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::commands::{json, lowkey, succeed, text};
use crate::reference::announce;

/// Words, in the order of their ids; `</s>`, `<|im_end|>` and `<s>` follow.
const WORDS: [&str; 8] = ["<unk>", "▁The", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "▁."];
const END: u32 = 8;
const TURN: u32 = 9;
const BEGIN: u32 = 10;

const SENTENCE: &str = "The cat sat on a mat .";

/// A tokenizer as Llama's: a space is part of the word after it, and `<s>` stands before a text.
fn llama() -> Value {
    let vocab: serde_json::Map<String, Value> =
        WORDS.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true })
    };
    let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
    let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    let begin = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(END, "</s>"), special(TURN, "<|im_end|>"), special(BEGIN, "<s>")],
        "normalizer": null, "pre_tokenizer": metaspace, "decoder": metaspace,
        "post_processor": { "type": "TemplateProcessing", "single": [begin, text("A")], "pair": [begin, text("A"), text("B")],
                            "special_tokens": { "<s>": { "id": "<s>", "ids": [BEGIN], "tokens": ["<s>"] } } },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" }
    })
}

const MODEL: &str = "
[model]
attention = \"mla\"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
intermediate_size = 64
";

/// A run file: where the model comes from, what its data are, how many steps.
fn run_file(model: &str, data: &str, steps: usize) -> String {
    format!(
        "[run]\nname = \"t\"\ndevice = \"cpu\"\n{model}\n[data]\n{data}\nseq_len = 32\n[optimizer]\nlr = 1e-2\n\
         [training]\nsteps = {steps}\nbatch_size = 4\nthreads = 2\n\
         [eval]\nprompts = [\"The cat\"]\nsample_tokens = 4\ntemperature = 0.0\n"
    )
}

/// A folder with 200 documents of one sentence and a Llama-like tokenizer, and what a run on them has printed.
fn fixture() -> (&'static Path, &'static str) {
    static FIXTURE: OnceLock<(tempfile::TempDir, String)> = OnceLock::new();
    let (dir, printed) = FIXTURE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("tokenizer.json"), llama().to_string()).unwrap();
        fs::write(at("a.jsonl"), format!("{{\"text\": \"{SENTENCE}\"}}\n").repeat(200)).unwrap();
        let dataset = "name = \"d\"\n[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n[tokenizer]\nkind = \"file\"\npath = \"tokenizer.json\"\n";
        fs::write(at("d.toml"), dataset).unwrap();
        fs::write(at("run.toml"), run_file(MODEL, "dataset = \"d.toml\"", 120)).unwrap();
        let printed = succeed(&["train", text(&at("run.toml")), "--out", text(&at("run"))]);
        (dir, printed)
    });
    (dir.path(), printed)
}

fn model() -> PathBuf {
    fixture().0.join("run/checkpoints/best")
}

/// A copy of the model as somebody else would ship it, without what a run leaves beside it.
fn shipped(name: &str) -> PathBuf {
    let to = fixture().0.join(name);
    fs::create_dir_all(&to).unwrap();
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(model().join(file), to.join(file)).unwrap();
    }
    to
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn greedy(model: &Path, more: &[&str]) -> Value {
    let mut arguments = vec!["generate", text(model), "--temperature", "0", "--max-new-tokens", "12", "--json"];
    arguments.extend(more);
    json(&arguments)
}

/// Trains on from a model for a few steps; returns the model that comes out.
fn fine_tuned(from: &Path, out: &str, data: &str, steps: usize) -> PathBuf {
    let dir = fixture().0;
    let file = dir.join(format!("{out}.toml"));
    fs::write(&file, run_file(&format!("[init]\nfrom = \"{}\"\n", text(from)), data, steps)).unwrap();
    succeed(&["train", text(&file), "--out", text(&dir.join(out))]);
    dir.join(out).join("checkpoints/best")
}

#[test]
fn a_continuation_keeps_the_space_before_its_first_word() {
    let (_, printed) = fixture();
    assert!(printed.contains("| The cat sat on a mat"), "in a run's samples:\n{printed}");
    let model = model();
    let found = greedy(&model, &["--prompt", "The cat"]);
    assert_eq!(found["text"], " sat on a mat .");
    let plain = ["generate", text(&model), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "4"];
    assert_eq!(succeed(&plain).trim_end(), "The cat sat on a mat");
    // A stop text may begin with that space.
    let stopped = greedy(&model, &["--prompt", "The cat", "--stop", " sat"]);
    assert_eq!((&stopped["text"], &stopped["finish"]), (&json!(""), &json!("stop")));
}

#[test]
fn prompts_and_documents_begin_as_the_tokenizer_begins_a_text() {
    let (dir, _) = fixture();
    let manifest = json(&["data", "info", text(&dir.join("prepared/d")), "--json"]);
    // Seven words, a beginning and an end.
    assert_eq!((&manifest["train"]["tokens"], &manifest["special_tokens"]), (&json!(180 * 9), &json!(true)));
    let found = greedy(&model(), &["--prompt", "The cat"]);
    assert_eq!((&found["prompt_tokens"], &found["finish"]), (&json!(3), &json!("eos")));
    // Nothing but the beginning is a prompt, too.
    let found = greedy(&model(), &[]);
    assert_eq!((&found["prompt_tokens"], &found["text"]), (&json!(1), &json!(SENTENCE)));
    assert_eq!(greedy(&model(), &["--prompt", "The", "--add-special-tokens", "false"])["prompt_tokens"], 1);
    let config = read(&model().join("config.json"));
    assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&json!(BEGIN), &json!(END)));
    // Held-out documents too: after their beginning the first word is certain.
    let (best, data) = (model(), dir.join("d.toml"));
    let eval = |more: &[&str]| {
        let mut arguments = vec!["eval", text(&best), "--data", text(&data), "--json"];
        arguments.extend(more);
        json(&arguments)
    };
    let (with, without) = (eval(&[]), eval(&["--add-special-tokens", "false"]));
    assert!(with["tokens"].as_u64() > without["tokens"].as_u64());
    assert!(with["loss"].as_f64().unwrap() < without["loss"].as_f64().unwrap(), "{with} {without}");
}

#[test]
fn a_model_says_whether_its_documents_had_special_tokens() {
    let dir = fixture().0;
    let recorded = |model: &Path| read(&model.join("tokenizer_config.json"))["documents_have_special_tokens"].clone();
    assert_eq!(recorded(&model()), true);
    let plain = fine_tuned(&model(), "plain", "dataset = \"d.toml\"\nadd_special_tokens = false", 2);
    assert_eq!(recorded(&plain), false);
    assert_eq!(greedy(&plain, &["--prompt", "The cat"])["prompt_tokens"], 2);
    assert_eq!(greedy(&plain, &["--prompt", "The cat", "--add-special-tokens", "true"])["prompt_tokens"], 3);
    // What is made of it knows, too.
    let out = dir.join("plain-hf");
    succeed(&["export", text(&plain), "--to", "hf", "--out", text(&out)]);
    assert_eq!(greedy(&out, &["--prompt", "The cat"])["prompt_tokens"], 2);
    let again = fine_tuned(&plain, "plain-again", "dataset = \"d.toml\"", 2);
    assert_eq!(recorded(&again), false);
    // A resumed run goes on as it began.
    let file = dir.join("plain-again.toml");
    let more = ["--set", "training.steps=3", "--resume", "--out", text(again.parent().unwrap().parent().unwrap())];
    succeed(&[&["train", text(&file)], &more[..]].concat());
    assert_eq!(recorded(&again), false);
}

#[test]
fn a_model_without_such_a_record_begins_texts_as_its_tokenizer_does_and_a_note_says_so() {
    let older = shipped("older");
    edit(&older.join("tokenizer_config.json"), |config| {
        config.as_object_mut().unwrap().remove("documents_have_special_tokens");
    });
    let arguments = ["generate", text(&older), "--prompt", "The", "--temperature", "0", "--json"];
    let (_, out, err) = lowkey(&arguments);
    assert!(out.contains("\"prompt_tokens\": 2") && !err.contains("note"), "a model of somebody else\n{out}{err}");
    fs::copy(model().join("trainer.json"), older.join("trainer.json")).unwrap();
    let (_, out, err) = lowkey(&arguments);
    assert!(out.contains("\"prompt_tokens\": 2") && err.contains("--add-special-tokens false"), "{out}{err}");
    let (_, _, err) = lowkey(&[&arguments[..], &["--add-special-tokens", "true"]].concat());
    assert!(!err.contains("note"), "{err}");
}

#[test]
fn generation_ends_at_each_token_that_a_file_calls_an_end() {
    let listed = shipped("listed");
    let on = 4;
    edit(&listed.join("generation_config.json"), |config| config["eos_token_id"] = json!([on, TURN]));
    let found = greedy(&listed, &["--prompt", "The cat"]);
    assert_eq!((&found["text"], &found["finish"]), (&json!(" sat"), &json!("eos")));
    assert_eq!(greedy(&listed, &["--prompt", "The cat", "--ignore-eos"])["finish"], "length");
    // The end that config.json alone names is one besides.
    assert_eq!(greedy(&listed, &["--prompt", "The mat"])["finish"], "eos");
}

#[test]
fn what_a_generation_config_declares_is_in_force_and_survives() {
    let dir = fixture().0;
    let declared = shipped("declared");
    let settings = json!({ "eos_token_id": [END, TURN], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9, "top_k": 3,
                           "repetition_penalty": 1000.0, "do_sample": true });
    fs::write(declared.join("generation_config.json"), settings.to_string()).unwrap();
    let run = |model: &Path, more: &[&str]| {
        json(
            &[&["generate", text(model), "--prompt", "The", "--max-new-tokens", "6", "--ignore-eos", "--json"], more]
                .concat(),
        )
    };
    // A penalty that forbids every word that has occurred.
    let mut ids: Vec<u64> =
        run(&declared, &[])["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6, "{ids:?}");
    let options =
        ["--temperature", "0.6", "--top-p", "0.9", "--top-k", "3", "--repetition-penalty", "1000", "--seed", "5"];
    let bare = shipped("bare");
    fs::remove_file(bare.join("generation_config.json")).unwrap();
    assert_eq!(run(&declared, &["--seed", "5"])["ids"], run(&bare, &options)["ids"]);
    // An option says otherwise.
    let overruled = run(&declared, &["--temperature", "0", "--repetition-penalty", "1"]);
    assert_eq!(overruled["text"].as_str().unwrap().trim_start_matches(" cat sat on a mat ."), "");
    edit(&declared.join("generation_config.json"), |config| {
        (config["do_sample"], config["repetition_penalty"]) = (json!(false), json!(1.0));
    });
    assert_eq!(run(&declared, &[])["ids"], overruled["ids"], "do_sample = false is greedy");

    let kept = |model: &Path| {
        let found = read(&model.join("generation_config.json"));
        for key in ["eos_token_id", "pad_token_id", "temperature", "top_p", "top_k"] {
            assert_eq!(found[key], settings[key], "{key} in {}", model.display());
        }
    };
    kept(&fine_tuned(&declared, "declared-tuned", "dataset = \"d.toml\"", 1));
    let (hf, narrow) = (dir.join("declared-hf"), dir.join("declared-narrow"));
    succeed(&["export", text(&declared), "--to", "hf", "--data", text(&dir.join("d.toml")), "--out", text(&hf)]);
    kept(&hf);
    let data = dir.join("d.toml");
    let budget = ["--kv-rank-budget", "100%", "--tokens", "200", "--data", text(&data)];
    succeed(&[&["convert", text(&declared), "--out", text(&narrow)], &budget[..]].concat());
    kept(&narrow);

    edit(&declared.join("generation_config.json"), |config| config["top_p"] = json!("much"));
    let (code, _, err) = lowkey(&["generate", text(&declared), "--prompt", "The"]);
    assert!(code == 1 && err.contains("generation_config.json") && err.contains("top_p"), "{code} {err}");
}

#[test]
fn a_fine_tuned_model_ends_where_its_documents_ended() {
    // As base models are shipped: config.json names one end, tokenizer_config.json another.
    let base = shipped("two-ends");
    edit(&base.join("tokenizer_config.json"), |config| config["eos_token"] = json!("<|im_end|>"));
    let tuned = fine_tuned(&base, "two-ends-tuned", "dataset = \"d.toml\"", 100);
    for file in ["config.json", "generation_config.json"] {
        assert_eq!(read(&tuned.join(file))["eos_token_id"], json!([TURN, END]), "{file}");
    }
    let found = greedy(&tuned, &["--prompt", "The cat"]);
    assert_eq!((&found["text"], &found["finish"]), (&json!(" sat on a mat ."), &json!("eos")));
    // Programs that look at its generation_config.json alone would stop there, too.
    fs::remove_file(tuned.join("checksums.json")).unwrap();
    edit(&tuned.join("tokenizer_config.json"), |config| config["eos_token"] = json!("</s>"));
    edit(&tuned.join("config.json"), |config| config["eos_token_id"] = json!(END));
    assert_eq!(greedy(&tuned, &["--prompt", "The cat"])["finish"], "eos");
}

#[test]
fn a_default_length_is_no_request() {
    let dir = fixture().0;
    let limit = 32;
    let run =
        |more: &[&str]| lowkey(&[&["generate", text(&model()), "--prompt", "The", "--ignore-eos"], more].concat());
    let (code, _, err) = run(&[]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(err.matches(&format!("fill the model's {limit} positions")).count(), 1, "{err}");
    assert!(err.contains(&format!("[{} tokens", limit - 2)), "{err}");
    let (code, out, err) = run(&["--max-new-tokens", "31"]);
    assert!(code == 2 && out.is_empty() && err.contains("needs 33 positions"), "{code} {out} {err}");
    let (code, _, err) = run(&["--max-new-tokens", "30"]);
    assert!(code == 0 && !err.contains("note"), "{err}");

    // What a run says at its end works as it is printed.
    let (_, printed) = fixture();
    let line = printed.lines().last().unwrap();
    let command = line.split_once("Try it: lowkey ").unwrap_or_else(|| panic!("{line}")).1;
    let script = format!("'{}' {command}", env!("CARGO_BIN_EXE_lowkey"));
    let output = std::process::Command::new("sh").arg("-c").arg(&script).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("The cat"), "{script}");
}

/// A real checkpoint, whose text is documented by those who trained it: not part of this repository.
fn stories() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/real/stories260k");
    if !dir.is_dir() {
        announce("reference: no pretrained checkpoint of a third judge is here: its story is not compared");
        return None;
    }
    announce("reference: a pretrained checkpoint of a third judge compared with its documented story");
    Some(dir)
}

#[test]
fn a_real_checkpoint_tells_its_documented_story() {
    const STORY: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, \
                         she saw a big, red ball. She wanted to play with it, but it was too high.\n\
                         Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \
                         \"I want to play with your ball, but I can't find it.\"";
    let Some(model) = stories() else { return };
    let greedy = |more: &[&str]| {
        json(&[&["generate", text(&model), "--temperature", "0", "--max-new-tokens", "250", "--json"], more].concat())
    };
    let whole = greedy(&[]);
    assert_eq!(whole["prompt_tokens"], 1);
    assert!(whole["text"].as_str().unwrap().starts_with(STORY), "{whole}");
    let prompted = greedy(&["--prompt", "Once upon a time"]);
    assert_eq!(prompted["prompt_tokens"], 5);
    assert!(prompted["text"].as_str().unwrap().starts_with(&STORY["Once upon a time".len()..]), "{prompted}");
    let bare = greedy(&["--prompt", "Once upon a time", "--add-special-tokens", "false"]);
    assert!(bare["text"].as_str().unwrap().contains("She loved to play with her toys and her friends."), "{bare}");

    // Of its own story it is surer after the beginning that it knows.
    let dir = tempfile::tempdir().unwrap();
    let story = dir.path().join("story.txt");
    fs::write(&story, whole["text"].as_str().unwrap()).unwrap();
    let loss = |add: &str| {
        let arguments =
            ["eval", text(&model), "--data", text(&story), "--split", "all", "--add-special-tokens", add, "--json"];
        json(&arguments)["loss"].as_f64().unwrap()
    };
    let (with, without) = (loss("true"), loss("false"));
    println!("loss of its own story: {with:.4} with <s>, {without:.4} without");
    assert!(with < without, "{with} {without}");
}
