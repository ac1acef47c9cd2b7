//! A story as a conversation: the user tells it and asks, the assistant answers.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::{Class, Story, lexicon::END, rule::Rule, writer::Writer};
use crate::records::{Chat, messages_of};

/// No conversation has more tokens than this where a token is a byte and the end of an answer one more.
pub(crate) const MAX_TOKENS: usize = 512;

/// A story as a conversation, with the truth about its answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exchange {
    /// The story and the first question from the user, the answer; then each further question and its answer.
    pub(crate) chat: Chat,
    /// For each answer the class of each of its bytes. Whoever remembers the story is certain of all of them.
    pub(crate) answers: Vec<Vec<Class>>,
}

/// Tells a story as a conversation. The story is told to its first question; then all is asked that can be asked of its facts, in an
/// order drawn from the text, as far as [`MAX_TOKENS`] go. The story decides each answer: given the question, the probability of each of
/// its bytes is 1. A story itself asks about each thing once at most; one who learns to answer needs more questions than that, since of
/// a story's bytes only some ten are answers.
pub(crate) fn exchange(story: &Story) -> Exchange {
    let Reading { told, mut questions } = Reading::of(story);
    questions.shuffle(&mut ChaCha8Rng::from_seed(Sha256::digest(&story.text).into()));
    let (mut texts, mut answers) = (Vec::new(), Vec::new());
    let mut tokens = told.len();
    for Question { asked, answer, classes } in questions {
        // The spaces before the question and before the answer, of which the first one may be none, and the end of the answer.
        let length = asked.len() + answer.len() + 3;
        if tokens + length > MAX_TOKENS {
            continue;
        }
        tokens += length;
        let asked = if texts.is_empty() { format!("{told} {asked}") } else { asked };
        texts.extend([("user", asked), ("assistant", answer)]);
        answers.push(classes);
    }
    let turns: Vec<_> = texts.iter().map(|(role, text)| (*role, text.as_str())).collect();
    Exchange { chat: Chat::new(messages_of(&turns), Vec::new(), None), answers }
}

/// A story before its questions, and all that can be asked.
struct Reading {
    told: String,
    questions: Vec<Question>,
}

struct Question {
    asked: String,
    answer: String,
    classes: Vec<Class>,
}

impl Reading {
    /// Reads a story again: what is so at its first question stands in its text, but not in the story.
    fn of(story: &Story) -> Self {
        let mark = story.text.find('?').unwrap_or(story.text.len());
        let told = story.text[..mark].rfind(['.', '"']).map_or(mark, |end| end + 1);
        let whole = format!("{}{END}", story.text);
        let mut reader = Writer::reading(&whole);
        Rule::Story.tell(&mut reader);
        let questions = reader.facts().iter().flat_map(questions).collect();
        Self { told: story.text[..told].to_owned(), questions }
    }
}

/// What can be asked of a fact, in the words of the grammar.
fn questions([who, adjective, noun, place]: &[String; 4]) -> [Question; 3] {
    let question = |asked: String, before: &str, certain: String| Question {
        asked,
        classes: [(before, Class::Syntax), (&certain, Class::Answer), (".", Class::Syntax)]
            .iter()
            .flat_map(|(text, class)| std::iter::repeat_n(*class, text.len()))
            .collect(),
        answer: format!("{before}{certain}."),
    };
    let (first, rest) = place.split_at(1);
    [
        question(format!("Where was the {noun}?"), "", first.to_ascii_uppercase() + rest),
        question(format!("Who had the {noun} last?"), "", who.clone()),
        question(format!("What was {place}?"), "The ", format!("{adjective} {noun}")),
    ]
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
    use crate::storybook::{parse, story};

    #[test]
    fn of_a_pair_the_right_answer_was_chosen() {
        for index in 0..100 {
            let told = story(3, index);
            let [chosen, rejected] = pair(&told, (index + 1..).map(|index| story(3, index))).unwrap();
            assert!(told.text.starts_with(&contents(&chosen).join(" ")));
            assert_eq!(rejected.messages[0], chosen.messages[0]);
            assert_ne!(rejected.messages[1], chosen.messages[1]);
            let wrong = rejected.messages[1]["content"].as_str().unwrap();
            assert!(wrong.ends_with('.') && rejected.is_answer(1) && rejected.prompt == Some(1));
        }
    }

    fn contents(chat: &Chat) -> Vec<&str> {
        chat.messages.iter().map(|message| message["content"].as_str().unwrap()).collect()
    }

    #[test]
    fn all_is_asked_that_the_story_decides_and_each_answer_is_the_grammars() {
        let (mut own, mut asked) = (0, 0);
        for index in 0..300 {
            let story = story(3, index);
            let Exchange { chat, answers } = exchange(&story);
            let contents = contents(&chat);
            let told = contents[0].rfind(". ").max(contents[0].rfind("\" ")).unwrap() + 1;
            let (told, first) = contents[0].split_at(told);
            assert!(story.text.starts_with(told), "{told}");
            assert_eq!(contents.len(), 2 * answers.len());
            let pairs: Vec<[&str; 2]> = std::iter::once(first.trim_start())
                .chain(contents[1..].iter().copied())
                .collect::<Vec<_>>()
                .chunks(2)
                .map(|pair| [pair[0], pair[1]])
                .collect();
            for ([question, answer], classes) in pairs.iter().zip(&answers) {
                // A story that ends with this question is a story if, and only if, the answer is right. It may be too long for one.
                let text = format!("{told} {question} {answer}");
                match parse(&text) {
                    Ok(read) => {
                        let range = text.len() - answer.len()..text.len();
                        assert_eq!(&read.classes[range.clone()], classes, "{text}");
                        assert!(read.log_probs[range].iter().all(|log_prob| *log_prob == 0.0), "{text}");
                    }
                    Err(slip) => {
                        assert!(slip.at < told.len() + question.len() && slip.at > told.len(), "{text}: {slip}");
                    }
                }
                asked += 1;
            }
            // What the story itself asks is among them.
            let mut rest = &story.text[told.len()..];
            while let Some(mark) = rest.find('?') {
                let end = mark + rest[mark..].find('.').unwrap() + 1;
                let pair = [rest[..=mark].trim_start(), rest[mark + 1..end].trim_start()];
                let room = told.len() + pairs.iter().flatten().map(|text| text.len() + 2).sum::<usize>();
                assert!(pairs.contains(&pair) || room + 60 > MAX_TOKENS, "{pair:?} of {:?}", story.text);
                own += 1;
                rest = &rest[end..];
            }
        }
        assert!(asked > 4 * own, "{asked} questions where the stories ask {own}");
    }

    #[test]
    fn a_conversation_fits_and_is_the_same_each_time() {
        let mut longest = 0;
        for index in 0..2000 {
            let told = exchange(&story(4, index));
            assert_eq!(told, exchange(&story(4, index)));
            let contents = contents(&told.chat);
            let tokens = contents.join(" ").len() + contents.len() / 2;
            assert!(tokens <= MAX_TOKENS && contents.len() >= 2);
            longest = longest.max(tokens);
        }
        assert!(longest > 400, "{longest}");
    }
}
