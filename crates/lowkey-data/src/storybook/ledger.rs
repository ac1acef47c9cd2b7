//! All stories at once: expected nats and symbols by class, and the longest story, without drawing one.

use std::{collections::HashMap, mem};

use super::{
    Class,
    lexicon::{Form, Kind, Part, Slot},
    rule::Rule,
    teller::{Teller, class_of},
};

/// What a stretch of a story costs on average, and at most.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    /// Expected nats by class.
    pub(super) nats: [f64; Class::ALL.len()],
    /// Expected symbols by class.
    pub(super) symbols: [f64; Class::ALL.len()],
    /// No way through is longer than this many symbols.
    pub(super) longest: usize,
}

/// Walks through every branch of the grammar with its probability.
///
/// A draw is not a branch. Lists are drawn from uniformly and no decision looks at a word, so given the path through the
/// grammar each slot is uniform over its whole list, whichever words were in use before: a mention costs the list's mean
/// length, and a draw from n free words costs ln n nats.
pub(super) struct Ledger {
    totals: Totals,
    /// The probability of being at this point of the grammar.
    weight: f64,
    /// The lists of the words in use.
    drawn: Vec<Kind>,
    /// What each nonterminal costs, given the words in use when it begins. Slots of one list are the same here, so that
    /// stories that differ in their words alone share one entry.
    known: HashMap<(Rule, Vec<Kind>), Totals>,
}

impl Ledger {
    /// What is told by `tell`, summed over all that it can tell.
    pub(super) fn of(tell: impl FnOnce(&mut Ledger)) -> Totals {
        let mut ledger = Ledger { totals: Totals::default(), weight: 1.0, drawn: vec![], known: HashMap::new() };
        tell(&mut ledger);
        ledger.totals
    }

    fn add(&mut self, class: Class, nats: f64, symbols: f64) {
        self.totals.nats[class as usize] += self.weight * nats;
        self.totals.symbols[class as usize] += self.weight * symbols;
    }
}

impl Teller for Ledger {
    fn draw(&mut self, class: Class, kind: Kind, form: Form) -> Slot {
        let slot = Slot { kind, id: 0 };
        let free = kind.words().len() - self.drawn.iter().filter(|&&other| other == kind).count();
        let (mean, most) = length(Part::Word(slot, form));
        self.add(class, (free as f64).ln(), mean);
        self.totals.longest += most;
        self.drawn.push(kind);
        slot
    }

    fn choose(&mut self, class: Class, options: &[(u32, Part)], then: impl Fn(&mut Self, usize)) {
        let total: f64 = options.iter().map(|&(weight, _)| f64::from(weight)).sum();
        let (here, before, in_use) = (self.weight, self.totals.longest, self.drawn.len());
        let mut longest = before;
        for (index, &(weight, part)) in options.iter().enumerate() {
            let p = f64::from(weight) / total;
            let (mean, most) = length(part);
            self.weight = here * p;
            self.add(class_of(class, part), -p.ln(), mean);
            self.totals.longest = before + most;
            then(self, index);
            longest = longest.max(self.totals.longest);
            self.drawn.truncate(in_use);
        }
        self.weight = here;
        self.totals.longest = longest;
    }

    fn expand(&mut self, rule: Rule) {
        let mut in_use = self.drawn.clone();
        in_use.sort_unstable();
        let key = (rule, in_use);
        if !self.known.contains_key(&key) {
            let mut inner = Ledger {
                totals: Totals::default(),
                weight: 1.0,
                drawn: self.drawn.clone(),
                known: mem::take(&mut self.known),
            };
            rule.tell(&mut inner);
            self.known = inner.known;
            self.known.insert(key.clone(), inner.totals);
        }
        if let Some(rest) = self.known.get(&key) {
            for index in 0..Class::ALL.len() {
                self.totals.nats[index] += self.weight * rest.nats[index];
                self.totals.symbols[index] += self.weight * rest.symbols[index];
            }
            self.totals.longest += rest.longest;
        }
    }
}

/// The mean and the greatest number of bytes of a part, over all words that its slots may hold.
fn length(part: Part) -> (f64, usize) {
    let (first, second) = part.slots();
    debug_assert!(
        first.map(|slot| slot.kind) != second.map(|slot| slot.kind) || second.is_none(),
        "{part:?}: not independent"
    );
    let words = |slot: Option<Slot>| slot.map_or(1, |slot| slot.kind.words().len());
    let (mut sum, mut most) = (0, 0);
    for i in 0..words(first) {
        for j in 0..words(second) {
            let bytes = part.spell(|slot| if Some(slot) == first { i } else { j }).len();
            sum += bytes;
            most = most.max(bytes);
        }
    }
    (sum as f64 / (words(first) * words(second)) as f64, most)
}
