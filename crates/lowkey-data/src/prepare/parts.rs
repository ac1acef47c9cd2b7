//! A long preparation in parts, so that one that was stopped or killed goes on where it was.
//!
//! A part holds the tokens of some hundred megabytes of text, of both splits, in a folder beside the place of the result. It is written when it is
//! whole, and with it what the next begins with. The same source is read again up to there, and not tokenised. In the end the parts become
//! one, byte for byte what a preparation makes that nobody stopped; a short one has only one, which is written where it is to stand.

use std::path::{Path, PathBuf};

use lowkey_files::Staging;
use serde::{Deserialize, Serialize};

use super::Skipped;
use crate::error::Result;
use crate::shard::{Shard, ShardWriter};
use crate::tokenizer::Tokenizer;

/// Bytes of text in a part, at least: what is done again at most.
pub(super) const PART: u64 = 256 << 20;

/// What has been done so far.
const STATE: &str = "state.json";

/// Bytes of such a file at most.
const LARGEST_STATE: u64 = 1 << 24;

/// Splits, by the names of their files.
const SPLITS: [&str; 2] = ["train", "validation"];

/// Which split a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Train,
    Validation,
}

/// What stands in [`STATE`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    /// Of the whole preparation.
    fingerprint: String,
    /// Of the tokenizer beside it, where one was kept.
    tokenizer: Option<String>,
    /// Of each part for both splits whether its last document goes on in the next.
    parts: Vec<[bool; 2]>,
    /// Pieces of the source, or records, that are in them.
    items: u64,
    /// Documents that ended, and tokens, of both splits.
    documents: [u64; 2],
    tokens: [u64; 2],
    skipped: Skipped,
}

/// The tokens of both splits on their way into files.
pub(super) struct Parts {
    /// Where parts lie that are done.
    dir: PathBuf,
    /// Where the result is to stand.
    finals: [PathBuf; 2],
    state: State,
    /// Those of the part being written, by [`Side`].
    writers: Vec<ShardWriter>,
    form: Form,
    /// Bytes of text in a part.
    most: u64,
}

/// What the token files are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub(super) vocab_size: usize,
    /// Whether only some tokens are learnt, and whether documents come in pairs.
    pub(super) masked: bool,
    pub(super) pairs: bool,
}

impl Form {
    fn writer(self, path: &Path) -> Result<ShardWriter> {
        if self.masked {
            ShardWriter::masked(path, self.vocab_size, self.pairs)
        } else {
            ShardWriter::create(path, self.vocab_size)
        }
    }
}

/// What a stopped preparation of the same left.
pub(super) struct Begun {
    dir: PathBuf,
    state: State,
}

impl Begun {
    /// Looks for it; whatever else is there is removed.
    pub(super) fn find(staging: &Staging, fingerprint: &str) -> Result<Self> {
        let dir = lowkey_files::staging::begun(staging.target())?;
        let fresh = || State { fingerprint: fingerprint.to_owned(), ..State::default() };
        if !dir.exists() {
            return Ok(Self { dir, state: fresh() });
        }
        lowkey_files::write::sweep(&dir)?;
        let read = || -> Option<State> {
            let state = load(&dir, fingerprint)?;
            let whole = |part: usize| part_paths(&dir, part).iter().all(|path| Shard::open(path).is_ok());
            (0..state.parts.len()).all(whole).then_some(state)
        };
        match read() {
            Some(state) => Ok(Self { dir, state }),
            None => {
                lowkey_files::write::remove_dir(&dir)?;
                Ok(Self { dir, state: fresh() })
            }
        }
    }

    /// The tokenizer that it had built, if it is still the same.
    pub(super) fn tokenizer(&self) -> Option<Tokenizer> {
        let kept = self.state.tokenizer.as_ref()?;
        Tokenizer::from_model_dir(&self.dir).ok().filter(|tokenizer| tokenizer.fingerprint() == *kept)
    }

    /// Keeps a tokenizer that took long to build.
    pub(super) fn keep(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        tokenizer.save(&self.dir)?;
        self.state.tokenizer = Some(tokenizer.fingerprint());
        save(&self.dir, &self.state)
    }
}

impl Parts {
    /// Begins a part behind those that are there, for files that are to stand at `finals` in the end.
    pub(super) fn new(begun: Begun, finals: [&Path; 2], form: Form, most: u64) -> Result<Self> {
        let Begun { dir, state } = begun;
        let finals = finals.map(Path::to_path_buf);
        let writers = writers(&dir, &finals, &state, form)?;
        Ok(Self { dir, finals, state, writers, form, most })
    }

