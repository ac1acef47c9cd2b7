//! What a fine-tuning run reads: records of examples, chat templates with what they are given, adapters.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::Device;
use lowkey_data::chat::{ChatTemplate, Conversation, Now, Options};
use lowkey_data::{DatasetConfig, Tokenizer};
use lowkey_model::{CausalLm, ModelConfig, ModelDir, checkpoint::WeightDtype};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::driver::{Entry, Input, Target};
use crate::models::{MODEL, config, folder, json_limit, saved};
use crate::mutate::{self, below, once_in, one_of};
use crate::weights::damage_weights;

fn file(text: impl Into<String>) -> Entry {
    Entry::File(text.into().into_bytes())
}

const DATASET: &str = "dataset.toml";
const LINES: &str = "records.jsonl";

/// Lines of records, read and made into tokens.
pub(crate) struct Records;

/// Parts of records, which damage puts where they do not belong.
fn parts() -> Vec<Value> {
    let call = json!({ "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{\"a\": 1}" } });
    vec![
        json!({ "role": "tool", "content": "4", "tool_call_id": "c1" }),
        json!({ "role": "assistant", "content": null, "tool_calls": [call.clone()] }),
        json!({ "role": "developer", "content": [{ "type": "text", "text": "a" }, { "type": "image", "image": "b" }] }),
        json!({ "role": "assistant", "content": "<|im_end|>", "weight": 0, "reasoning_content": "hm" }),
        json!({ "from": "human", "value": "<image>" }),
        json!({ "from": "gpt", "value": "" }),
        json!([call]),
        "{\"a\": [}".into(),
        "user".into(),
        "assistant".into(),
        json!([{ "role": "user", "content": "q" }]),
    ]
}

impl Target for Records {
    fn name(&self) -> &'static str {
        "finetuning"
    }

    fn seeds(&self) -> Vec<Input> {
        let user = json!({ "role": "user", "content": "hi" });
        let answer = |text: &str| json!({ "role": "assistant", "content": text });
        let call = json!({ "role": "assistant", "content": "", "tool_calls": [{ "name": "f", "arguments": { "a": [1, null] } }] });
        let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
        let seed = |records: &str, template: &str, lines: &[Value]| {
            let toml = format!(
                "name = \"records\"\n[source]\nkind = \"jsonl\"\npaths = [\"{LINES}\"]\nrecords = \"{records}\"\n[chat]\ntemplate = \"{template}\"\n[split]\n\
                 validation_fraction = 0.0\n"
            );
            let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
            Input::from([(DATASET.to_owned(), file(toml)), (LINES.to_owned(), file(lines))])
        };
        let talk = json!({ "messages": [{ "role": "system", "content": "Be brief." }, user, answer("ho"), user, answer("né")] });
        let tool = json!({ "tools": tools, "messages": [user, call, { "role": "tool", "content": "4" }, answer("4")] });
        vec![
            seed("messages", "chatml", &[talk.clone(), tool.clone()]),
            seed("messages", "deepseek", &[tool, talk]),
            seed(
                "sharegpt",
                "llama3",
                &[json!({ "conversations": [{ "from": "human", "value": "hi" }, { "from": "gpt", "value": "ho" }] })],
            ),
            seed("alpaca", "qwen", &[json!({ "instruction": "add", "input": "2 2", "output": "4" })]),
            seed(
                "completion",
                "plain",
                &[
                    json!({ "prompt": "a ", "completion": "b" }),
                    json!({ "prompt": [user], "completion": [answer("c")] }),
                ],
            ),
            seed(
                "preference",
                "chatml",
                &[
                    json!({ "chosen": [user, answer("yes")], "rejected": [user, answer("no")] }),
                    json!({ "prompt": "a", "chosen": "b", "rejected": "c" }),
                ],
            ),
        ]
    }

    fn main_file(&self) -> &'static str {
        LINES
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let Some(Entry::File(bytes)) = input.get_mut(LINES) else { return };
        if once_in(random, 6) {
            return mutate::bytes(bytes, random);
        }
        let mut lines: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        let at = below(random, lines.len());
        mutate::json(&mut lines[at], &parts(), random);
        *bytes = lines.join(&b'\n');
        // Another form of record than the lines have.
        if once_in(random, 10)
            && let Some(Entry::File(toml)) = input.get_mut(DATASET)
        {
            let text = String::from_utf8(toml.clone()).unwrap();
            let to = one_of(random, &["messages", "sharegpt", "alpaca", "completion", "preference"]);
            *toml = text.replace("records = \"messages\"", &format!("records = \"{to}\"")).into_bytes();
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let dataset = DatasetConfig::load(&dir.join(DATASET)).map_err(|e| e.to_string())?;
        let out = dir.join("tokens");
        let prepared =
            lowkey_data::prepare(&dataset, &out, Some(Tokenizer::bytes()), &mut |_| ControlFlow::Continue(()));
        let read = prepared.map_err(|e| e.to_string()).map(|prepared| {
            for i in 0..4 {
                let _ = prepared.example(i);
            }
        });
        // Nothing of it may lie beside the next input.
        let _ = std::fs::remove_dir_all(out);
        read
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON")
    }

    /// Files are read and written through buffers of fixed size; a conversation is held as a tree, as text and as tokens.
    fn limit(&self, bytes: usize) -> usize {
        (16 << 20) + 4 * json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        2_000
    }
}

