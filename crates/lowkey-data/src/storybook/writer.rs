//! One story: drawn at random, or read from a text. Either way each byte gets its exact probability.

use std::borrow::Cow;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{
    Class, Continuation, Slip, Story,
    lexicon::{END, Form, Kind, Part, Slot, spell},
    rule::Rule,
    teller::{Teller, class_of},
    world::Fact,
};

/// Who decides at a choice.
enum Source<'a> {
    /// Chance.
    Random(Box<ChaCha8Rng>),
    /// A text that is already there.
    Text(&'a [u8]),
}

/// Tells one story and writes down each byte, its log-probability and its class.
pub(super) struct Writer<'a> {
    source: Source<'a>,
    text: String,
    log_probs: Vec<f64>,
    classes: Vec<Class>,
    /// The words in use, as list and index; a slot's id is the position here.
    drawn: Vec<(Kind, usize)>,
    /// What was so after each sentence before the questions.
    moments: Vec<Moment>,
    /// Where the text that is read left the grammar. From then on nothing is told.
    lost: Option<Lost>,
}

struct Lost {
    slip: Slip,
    continuations: Vec<Continuation>,
}

/// A story between two of its sentences.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moment {
    /// Where the next sentence begins, with the space before it.
    pub(super) at: usize,
    /// What is so, in words: who had what last, how it looks, what it is, where it is.
    pub(super) facts: Vec<[String; 4]>,
}

/// One way to go on: its weight, its bytes, its class.
type Choice = (u32, Cow<'static, str>, Class);

impl<'a> Writer<'a> {
    /// Tells a random story.
    pub(super) fn random(rng: ChaCha8Rng) -> Self {
        Self::new(Source::Random(Box::new(rng)))
    }

    /// Reads a text.
    pub(super) fn reading(text: &'a str) -> Self {
        Self::new(Source::Text(text.as_bytes()))
    }

    fn new(source: Source<'a>) -> Self {
        Self {
            source,
            text: String::new(),
            log_probs: vec![],
            classes: vec![],
            drawn: vec![],
            moments: vec![],
            lost: None,
        }
    }

    /// The story that was told.
    pub(super) fn story(mut self) -> Story {
        self.text.truncate(self.text.len() - END.len());
        Story { text: self.text, log_probs: self.log_probs, classes: self.classes }
    }

    /// The story that was read, or where the text left the grammar.
    pub(super) fn parsed(self) -> Result<Story, Slip> {
        match (&self.lost, &self.source) {
            (Some(lost), _) => Err(lost.slip),
            (None, Source::Text(given)) if given.len() > self.text.len() => {
                Err(Slip { at: self.text.len() - END.len(), class: Class::End })
            }
            (None, _) => Ok(self.story()),
        }
    }

    /// The moments after each sentence up to the first question.
    pub(super) fn moments(self) -> Vec<Moment> {
        self.moments
    }

    /// What may come where the text that was read stops, if it got that far.
    pub(super) fn continuations(self) -> Option<Vec<Continuation>> {
        let Source::Text(given) = self.source else { return None };
        self.lost.filter(|lost| lost.slip.at == given.len()).map(|lost| lost.continuations)
    }

    /// Says one of the options; `None` when the story is lost.
    fn emit(&mut self, options: &[Choice]) -> Option<usize> {
        if cfg!(any(test, debug_assertions)) {
            assert!(prefix_free(options), "not prefix-free: {options:?}");
        }
        if self.lost.is_some() {
            return None;
        }
        let said = self.text.len();
        let chosen = match &mut self.source {
            Source::Random(rng) => {
                let total: u64 = options.iter().map(|option| u64::from(option.0)).sum();
                // Multiply and shift: off from exact by less than total / 2^64, and the same on every machine.
                let mut ticket = ((u128::from(rng.next_u64()) * u128::from(total)) >> 64) as u64;
                options.iter().position(|option| {
                    let weight = u64::from(option.0);
                    let hit = ticket < weight;
                    ticket = ticket.saturating_sub(weight);
                    hit
                })
            }
            Source::Text(given) => {
                let rest = &given[said..];
                let chosen = options.iter().position(|option| rest.starts_with(option.1.as_bytes()));
                if chosen.is_none() {
                    self.lost = Some(lose(said, rest, options));
                }
                chosen
            }
        }?;
        let (_, text, class) = &options[chosen];
        self.text.push_str(text);
        self.classes.extend(std::iter::repeat_n(*class, text.len()));
        if options.len() == 1 {
            self.log_probs.extend(std::iter::repeat_n(0.0, text.len()));
        } else {
            // Weights are whole numbers, so a byte that cannot be otherwise has log-probability 0 to the last bit.
            let mut before = agreeing(options, b"");
            for end in 1..=text.len() {
                let after = agreeing(options, &text.as_bytes()[..end]);
                self.log_probs.push(if after == before { 0.0 } else { (after as f64 / before as f64).ln() });
                before = after;
            }
        }
        Some(chosen)
    }
}

impl Teller for Writer<'_> {
    fn draw(&mut self, class: Class, kind: Kind, form: Form) -> Slot {
        let free: Vec<usize> = (0..kind.words().len()).filter(|&index| !self.drawn.contains(&(kind, index))).collect();
        let options: Vec<Choice> = free.iter().map(|&index| (1, spell(kind, index, form), class)).collect();
        // A lost story still needs a slot to hand back, though nobody will see how it is spelt.
        let index = self.emit(&options).map_or(0, |chosen| free[chosen]);
        self.drawn.push((kind, index));
        Slot { kind, id: self.drawn.len() - 1 }
    }

    fn choose(&mut self, class: Class, options: &[(u32, Part)], then: impl Fn(&mut Self, usize)) {
        let options: Vec<Choice> = options
            .iter()
            .map(|&(weight, part)| (weight, part.spell(|slot| self.drawn[slot.id].1), class_of(class, part)))
            .collect();
        let in_use = self.drawn.len();
        if let Some(chosen) = self.emit(&options) {
            then(self, chosen);
        }
        self.drawn.truncate(in_use);
    }

    fn heard(&mut self, facts: &[Option<Fact>]) {
        if self.lost.is_none() {
            let word = |slot: Slot| Part::Word(slot, Form::Plain).spell(|slot| self.drawn[slot.id].1).into_owned();
            let words = |fact: &Fact| [fact.who, fact.adjective, fact.noun, fact.place].map(word);
            let facts = facts.iter().flatten().map(words).collect();
            self.moments.push(Moment { at: self.text.len(), facts });
        }
    }

    fn expand(&mut self, rule: Rule) {
        if self.lost.is_none() {
            rule.tell(self);
        }
    }
}

