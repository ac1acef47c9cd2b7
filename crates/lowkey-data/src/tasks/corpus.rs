//! From a task to batches.

use std::ops::Range;

use lowkey_batch::{Batch, IGNORE, Vectors};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::draw::{Draw, Side};
use super::{Kind, Task, TokenTask, VectorTask};
use crate::dataset::{DatasetConfig, Source};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Raised whenever the same keys would give other examples than before.
const FORMAT: u32 = 1;

/// Held-out tokens with the class of each answer.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerBatch {
    /// The rows.
    pub batch: Batch,
    /// `[rows · seq_len]`: index into the names of the classes; of no meaning where there is no target.
    pub classes: Vec<u8>,
}

/// The held-out examples of a task.
#[derive(Debug, Clone, PartialEq)]
pub enum HeldExamples {
    /// Tokens, and the names of the classes of answers.
    Tokens(Vec<AnswerBatch>, &'static [&'static str]),
    /// Vectors.
    Vectors(Vec<Batch>),
}

/// How examples fill the rows of a batch: each row holds as many whole ones as fit, and is padded to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowLayout {
    /// Positions per row: at least [`TaskCorpus::positions`], which is for the caller to check.
    pub seq_len: usize,
    /// Whether attention stops at the bounds of an example.
    pub mask_documents: bool,
}

/// A task as a corpus.
#[derive(Debug, Clone)]
pub struct TaskCorpus {
    task: Task,
    seed: u64,
    validation_examples: u64,
    tokenizer: Option<Tokenizer>,
}

/// A task in figures, for people and scripts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskSummary {
    /// The keys of `[source.task]`.
    pub task: Task,
    /// Positions of an example.
    pub positions: usize,
    /// Answers in an example.
    pub answers: usize,
    /// Words of the vocabulary, or numbers of an input vector.
    pub width: usize,
    /// Numbers of an answer; absent where the answer is a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_width: Option<usize>,
    /// Names of the classes of answers; none for vectors.
    pub classes: &'static [&'static str],
    /// See [`TaskCorpus::chance`].
    pub chance: f64,
    /// Held-out examples.
    pub validation_examples: u64,
    /// See [`TaskCorpus::fingerprint`].
    pub fingerprint: String,
}

impl TaskCorpus {
    /// The task of a dataset file; none for a source of text.
    ///
    /// # Errors
    /// What is wrong with the file's keys.
    pub fn new(config: &DatasetConfig) -> Result<Option<Self>> {
        let Source::Task { seed, validation_examples, task } = &config.source else { return Ok(None) };
        config.check()?;
        let tokenizer = match task.kind() {
            Kind::Tokens(task) => Some(Tokenizer::words(&task.words())?),
            Kind::Vectors(_) => None,
        };
        Ok(Some(Self { task: task.clone(), seed: *seed, validation_examples: *validation_examples, tokenizer }))
    }

    /// The task.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// What its ids mean; none for vectors.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Words of the vocabulary, or numbers of an input vector: the rows of an embedding that fits.
    pub fn width(&self) -> usize {
        match self.task.kind() {
            Kind::Tokens(_) => self.tokenizer.as_ref().map_or(0, Tokenizer::vocab_size),
            Kind::Vectors(task) => task.input_width(),
        }
    }

    /// Positions of an example.
    pub fn positions(&self) -> usize {
        self.task.positions()
    }

    /// The accuracy of a model that knows which answers are possible but not which one is due; for vectors the mean squared
    /// error per number of an answer of 0, which is 1.
    pub fn chance(&self) -> f64 {
        match self.task.kind() {
            Kind::Tokens(task) => task.chance(),
            Kind::Vectors(_) => 1.0,
        }
    }

    /// The task in figures.
    pub fn summary(&self) -> TaskSummary {
        let mut draw = Draw::new(self.seed, Side::Validation, 0);
        let (answers, classes, output_width) = match self.task.kind() {
            Kind::Tokens(task) => {
                (task.example(&mut draw).targets.iter().filter(|t| **t >= 0).count(), task.classes(), None)
            }
            Kind::Vectors(task) => {
                let asked = task.example(&mut draw).asked;
                (asked.into_iter().filter(|asked| *asked).count(), &[][..], Some(task.output_width()))
            }
        };
        TaskSummary {
            task: self.task.clone(),
            positions: self.positions(),
            answers,
            width: self.width(),
            output_width,
            classes,
            chance: self.chance(),
            validation_examples: self.validation_examples,
            fingerprint: self.fingerprint(),
        }
    }