const TEMPLATE: &str = "chat_template.jinja";
const TALK: &str = "conversation.json";
const TOKENIZER: &str = "tokenizer_config.json";

/// Chat templates of a model directory, and what they make of a conversation.
pub(crate) struct Templates;

/// Pieces of templates, whole and broken.
const PIECES: [&str; 26] = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if loop.first or messages[0].role == 'system' %}",
    "{% endif %}",
    "{%- generation %}",
    "{%- endgeneration -%}",
    "{{ messages }}",
    "{{ messages[-1]['content'] | trim }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%d %b %Y %q %') }}",
    "{% set ns = namespace(x='a') %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(1000000000) %}",
    "{{ 'é'[1:] ~ 'a'.split('')[0] }}",
    "{{ '%s' | format(1) }}{{ '{:>9999999}'.format(1) }}",
    "{{ ('a' * 99999999) | upper }}",
    "{{ messages | map(attribute='content') | join('\\u0000') }}",
    "{{ 1 / 0 }}{{ 1 // 0 }}{{ 2 ** 9999 }}",
    "{{ -9223372036854775808 % -1 }}",
    "{% raw %}{{{% endraw %}",
    "{#",
    "{{ bos_token",
    "\u{10FF00}",
    "-%}",
];

impl Target for Templates {
    fn name(&self) -> &'static str {
        "templates"
    }

    fn seeds(&self) -> Vec<Input> {
        let call = json!([{ "function": { "name": "f", "arguments": { "a": 1 } } }]);
        let talk = json!({ "messages": [
            { "role": "user", "content": "Hé?" }, { "role": "assistant", "content": "漢 yes" }, { "role": "user", "content": " Sure? " },
            { "role": "assistant", "content": "No." },
        ] });
        let tool = json!({ "tools": [{ "type": "function", "function": { "name": "f" } }], "messages": [
            { "role": "system", "content": "s" }, { "role": "user", "content": "q" }, { "role": "assistant", "tool_calls": call },
            { "role": "tool", "content": "4" }, { "role": "assistant", "content": "four", "reasoning_content": "hm" },
        ] });
        let tokens = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" }, "chat_template": [
            { "name": "default", "template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}" },
            { "name": "rag", "template": "{{ documents }}" },
        ] });
        let mut seeds = Vec::new();
        for name in ChatTemplate::built_in_names() {
            let talk = if name == "plain" { &talk } else { &tool };
            seeds.push(Input::from([
                (TEMPLATE.to_owned(), file(ChatTemplate::built_in(name).unwrap().source())),
                (TOKENIZER.to_owned(), file(tokens.to_string())),
                (TALK.to_owned(), file(talk.to_string())),
            ]));
        }
        // Those that lie elsewhere.
        seeds.push(Input::from([
            (TOKENIZER.to_owned(), file(tokens.to_string())),
            (TALK.to_owned(), file(talk.to_string())),
        ]));
        let own = json!({ "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" });
        seeds.push(Input::from([
            ("chat_template.json".to_owned(), file(own.to_string())),
            (TALK.to_owned(), file(talk.to_string())),
        ]));
        seeds
    }

    fn main_file(&self) -> &'static str {
        TEMPLATE
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let names: Vec<String> = input.keys().cloned().collect();
        let name = one_of(random, &names);
        let Some(Entry::File(bytes)) = input.get_mut(&name) else { return };
        if name != TEMPLATE {
            let pieces: Vec<Value> = PIECES.iter().map(|piece| (*piece).into()).collect();
            return mutate::json(bytes, &pieces, random);
        }
        if once_in(random, 4) {
            return mutate::bytes(bytes, random);
        }
        // Pieces where a tag begins, so that the rest stays a template.
        let text = String::from_utf8(bytes.clone()).unwrap();
        let places: Vec<usize> = text.match_indices('{').map(|(at, _)| at).chain([text.len()]).collect();
        let mut at: Vec<usize> = (0..one_of(random, &[1, 1, 2, 5])).map(|_| one_of(random, &places)).collect();
        at.sort_unstable_by(|a, b| b.cmp(a));
        let mut text = text;
        for at in at {
            text.insert_str(at, one_of(random, &PIECES));
        }
        *bytes = text.into_bytes();
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let Some(template) = ChatTemplate::of_directory(dir, None).map_err(|e| e.to_string())? else { return Ok(()) };
        let path = dir.join(TALK);
        let named = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = lowkey_files::read_text(&path, 1 << 28).map_err(|e| named(&e))?;
        let conversation: Conversation = serde_json::from_str(&text).map_err(|e| named(&e))?;
        let now = Now::At("2026-01-15T12:00:00".parse().unwrap());
        for (add_generation_prompt, continue_final_message) in [(false, false), (true, false), (false, true)] {
            let options = Options { add_generation_prompt, continue_final_message, now };
            if let Ok(rendered) = template.render(&conversation, &options) {
                let mut end = 0;
                for span in rendered.spans {
                    assert!(span.start >= end && rendered.text.get(span.clone()).is_some(), "{span:?}");
                    end = span.end;
                }
            }
        }
        let answers = template.answers(&conversation, now).map_err(|e| e.to_string())?;
        for span in &answers.spans {
            assert!(
                span.message < conversation.messages.len() && answers.text.get(span.bytes.clone()).is_some(),
                "{span:?}"
            );
        }
        Ok(())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON") && !refusal.contains("syntax error")
    }

    /// Rendering is on a thread of its own, bounded by work; here are the files, the conversation as a tree and what comes of it.
    fn limit(&self, bytes: usize) -> usize {
        (32 << 20) + 4 * json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        1_500
    }
}

