//! A story as a conversation: the user tells it and asks, the assistant answers.

use rand::{
    RngExt, SeedableRng,
    seq::{IteratorRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::{
    Class, Story,
    lexicon::END,
    rule::Rule,
    writer::{Moment, Writer},
};
use crate::records::{Chat, messages_of};

/// No conversation has more tokens than this where a token is a byte and the end of an answer one more.
pub(crate) const MAX_TOKENS: usize = 512;

/// A story as a conversation, with the truth about its answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exchange {
    /// From the user some of the story and a question, the answer; then each further part of the story and question, and its answer.
    pub(crate) chat: Chat,
    /// For each answer the class of each of its bytes. Whoever remembers the story is certain of all of them.
    pub(crate) answers: Vec<Vec<Class>>,
}

/// Tells a story as a conversation. The user stops now and then after a sentence that changed something, and asks about one thing; at the
/// end all is asked that can be asked, as far as [`MAX_TOKENS`] go. What is asked is drawn from the text. The story decides each answer:
/// given what was told, the probability of each of its bytes is 1.
///
/// A story itself asks about each thing once at most, and about all of it at the end. A small model does not learn from that where to look:
/// questions right after the sentence that they are about are where it begins to.
pub(crate) fn exchange(story: &Story) -> Exchange {
    let mut rng = ChaCha8Rng::from_seed(Sha256::digest(&story.text).into());
    let moments = moments(story);
    let end = moments.last().map_or(0, |last| last.at);
    let (mut texts, mut answers) = (Vec::new(), Vec::new());
    let (mut tokens, mut told) = (end, 0);
    let mut ask = |at: usize, Question { asked, answer, classes }: Question, spare: usize| {
        // The spaces before the question and before the answer, of which the first one may be none, and the end of the answer.
        let length = asked.len() + answer.len() + 3;
        if tokens + length + spare <= MAX_TOKENS {
            tokens += length;
            let told = story.text[std::mem::replace(&mut told, at)..at].trim_start();
            let asked = if told.is_empty() { asked } else { format!("{told} {asked}") };
            texts.extend([("user", asked), ("assistant", answer)]);
            answers.push(classes);
        }
    };
    for two in moments.windows(2) {
        let [before, after] = two else { continue };
        if before.facts != after.facts && after.at < end && rng.random_bool(ASIDE) {
            let asides: Vec<Question> = after.facts.iter().flat_map(questions).collect();
            if let Some(question) = asides.into_iter().choose(&mut rng) {
                ask(after.at, question, LONGEST);
            }
        }
    }
    let mut last: Vec<Question> =
        moments.iter().rev().take(1).flat_map(|last| &last.facts).flat_map(questions).collect();
    last.shuffle(&mut rng);
    last.into_iter().for_each(|question| ask(end, question, 0));
    let turns: Vec<_> = texts.iter().map(|(role, text)| (*role, text.as_str())).collect();
    Exchange { chat: Chat::new(messages_of(&turns), Vec::new(), None), answers }
}

/// How often something is asked before the story is at its end, of the sentences that changed something.
const ASIDE: f64 = 0.75;

/// Tokens of the longest question with its answer: what is left for one at the end.
const LONGEST: usize = 64;

/// What a story was after each sentence up to its first question: that stands in its text, and is found by reading it again.
fn moments(story: &Story) -> Vec<Moment> {
    let whole = format!("{}{END}", story.text);
    let mut reader = Writer::reading(&whole);
    Rule::Story.tell(&mut reader);
    reader.moments()
}

struct Question {
    asked: String,
    answer: String,
    classes: Vec<Class>,
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

    /// The story that the user tells, and each question with how far it was told by then, and its answer.
    fn taken_apart(chat: &Chat) -> (String, Vec<(usize, String, String)>) {
        let (mut told, mut asked) = (String::new(), Vec::new());
        for pair in contents(chat).chunks(2) {
            let (part, question) = pair[0].split_at(pair[0].rfind(['.', '"']).map_or(0, |end| end + 1));
            if !told.is_empty() && !part.is_empty() {
                told.push(' ');
            }
            told.push_str(part);
            asked.push((told.len(), question.trim_start().to_owned(), pair[1].to_owned()));
        }
        (told, asked)
    }

    #[test]
    fn all_is_asked_that_the_story_decides_and_each_answer_is_the_grammars() {
        let (mut own, mut asked, mut asides) = (0, 0, 0);
        for index in 0..300 {
            let story = story(3, index);
            let Exchange { chat, answers } = exchange(&story);
            let (told, questions) = taken_apart(&chat);
            assert!(story.text.starts_with(&told) && story.text[told.len()..].find('?').is_some(), "{told}");
            assert_eq!(questions.len(), answers.len());
            for ((at, question, answer), classes) in questions.iter().zip(&answers) {
                // A story that goes on with this question is one if, and only if, the answer is right. It may be too early or too late
                // for a question.
                let text = format!("{} {question} {answer}", &told[..*at]);
                match parse(&text) {
                    Ok(read) => {
                        let range = text.len() - answer.len()..text.len();
                        assert_eq!(&read.classes[range.clone()], classes, "{text}");
                        assert!(read.log_probs[range].iter().all(|log_prob| *log_prob == 0.0), "{text}");
                        asked += 1;
                    }
                    Err(slip) => assert!(slip.at < at + question.len() && slip.at > *at, "{text}: {slip}"),
                }
                asides += usize::from(*at < told.len());
            }
            // What the story itself asks is among them.
            let last: Vec<[&str; 2]> = questions.iter().map(|(_, question, answer)| [&**question, &**answer]).collect();
            let mut rest = &story.text[told.len()..];
            while let Some(mark) = rest.find('?') {
                let end = mark + rest[mark..].find('.').unwrap() + 1;
                let pair = [rest[..=mark].trim_start(), rest[mark + 1..end].trim_start()];
                let room = told.len() + last.iter().flatten().map(|text| text.len() + 2).sum::<usize>();
                assert!(last.contains(&pair) || room + 60 > MAX_TOKENS, "{pair:?} of {:?}", story.text);
                own += 1;
                rest = &rest[end..];
            }
        }
        assert!(asked > 3 * own && asides > 300, "{asked} and {asides} questions where the stories ask {own}");
    }

    #[test]
    fn what_is_asked_at_once_is_answered_by_what_was_told_so_far() {
        // Too early for the grammar, which asks when two things are known: the last sentence names the thing and its place.
        let mut early = 0;
        for index in 0..300 {
            let (told, questions) = taken_apart(&exchange(&story(5, index)).chat);
            for (at, question, answer) in questions {
                let Some(noun) = question.strip_prefix("Where was the ").and_then(|rest| rest.strip_suffix('?')) else {
                    continue;
                };
                let mut places =
                    told[..at].split_inclusive('.').filter(|sentence| sentence.contains(&format!(" {noun} ")));
                let place = format!("{}{}", answer[..1].to_ascii_lowercase(), &answer[1..]);
                assert!(places.next_back().unwrap().ends_with(&format!(" {place}")), "{told} {question} {answer}");
                early += usize::from(at < told.len());
            }
        }
        assert!(early > 30, "{early}");
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
