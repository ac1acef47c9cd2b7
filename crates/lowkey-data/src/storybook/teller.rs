//! What a grammar may do while it tells a story.

use super::{
    Class,
    lexicon::{Form, Kind, Part, Slot},
    rule::Rule,
    world::Fact,
};

/// One who carries the grammar out: [`super::writer::Writer`] makes or reads one story, [`super::ledger::Ledger`] adds
/// up all stories at once.
///
/// The grammar sees nothing but this trait, so sampling, scoring and the closed form cannot drift apart. Two things keep
/// the ledger exact. A [`Slot`] is opaque, so no decision can rest on a word's spelling. And the continuation of a choice
/// is `Fn`, so whatever it decides is gone when it returns: what the rest of the story depends on is told *inside* the
/// continuation.
pub(super) trait Teller: Sized {
    /// Draws a word uniformly from those of the list that are not in use, and says it. It stays in use until the
    /// innermost enclosing choice is over.
    fn draw(&mut self, class: Class, kind: Kind, form: Form) -> Slot;

    /// Says one of the options, with probability proportional to its weight, and goes on with `then`. The spellings must
    /// be prefix-free. Words drawn in `then` are free again afterwards.
    fn choose(&mut self, class: Class, options: &[(u32, Part)], then: impl Fn(&mut Self, usize));

    /// Tells the rest of the story from a nonterminal of the grammar.
    fn expand(&mut self, rule: Rule);

    /// Hears after each sentence before the questions what is so. It changes nothing of what is told.
    fn heard(&mut self, _facts: &[Option<Fact>]) {}

    /// Says what cannot be otherwise: a choice of one.
    fn say(&mut self, class: Class, part: Part) {
        self.choose(class, &[(1, part)], |_, _| {});
    }

    /// Says fixed words.
    fn text(&mut self, text: &'static str) {
        self.say(Class::Syntax, Part::Text(text));
    }

    /// Says one of several fixed words that make no difference to what follows.
    fn vary(&mut self, class: Class, options: &[(u32, &'static str)]) {
        let options: Vec<_> = options.iter().map(|&(weight, text)| (weight, Part::Text(text))).collect();
        self.choose(class, &options, |_, _| {});
    }

    /// As [`Teller::choose`], with a value beside each option in place of its index.
    fn pick<A: Copy>(&mut self, class: Class, options: &[(u32, Part, A)], then: impl Fn(&mut Self, A)) {
        let parts: Vec<_> = options.iter().map(|&(weight, part, _)| (weight, part)).collect();
        self.choose(class, &parts, |teller, index| then(teller, options[index].2));
    }
}

/// The class of an option of a choice: the end of a document is its own, whatever it was chosen against.
pub(super) fn class_of(class: Class, part: Part) -> Class {
    if matches!(part, Part::End) { Class::End } else { class }
}
