//! The storybook against counting, against brute force, and against a reader who knows only English.

use std::collections::{HashMap, HashSet};

use super::{
    ledger::Ledger,
    lexicon::{END, Form, Kind, Part, Setting, Slot, spell},
    teller::Teller,
    *,
};

mod reader;

/// How many stories the statistical tests look at.
const SAMPLE: u64 = 40_000;

#[test]
fn a_story_is_the_same_for_ever() {
    assert_eq!(
        story(1, 0).text,
        "Once Mira and Anna sat at the farm. Anna hid a paper bell by the gate. Mira saw six cats: one, two, three, four, five, six. She hid a gold fan by the cart. What was by the cart? The gold fan. Who had the bell last? Anna."
    );
    assert_eq!(
        story(1, 1).text,
        "Once Hugo and Noah went to the shop. Hugo left an oak hat in the till. He set a steel coin under the jug. Where was the coin? Under the jug. Where was the hat? In the till."
    );
    assert_eq!(
        story(u64::MAX, u64::MAX).text,
        "One fine day Jack met Carl at the beach. Carl had ten plums and found two more, so he had twelve. He hid a stone bead on the dune. Jack left a small comb on the raft. What was on the raft? The small comb."
    );
    assert_eq!(story(3, 4), story(3, 4));
}

#[test]
fn stories_do_not_repeat() {
    let distinct: HashSet<String> =
        (0..100).flat_map(|seed| (0..100).map(move |index| story(seed, index).text)).collect();
    assert_eq!(distinct.len(), 10_000);
}

#[test]
fn no_word_begins_another_of_its_list() {
    use Kind::*;
    let settings = Setting::ALL.map(|(_, setting, _)| setting);
    let lists = [Name, Adjective, Noun, Fruit, Many, Some, Few, Call, Mood];
    let lists = lists.into_iter().chain(settings.map(Place)).chain(settings.map(Animal));
    let mut lexicon = HashSet::new();
    for kind in lists {
        let words = kind.words();
        for (i, a) in words.iter().enumerate() {
            assert!(words.iter().enumerate().all(|(j, b)| i == j || !b.starts_with(a)), "{kind:?}: {a}");
            lexicon.extend(a.split(' '));
        }
    }
    assert!((150..300).contains(&lexicon.len()), "{} words", lexicon.len());
}

#[test]
fn every_story_is_ascii_and_short_with_a_class_and_a_probability_for_each_byte() {
    for index in 0..5000 {
        let story = story(11, index);
        assert!(story.text.is_ascii() && story.text.len() <= MAX_BYTES && !story.text.contains(END));
        assert_eq!((story.log_probs.len(), story.classes.len()), (story.text.len() + 1, story.text.len() + 1));
        assert!(story.log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob <= 0.0));
        assert_eq!(story.classes.iter().position(|&class| class == Class::End), Some(story.text.len()));
        for (&class, &log_prob) in story.classes.iter().zip(&story.log_probs) {
            assert!(!class.is_determined() || log_prob == 0.0, "{class}: {log_prob}");
        }
    }
}

#[test]
fn no_story_can_be_longer_than_the_maximum() {
    let longest = Ledger::of(|ledger| Rule::Story.tell(ledger)).longest;
    assert!(longest <= MAX_BYTES + END.len(), "{longest}");
    assert!(longest > MAX_BYTES - 10, "the grammar leaves {} bytes unused", MAX_BYTES + 1 - longest);
}

/// Mean of `value` over the sample less `exact`, in standard errors; both must vanish where there is no variance.
fn deviation(values: &[f64], exact: f64) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let difference = mean - exact;
    if difference.abs() < 1e-9 { 0.0 } else { difference / (variance / n).sqrt() }
}

