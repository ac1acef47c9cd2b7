//! What a foreign `tokenizer.json` may not ask of the tokenizers crate.
//!
//! That crate trusts its files. Some sizes in them it reserves before it reads what they count, some steps grow a text in
//! proportion to what they are told, and some values it only finds impossible when it panics. Panics can be caught; memory
//! that is gone cannot, so everything that costs memory out of proportion to the file is refused here, before the parser
//! sees it.

use serde_json::Value;

/// Length of all regular expressions of a file together ([`pattern_cost`]). The patterns of published tokenizers have a few
/// hundred characters, some thirty classes and a `{1,3}` or two.
const MOST_PATTERN: usize = 1 << 14;

/// What a class such as `\w` or `\p{L}` counts for, in characters: it compiles to some twenty kilobytes, which is a hundred
/// times what a character does.
const CLASS: usize = 15;

/// How many times longer the strings of a file may make a text, all steps together. The known tokenizers stay below 20.
const MOST_GROWTH: usize = 1 << 10;

/// How many characters a table may put for one, all tables together. SentencePiece's own puts 18.
const MOST_FOR_ONE: usize = 32;

/// Bytes that the added tokens of a file, which are rewritten when it is loaded, may become.
const MOST_ADDED: usize = 1 << 26;

/// Bytes of what a model puts before or behind the parts of a word: it is put there at each look into the vocabulary.
const LONGEST_AFFIX: usize = 64;

/// Characters of a word that is looked up part by part, which takes time with the square of its length. Published
/// vocabularies say 100.
const LONGEST_WORD: u64 = 1 << 10;

/// How many special tokens a template may put around a text. Published ones put up to three there.
const MOST_AROUND: usize = 256;

/// Refuses what would make the parser, or the tokenizer that it makes, take more memory than the file accounts for, or
/// read past the end of a token. Returns how many times longer the strings of the file can make a text.
pub(super) fn vet(json: &Value) -> Result<usize, String> {
    let mut patterns = 0;
    visit(json, &mut |node| {
        patterns = pattern_cost(node).saturating_add(patterns);
        if patterns > MOST_PATTERN {
            return Err(format!(
                "its regular expressions are too large (more than {MOST_PATTERN} characters, \
                 classes counted {CLASS} times and repetitions written out)"
            ));
        }
        charsmap(node)?;
        template(node)
    })?;
    let encoding = grows(json, &["normalizer", "pre_tokenizer"])?;
    grows(json, &["decoder"])?;
    let added = json.get("added_tokens").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let content = |token: &Value| token.get("content").and_then(Value::as_str).map_or(0, str::len);
    let bytes = added.iter().map(content).fold(0, usize::saturating_add);
    if bytes.saturating_mul(encoding) > MOST_ADDED {
        return Err(format!("its normalizer can make its added tokens, of {bytes} bytes, {encoding} times longer"));
    }
    json.get("model").map_or(Ok(()), |model| prefixed_merges(model).and_then(|()| words(model)))?;
    Ok(encoding)
}

/// How many times longer the strings of these steps can make a text, if it is not too much.
fn grows(json: &Value, steps: &[&str]) -> Result<usize, String> {
    let (mut together, mut tables) = (1usize, 1usize);
    for step in steps.iter().filter_map(|step| json.get(step)) {
        visit(step, &mut |node| {
            together = together.saturating_mul(growth(node));
            if together > MOST_GROWTH {
                return Err(format!("its {} can make a text {MOST_GROWTH} times longer", steps.join(" and ")));
            }
            tables = tables.saturating_mul(for_one(node));
            if tables > MOST_FOR_ONE {
                return Err(format!(
                    "its tables (precompiled_charsmap) put more than {MOST_FOR_ONE} characters for one"
                ));
            }
            Ok(())
        })?;
    }
    Ok(together)
}

/// Visits every value below `node`, itself first. The parser has bounded the depth.
fn visit(node: &Value, look: &mut impl FnMut(&Value) -> Result<(), String>) -> Result<(), String> {
    look(node)?;
    match node {
        Value::Array(items) => items.iter().try_for_each(|item| visit(item, look)),
        Value::Object(map) => map.values().try_for_each(|item| visit(item, look)),
        _ => Ok(()),
    }
}

/// The length of a pattern `{"Regex": "…"}`, each class (and each other escape) counted [`CLASS`] times, times the upper
/// bounds of its repetitions `{n}`, `{n,}` and `{n,m}`, which may stand in one another.
fn pattern_cost(node: &Value) -> usize {
    let Some(pattern) = node.get("Regex").and_then(Value::as_str) else { return 0 };
    let length = pattern.len() + CLASS * pattern.matches('\\').count();
    pattern.split('{').skip(1).fold(length, |cost, rest| {
        let bounds = rest.split('}').next().unwrap_or_default();
        let largest = bounds.split(',').filter_map(|bound| bound.trim().parse().ok()).max();
        cost.saturating_mul(largest.unwrap_or(1).max(1))
    })
}

