//! Damage to bytes and to JSON.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// A number below `end`; 0 where there is none.
pub(crate) fn below(random: &mut ChaCha8Rng, end: usize) -> usize {
    if end == 0 { 0 } else { random.random_range(0..end) }
}

/// Whether to do what is done once in `n` times.
pub(crate) fn once_in(random: &mut ChaCha8Rng, n: usize) -> bool {
    below(random, n) == 0
}

/// One of `items`, which are not none.
pub(crate) fn one_of<T: Clone>(random: &mut ChaCha8Rng, items: &[T]) -> T {
    items.choose(random).expect("something to choose from").clone()
}

/// Whole numbers at the edges of types and limits.
const NUMBERS: [u64; 26] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    127,
    128,
    255,
    256,
    4096,
    4097,
    65_535,
    65_536,
    (1 << 20) + 1,
    (1 << 24) + 1,
    1_000_000_000,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 53,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// A whole number that a size should not be.
pub(crate) fn number(random: &mut ChaCha8Rng) -> u64 {
    one_of(random, &NUMBERS)
}

/// Flips, overwrites, removes, doubles and inserts bytes.
pub(crate) fn bytes(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    for _ in 0..one_of(random, &[1, 1, 2, 4, 16]) {
        let at = below(random, bytes.len());
        let len = below(random, 32.min(bytes.len() - at + 1));
        match below(random, 8) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << below(random, 8),
            2 if !bytes.is_empty() => {
                bytes[at] = one_of(random, &[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'}', b'[', b',', b'9', b'-', b'\\']);
            }
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..at + len)),
            5 => {
                let copy = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copy);
            }
            6 => {
                // A piece of one place in another.
                let copy = bytes[at..at + len].to_vec();
                let to = below(random, bytes.len());
                let end = (to + len).min(bytes.len());
                bytes.splice(to..end, copy);
            }
            _ => {
                let word = number(random).to_le_bytes();
                let end = (at + word.len()).min(bytes.len());
                bytes.splice(at..end, word);
            }
        }
    }
}

/// A value that does not belong where it is put.
pub(crate) fn weird(random: &mut ChaCha8Rng) -> Value {
    match below(random, 22) {
        0 => Value::Null,
        1 => true.into(),
        2 => false.into(),
        3..=9 => number(random).into(),
        10 => (-(below(random, 1000) as i64)).into(),
        11 => i64::MIN.into(),
        12 => json!(one_of(random, &[0.5, -0.0, 1e-320, 1e308, -1e308, 1e20, 0.1, 2.0, -1.0])),
        13 => "".into(),
        14 => "x".repeat(one_of(random, &[1, 17, 3000])).into(),
        15 => {
            (one_of(random, &["\u{0}", "é", "\u{10FFFF}", "\u{FFFD}", "null", "-1", "1e999", "../x", "▁", "🦀"])).into()
        }
        16 => json!([]),
        17 => json!({}),
        18 => (0..one_of(random, &[10, 60, 200])).fold(Value::Null, |inner, _| json!([inner])),
        19 => (0..50).fold(json!(1), |inner, _| json!({ "type": "Sequence", "a": inner })),
        20 => vec![below(random, 10); one_of(random, &[1, 2, 100, 100, 10_000])].into(),
        _ => json!({ "type": "x", "content": "x", "id": number(random) }),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The `n`th value in reading order.
fn nth<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, n)),
        Value::Object(map) => map.values_mut().find_map(|item| nth(item, n)),
        _ => None,
    }
}

/// A value anywhere in `root`; the upper levels, where the structure is, as often as the rest.
fn somewhere<'a>(root: &'a mut Value, random: &mut ChaCha8Rng) -> &'a mut Value {
    if once_in(random, 2) {
        let mut n = below(random, count(root));
        return nth(root, &mut n).expect("fewer than there are");
    }
    descend(root, random)
}

fn descend<'a>(node: &'a mut Value, random: &mut ChaCha8Rng) -> &'a mut Value {
    let inner = match node {
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if inner == 0 || once_in(random, 4) {
        return node;
    }
    let at = below(random, inner);
    match node {
        Value::Array(items) => descend(&mut items[at], random),
        Value::Object(map) => descend(map.values_mut().nth(at).expect("fewer than there are"), random),
        _ => node,
    }
}