#[test]
fn sampled_stories_agree_with_the_closed_form() {
    let exact = entropy();
    let stories: Vec<Story> = (0..SAMPLE).map(|index| story(5, index)).collect();
    let nats: Vec<f64> = stories.iter().map(|story| -story.log_prob()).collect();
    let bytes: Vec<f64> = stories.iter().map(|story| story.text.len() as f64).collect();
    assert!(deviation(&nats, exact.nats_per_document).abs() < 3.0);
    assert!(deviation(&bytes, exact.bytes_per_document).abs() < 3.0);
    for entry in &exact.by_class {
        let of_class = |story: &Story, value: fn(f64) -> f64| {
            let pairs = story.classes.iter().zip(&story.log_probs);
            pairs.filter(|(class, _)| **class == entry.class).map(|(_, &log_prob)| value(log_prob)).sum::<f64>()
        };
        let nats: Vec<f64> = stories.iter().map(|story| of_class(story, |log_prob| -log_prob)).collect();
        let symbols: Vec<f64> = stories.iter().map(|story| of_class(story, |_| 1.0)).collect();
        // Twenty comparisons want a wider gate than one.
        assert!(deviation(&nats, entry.nats).abs() < 4.0, "{}: {}", entry.class, deviation(&nats, entry.nats));
        assert!(
            deviation(&symbols, entry.symbols).abs() < 4.0,
            "{}: {}",
            entry.class,
            deviation(&symbols, entry.symbols)
        );
        assert!(!entry.class.is_determined() || entry.nats == 0.0);
        assert!(entry.symbols > 0.0, "{} never happens", entry.class);
    }
}

#[test]
fn the_parts_of_the_entropy_add_up() {
    let exact = entropy();
    assert_eq!(exact.by_class.iter().map(|entry| entry.class).collect::<Vec<_>>(), Class::ALL);
    assert!(Class::ALL.iter().enumerate().all(|(index, &class)| class as usize == index));
    assert!((exact.by_class.iter().map(|entry| entry.nats).sum::<f64>() - exact.nats_per_document).abs() < 1e-9);
    assert!(
        (exact.by_class.iter().map(|entry| entry.symbols).sum::<f64>() - exact.bytes_per_document - 1.0).abs() < 1e-9
    );
    assert!(
        (exact.by_class[Class::End as usize].symbols - 1.0).abs() < 1e-9,
        "the probabilities of all endings add up to 1"
    );
    assert!((exact.by_class[Class::Name as usize].nats - (24f64.ln() + 23f64.ln())).abs() < 1e-9, "two names of 24");
}

/// Frequencies of the next byte among stories with one beginning, against the distribution that the grammar claims.
#[test]
fn counted_continuations_agree_with_the_exact_ones() {
    let stories: Vec<String> = (0..SAMPLE).map(|index| story(6, index).text).collect();
    let mut counts: HashMap<&str, HashMap<u8, f64>> = HashMap::new();
    for text in &stories {
        for end in 0..30 {
            *counts.entry(&text[..end]).or_default().entry(text.as_bytes()[end]).or_default() += 1.0;
        }
    }
    let mut compared = 0;
    for (prefix, next) in counts {
        let n: f64 = next.values().sum();
        if n < 500.0 {
            continue;
        }
        let exact = continuations(prefix).unwrap();
        assert!(
            next.keys().all(|&byte| exact.iter().any(|continuation| continuation.byte == Some(byte))),
            "{prefix:?}"
        );
        for Continuation { byte, probability: p, .. } in exact {
            let count = byte.and_then(|byte| next.get(&byte)).copied().unwrap_or(0.0);
            assert!(
                (count - n * p).abs() <= 4.5 * (n * p * (1.0 - p)).sqrt() + 1e-9,
                "{prefix:?} {byte:?}: {count} of {n}, {p}"
            );
            compared += 1;
        }
    }
    assert!(compared > 300, "{compared}");
}

#[test]
fn continuations_are_distributions_and_agree_with_the_story() {
    for index in 0..20 {
        let story = story(8, index);
        for at in 0..=story.text.len() {
            let exact = continuations(&story.text[..at]).unwrap();
            let total: f64 = exact.iter().map(|continuation| continuation.probability).sum();
            assert!((total - 1.0).abs() < 1e-12);
            let byte = story.text.as_bytes().get(at).copied();
            let here = exact.iter().find(|continuation| continuation.byte == byte).unwrap();
            assert!((here.probability.ln() - story.log_probs[at]).abs() < 1e-12);
            assert_eq!(here.class, story.classes[at]);
        }
        assert_eq!(continuations(&format!("{}{END}", story.text)), None);
    }
    assert!(PROMPTS.iter().all(|prompt| continuations(prompt).is_some()));
    assert_eq!(continuations("Twice"), None);
}

