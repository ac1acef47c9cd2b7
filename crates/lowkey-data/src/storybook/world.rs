//! What a story knows of its world, and what can happen there next.

use super::{
    MAX_BYTES,
    lexicon::{
        Part::{self, Text},
        Setting, Slot,
    },
};

/// How many facts a story can hold; the first two are always told.
pub(super) const FACTS: usize = 3;
pub(super) const FEWEST_FACTS: usize = 2;

/// The longest sentence of each sort, with the space before it. A story goes on only to what still fits, so that no
/// story is longer than [`MAX_BYTES`]; a test proves that on the ledger. The real length of a sentence must not count
/// here: then what can happen would depend on how words are spelt.
pub(super) const OPENING: usize = 49;
pub(super) const HIDE: usize = 38;
pub(super) const TAKE: usize = 45;
pub(super) const OWN: usize = 66;
pub(super) const SING: usize = 74;
pub(super) const COUNT: usize = 56;
pub(super) const BEASTS: usize = 64;
pub(super) const WEATHER: usize = 17;
pub(super) const WHERE: usize = 35;
pub(super) const WHO: usize = 29;
pub(super) const WHAT: usize = 40;

/// Someone put something somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fact {
    pub(super) who: Slot,
    pub(super) adjective: Slot,
    pub(super) noun: Slot,
    pub(super) place: Slot,
}

/// What is so at one point of a story. Every field can be read off the text so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) setting: Setting,
    /// The two children.
    pub(super) cast: [Slot; 2],
    /// Which of them the last sentence was about, if one.
    pub(super) topic: Option<usize>,
    /// What can be asked.
    pub(super) facts: [Option<Fact>; FACTS],
    /// What has happened that happens once at most.
    pub(super) done: Done,
    /// How many bytes are left.
    pub(super) room: usize,
}

/// What happens once in a story at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Done {
    pub(super) take: bool,
    pub(super) own: bool,
    pub(super) sing: bool,
    pub(super) count: bool,
    pub(super) beasts: bool,
    pub(super) weather: bool,
}

/// What a child does.
#[derive(Clone, Copy)]
pub(super) enum Deed {
    Hide,
    Take,
    Own,
    Sing,
    Count,
}

/// What a sentence of a scene is about.
#[derive(Clone, Copy)]
pub(super) enum Subject {
    Child(usize),
    Beasts,
    Weather,
    Question(Question),
}

/// What is asked of a fact.
#[derive(Clone, Copy)]
pub(super) enum Question {
    Where,
    Who,
    What,
}

impl World {
    /// The world of an opening: two children somewhere, and nothing has happened.
    pub(super) fn new(setting: Setting, cast: [Slot; 2]) -> World {
        World { setting, cast, topic: None, facts: [None; FACTS], done: Done::default(), room: MAX_BYTES - OPENING }
    }

    /// How many facts can be asked about.
    pub(super) fn known(&self) -> usize {
        self.facts.iter().flatten().count()
    }

    /// Whether a sentence of this length leaves room for the facts that are still due and for a question, `Where` or `Who`.
    pub(super) fn fits(&self, length: usize, facts: usize) -> bool {
        let due = FEWEST_FACTS.saturating_sub(self.known() + facts);
        length + due * HIDE + WHERE <= self.room
    }

    /// The same world after a sentence about `topic`.
    pub(super) fn after(mut self, length: usize, topic: Option<usize>, mark: impl Fn(&mut Done)) -> World {
        self.room -= length;
        self.topic = topic;
        mark(&mut self.done);
        self
    }

    /// What a child may do now, in words.
    pub(super) fn deeds(&self) -> Vec<(u32, Part, Deed)> {
        let mut deeds = vec![];
        if self.known() < FACTS && self.fits(HIDE, 1) {
            let verbs = [(4, "hid "), (3, "put "), (2, "left "), (1, "set ")];
            deeds.extend(verbs.map(|(weight, verb)| (weight, Text(verb), Deed::Hide)));
        }
        if !self.done.take && self.known() > 0 && self.fits(TAKE, 0) {
            deeds.push((6, Text("took the "), Deed::Take));
        }
        if !self.done.own && self.fits(OWN, 0) {
            deeds.push((3, Text("had "), Deed::Own));
        }
        if !self.done.sing && self.fits(SING, 0) {
            deeds.push((3, Text("sang, \""), Deed::Sing));
        }
        if !self.done.count && self.fits(COUNT, 0) {
            deeds.push((3, Text("saw "), Deed::Count));
        }
        deeds
    }

    /// What can be asked now, in words.
    pub(super) fn questions(&self) -> Vec<(u32, Part, Question)> {
        let mut questions = vec![];
        if WHERE <= self.room {
            questions.push((5, Text("Where was the "), Question::Where));
        }
        if WHO <= self.room {
            questions.push((3, Text("Who had the "), Question::Who));
        }
        if WHAT <= self.room {
            questions.push((3, Text("What was "), Question::What));
        }
        questions
    }
}
