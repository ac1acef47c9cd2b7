//! A story as a conversation: the user tells it and asks, the assistant answers.

use super::{Class, Story};
use crate::records::{Chat, messages_of};

/// A story as a conversation, with the truth about its answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exchange {
    /// The story and its first question from the user, the answer; then each further question and its answer.
    pub(crate) chat: Chat,
    /// For each answer the class of each of its bytes. Whoever remembers the story is certain of all of them.
    pub(crate) answers: Vec<Vec<Class>>,
}

/// Tells a story as a conversation. Every question of a story stands at its end and has one answer, which the story decides: given the
/// question, the probability of each byte of the answer is 1.
pub(crate) fn exchange(story: &Story) -> Exchange {
    let (mut turns, mut answers) = (Vec::new(), Vec::new());
    let mut asked_from = 0;
    // A question mark stands nowhere else.
    while let Some(mark) = story.text[asked_from..].find('?').map(|at| asked_from + at + 1) {
        let end = story.text[mark..].find('.').map_or(story.text.len(), |at| mark + at + 1);
        let from = mark + usize::from(story.text[mark..].starts_with(' '));
        turns.push(("user", story.text[asked_from..mark].trim_start()));
        turns.push(("assistant", &story.text[from..end]));
        answers.push(story.classes[from..end].to_vec());
        asked_from = end;
    }
    Exchange { chat: Chat::new(messages_of(&turns), Vec::new(), None), answers }
}

/// The first question about a story with its answer, and with a wrong one: the answer to the first question about the first of `others`
/// where it is another. None where all answers are the same.
pub(crate) fn pair(story: &Story, others: impl Iterator<Item = Story>) -> Option<[Chat; 2]> {
    let (prompt, right) = first_question(story)?;
    let wrong = others.filter_map(|other| Some(first_question(&other)?.1.to_owned())).find(|wrong| wrong != right)?;
    let chat = |answer: &str| Chat::new(messages_of(&[("user", prompt), ("assistant", answer)]), Vec::new(), Some(1));
    Some([chat(right), chat(&wrong)])
}

/// A story up to its first question, and the answer.
fn first_question(story: &Story) -> Option<(&str, &str)> {
    let (prompt, rest) = story.text.split_at(story.text.find('?')? + 1);
    let end = rest.find('.').map_or(rest.len(), |at| at + 1);
    Some((prompt, rest[..end].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storybook::story;

    #[test]
    fn of_a_pair_the_right_answer_was_chosen() {
        for index in 0..100 {
            let [told, Exchange { chat, .. }] = [exchange(&story(3, index)), exchange(&story(3, index))];
            let [chosen, rejected] = pair(&story(3, index), (index + 1..).map(|index| story(3, index))).unwrap();
            assert_eq!(chosen.messages, told.chat.messages[..2]);
            assert_eq!(rejected.messages[0], chat.messages[0]);
            assert_ne!(rejected.messages[1], chosen.messages[1]);
            let wrong = rejected.messages[1]["content"].as_str().unwrap();
            assert!(wrong.ends_with('.') && rejected.is_answer(1) && rejected.prompt == Some(1));
        }
    }

    #[test]
    fn answers_are_certain_and_nothing_of_the_story_is_lost() {
        for index in 0..300 {
            let story = story(3, index);
            let Exchange { chat, answers } = exchange(&story);
            let contents: Vec<&str> =
                chat.messages.iter().map(|message| message["content"].as_str().unwrap()).collect();
            assert_eq!(contents.join(" "), story.text);
            assert!(contents.len() >= 2 && contents.len() == 2 * answers.len());
            let mut at = 0;
            for (i, content) in contents.iter().enumerate() {
                let range = at..at + content.len();
                if i % 2 == 1 {
                    assert!(chat.is_answer(i) && content.ends_with('.'));
                    assert!(story.log_probs[range.clone()].iter().all(|log_prob| *log_prob == 0.0), "{content}");
                    assert_eq!(story.classes[range], answers[i / 2]);
                } else {
                    assert!(content.ends_with('?'));
                }
                at += content.len() + 1;
            }
        }
    }
}