#[test]
fn parsing_gives_the_story_back() {
    for index in 0..2000 {
        let story = story(12, index);
        assert_eq!(parse(&story.text), Ok(story.clone()));
        assert_eq!(parse(&story.text[..story.text.len() - 1]).map_err(|slip| slip.at), Err(story.text.len() - 1));
        for more in [" ", ".", END] {
            assert!(parse(&format!("{}{more}", story.text)).is_err());
        }
    }
    assert_eq!(parse("").map_err(|slip| slip.at), Err(0));
    assert_eq!(parse("Once Mira and Tom flew").map_err(|slip| slip.at), Err("Once Mira and Tom ".len()));
    assert_eq!(parse("Öde").map_err(|slip| slip.at), Err(0));
}

/// The story of the module's essay.
const EXAMPLE: &str = "One warm day Mira and Tom went to the farm. Mira hid a brass key by the cart. Tom put an old lamp in \
    the barn. He took the key and hid it in the hay. Where was the key? In the hay. Who had the lamp last? Tom.";

#[test]
fn parsing_tells_a_lie_by_its_class() {
    let tale = |place: &str, who: &str, left: &str, she: &str, song: &str| {
        format!(
            "Once Mira met Tom at the farm. Mira had nine figs and gave Tom two, so {she} had {left} left. Tom hid a tin \
             cup in the hay. Mira put an old key by the well. Where was the key? {place}. Who had the cup last? {who}.{song}"
        )
    };
    assert!(parse(&tale("By the well", "Tom", "seven", "she", "")).is_ok());
    let class = |text: String| parse(&text).map_err(|slip| slip.class);
    assert!(parse(EXAMPLE).is_ok());
    assert_eq!(class(tale("In the hay", "Tom", "seven", "she", "")), Err(Class::Answer));
    assert_eq!(class(tale("By the well", "Mira", "seven", "she", "")), Err(Class::Answer));
    assert_eq!(class(tale("By the well", "Tom", "six", "she", "")), Err(Class::Arithmetic));
    assert_eq!(class(tale("By the well", "Tom", "seven", "he", "")), Err(Class::Agreement));
    assert_eq!(class(tale("By the well", "Tom", "seven", "she", " Mira sang.")), Err(Class::End));
}

/// A small grammar with everything in it: draws without replacement, a draw inside a choice, an inner choice, a repeat, a
/// sum, a forced and a free end.
fn toy(t: &mut impl Teller) {
    let many = t.draw(Class::Fact, Kind::Many, Form::Plain);
    t.text(" ");
    let some = t.draw(Class::Fact, Kind::Some, Form::Plain);
    t.choose(Class::Syntax, &[(3, Part::Text("s")), (1, Part::Text(" t")), (2, Part::Text(" u"))], |t, i| {
        if i > 0 {
            t.draw(Class::Detail, Kind::Few, Form::Plain);
            t.vary(Class::Syntax, &[(1, "ab"), (5, "ac"), (2, "b")]);
        }
    });
    let few = t.draw(Class::Fact, Kind::Few, Form::Capital);
    t.draw(Class::Fact, Kind::Few, Form::Indefinite);
    t.say(Class::Arithmetic, Part::Sum(many, some));
    t.choose(Class::Plot, &[(1, Part::End), (2, Part::Word(few, Form::Plain))], |t, i| {
        if i == 1 {
            t.say(Class::Arithmetic, Part::Difference(many, some));
            t.say(Class::End, Part::End);
        }
    });
}

/// Tells the derivation that a script of decisions gives, and keeps its probability. Knows nothing of bytes.
#[derive(Default)]
struct Scripted {
    /// Decision and number of options, for each choice on the way.
    script: Vec<(usize, usize)>,
    at: usize,
    probability: f64,
    text: String,
    symbols: [f64; Class::ALL.len()],
    drawn: Vec<(Kind, usize)>,
}