    /// Hash of all that decides the examples: the keys, and some examples in the place of the generator, so that a changed one
    /// is noticed.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{FORMAT} {:?} {} {}\n", self.task, self.seed, self.validation_examples));
        for index in 0..8 {
            for side in [Side::Train(0), Side::Validation] {
                let mut draw = Draw::new(self.seed, side, index);
                match self.task.kind() {
                    Kind::Tokens(task) => hash.update(format!("{:?}", task.example(&mut draw))),
                    Kind::Vectors(task) => {
                        let example = task.example(&mut draw);
                        let numbers = example.inputs.iter().chain(&example.values);
                        numbers.for_each(|number| hash.update(number.to_le_bytes()));
                    }
                }
            }
        }
        lowkey_files::hash::hex(&hash.finalize())
    }

    /// The words of training example `index` for run seed 0, answers in parentheses; none for vectors.
    ///
    /// # Errors
    /// None for an id of the vocabulary, which all are.
    pub fn show(&self, index: u64) -> Result<Option<String>> {
        let (Kind::Tokens(task), Some(tokenizer)) = (self.task.kind(), &self.tokenizer) else { return Ok(None) };
        let example = task.example(&mut Draw::new(self.seed, Side::Train(0), index));
        let mut words = Vec::new();
        for (id, target) in example.input_ids.iter().zip(&example.targets) {
            words.push(tokenizer.decode(&[*id])?);
            if let Ok(target) = u32::try_from(*target) {
                words.push(format!("({})", tokenizer.decode(&[target])?));
            }
        }
        Ok(Some(words.join(" ")))
    }

    /// Examples per row.
    fn per_row(&self, seq_len: usize) -> u64 {
        (seq_len / self.positions().max(1)).max(1) as u64
    }

    /// The batch of a training step: a pure function of the run's seed and the step's number.
    pub fn batch(&self, layout: RowLayout, batch_size: usize, seed: u64, step: u64) -> Batch {
        let per_step = self.per_row(layout.seq_len) * batch_size as u64;
        let first = step.wrapping_mul(per_step);
        let range = first..first.wrapping_add(per_step);
        match self.task.kind() {
            Kind::Tokens(task) => self.tokens(task, layout, Side::Train(seed), range).batch,
            Kind::Vectors(task) => self.vectors(task, layout, Side::Train(seed), range),
        }
    }

    /// All held-out examples, in batches of at most `rows` rows: the same whatever the run's seed.
    pub fn held(&self, layout: RowLayout, rows: usize) -> HeldExamples {
        let per_batch = self.per_row(layout.seq_len).saturating_mul(rows.max(1) as u64);
        let all = self.validation_examples;
        let step = usize::try_from(per_batch).unwrap_or(usize::MAX);
        let ranges = (0..all).step_by(step).map(|first| first..first.saturating_add(per_batch).min(all));
        match self.task.kind() {
            Kind::Tokens(task) => {
                let batches = ranges.map(|range| self.tokens(task, layout, Side::Validation, range)).collect();
                HeldExamples::Tokens(batches, task.classes())
            }
            Kind::Vectors(task) => {
                HeldExamples::Vectors(ranges.map(|range| self.vectors(task, layout, Side::Validation, range)).collect())
            }
        }
    }

    fn tokens(&self, task: &dyn TokenTask, layout: RowLayout, side: Side, examples: Range<u64>) -> AnswerBatch {
        let RowLayout { seq_len, mask_documents } = layout;
        let rows = (examples.end - examples.start).div_ceil(self.per_row(seq_len));
        let mut out = AnswerBatch { batch: Batch::with_capacity(seq_len, rows as usize), classes: Vec::new() };
        for index in examples {
            let batch = &mut out.batch;
            if batch.column() + self.positions() > seq_len {
                batch.end_row(mask_documents);
                out.classes.resize(batch.input_ids.len(), 0);
            }
            let example = task.example(&mut Draw::new(self.seed, side, index));
            let start = if mask_documents { batch.column() as u32 } else { 0 };
            batch.input_ids.extend(example.input_ids);
            batch.targets.extend(example.targets);
            batch.document_starts.resize(batch.input_ids.len(), start);
            out.classes.extend(example.classes);
        }
        if out.batch.column() > 0 {
            out.batch.end_row(mask_documents);
            out.classes.resize(out.batch.input_ids.len(), 0);
        }
        out
    }

    fn vectors(&self, task: &dyn VectorTask, layout: RowLayout, side: Side, examples: Range<u64>) -> Batch {
        let RowLayout { seq_len, mask_documents } = layout;
        let (input_width, output_width) = (task.input_width(), task.output_width());
        let per_row = self.per_row(seq_len);
        let rows = (examples.end - examples.start).div_ceil(per_row) as usize;
        let positions = rows * seq_len;
        let mut vectors = Vectors {
            input_width,
            output_width,
            inputs: vec![0.0; positions * input_width],
            values: vec![0.0; positions * output_width],
        };
        let (mut targets, mut document_starts) = (vec![IGNORE; positions], vec![0; positions]);
        for (i, index) in (0..).zip(examples) {
            let example = task.example(&mut Draw::new(self.seed, side, index));
            let (row, place): (u64, u64) = (i / per_row, i % per_row);
            let column = place as usize * self.positions();
            let at = row as usize * seq_len + column;
            copy(&mut vectors.inputs, at * input_width, &example.inputs);
            copy(&mut vectors.values, at * output_width, &example.values);
            let asked: Vec<i64> = example.asked.iter().map(|asked| if *asked { 0 } else { IGNORE }).collect();
            copy(&mut targets, at, &asked);
            if mask_documents {
                // To the row's end: the next example, or the padding, is told apart below.
                document_starts[at..(row as usize + 1) * seq_len].fill(column as u32);
                let end = column + self.positions();
                let from = (row as usize * seq_len + end).min(positions);
                document_starts[from..(row as usize + 1) * seq_len].fill(end as u32);
            }
        }
        Batch { rows, seq_len, targets, document_starts, vectors: Some(vectors), ..Batch::default() }
    }
}

/// Writes `from` at `at`, as far as there is room.
fn copy<T: Copy>(to: &mut [T], at: usize, from: &[T]) {
    to.iter_mut().skip(at).zip(from).for_each(|(to, from)| *to = *from);
}
