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

/// How many times longer the steps that rewrite a text may make it, all together. The known tokenizers stay below 20.
const MOST_GROWTH: usize = 1 << 16;

/// How many special tokens a template may put around a text. Published ones put up to three there.
const MOST_AROUND: usize = 256;

/// Refuses what would make the parser, or the tokenizer that it makes, take more memory than the file accounts for, or
/// read past the end of a token.
pub(super) fn vet(json: &Value) -> Result<(), String> {
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
    for steps in [&["normalizer", "pre_tokenizer"][..], &["decoder"]] {
        let mut together = 1usize;
        for step in steps.iter().filter_map(|step| json.get(step)) {
            visit(step, &mut |node| {
                together = together.saturating_mul(growth(node));
                if together > MOST_GROWTH {
                    return Err(format!("its {} can make a text {MOST_GROWTH} times longer", steps.join(" and ")));
                }
                Ok(())
            })?;
        }
    }
    json.get("model").map_or(Ok(()), prefixed_merges)
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

/// The factor by which one step can lengthen a text.
fn growth(step: &Value) -> usize {
    let text = |key: &str| step.get(key).and_then(Value::as_str);
    match text("type") {
        // A byte that is no printable character becomes a character of two bytes, whose bytes are none either.
        Some("ByteLevel") => 2,
        // SentencePiece's longest replacement of one character has 18.
        Some("Precompiled") => 18,
        Some("Replace") => {
            let content = text("content").map_or(0, |content| content.chars().count());
            let pattern = step.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
            match pattern.map_or(0, |pattern| pattern.chars().count()) {
                // A pattern that matches nothing matches everywhere, and leaves what was there.
                0 if content == 0 => 1,
                0 => content + 1,
                matched => content.div_ceil(matched).max(1),
            }
        }
        _ => 1,
    }
}

/// A SentencePiece table begins with its own size in bytes, which the parser reserves twice over.
fn charsmap(node: &Value) -> Result<(), String> {
    let Some(table) = node.get("precompiled_charsmap").and_then(Value::as_str) else { return Ok(()) };
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    // Six digits of base64 hold the 32 bits, lowest byte first, and four more.
    let Some(head) = table.as_bytes().first_chunk::<6>() else { return Ok(()) };
    let Some(bits) = head.iter().try_fold(0u64, |bits, c| Some(bits << 6 | u64::from(digit(*c)?))) else {
        return Ok(());
    };
    let size = u64::from(u32::swap_bytes((bits >> 4) as u32));
    if size > table.len() as u64 {
        return Err(format!("its precompiled_charsmap says that it holds {size} bytes, but is cut short"));
    }
    Ok(())
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
