//! Which of llama.cpp's pre-tokenizers cuts a text as a `tokenizer.json` does.

use serde_json::Value;

use crate::error::{Error, Result};

/// A pre-tokenizer that llama.cpp knows by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pre {
    /// GPT-2's pattern.
    Gpt2,
    /// The same after each digit has been cut off.
    Smollm,
    /// Llama 3's pattern. llama.cpp takes a whole word that is in the vocabulary without merging.
    LlamaBpe,
    /// Qwen 2's pattern.
    Qwen2,
    /// The three patterns of DeepSeek-V3.
    DeepseekV3,
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

impl Pre {
    /// `tokenizer.ggml.pre`
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt-2",
            Self::Smollm => "smollm",
            Self::LlamaBpe => "llama-bpe",
            Self::Qwen2 => "qwen2",
            Self::DeepseekV3 => "deepseek-v3",
        }
    }

    /// Whether llama.cpp then looks whole words up before it merges.
    fn ignores_merges(self) -> bool {
        self == Self::LlamaBpe
    }
}

/// The reason why a tokenizer cannot be embedded.
pub(super) fn unsupported(why: impl Into<String>) -> Error {
    Error::Unsupported { format: "GGUF", why: why.into() }
}

/// The pre-tokenizer of a byte-level `tokenizer.json`.
///
/// # Errors
/// [`Error::Unsupported`] where no name stands for this pattern: a near one would cut some texts otherwise.
pub(super) fn pre_tokenizer(json: &Value, notes: &mut Vec<String>) -> Result<Pre> {
    check_normalizer(json.get("normalizer").unwrap_or(&Value::Null), notes)?;
    check_added_tokens(json, notes);
    let steps = flatten(json.get("pre_tokenizer").unwrap_or(&Value::Null), "pretokenizers");
    let Some((last, before)) = steps.split_last() else {
        return Err(unsupported(
            "its tokenizer has no byte-level pre-tokenizer; use --to hf, or export without a tokenizer",
        ));
    };
    let is = |step: &Value, key: &str, default: bool| step.get(key).and_then(Value::as_bool).unwrap_or(default);
    if kind(last) != "ByteLevel" || is(last, "add_prefix_space", true) {
        return Err(unsupported(
            "its tokenizer is not byte-level without a prefix space; use --to hf, or export without a tokenizer",
        ));
    }
    let ignore_merges = is(json.get("model").unwrap_or(&Value::Null), "ignore_merges", false);
    // Where nothing is merged, it does not matter where a text is cut.
    let no_merges = json.pointer("/model/merges").and_then(Value::as_array).is_some_and(Vec::is_empty);
    if no_merges && !ignore_merges {
        return Ok(Pre::Gpt2);
    }
    let patterns: Vec<Option<String>> = before.iter().map(isolating_pattern).collect();
    let patterns: Vec<&str> = patterns.iter().map(|pattern| pattern.as_deref().unwrap_or("?")).collect();
    let digits = |step: &Value| kind(step) == "Digits" && is(step, "individual_digits", false);
    let found = if is(last, "use_regex", true) {
        match before {
            [] => Some(Pre::Gpt2),
            [step] if digits(step) => Some(Pre::Smollm),
            _ => None,
        }
    } else {
        match patterns.as_slice() {
            [LLAMA3] => Some(Pre::LlamaBpe),
            [QWEN2] => Some(Pre::Qwen2),
            three if three == DEEPSEEK_V3 => Some(Pre::DeepseekV3),
            _ => None,
        }
    };
    let pre = found.ok_or_else(|| {
        unsupported(format!(
            "its tokenizer cuts texts by a pattern that llama.cpp is not known to have ({}); use --to hf, or export without a \
             tokenizer",
            json.get("pre_tokenizer").unwrap_or(&Value::Null)
        ))
    })?;
    if pre.ignores_merges() != ignore_merges {
        return Err(unsupported(format!(
            "its tokenizer has ignore_merges = {ignore_merges}, and llama.cpp's pre-tokenizer {} the opposite; use --to hf, or \
             export without a tokenizer",
            pre.name()
        )));
    }
    Ok(pre)
}

pub(super) fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// The steps of a component that may be a sequence of them; none for null.
pub(super) fn flatten<'a>(step: &'a Value, parts: &str) -> Vec<&'a Value> {
    match step {
        Value::Null => Vec::new(),
        step if kind(step) == "Sequence" => step
            .get(parts)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .flat_map(|part| flatten(part, parts))
            .collect(),
        step => vec![step],
    }
}

/// The regular expression of a step that makes each match a piece of its own, with line ends spelled as escapes.
fn isolating_pattern(step: &&Value) -> Option<String> {
    let isolates = kind(step) == "Split"
        && step.get("behavior").and_then(Value::as_str) == Some("Isolated")
        && step.get("invert").and_then(Value::as_bool) != Some(true);
    let pattern = step.pointer("/pattern/Regex").and_then(Value::as_str).filter(|_| isolates)?;
    Some(pattern.replace('\r', r"\r").replace('\n', r"\n"))
}

fn check_normalizer(normalizer: &Value, notes: &mut Vec<String>) -> Result<()> {
    for step in flatten(normalizer, "normalizers") {
        match kind(step) {
            "NFC" => notes.push(
                "the tokenizer brings texts into Unicode's normal form NFC first, llama.cpp does not: texts in another form give \
                 other tokens there"
                    .into(),
            ),
            other => {
                return Err(unsupported(format!(
                    "its tokenizer has a normalizer {other}, which llama.cpp does not apply; use --to hf, or export without a \
                     tokenizer"
                )));
            }
        }
    }
    Ok(())
}

/// Added tokens that swallow spaces around them, or stand for whole words only, are cut plainly by llama.cpp.
fn check_added_tokens(json: &Value, notes: &mut Vec<String>) {
    let set = |token: &Value| {
        ["single_word", "lstrip", "rstrip"].iter().any(|key| token.get(key).and_then(Value::as_bool) == Some(true))
    };
    let tokens = json.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let names: Vec<&str> =
        tokens.filter(|token| set(token)).filter_map(|token| token.get("content").and_then(Value::as_str)).collect();
    if !names.is_empty() {
        notes.push(format!(
            "llama.cpp ignores single_word, lstrip and rstrip of added tokens: spaces beside {} differ",
            names.join(", ")
        ));
    }
}