impl Scripted {
    fn decide(&mut self, options: usize) -> usize {
        if self.at == self.script.len() {
            self.script.push((0, options));
        }
        self.at += 1;
        self.script[self.at - 1].0
    }

    /// The script of the next derivation, or `None` after the last.
    fn next(mut self) -> Option<Vec<(usize, usize)>> {
        while let Some((decision, options)) = self.script.pop() {
            if decision + 1 < options {
                self.script.push((decision + 1, options));
                return Some(self.script);
            }
        }
        None
    }

    fn add(&mut self, class: Class, text: &str) {
        let class = if text == END { Class::End } else { class };
        self.symbols[class as usize] += text.len() as f64;
        self.text.push_str(text);
    }
}

impl Teller for Scripted {
    fn draw(&mut self, class: Class, kind: Kind, form: Form) -> Slot {
        let free: Vec<usize> = (0..kind.words().len()).filter(|&i| !self.drawn.contains(&(kind, i))).collect();
        let index = free[self.decide(free.len())];
        self.probability /= free.len() as f64;
        self.drawn.push((kind, index));
        self.add(class, &spell(kind, index, form));
        Slot { kind, id: self.drawn.len() - 1 }
    }

    fn choose(&mut self, class: Class, options: &[(u32, Part)], then: impl Fn(&mut Self, usize)) {
        let index = self.decide(options.len());
        let total: u32 = options.iter().map(|option| option.0).sum();
        self.probability *= f64::from(options[index].0) / f64::from(total);
        let text = options[index].1.spell(|slot| self.drawn[slot.id].1);
        self.add(class, &text);
        let in_use = self.drawn.len();
        then(self, index);
        self.drawn.truncate(in_use);
    }

    fn expand(&mut self, _: Rule) {
        unreachable!("the toy has no nonterminals");
    }
}

#[test]
fn a_toy_grammar_agrees_with_brute_force_over_all_its_texts() {
    let mut texts: HashMap<String, f64> = HashMap::new();
    let mut prefixes: HashMap<String, f64> = HashMap::new();
    let (mut nats, mut symbols, mut longest) = (0.0, [0.0; Class::ALL.len()], 0);
    let mut script = Some(vec![]);
    while let Some(now) = script {
        let mut teller = Scripted { script: now, probability: 1.0, ..Scripted::default() };
        toy(&mut teller);
        let (p, text) = (teller.probability, teller.text.clone());
        nats -= p * p.ln();
        longest = longest.max(text.len());
        for (sum, &here) in symbols.iter_mut().zip(&teller.symbols) {
            *sum += p * here;
        }
        for end in 0..=text.len() {
            *prefixes.entry(text[..end].to_owned()).or_default() += p;
        }
        assert_eq!(texts.insert(text, p), None, "two derivations of one text");
        script = teller.next();
    }
    assert!(texts.len() > 1000 && (texts.values().sum::<f64>() - 1.0).abs() < 1e-9);

    let totals = Ledger::of(toy);
    assert!((totals.nats.iter().sum::<f64>() - nats).abs() < 1e-9);
    assert!(totals.symbols.iter().zip(&symbols).all(|(a, b)| (a - b).abs() < 1e-9), "{:?} {symbols:?}", totals.symbols);
    assert!(totals.longest >= longest);

    // The chain rule over bytes, with no notion of a choice, gives what the writer gives.
    let mut by_class = [0.0; Class::ALL.len()];
    for (text, p) in &texts {
        let mut writer = Writer::reading(text);
        toy(&mut writer);
        let read = writer.parsed().unwrap();
        for (at, &log_prob) in read.log_probs.iter().enumerate() {
            let exact = (prefixes[&text[..=at]] / prefixes[&text[..at]]).ln();
            assert!((exact - log_prob).abs() < 1e-9, "{text:?} at {at}: {exact} {log_prob}");
            by_class[read.classes[at] as usize] -= p * log_prob;
        }
    }
    assert!(totals.nats.iter().zip(&by_class).all(|(a, b)| (a - b).abs() < 1e-9), "{:?} {by_class:?}", totals.nats);
}
