//! A reader who knows English and not the grammar: takes a story apart by its words, keeps track of who put what where,
//! and checks every answer, sum, count, refrain, article and pronoun.

use std::collections::HashMap;

use super::story;

const NUMBERS: [&str; 17] = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
];
const GIRLS: &str = "Mira Anna Ruby Nora Rosa Lily Emma Vera Zoe Ivy Ada Mia";

fn number(word: &str) -> usize {
    NUMBERS.iter().position(|&number| number == word).unwrap()
}

/// What the reader remembers of a thing: adjective, who had it last, place.
type Memory = HashMap<String, (String, String, String)>;

#[derive(Default)]
struct Checked {
    answers: usize,
    moved: usize,
    sums: usize,
    counts: usize,
    songs: usize,
    clauses: usize,
}

/// Reads one sentence without its full stop; `topic` is whom a pronoun means.
fn sentence(text: &str, topic: &mut String, memory: &mut Memory, checked: &mut Checked) {
    let mut words: Vec<&str> = text.split(' ').collect();
    if words[0] == "She" || words[0] == "He" {
        assert_eq!(words[0] == "She", GIRLS.contains(topic.as_str()), "{text}");
        words[0] = topic;
    }
    let who = words[0].to_owned();
    match (words[0], words[1]) {
        ("It", _) => {}
        ("The", noun) => {
            let verb = words[words.len() - 2];
            assert_eq!(verb, if noun.ends_with('s') { "were" } else { "was" }, "{text}");
            checked.clauses += words.iter().filter(|&&word| word == "that").count();
            who.clone_into(topic);
            return;
        }
        (_, "hid" | "put" | "left" | "set") => {
            assert_eq!(words[2] == "an", words[3].starts_with(['a', 'e', 'i', 'o', 'u']), "{text}");
            let thing = (words[3].to_owned(), who.clone(), words[5..].join(" "));
            assert!(memory.insert(words[4].to_owned(), thing).is_none(), "{text}");
        }
        (_, "took") => {
            let thing = memory.get_mut(words[3]).unwrap();
            thing.1.clone_from(&who);
            thing.2 = words[7..].join(" ");
            checked.moved += 1;
        }
        (_, "had") => {
            let gave = words[5] == "gave";
            let (many, some) = (number(words[2]), number(words[if gave { 7 } else { 6 }].trim_end_matches(',')));
            let now = words.iter().rposition(|&word| word == "had").unwrap() + 1;
            assert_eq!(number(words[now]), if gave { many - some } else { many + some }, "{text}");
            assert_eq!(words[now - 2] == "she", GIRLS.contains(&*who), "{text}");
            checked.sums += 1;
        }
        (_, "saw") => {
            let (_, counted) = text.split_once(": ").unwrap();
            let counted: Vec<usize> = counted.split(", ").map(number).collect();
            assert_eq!(counted, (1..=number(words[2])).collect::<Vec<_>>(), "{text}");
            checked.counts += 1;
        }
        _ => panic!("what does it mean? {text}"),
    }
    *topic = who;
}

/// Reads one question with its answer.
fn question(ask: &str, answer: &str, memory: &Memory) {
    let words: Vec<&str> = ask.split(' ').collect();
    let truth = match words[0] {
        "Where" => memory[words[3]].2.clone(),
        "Who" => memory[words[3]].1.clone(),
        "What" => {
            let place = words[2..].join(" ");
            let mut there = memory.iter().filter(|(_, thing)| thing.2 == place);
            let (noun, thing) = there.next().unwrap();
            assert!(there.next().is_none(), "two things {place}");
            format!("the {} {noun}", thing.0)
        }
        _ => panic!("what does it ask? {ask}"),
    };
    assert_eq!(answer.to_lowercase(), truth.to_lowercase(), "{ask}");
}

#[test]
fn every_answer_and_sum_and_refrain_is_right() {
    let mut checked = Checked::default();
    for index in 0..5000 {
        let text = story(13, index).text;
        let (opening, mut rest) = text.split_once(". ").unwrap();
        let mut memory = Memory::new();
        let mut topic = String::new();
        while !rest.is_empty() {
            let stop = rest.find(['.', '?', '"']).unwrap();
            let (now, after) = rest.split_at(stop + 1);
            rest = after.trim_start();
            let now = &now[..stop];
            if text.as_bytes()[text.len() - after.len() - 1] == b'?' {
                let (answer, after) = rest.split_once('.').unwrap();
                question(now, answer, &memory);
                rest = after.trim_start();
                checked.answers += 1;
            } else if let Some(first) = now.strip_suffix(" sang, ") {
                let parts: Vec<&str> = rest.splitn(4, '"').collect();
                let second = parts[1].trim().strip_suffix(" sang,").unwrap();
                assert_eq!(parts[0], parts[2], "{text}");
                assert!(first != second && opening.contains(second), "{text}");
                second.clone_into(&mut topic);
                rest = parts[3].trim_start();
                checked.songs += 1;
            } else {
                sentence(now, &mut topic, &mut memory, &mut checked);
            }
        }
        assert!((2..=3).contains(&memory.len()), "{text}");
    }
    assert!(checked.answers > 5000 && checked.moved > 500 && checked.sums > 300, "too few to mean anything");
    assert!(checked.counts > 300 && checked.songs > 300 && checked.clauses > 100, "too few to mean anything");
}
