//! The storybook: endless short stories whose exact entropy is known.
//!
//! > One warm day Mira and Tom went to the farm. Mira hid a brass key by the cart. Tom put an old lamp in the barn. He
//! > took the key and hid it in the hay. Where was the key? In the hay. Who had the lamp last? Tom.
//!
//! A model that trains here has a floor that no model can pass, so its loss is not a bare number: loss less entropy is
//! what it has yet to learn. [`Class`] splits that by what a byte asks for. Wording is quickly learnt; answers cost
//! nothing to one who remembers and much to one who does not, and remembering is what a narrow latent makes hard.
//!
//! # The grammar
//!
//! `|` separates options, capitals are drawn from lists, `=x` is a word that was drawn before. A story goes on only to
//! sentences that surely fit in [`MAX_BYTES`].
//!
//! ```text
//! story    := when NAME (" and " NAME (" went to" | " ran to" | ..) | " met " NAME " at") " the " setting "." scene
//! when     := "Once " | "Long ago " | "One " weather time | "Last " time
//! scene    := " " (child " " deed | "The " beasts | "It " weather) scene  |  " " question close      (2 to 3 facts)
//! child    := =hero | =friend | "She" | "He"                              (who was spoken of in the sentence before)
//! deed     := ("hid " | "put " | "left " | "set ") A-ADJECTIVE " " NOUN " " PLACE "."                  a fact
//!           | "took the " =noun " and hid it " PLACE "."                                    the last write wins
//!           | "had " MANY " " FRUIT " and found " SOME " more, so " =she " had " sum "."
//!           | "had " MANY " " FRUIT " and gave " =other " " SOME ", so " =she " had " difference " left."
//!           | "sang, \"" CALL ", " MOOD " " ANIMAL ", " =call "!\" " =other " sang, \"" =the =same =line "!\""
//!           | "saw " FEW " " ANIMAL "s: " "one, two, .., " =few "."
//! beasts   := ANIMAL ("" | "s") (" that " ("saw" | "met" | "led") " the " ANIMAL ("" | "s") ..)  " was " | " were " mood
//! question := "Where was the " =noun "? " =place "." | "Who had the " =noun " last? " =name "."
//!           | "What was " =place "? The " =adjective " " =noun "."
//! close    := END | " " question close                                    (each thing is asked about once at most)
//! ```
//!
//! # Why the numbers are exact
//!
//! A story is a sequence of choices. At each, the spellings of the options are prefix-free, so a text tells which option
//! was taken and where the next choice begins: text and derivation are one to one, and nothing is hidden. Within a
//! choice with probabilities p(o), the next byte after a prefix s of it has probability
//!
//! ```text
//! P(b | s) = sum of p(o) over the o that begin with s b  /  sum of p(o) over the o that begin with s
//! ```
//!
//! which telescopes: the bytes of option o together cost −ln p(o). A byte that cannot be otherwise costs exactly 0.
//!
//! The entropy of a document is the expected sum of the entropies of its choices. The grammar is written once, against
//! the trait `Teller`, and carried out three ways: drawn (`story`), read (`parse`), and added up over all branches with
//! their probabilities (`entropy`). The last is a small dynamic programme and not an enumeration of texts, because words
//! are drawn uniformly without replacement and the grammar cannot see how a drawn word is spelt. So given the path
//! through the grammar, a draw from n words of which k are in use costs ln(n − k) nats, and every mention of it has the
//! mean length of the list, by symmetry. What is left to branch on is the shape of the story, some hundreds of states.

use std::fmt;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

mod exchange;
mod grammar;
mod ledger;
mod lexicon;
mod rule;
mod teller;
#[cfg(test)]
mod tests;
mod world;
mod writer;

pub(crate) use exchange::{exchange, pair};
use ledger::Ledger;
use rule::Rule;
use writer::Writer;

/// No story has more bytes than this. With the end of the document it fits a context of 256.
pub const MAX_BYTES: usize = 255;

/// Beginnings of stories, to sample from a model: the grammar can go on from each.
pub const PROMPTS: [&str; 4] = ["Once", "One cold day", "Last night", "Long ago"];

/// What kind of knowledge a byte asks for. The loss of a model less the entropy, class by class, says what it has learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Wording: which words the grammar uses, and words that cannot be otherwise.
    Syntax,
    /// `he` or `she`, `was` or `were`: fixed by a word that may stand far back. 0 nats.
    Agreement,
    /// A child's name, told for the first time.
    Name,
    /// Setting, weather, animals, songs: drawn at random, and never asked.
    Detail,
    /// What is put where, and how many: drawn at random, to be remembered.
    Fact,
    /// What happens next, who does it, which thing is asked about.
    Plot,
    /// A name or a line of a song, told again where it cannot be otherwise. 0 nats.
    Repeat,
    /// The answer to a question. 0 nats for who remembers.
    Answer,
    /// A sum, a difference, a count. 0 nats for who can reckon.
    Arithmetic,
    /// The end of the document, where another question might have come.
    End,
}