/// The total weight of the options that begin with `prefix`.
fn agreeing(options: &[Choice], prefix: &[u8]) -> u64 {
    options.iter().filter(|option| option.1.as_bytes().starts_with(prefix)).map(|option| u64::from(option.0)).sum()
}

/// Whether no option begins another. Without that the text would not tell where a choice ends.
fn prefix_free(options: &[Choice]) -> bool {
    options
        .iter()
        .enumerate()
        .all(|(i, a)| options.iter().skip(i + 1).all(|b| !a.1.starts_with(&*b.1) && !b.1.starts_with(&*a.1)))
}

/// How far `rest` agrees with the options, and what could have followed there.
fn lose(said: usize, rest: &[u8], options: &[Choice]) -> Lost {
    let common = |option: &Choice| rest.iter().zip(option.1.as_bytes()).take_while(|(a, b)| a == b).count();
    let agreed = options.iter().map(common).max().unwrap_or(0);
    let prefix = &rest[..agreed];
    let total = agreeing(options, prefix) as f64;
    let mut continuations: Vec<Continuation> = vec![];
    let mut class = Class::Syntax;
    for option in options.iter().filter(|option| option.1.as_bytes().starts_with(prefix)) {
        class = option.2;
        let byte = (class != Class::End).then(|| option.1.as_bytes()[agreed]);
        let probability = f64::from(option.0) / total;
        match continuations.iter_mut().find(|known| known.byte == byte) {
            Some(known) => known.probability += probability,
            None => continuations.push(Continuation { byte, probability, class }),
        }
    }
    Lost { slip: Slip { at: said + agreed, class }, continuations }
}
