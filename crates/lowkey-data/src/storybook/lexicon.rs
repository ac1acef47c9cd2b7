//! The words of the storybook: what can be drawn, and how a drawn word is spelt.
//!
//! Every list is prefix-free (no word begins another word of its list), so that a reader knows at the last byte of a
//! word that the word is over. A test holds each list to that.

use std::borrow::Cow;

/// Where a story takes place. It decides which places and which animals the story knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Setting {
    Farm,
    Beach,
    Shop,
    Fort,
    Camp,
    House,
}

impl Setting {
    /// Every setting with its weight: common ones first, as topics are in real text.
    pub(super) const ALL: [(u32, Setting, &'static str); 6] = [
        (6, Setting::Farm, "farm"),
        (4, Setting::Beach, "beach"),
        (3, Setting::Shop, "shop"),
        (3, Setting::Fort, "fort"),
        (2, Setting::Camp, "camp"),
        (2, Setting::House, "house"),
    ];
}

/// A list of words from which a story draws uniformly, and never the same word twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// Children; girls stand before boys.
    Name,
    /// Colours and materials of things.
    Adjective,
    /// Things that are hidden and looked for.
    Noun,
    /// Hiding places, with their prepositions.
    Place(Setting),
    /// Animals, all with a regular plural.
    Animal(Setting),
    /// Things one has several of, in the plural.
    Fruit,
    /// A number from five to twelve: how many one has.
    Many,
    /// A number from two to four: how many one gets or gives. Smaller than any [`Kind::Many`].
    Some,
    /// A number from three to six: how many are counted aloud.
    Few,
    /// What a song tells an animal to do.
    Call,
    /// What a song says of an animal.
    Mood,
}

/// Number words by value; no story goes beyond twelve and four.
const NUMBERS: [&str; 17] = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
];

const GIRLS: usize = 12;

const NAMES: [&str; 24] = [
    "Mira", "Anna", "Ruby", "Nora", "Rosa", "Lily", "Emma", "Vera", "Zoe", "Ivy", "Ada", "Mia", // girls
    "Tom", "Ben", "Leo", "Max", "Finn", "Hugo", "Otto", "Jack", "Luke", "Carl", "Sam", "Noah", // boys
];

const ADJECTIVES: [&str; 20] = [
    "red", "blue", "green", "pink", "black", "white", "brass", "iron", "glass", "gold", "paper", "old", "odd", "small",
    "tin", "clay", "oak", "big", "steel", "stone",
];

const NOUNS: [&str; 24] = [
    "cup", "key", "drum", "lamp", "coin", "kite", "ball", "doll", "book", "ring", "bell", "map", "hat", "jar", "comb",
    "fork", "mug", "bag", "box", "rope", "nail", "pen", "fan", "bead",
];

const FRUITS: [&str; 10] = ["plums", "pears", "nuts", "figs", "limes", "buns", "eggs", "beans", "dates", "cakes"];

const CALLS: [&str; 8] = ["fly", "run", "hop", "sing", "rest", "jump", "wake", "come"];

const MOODS: [&str; 8] = ["shy", "wise", "gray", "tiny", "bold", "dear", "sad", "kind"];

impl Kind {
    /// The words of the list.
    pub(super) fn words(self) -> &'static [&'static str] {
        match self {
            Kind::Name => &NAMES,
            Kind::Adjective => &ADJECTIVES,
            Kind::Noun => &NOUNS,
            Kind::Place(setting) => places(setting),
            Kind::Animal(setting) => animals(setting),
            Kind::Fruit => &FRUITS,
            Kind::Many => &NUMBERS[5..=12],
            Kind::Some => &NUMBERS[2..=4],
            Kind::Few => &NUMBERS[3..=6],
            Kind::Call => &CALLS,
            Kind::Mood => &MOODS,
        }
    }

    /// The number that a word of a list of numbers stands for; of any other list, its index.
    fn value(self, index: usize) -> usize {
        index
            + match self {
                Kind::Many => 5,
                Kind::Some => 2,
                Kind::Few => 3,
                _ => 0,
            }
    }
}