impl Class {
    /// Every class, in order.
    pub const ALL: [Class; 10] = [
        Class::Syntax,
        Class::Agreement,
        Class::Name,
        Class::Detail,
        Class::Fact,
        Class::Plot,
        Class::Repeat,
        Class::Answer,
        Class::Arithmetic,
        Class::End,
    ];

    /// A short name, for tables and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Class::Syntax => "syntax",
            Class::Agreement => "agreement",
            Class::Name => "name",
            Class::Detail => "detail",
            Class::Fact => "fact",
            Class::Plot => "plot",
            Class::Repeat => "repeat",
            Class::Answer => "answer",
            Class::Arithmetic => "arithmetic",
            Class::End => "end",
        }
    }

    /// Whether the text so far leaves no doubt, so that the entropy is exactly 0.
    pub fn is_determined(self) -> bool {
        matches!(self, Class::Agreement | Class::Repeat | Class::Answer | Class::Arithmetic)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.label())
    }
}

/// One document, with what the best possible model would have predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// ASCII, at most [`MAX_BYTES`] bytes, without a mark for the end.
    pub text: String,
    /// ln p of each byte given all before it, and at last of the end of the document: `text.len() + 1` entries.
    pub log_probs: Vec<f64>,
    /// The class of each byte and of the end, beside `log_probs`.
    pub classes: Vec<Class>,
}

impl Story {
    /// ln p of the whole document, its end included.
    pub fn log_prob(&self) -> f64 {
        self.log_probs.iter().sum()
    }
}

/// Where a text stops being a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a story from byte {at} on, where the class is {class}")]
pub struct Slip {
    /// How many bytes are the beginning of some story. The length of the text, if it merely stops too soon.
    pub at: usize,
    /// What was due there: [`Class::Answer`] for a wrong answer, [`Class::Arithmetic`] for a wrong sum. Where several
    /// classes could have followed, the last of them in the grammar's order.
    pub class: Class,
}

/// A byte that may follow a prefix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation {
    /// The byte; `None` for the end of the document.
    pub byte: Option<u8>,
    /// Its exact probability given the prefix.
    pub probability: f64,
    /// The class it would have.
    pub class: Class,
}

/// What one class contributes to a document on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassEntropy {
    /// The class.
    pub class: Class,
    /// Expected nats per document.
    pub nats: f64,
    /// Expected symbols per document: bytes, and for [`Class::End`] the one end.
    pub symbols: f64,
}

/// The exact entropy of the corpus, from the grammar and not from samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Entropy {
    /// Expected −ln p of a document, its end included.
    pub nats_per_document: f64,
    /// Expected bytes of a document, without its end.
    pub bytes_per_document: f64,
    /// The same by class, in the order of [`Class::ALL`].
    pub by_class: Vec<ClassEntropy>,
}

impl Entropy {
    /// Nats per byte of text: what a compressor is measured by.
    pub fn nats_per_byte(&self) -> f64 {
        self.nats_per_document / self.bytes_per_document
    }

    /// Nats per byte or end: the least mean loss of a byte-level model, which has the end of the document to predict too.
    pub fn nats_per_symbol(&self) -> f64 {
        self.nats_per_document / (self.bytes_per_document + 1.0)
    }
}

/// The story of a seed and an index: the same on every machine, for ever.
pub fn story(seed: u64, index: u64) -> Story {
    let mut key = *b"lowkey storybook................";
    key[16..24].copy_from_slice(&seed.to_le_bytes());
    key[24..].copy_from_slice(&index.to_le_bytes());
    let mut writer = Writer::random(ChaCha8Rng::from_seed(key));
    Rule::Story.tell(&mut writer);
    writer.story()
}

/// Reads a text as a story: its log-probabilities and classes, or where it goes wrong. A story with one wrong answer is
/// no story.
pub fn parse(text: &str) -> Result<Story, Slip> {
    let whole = format!("{text}{}", lexicon::END);
    let mut writer = Writer::reading(&whole);
    Rule::Story.tell(&mut writer);
    writer.parsed()
}

/// The exact distribution of what comes after a prefix, or `None` if no story begins so.
pub fn continuations(prefix: &str) -> Option<Vec<Continuation>> {
    let mut writer = Writer::reading(prefix);
    Rule::Story.tell(&mut writer);
    writer.continuations()
}

/// The closed form.
pub fn entropy() -> Entropy {
    let totals = Ledger::of(|ledger| Rule::Story.tell(ledger));
    let by_class: Vec<_> = Class::ALL
        .map(|class| ClassEntropy { class, nats: totals.nats[class as usize], symbols: totals.symbols[class as usize] })
        .into();
    Entropy {
        nats_per_document: totals.nats.iter().sum(),
        bytes_per_document: totals.symbols.iter().sum::<f64>() - 1.0,
        by_class,
    }
}
