//! Diagnostic tasks: procedural examples that ask for one ability each, so that a sweep over the latent's width shows what
//! that ability needs of a cache.
//!
//! The loss on a text hardly moves with the rank of the latent; recall does. Each task here has an answer that follows from
//! what was read before (entropy 0), and asks nothing else: only answers are targets. Examples are a pure function of the seeds
//! and a number and never repeat; the held-out ones have a stream of their own.
//!
//! ```toml
//! [source]
//! kind = "task"
//! seed = 1
//! validation_examples = 512
//!
//! [source.task]
//! kind = "mqar"            # records | mqar | copy | induction | position | dyck | modular-addition | linear-recall | ..
//! pairs = 8
//! length = 64
//! keys = 64
//! values = 64
//! ```
//!
//! # The tasks
//!
//! r is `kv_lora_rank`, R is `qk_rope_head_dim`. "Chance" is what [`TaskCorpus::chance`] reports: the accuracy of a model that
//! knows which answers are possible but not which one is due (for vectors: the error of an answer of 0).
//!
//! | kind | asks for | what r does | what R does | chance | theory |
//! |---|---|---|---|---|---|
//! | [`linear-recall`](LinearRecall) (S1) | a Gaussian vector, by place | all: error falls by 1/m per dimension | > 0 to find the place | 1 | [`theory::linear_floor`], [`theory::normalised_floor`] |
//! | [`records`](Records) (S2) | one of A symbols of a record, by place | r = 1 is a sign, one bit; from 2 on a sphere has room, and what gives way is packing: soft | > 0 to find the place | 1/V | none |
//! | [`mqar`](Mqar) (S3) | the value of a key | key and value must both fit | ties a value to its key in the first block | 1/pairs | separation of random codes, r ≳ log pairs |
//! | [`multi-key-match`](MultiKeyMatch) (S4) | a vector, by any of H keys | knee at Hκ + m | nothing | 1 | [`theory::multi_key_width`] |
//! | [`copy`](Copying) (S5) | symbols once more | little: a symbol | > 0 finds a fixed distance; with noise a wide latent can count instead | 1/V | none |
//! | [`induction`](Induction) (S5) | what followed last time | a symbol and its predecessor: some; the narrower, the longer it takes to be found | marks the predecessor | 1/(n−1) | none |
//! | [`position`](Position) (S6) | the symbol k places back | nothing | everything: at R = 0 one block guesses | mean of 1/t | [`theory::position_chance`], exact for one block |
//! | [`dyck`](Dyck) (S7) | the bracket to close | nothing (control) | little | 1/kinds | none |
//! | [`modular-addition`](ModularAddition) (S7) | a sum mod p | nothing (control) | little | 1/p | none |
//!
//! # Tokens
//!
//! A task of tokens brings a vocabulary of readable words (`r0110`, `a2`, `k17`), saved as a `tokenizer.json` like any other, so
//! that its checkpoints are whole model directories. A word's bytes mean nothing, so bits per byte are not reported.
//!
//! # Vectors
//!
//! A task of vectors has no vocabulary and no tokenizer. Its examples go through the same model all the same: the embedding
//! matrix E [vocab, d] maps an input vector x of `vocab` numbers to x·E, of which a token is the case of a single 1; the answer is
//! the first m of the logits; and the loss is the mean squared error per number. `vocab_size` is the width of the input.
//! A checkpoint is a model directory without `tokenizer.json`.
//!
//! # Settings
//!
//! Two keys of `[model]` decide more than the sizes. The default embedding, N(0, 0.02²), is small beside what a block writes to the
//! residual stream, and a second block then finds hardly a trace of the token: `mqar` and `induction` stay at a guess among what
//! they have read for thousands of steps, and leave it within some hundreds at `initializer_range = 0.1`. And rows are short, so
//! that most frequencies of the usual rotation do not turn: `rope_parameters.rope_theta = 100` puts them to use.

mod controls;
mod copying;
mod corpus;
mod draw;
mod recall;
pub mod theory;
mod vectors;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use controls::{Dyck, ModularAddition};
pub use copying::{Copying, Induction};
pub use corpus::{AnswerBatch, HeldExamples, RowLayout, TaskCorpus, TaskSummary};
use draw::Draw;
pub use recall::{Mqar, Position, Records};
pub use vectors::{LinearRecall, MultiKeyMatch};

use lowkey_batch::IGNORE;

/// A task with its sizes; the keys of `[source.task]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Task {
    /// Vectors of random numbers, asked back by their place. A task of vectors: it has no words, and no tokenizer.
    LinearRecall(LinearRecall),
    /// Records of several symbols, one token each; one symbol of each record is asked back, by its place.
    Records(Records),
    /// Pairs of a key and a value; then the keys once more, each to be answered with its value (arXiv 2312.04927).
    Mqar(Mqar),
    /// Items with several key vectors and a value vector; a query shows one key of one item and asks for its value. A task of vectors.
    MultiKeyMatch(MultiKeyMatch),
    /// Symbols, with or without blanks among them, to be told again.
    Copy(Copying),
    /// Different symbols in random order, then some of them once more: what follows each is asked for.
    Induction(Induction),
    /// Different symbols in random order; at each, the symbol some places back is asked for.
    Position(Position),
    /// Balanced brackets of several kinds; wherever one closes, its kind is asked for. A control that no cache decides.
    Dyck(Dyck),
    /// Numbers whose sum modulo a number is asked for. A control that no cache decides.
    ModularAddition(ModularAddition),
}