/// Removes, doubles, renames and swaps members of a container.
fn container(node: &mut Value, random: &mut ChaCha8Rng) {
    match node {
        Value::Array(items) if !items.is_empty() => {
            let at = below(random, items.len());
            let item = items[at].clone();
            match below(random, 4) {
                0 => drop(items.remove(at)),
                1 => items.extend(vec![item; one_of(random, &[1, 2, 40])]),
                2 => items.truncate(at),
                _ => {
                    let other = below(random, items.len());
                    items.swap(at, other);
                }
            }
        }
        Value::Object(map) if !map.is_empty() => {
            let key = map.keys().nth(below(random, map.len())).expect("fewer than there are").clone();
            let member = map.get(&key).expect("just seen").clone();
            match below(random, 4) {
                0 => drop(map.shift_remove(&key)),
                1 => {
                    let other = map.keys().nth(below(random, map.len())).expect("fewer than there are").clone();
                    map.insert(other, member);
                }
                2 => {
                    map.shift_remove(&key);
                    let name = if once_in(random, 2) { format!("{key}x") } else { key.chars().skip(1).collect() };
                    map.insert(name, member);
                }
                _ => drop(map.insert("x".repeat(1 + below(random, 3)), member)),
            }
        }
        other => *other = weird(random),
    }
}

/// A small change to a value of its own kind.
fn nudge(node: &mut Value, random: &mut ChaCha8Rng) {
    let changed = match &*node {
        Value::Bool(flag) => json!(!flag),
        Value::Number(n) => match (n.as_u64(), below(random, 6)) {
            (Some(n), 0) => n.wrapping_add(1).into(),
            (Some(n), 1) => n.wrapping_sub(1).into(),
            (Some(n), 2) => n.wrapping_mul(2).into(),
            (Some(n), 3) => (n as f64).into(),
            (Some(n), 4) => (n ^ 1 << below(random, 64)).into(),
            (_, 5) => n.to_string().into(),
            _ => number(random).into(),
        },
        Value::String(text) => {
            let at = text.char_indices().map(|(at, _)| at).nth(below(random, text.len())).unwrap_or(0);
            let mut text = text.clone();
            match below(random, 4) {
                0 => text.truncate(at),
                1 => text.insert_str(at, one_of(random, &["\u{0}", "é", "/", "(", "{999}", " ", "\\p{L}", "x"])),
                2 => text.push_str(&text.clone()),
                _ => text = text[at..].to_owned(),
            }
            text.into()
        }
        Value::Array(_) => json!([node]),
        Value::Object(_) => json!({ "type": "Sequence", "inner": node }),
        Value::Null => weird(random),
    };
    *node = changed;
}

/// Damages a value; `known` are parts that fit somewhere.
pub(crate) fn value(root: &mut Value, known: &[Value], random: &mut ChaCha8Rng) {
    for _ in 0..one_of(random, &[1, 1, 1, 2, 3, 6]) {
        match below(random, 8) {
            0 | 1 => *somewhere(root, random) = weird(random),
            2 | 3 => container(somewhere(root, random), random),
            4 | 5 => nudge(somewhere(root, random), random),
            6 if !known.is_empty() => *somewhere(root, random) = one_of(random, known).clone(),
            _ => {
                let part = somewhere(root, random).clone();
                *somewhere(root, random) = part;
            }
        }
    }
}

/// The text of a value, now and then with what a [`Value`] cannot say.
pub(crate) fn text(root: &Value, random: &mut ChaCha8Rng) -> Vec<u8> {
    let text = root.to_string();
    let brace = text.find('{').map_or(0, |at| at + 1);
    match (below(random, 40), root) {
        // A key twice.
        (0, Value::Object(map)) if !map.is_empty() => {
            let (key, old) = map.iter().nth(below(random, map.len())).expect("fewer than there are");
            let new = if once_in(random, 2) { weird(random) } else { old.clone() };
            let twice: Map<String, Value> = [(key.clone(), new)].into_iter().collect();
            let twice = Value::Object(twice).to_string();
            format!("{}{},{}", &text[..brace], &twice[1..twice.len() - 1], &text[brace..])
        }
        (1, _) => {
            text.replacen(|c: char| c.is_ascii_digit(), one_of(random, &["1e999", "-", "0x1", "00", "NaN", "1."]), 1)
        }
        (2, _) => text.replacen('"', one_of(random, &["\"\\ud800", "\"\\u0000", "\"\u{FEFF}", "'", "\"\n"]), 1),
        (3, _) => format!("\u{FEFF}{text}"),
        (4, _) => format!("{text}{text}"),
        (5, _) => {
            let depth = one_of(random, &[100, 127, 128, 129, 20_000]);
            format!("{}\"deep\":{},{}", &text[..brace], "[".repeat(depth) + &"]".repeat(depth), &text[brace..])
        }
        _ => text,
    }
    .into_bytes()
}

/// Damages a JSON file: mostly what it says, sometimes its bytes.
pub(crate) fn json(file: &mut Vec<u8>, known: &[Value], random: &mut ChaCha8Rng) {
    match serde_json::from_slice(file) {
        Ok(mut root) if !once_in(random, 8) => {
            value(&mut root, known, random);
            *file = text(&root, random);
        }
        _ => bytes(file, random),
    }
}