    /// Pieces or records that are done.
    pub(super) fn items(&self) -> u64 {
        self.state.items
    }

    /// What was left out of them.
    pub(super) fn skipped(&self) -> Skipped {
        self.state.skipped.clone()
    }

    /// Where the tokens of a split go.
    pub(super) fn writer(&mut self, side: Side) -> &mut ShardWriter {
        &mut self.writers[side as usize]
    }

    /// Documents that ended, of a split.
    fn documents_of(&self, side: Side) -> u64 {
        self.state.documents[side as usize] + self.writers[side as usize].documents()
    }

    /// Tokens of a split.
    pub(super) fn tokens_of(&self, side: Side) -> u64 {
        self.state.tokens[side as usize] + self.writers[side as usize].tokens()
    }

    /// Documents that ended, of both.
    pub(super) fn documents(&self) -> u64 {
        self.documents_of(Side::Train) + self.documents_of(Side::Validation)
    }

    /// Tokens of both.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens_of(Side::Train) + self.tokens_of(Side::Validation)
    }

    /// To be said between two items: `items` are done in all. Ends the part where it is long enough.
    pub(super) fn reached(&mut self, items: u64, skipped: &Skipped) -> Result<()> {
        if self.writers.iter().map(ShardWriter::bytes).sum::<u64>() >= self.most {
            self.end_part(items, skipped)?;
            self.writers = writers(&self.dir, &self.finals, &self.state, self.form)?;
        }
        Ok(())
    }

    /// Finishes the part being written and says so.
    fn end_part(&mut self, items: u64, skipped: &Skipped) -> Result<()> {
        lowkey_files::write::create_dir(&self.dir)?;
        let part = self.state.parts.len();
        let open = [0, 1].map(|side| self.writers[side].is_open());
        for side in [Side::Train, Side::Validation] {
            self.state.documents[side as usize] = self.documents_of(side);
            self.state.tokens[side as usize] = self.tokens_of(side);
        }
        let paths = part_paths(&self.dir, part);
        for ((writer, path), done) in std::mem::take(&mut self.writers).into_iter().zip(&self.finals).zip(paths) {
            writer.finish()?;
            // The first was to be the only one.
            if part == 0 {
                lowkey_files::write::rename(path, &done)?;
            }
        }
        self.state.parts.push(open);
        (self.state.items, self.state.skipped) = (items, skipped.clone());
        save(&self.dir, &self.state)
    }

    /// Makes one file of each split.
    pub(super) fn finish(mut self, items: u64, skipped: &Skipped) -> Result<()> {
        if self.state.parts.is_empty() {
            return self.writers.into_iter().try_for_each(ShardWriter::finish);
        }
        self.end_part(items, skipped)?;
        for (side, path) in self.finals.iter().enumerate() {
            let mut writer = self.form.writer(path)?;
            for (part, open) in self.state.parts.iter().enumerate() {
                let shard = Shard::open(&part_paths(&self.dir, part)[side])?;
                writer.append(&shard, open[side])?;
            }
            writer.finish()?;
        }
        Ok(())
    }
}

/// Writers of the part that comes next.
fn writers(dir: &Path, finals: &[PathBuf; 2], state: &State, form: Form) -> Result<Vec<ShardWriter>> {
    let paths = match state.parts.len() {
        0 => finals.clone(),
        part => part_paths(dir, part),
    };
    paths.iter().map(|path| form.writer(path)).collect()
}

fn part_paths(dir: &Path, part: usize) -> [PathBuf; 2] {
    SPLITS.map(|split| dir.join(format!("{part:05}.{split}.tokens")))
}

fn save(dir: &Path, state: &State) -> Result<()> {
    Ok(lowkey_files::write_json(&dir.join(STATE), state)?)
}

/// The state of a preparation with this fingerprint.
fn load(dir: &Path, fingerprint: &str) -> Option<State> {
    let text = lowkey_files::read_text(&dir.join(STATE), LARGEST_STATE).ok()?;
    serde_json::from_str(&text).ok().filter(|state: &State| state.fingerprint == fingerprint)
}

/// Removes what is left of the parts of a folder that is whole. Those of another one stay: somebody may be at it, for the same place.
pub(super) fn forget(out: &Path, fingerprint: &str) -> Result<()> {
    let dir = lowkey_files::staging::begun(out)?;
    if load(&dir, fingerprint).is_some() {
        // Another process may be removing it, too, and what stays does no harm.
        let _ = lowkey_files::write::remove_dir(&dir);
    }
    Ok(())
}