/// One example of a task of tokens: an entry of each list per position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TokenExample {
    pub(crate) input_ids: Vec<u32>,
    /// The answer, or [`IGNORE`].
    pub(crate) targets: Vec<i64>,
    /// Index of the answer's class; 0 where there is no answer.
    pub(crate) classes: Vec<u8>,
}

impl TokenExample {
    /// Tokens that nothing is asked at.
    fn reading(tokens: impl Iterator<Item = usize>) -> Self {
        let mut example = Self::default();
        tokens.for_each(|token| example.read(token));
        example
    }

    fn read(&mut self, token: usize) {
        self.input_ids.push(token as u32);
        self.targets.push(IGNORE);
        self.classes.push(0);
    }

    /// A token at which an answer is due.
    fn ask(&mut self, token: usize, answer: usize, class: u8) {
        self.input_ids.push(token as u32);
        self.targets.push(answer as i64);
        self.classes.push(class);
    }
}

/// One example of a task of vectors.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct VectorExample {
    /// `[positions, input_width]`
    pub(crate) inputs: Vec<f32>,
    /// `[positions, output_width]`, 0 where nothing is asked.
    pub(crate) values: Vec<f32>,
    /// `[positions]`
    pub(crate) asked: Vec<bool>,
}

impl VectorExample {
    fn read(&mut self, input: impl Iterator<Item = f32>, output_width: usize) {
        self.inputs.extend(input);
        self.values.extend(std::iter::repeat_n(0.0, output_width));
        self.asked.push(false);
    }

    /// An input at which `answer` is due.
    fn ask(&mut self, input: impl Iterator<Item = f32>, answer: &[f32]) {
        self.inputs.extend(input);
        self.values.extend_from_slice(answer);
        self.asked.push(true);
    }
}

/// What makes a task of tokens.
trait TokenTask {
    /// Refuses sizes that no example can have, naming the key.
    fn check(&self) -> Result<(), String>;
    /// Positions of an example, the same for all.
    fn positions(&self) -> usize;
    /// The vocabulary, by id.
    fn words(&self) -> Vec<String>;
    /// Names of the classes of answers.
    fn classes(&self) -> &'static [&'static str];
    /// Accuracy of a guess among the possible answers.
    fn chance(&self) -> f64;
    /// An example, after a check.
    fn example(&self, draw: &mut Draw) -> TokenExample;
}

/// What makes a task of vectors.
trait VectorTask {
    /// Refuses sizes that no example can have, naming the key.
    fn check(&self) -> Result<(), String>;
    /// Positions of an example, the same for all.
    fn positions(&self) -> usize;
    /// Numbers read at a position.
    fn input_width(&self) -> usize;
    /// Numbers asked for.
    fn output_width(&self) -> usize;
    /// An example, after a check.
    fn example(&self, draw: &mut Draw) -> VectorExample;
}

/// A task by what its examples are made of.
enum Kind<'a> {
    Tokens(&'a dyn TokenTask),
    Vectors(&'a dyn VectorTask),
}

impl Task {
    fn kind(&self) -> Kind<'_> {
        match self {
            Self::LinearRecall(task) => Kind::Vectors(task),
            Self::Records(task) => Kind::Tokens(task),
            Self::Mqar(task) => Kind::Tokens(task),
            Self::MultiKeyMatch(task) => Kind::Vectors(task),
            Self::Copy(task) => Kind::Tokens(task),
            Self::Induction(task) => Kind::Tokens(task),
            Self::Position(task) => Kind::Tokens(task),
            Self::Dyck(task) => Kind::Tokens(task),
            Self::ModularAddition(task) => Kind::Tokens(task),
        }
    }

    /// Refuses sizes that no example can have, naming the key.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.kind() {
            Kind::Tokens(task) => task.check(),
            Kind::Vectors(task) => task.check(),
        }
    }

    /// Positions of an example, the same for all.
    pub fn positions(&self) -> usize {
        match self.kind() {
            Kind::Tokens(task) => task.positions(),
            Kind::Vectors(task) => task.positions(),
        }
    }

    /// Whether it is one of vectors.
    pub fn is_of_vectors(&self) -> bool {
        matches!(self.kind(), Kind::Vectors(_))
    }
}

fn at_least(key: &str, value: usize, least: usize) -> Result<(), String> {
    if value >= least { Ok(()) } else { Err(format!("{key} = {value} must be at least {least}")) }
}

fn at_most(key: &str, value: usize, most: usize) -> Result<(), String> {
    if value <= most { Ok(()) } else { Err(format!("{key} = {value} must be at most {most}")) }
}

/// A digit in base 36.
fn digit(value: usize) -> char {
    u32::try_from(value).ok().and_then(|value| char::from_digit(value, 36)).unwrap_or('?')
}

#[cfg(test)]
mod tests;