fn places(setting: Setting) -> &'static [&'static str] {
    match setting {
        Setting::Farm => &[
            "in the barn",
            "by the cart",
            "on the fence",
            "by the well",
            "in the hay",
            "by the gate",
            "on the roof",
            "by the pond",
            "in the shed",
            "under the oak",
        ],
        Setting::Beach => &[
            "in the boat",
            "on the pier",
            "by the rocks",
            "in the sand",
            "in the hut",
            "in the cave",
            "under the net",
            "on the dune",
            "by the buoy",
            "on the raft",
        ],
        Setting::Shop => &[
            "in the till",
            "on the bench",
            "by the sign",
            "in the sack",
            "in the crate",
            "on the scale",
            "by the pump",
            "in the cellar",
            "on the rack",
            "under the jug",
        ],
        Setting::Fort => &[
            "in the tower",
            "by the moat",
            "on the stairs",
            "under the bed",
            "in the chest",
            "on the wall",
            "by the throne",
            "in the stable",
            "under the rug",
            "by the fire",
        ],
        Setting::Camp => &[
            "in the tent",
            "by the creek",
            "on the stump",
            "by the fern",
            "in the log",
            "by the path",
            "on the hill",
            "in the bush",
            "under the elm",
            "by the lake",
        ],
        Setting::House => &[
            "in the desk",
            "on the shelf",
            "under the mat",
            "by the door",
            "in the hall",
            "on the chair",
            "by the piano",
            "in the closet",
            "in the sink",
            "by the stove",
        ],
    }
}

fn animals(setting: Setting) -> &'static [&'static str] {
    match setting {
        Setting::Farm => &["hen", "cow", "pig", "goat", "duck", "lamb", "dog", "cat"],
        Setting::Beach => &["crab", "gull", "seal", "dog", "crow", "snail"],
        Setting::Shop => &["cat", "dog", "rat", "crow", "hen", "goat"],
        Setting::Fort => &["owl", "bat", "hound", "swan", "cat", "rat"],
        Setting::Camp => &["bear", "frog", "owl", "toad", "moth", "bee"],
        Setting::House => &["cat", "dog", "bird", "snail", "moth", "bee"],
    }
}

/// How a drawn word is spelt at one mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// `brass`
    Plain,
    /// `In the barn`
    Capital,
    /// `a brass`, `an iron`
    Indefinite,
    /// `she`, for a name
    Pronoun,
    /// `She`, for a name
    CapitalPronoun,
}

/// A word that the story has drawn. The grammar can mention it but not look inside, which is what makes the closed form
/// exact: what happens in a story cannot depend on how its words are spelt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Slot {
    /// The list that it was drawn from.
    pub(super) kind: Kind,
    /// Which draw of the story it was; always 0 where no word was really drawn.
    pub(super) id: usize,
}

/// The end of a document, as the last byte of the grammar's text. It is taken off before the text is shown.
pub(super) const END: &str = "\u{3}";

/// The least piece of text that the grammar knows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    /// These very bytes.
    Text(&'static str),
    /// A drawn word.
    Word(Slot, Form),
    /// Two drawn numbers added.
    Sum(Slot, Slot),
    /// The second drawn number taken from the first.
    Difference(Slot, Slot),
    /// All numbers from one to the drawn one.
    Count(Slot),
    /// The end of the document.
    End,
}

impl Part {
    /// The slots that decide the spelling.
    pub(super) fn slots(self) -> (Option<Slot>, Option<Slot>) {
        match self {
            Part::Text(_) | Part::End => (None, None),
            Part::Word(slot, _) | Part::Count(slot) => (Some(slot), None),
            Part::Sum(a, b) | Part::Difference(a, b) => (Some(a), Some(b)),
        }
    }

    /// The bytes, when `index` says which word of its list each slot holds.
    pub(super) fn spell(self, index: impl Fn(Slot) -> usize) -> Cow<'static, str> {
        let value = |slot: Slot| slot.kind.value(index(slot));
        match self {
            Part::Text(text) => text.into(),
            Part::End => END.into(),
            Part::Word(slot, form) => spell(slot.kind, index(slot), form),
            Part::Sum(a, b) => NUMBERS[value(a) + value(b)].into(),
            Part::Difference(a, b) => NUMBERS[value(a) - value(b)].into(),
            Part::Count(slot) => NUMBERS[1..=value(slot)].join(", ").into(),
        }
    }
}

/// Spells one word of a list.
pub(super) fn spell(kind: Kind, index: usize, form: Form) -> Cow<'static, str> {
    let word = kind.words()[index];
    let girl = index < GIRLS;
    match form {
        Form::Plain => word.into(),
        Form::Capital => (word[..1].to_ascii_uppercase() + &word[1..]).into(),
        Form::Indefinite if word.starts_with(['a', 'e', 'i', 'o', 'u']) => format!("an {word}").into(),
        Form::Indefinite => format!("a {word}").into(),
        Form::Pronoun => if girl { "she" } else { "he" }.into(),
        Form::CapitalPronoun => if girl { "She" } else { "He" }.into(),
    }
}
