//! The files of a model beside its configuration and weights, by name: what belongs to a model whatever becomes of its weights.
//!
//! Whoever makes one model directory from another (a conversion, an export, a run that starts from it) takes all of them along,
//! and reads none beyond its bound. What is in them is for others to know.

use std::collections::{BTreeMap, btree_map::Entry};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::read::read;
use crate::write::{create_dir, write};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A file that goes with a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Companion {
    /// Its name.
    pub name: &'static str,
    /// Bytes that it may have.
    pub largest: u64,
    /// Whether a tokenizer is read and written together with it: what its special tokens are and how it writes a conversation.
    pub of_tokenizer: bool,
}

const fn companion(name: &'static str, largest: u64) -> Companion {
    Companion { name, largest, of_tokenizer: false }
}

const fn of_tokenizer(name: &'static str, largest: u64) -> Companion {
    Companion { name, largest, of_tokenizer: true }
}

/// Every name: a tokenizer in every spelling that is about, templates, settings for generation. The largest published
/// vocabularies have some forty megabytes.
pub const COMPANIONS: [Companion; 13] = [
    companion("added_tokens.json", 64 * MIB),
    of_tokenizer("chat_template.jinja", 16 * MIB),
    of_tokenizer("chat_template.json", 16 * MIB),
    companion("generation_config.json", 16 * MIB),
    companion("merges.txt", GIB),
    companion("sentencepiece.bpe.model", GIB),
    of_tokenizer("special_tokens_map.json", 64 * MIB),
    companion("spiece.model", GIB),
    companion("tokenizer.json", GIB),
    companion("tokenizer.model", GIB),
    of_tokenizer("tokenizer_config.json", 256 * MIB),
    companion("vocab.json", GIB),
    companion("vocab.txt", GIB),
];

/// A folder of further chat templates, one file each.
pub const TEMPLATES: &str = "additional_chat_templates";

/// Bytes of one of them at most.
const LARGEST_TEMPLATE: u64 = 16 * MIB;

/// Far more of them than any model has.
const MOST_TEMPLATES: usize = 1000;

/// Bytes that the companion of this name may have; `None` where the name is none of theirs. A template's name has its folder before it.
pub fn largest(name: &str) -> Option<u64> {
    if is_template(name) {
        return Some(LARGEST_TEMPLATE);
    }
    COMPANIONS.iter().find(|companion| companion.name == name).map(|companion| companion.largest)
}

fn is_template(name: &str) -> bool {
    let rest = name.strip_prefix(TEMPLATES).and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|rest| rest.ends_with(".jinja") && crate::is_plain_name(rest))
}

/// The names of those that are in `dir`, sorted.
///
/// # Errors
/// [`Error::Io`] where a folder cannot be read, [`Error::Refused`] for a folder of more templates than any model has.
pub fn found(dir: &Path) -> Result<Vec<String>> {
    let there = |name: &str| dir.join(name).symlink_metadata().is_ok();
    let names = COMPANIONS.iter().map(|companion| companion.name).filter(|name| there(name));
    let mut names: Vec<String> = names.map(String::from).collect();
    let templates = dir.join(TEMPLATES);
    if templates.is_dir() {
        let before = names.len();
        for entry in fs::read_dir(&templates).map_err(Error::io("read", &templates))? {
            let entry = entry.map_err(Error::io("read", &templates))?;
            let name = format!("{TEMPLATES}/{}", entry.file_name().to_string_lossy());
            if is_template(&name) {
                names.push(name);
            }
            if names.len() - before > MOST_TEMPLATES {
                let why = format!("holds more than {MOST_TEMPLATES} templates; keep those of the model");
                return Err(Error::refused(&templates, why));
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Companions as they were read, to be written beside other weights; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Companions {
    files: Arc<[(String, Vec<u8>)]>,
}

impl Companions {
    /// All that are in a model directory.
    ///
    /// # Errors
    /// As [`found`]; [`Error::Refused`] for one that is no regular file or longer than it may be.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_first(&[dir])
    }

    /// All that are in any of these directories, each from the first that has it.
    ///
    /// # Errors
    /// As [`Companions::read`].
    pub fn read_first(dirs: &[&Path]) -> Result<Self> {
        let mut files = BTreeMap::new();
        for dir in dirs {
            for name in found(dir)? {
                if let Entry::Vacant(free) = files.entry(name) {
                    let bytes = read(&dir.join(free.key()), largest(free.key()).unwrap_or_default())?;
                    free.insert(bytes);
                }
            }
        }
        Ok(Self { files: files.into_iter().collect() })
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    /// Writes them into `dir`; what is there already stays.
    ///
    /// # Errors
    /// As [`write()`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        for (name, bytes) in self.files.iter() {
            let path = dir.join(name);
            if path.symlink_metadata().is_ok() {
                continue;
            }
            if let Some(folder) = path.parent() {
                create_dir(folder)?;
            }
            write(&path, bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One file of each name, each with its own text.
    fn all(dir: &Path) -> Vec<String> {
        let template = format!("{TEMPLATES}/tools.jinja");
        fs::create_dir_all(dir.join(TEMPLATES)).unwrap();
        let names: Vec<String> = COMPANIONS.iter().map(|c| c.name.to_owned()).chain([template]).collect();
        for name in &names {
            fs::write(dir.join(name), format!("text of {name}")).unwrap();
        }
        names
    }

    #[test]
    fn every_name_of_the_table_is_carried_and_nothing_else() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut names = all(from.path());
        names.sort();
        for other in ["notes.txt", "config.json", "model.safetensors", "additional_chat_templates/notes.txt"] {
            fs::write(from.path().join(other), "other").unwrap();
        }
        assert_eq!(found(from.path()).unwrap(), names);
        fs::write(to.path().join("vocab.json"), "mine").unwrap();
        Companions::read(from.path()).unwrap().write(to.path()).unwrap();
        assert_eq!(found(to.path()).unwrap(), names);
        for name in &names {
            let text = fs::read_to_string(to.path().join(name)).unwrap();
            let expected = if name == "vocab.json" { "mine".to_owned() } else { format!("text of {name}") };
            assert_eq!(text, expected);
        }
        assert!(!to.path().join("notes.txt").exists());
        assert_eq!(fs::read_dir(to.path().join(TEMPLATES)).unwrap().count(), 1);
    }

    #[test]
    fn a_companion_has_a_bound_and_other_names_have_none() {
        assert_eq!(largest("vocab.txt"), Some(GIB));
        assert_eq!(largest("additional_chat_templates/a.jinja"), Some(LARGEST_TEMPLATE));
        for other in [
            "config.json",
            "notes.txt",
            "a.jinja",
            "additional_chat_templates/../a.jinja",
            "additional_chat_templatesa.jinja",
        ] {
            assert_eq!(largest(other), None, "{other}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chat_template.jinja");
        fs::File::create(&path).unwrap().set_len(17 * MIB).unwrap();
        let why = Companions::read(dir.path()).unwrap_err().to_string();
        assert!(why.contains("chat_template.jinja") && why.contains("such a file has at most"), "{why}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(Companions::read(dir.path()).unwrap_err().to_string().contains("folder"));
    }

    #[test]
    fn a_flood_of_templates_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let templates = dir.path().join(TEMPLATES);
        fs::create_dir(&templates).unwrap();
        for i in 0..=MOST_TEMPLATES {
            fs::write(templates.join(format!("{i}.jinja")), "").unwrap();
        }
        assert!(found(dir.path()).unwrap_err().to_string().contains("more than 1000 templates"));
    }
}
