//! Pairs of answers to one prompt, of which one was chosen.

use serde_json::{Map, Value};

use super::messages::{Said, message, messages};
use super::{Chat, Record, Sample, field, shown};

/// The two answers of a record; `tools` are the record's.
pub(super) fn pair(object: &Map<String, Value>, tools: &[Value]) -> Result<Record, String> {
    let (chosen, rejected) = (field(object, "chosen")?, field(object, "rejected")?);
    if chosen == rejected {
        return Err("\"chosen\" and \"rejected\" are the same: nothing is to be learnt from them".to_owned());
    }
    let prompt = object.get("prompt").filter(|prompt| !prompt.is_null());
    match (chosen, rejected) {
        (Value::String(chosen), Value::String(rejected)) => match prompt {
            Some(Value::String(prompt)) => Ok(texts(prompt, chosen, rejected)),
            // An answer to messages is one, too.
            Some(prompt) => {
                let answer = |text: &str| {
                    let mut said = Said::default();
                    said.push(message("assistant", text));
                    said
                };
                Ok(chats(messages(prompt, "prompt")?, answer(chosen), answer(rejected), tools))
            }
            None => {
                let common = common_text(chosen, rejected);
                Ok(texts(&chosen[..common], &chosen[common..], &rejected[common..]))
            }
        },
        (Value::Array(_), Value::Array(_)) => {
            let (mut chosen, mut rejected) = (messages(chosen, "chosen")?, messages(rejected, "rejected")?);
            if let Some(prompt @ Value::Array(_)) = prompt {
                return Ok(chats(messages(prompt, "prompt")?, chosen, rejected, tools));
            }
            let same = chosen.messages.iter().zip(&rejected.messages).take_while(|(a, b)| a == b).count();
            if same == chosen.messages.len() || same == rejected.messages.len() {
                return Err("one of \"chosen\" and \"rejected\" is how the other begins: it has no answer of its own"
                    .to_owned());
            }
            // A text beside lists that begin with the question already is that question again.
            if let (0, Some(Value::String(prompt))) = (same, prompt) {
                let mut said = Said::default();
                said.push(message("user", prompt));
                return Ok(chats(said, chosen, rejected, tools));
            }
            let prompt =
                Said { messages: chosen.messages.drain(..same).collect(), said: chosen.said.drain(..same).collect() };
            rejected.messages.drain(..same);
            rejected.said.drain(..same);
            Ok(chats(prompt, chosen, rejected, tools))
        }
        (chosen, rejected) => Err(format!(
            "\"chosen\" and \"rejected\" must both be texts or both lists of messages, not {} and {}",
            shown(chosen),
            shown(rejected)
        )),
    }
}

fn texts(prompt: &str, chosen: &str, rejected: &str) -> Record {
    let sample = |completion: &str| Sample::Text { prompt: prompt.to_owned(), completion: completion.to_owned() };
    Record::Pair { chosen: sample(chosen), rejected: sample(rejected) }
}

fn chats(prompt: Said, chosen: Said, rejected: Said, tools: &[Value]) -> Record {
    let count = prompt.messages.len();
    let sample = |answer: Said| {
        let mut said = prompt.clone();
        said.append(answer);
        Sample::Chat(Chat::new(said, tools.to_vec(), Some(count)))
    };
    Record::Pair { chosen: sample(chosen), rejected: sample(rejected) }
}

/// How many bytes both texts begin with, up to the white space before the first word that is not all the same.
fn common_text(a: &str, b: &str) -> usize {
    let same = a.char_indices().zip(b.chars()).take_while(|((_, x), y)| x == y);
    let same = same.last().map_or(0, |((at, c), _)| at + c.len_utf8());
    let prefix = &a[..same];
    // The last word may go on in one of them.
    let words = prefix.trim_end_matches(|c: char| !c.is_whitespace());
    words.trim_end().len()
}