/// The factor by which the strings of one step can lengthen a text. (What Unicode says that a character becomes is no string of
/// the file, and doing it again changes nothing.)
fn growth(step: &Value) -> usize {
    let text = |key: &str| step.get(key).and_then(Value::as_str);
    let characters = |key: &str| text(key).map_or(0, |text| text.chars().count());
    let yes = |key: &str| usize::from(step.get(key).and_then(Value::as_bool) == Some(true));
    match text("type") {
        // A byte that is no printable character becomes a character of two bytes, whose bytes are none either.
        Some("ByteLevel") => 2 + yes("add_prefix_space"),
        // Before each section of a text, and between any two added tokens lies one.
        Some("Prepend") => 1 + characters("prepend"),
        Some("Metaspace") => 2,
        Some("Replace") => {
            let content = characters("content");
            let pattern = step.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
            match pattern.map_or(0, |pattern| pattern.chars().count()) {
                // A pattern that matches nothing matches everywhere, and leaves what was there.
                0 if content == 0 => 1,
                0 => content + 1,
                matched => content.div_ceil(matched).max(1),
            }
        }
        // These put spaces where an empty string stands, which is everywhere.
        Some("BPEDecoder") if characters("suffix") == 0 => 2,
        Some("CTC") if characters("word_delimiter_token") == 0 => 2,
        Some("WordPiece") => 2,
        _ => 1,
    }
}

/// The most characters that a SentencePiece table puts for one: the longest of the strings behind its index.
fn for_one(step: &Value) -> usize {
    let Some(table) = step.get("precompiled_charsmap").and_then(Value::as_str) else { return 1 };
    let bytes = base64(table);
    let Some(head) = bytes.first_chunk::<4>() else { return 1 };
    let strings = bytes.get(4 + u32::from_le_bytes(*head) as usize..).unwrap_or_default();
    let characters = |string: &[u8]| string.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
    strings.split(|byte| *byte == 0).map(characters).max().unwrap_or(1).max(1)
}

/// The bytes of a text in base64, up to where it is none.
fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bits, mut count) = (0u32, 0);
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for six in text.bytes().map_while(digit) {
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

/// A SentencePiece table begins with its own size in bytes, which the parser reserves twice over.
fn charsmap(node: &Value) -> Result<(), String> {
    let Some(table) = node.get("precompiled_charsmap").and_then(Value::as_str) else { return Ok(()) };
    // Six digits of base64 hold the four bytes, lowest first.
    let start = base64(table.get(..6).unwrap_or_default());
    let Some(head) = start.first_chunk::<4>() else { return Ok(()) };
    let size = u64::from(u32::from_le_bytes(*head));
    if size > table.len() as u64 {
        return Err(format!("its precompiled_charsmap says that it holds {size} bytes, but is cut short"));
    }
    Ok(())
}

/// What is done for each part of a word must not be long.
fn words(model: &Value) -> Result<(), String> {
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let length = model.get(key).and_then(Value::as_str).map_or(0, str::len);
        if length > LONGEST_AFFIX {
            return Err(format!("its {key} has {length} bytes, more than {LONGEST_AFFIX}"));
        }
    }
    match model.get("max_input_chars_per_word").and_then(Value::as_u64) {
        Some(most) if most > LONGEST_WORD => {
            Err(format!("its max_input_chars_per_word = {most} is larger than {LONGEST_WORD}"))
        }
        _ => Ok(()),
    }
}

/// A template may name the text as often as it likes, and so may the next one in a sequence.
fn template(node: &Value) -> Result<(), String> {
    if node.get("type").and_then(Value::as_str) != Some("TemplateProcessing") {
        return Ok(());
    }
    let pieces = node.get("single").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count() != 1 {
        return Err("its post_processor leaves the text out or repeats it".to_owned());
    }
    let special = |piece: &Value| {
        let name = piece.pointer("/SpecialToken/id").and_then(Value::as_str)?;
        Some(node.get("special_tokens")?.get(name)?.get("ids")?.as_array()?.len())
    };
    let added = pieces.iter().filter_map(special).fold(0usize, usize::saturating_add);
    if added > MOST_AROUND {
        return Err(format!("its post_processor puts {added} tokens around a text, more than {MOST_AROUND}"));
    }
    Ok(())
}

/// The second part of each merge loses the prefix of word-internal tokens. The parser cuts off as many bytes without a
/// look at them: in the middle of a character where it has others, past the end where it has fewer.
fn prefixed_merges(model: &Value) -> Result<(), String> {
    let Some(prefix) = model.get("continuing_subword_prefix").and_then(Value::as_str) else { return Ok(()) };
    let merges = model.get("merges").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let second = |merge: &Value| match merge {
        Value::String(pair) => pair.split_once(' ').map(|(_, second)| second.starts_with(prefix)),
        pair => pair.get(1).and_then(Value::as_str).map(|second| second.starts_with(prefix)),
    };
    match merges.iter().find(|merge| second(merge) == Some(false)) {
        Some(merge) => Err(format!("its merge {merge} lacks continuing_subword_prefix {prefix:?} on its second part")),
        None => Ok(()),
    }
}