const KEYS: &str = "adapter_config.json";
const FACTORS: &str = "adapter_model.safetensors";

/// A directory of an adapter, with its base beside it.
pub(crate) struct Adapters;

impl Target for Adapters {
    fn name(&self) -> &'static str {
        "adapters"
    }

    fn seeds(&self) -> Vec<Input> {
        let begun = |keys: Value| {
            let (base, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let config = config(json!({}));
            let model = saved(&config, WeightDtype::F32, usize::MAX);
            for (name, entry) in &model {
                let Entry::File(bytes) = entry else { panic!("{name} is no file") };
                std::fs::write(base.path().join(name), bytes).unwrap();
            }
            let config = ModelConfig::from_json(config.as_object().unwrap()).unwrap();
            let keys = serde_json::from_value(keys).unwrap();
            CausalLm::begin_adapter(base.path(), &config, &keys, 1, &Device::flex())
                .unwrap()
                .save_adapter(out.path())
                .unwrap();
            let mut input = folder(out.path());
            let Some(Entry::File(bytes)) = input.get_mut(KEYS) else { panic!("no {KEYS}") };
            let mut keys: Value = serde_json::from_slice(bytes).unwrap();
            keys["base_model_name_or_path"] = "base".into();
            *bytes = keys.to_string().into_bytes();
            input.insert("base".to_owned(), Entry::Folder);
            input.extend(model.into_iter().map(|(name, entry)| (format!("base/{name}"), entry)));
            input
        };
        vec![
            begun(json!({ "target_modules": "all-linear", "r": 2 })),
            begun(json!({ "target_modules": ["o_proj", "up_proj"], "r": 1, "use_rslora": true, "use_dora": true,
                          "rank_pattern": { "o_proj": 3 }, "modules_to_save": ["norm"] })),
        ]
    }

    fn main_file(&self) -> &'static str {
        FACTORS
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        if once_in(random, 2) {
            if let Some(Entry::File(file)) = input.get_mut(FACTORS) {
                damage_weights(file, random);
            }
            return;
        }
        let known: Vec<Value> = [
            "base",
            "../base",
            "/etc",
            "",
            "everything",
            "(a*)*b",
            "\\w{1000}{1000}",
            "model.layers.[0-9]+.*",
            "o_proj",
        ]
        .into_iter()
        .map(Value::from)
        .chain([json!(["q_proj", "kv_b_proj"]), json!({ "o_proj": 1, "(": 2 }), json!(true), json!([0, 1])])
        .collect();
        if let Some(Entry::File(file)) = input.get_mut(KEYS) {
            mutate::json(file, &known, random);
        }
        if once_in(random, 16) {
            let entry = one_of(random, &[Entry::Folder, Entry::Link(KEYS.into()), Entry::Link("/dev/zero".into())]);
            input.insert(one_of(random, &[KEYS, FACTORS]).into(), entry);
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let model = ModelDir::open(dir).map_err(|e| e.to_string())?;
        let model = model.load(&Device::flex()).map_err(|e| e.to_string())?;
        let _ = model.merged().parameters();
        Ok(())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON") && !refusal.contains("not a readable safetensors file")
    }

    /// Base, adapter and what they come to, and patterns of names as they are compiled.
    fn limit(&self, bytes: usize) -> usize {
        4 * MODEL + (16 << 20) + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        5_000
    }
}
