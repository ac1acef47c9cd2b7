//! `samples.jsonl`: what the model wrote at each evaluation, one text a line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cut;
use super::lines::{each_line, spread};
use crate::error::{Error, Result};
use crate::metrics::reopen;

/// Bytes of a file that are read; of a longer one so many, in parts from its beginning to its end.
const MOST_BYTES: u64 = 256 << 20;

/// Prompts that are told apart.
const MOST_PROMPTS: usize = 32;

/// Texts of a prompt that are held; where there are more, every second one goes.
const MOST_TEXTS: usize = 256;

/// Characters of a text that are held.
const LONGEST: usize = 4000;

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Sample<'a> {
    step: u64,
    prompt: std::borrow::Cow<'a, str>,
    text: std::borrow::Cow<'a, str>,
    /// Whether the text answers the prompt instead of going on with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    chat: bool,
}

/// An open `samples.jsonl`.
#[derive(Debug)]
pub(crate) struct SamplesFile {
    path: PathBuf,
    file: File,
}

impl SamplesFile {
    /// Opens the file for a run that continues at `step`; texts of later steps, and what is none, are dropped.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] where the file cannot be read or written.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self> {
        let is_kept = |line: &[u8]| serde_json::from_slice::<Sample>(line).is_ok_and(|sample| sample.step <= step);
        Ok(Self { path: path.to_path_buf(), file: reopen(path, is_kept)? })
    }

    /// Appends a text.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub(crate) fn write(&mut self, step: u64, prompt: &str, text: &str, chat: bool) -> Result<()> {
        let sample = Sample { step, prompt: prompt.into(), text: text.into(), chat };
        let mut line =
            serde_json::to_string(&sample).map_err(|e| Error::file(&self.path, format!("cannot be encoded: {e}")))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}

/// What a model wrote in the course of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// Texts by prompt and step.
    pub prompts: BTreeMap<String, BTreeMap<u64, String>>,
    /// Those prompts that are messages, which the texts answer.
    pub messages: BTreeSet<String>,
    /// Lines that are no text, or of more prompts than are told apart.
    pub unread: u64,
}

impl Samples {
    /// Reads a `samples.jsonl`; nothing where there is none. Of a step's texts the newest counts.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] where it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let mut samples = Self::default();
        let read =
            each_line(path, |bytes| spread(bytes, MOST_BYTES), &mut |line| match serde_json::from_slice::<Sample>(
                line.bytes,
            ) {
                Ok(sample) => samples.add(&sample),
                Err(_) => samples.unread += u64::from(line.ended && !line.bytes.trim_ascii().is_empty()),
            });
        match read {
            Err(Error::Io { reason, .. }) if reason.kind() == std::io::ErrorKind::NotFound => Ok(samples),
            Err(e) => Err(e),
            Ok(extent) => {
                samples.unread += extent.too_long;
                Ok(samples)
            }
        }
    }

    fn add(&mut self, sample: &Sample) {
        let (prompt, text) = (cut(&sample.prompt, LONGEST), cut(&sample.text, LONGEST));
        if self.prompts.len() >= MOST_PROMPTS && !self.prompts.contains_key(&prompt) {
            self.unread += 1;
            return;
        }
        if sample.chat {
            self.messages.insert(prompt.clone());
        }
        let texts = self.prompts.entry(prompt).or_default();
        texts.insert(sample.step, text);
        if texts.len() > MOST_TEXTS {
            let mut i = 0;
            texts.retain(|_, _| {
                i += 1;
                i % 2 == 1
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_as_they_were_written_and_those_of_a_lost_session_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        assert_eq!(Samples::read(&path).unwrap(), Samples::default());
        let mut file = SamplesFile::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            file.write(step, "Once", &format!(" \"upon\"\n{step}"), false).unwrap();
        }
        drop(file);
        let mut file = SamplesFile::open(&path, 20).unwrap();
        file.write(30, "Once", "again", false).unwrap();
        file.write(30, "Once", "and again", false).unwrap();
        file.write(30, "When?", "Once.", true).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"junk\n{\"step\":40,\"pro").unwrap();
        let samples = Samples::read(&path).unwrap();
        let texts: Vec<(u64, &str)> =
            samples.prompts["Once"].iter().map(|(step, text)| (*step, text.as_str())).collect();
        assert_eq!(texts, [(10, " \"upon\"\n10"), (20, " \"upon\"\n20"), (30, "and again")]);
        assert_eq!(samples.prompts["When?"][&30], "Once.");
        assert_eq!(samples.messages.iter().collect::<Vec<_>>(), ["When?"]);
        assert_eq!(samples.unread, 1);
    }

    #[test]
    fn texts_without_end_are_cut_and_thinned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut file = SamplesFile::open(&path, 0).unwrap();
        for step in 0..2000 {
            file.write(step, "ä", "x", false).unwrap();
        }
        for prompt in 0..100 {
            file.write(0, &prompt.to_string(), &"ö".repeat(5000), false).unwrap();
        }
        let samples = Samples::read(&path).unwrap();
        let texts = &samples.prompts["ä"];
        assert!((MOST_TEXTS / 2..=MOST_TEXTS).contains(&texts.len()) && texts.contains_key(&0));
        assert_eq!((samples.prompts.len(), samples.unread), (MOST_PROMPTS, 100 - (MOST_PROMPTS as u64 - 1)));
        assert_eq!(samples.prompts["0"][&0].chars().count(), LONGEST + 1);
    }
}
