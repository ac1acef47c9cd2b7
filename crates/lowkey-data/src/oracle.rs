//! What a perfect model would say: the true log-probability of every validation token, for sources that know it.

use crate::dataset::{DatasetConfig, Source, StorybookForm, TrainOn};
use crate::error::Result;
use crate::samples::{self, Document};
use crate::storybook::{self, Class, Story};
use crate::tokenizer::Tokenizer;

/// Sets the validation stories apart: they come from a seed of their own, whatever the seed of the training stories.
const VALIDATION: u64 = 0x56A1_1DA7_E5EE_D000;

/// Training story `index` of a storybook.
pub(crate) fn training_story(seed: u64, index: u64) -> Story {
    storybook::story(seed, index)
}

/// Validation story `index` of a storybook.
pub(crate) fn validation_story(seed: u64, index: u64) -> Story {
    storybook::story(seed ^ VALIDATION, index)
}

/// A validation document with the truth about each of its tokens.
#[derive(Debug, Clone)]
pub struct OracleDocument {
    /// The tokens, as they stand in the validation shard.
    pub ids: Vec<u32>,
    /// For each token the natural logarithm of its true probability, given everything before it.
    pub log_probs: Vec<f64>,
    /// For each token what kind of choice its first byte is.
    pub classes: Vec<Class>,
    /// For each token whether it is learnt, and measured. Of a story told as a conversation the answers alone are.
    pub learnt: Vec<bool>,
}

/// The first `n` validation documents with their true log-probabilities; none for a source whose entropy is not known,
/// and none under a tokenizer that does not keep the text byte by byte.
///
/// A token's log-probability is the sum over its bytes, which is exact for the byte tokenizer. For a larger vocabulary
/// it is the probability of those bytes, a bound that the entropy per byte still makes exact over a whole document.
/// The id that ends the document carries the entry for its end.
pub fn oracle_documents(
    config: &DatasetConfig,
    tokenizer: &Tokenizer,
    n: usize,
) -> Result<Option<Vec<OracleDocument>>> {
    config.check()?;
    let Source::Storybook { seed, validation_documents, form, .. } = config.source else {
        return Ok(None);
    };
    if form == StorybookForm::Pairs {
        return Ok(None);
    }
    if form == StorybookForm::Chat {
        let method = samples::method(config, tokenizer)?;
        let told = (0..validation_documents).take(n).map(|index| {
            let exchange = storybook::exchange(&validation_story(seed, index));
            let document = samples::conversation(&exchange.chat, &method, tokenizer);
            let document = document.map_err(|why| config.error(format!("story {index}: {why}")))?;
            Ok(told(document, &exchange.answers, tokenizer))
        });
        // Only of answers is the truth known: that they follow from the story.
        return if method.train_on == TrainOn::All { Ok(None) } else { told.collect::<Result<_>>().map(Some) };
    }
    let lengths = tokenizer.byte_lengths();
    let mut documents = Vec::new();
    for index in (0..validation_documents).take(n) {
        let story = validation_story(seed, index);
        let mut ids = tokenizer.encode_ordinary(&story.text)?;
        let (mut log_probs, mut classes) = (Vec::with_capacity(ids.len() + 1), Vec::with_capacity(ids.len() + 1));
        let mut at = 0;
        for id in &ids {
            let end = at + lengths.get(*id as usize).map_or(0, |&length| length as usize);
            let (Some(bytes), Some(class)) = (story.log_probs.get(at..end), story.classes.get(at)) else {
                return Ok(None);
            };
            log_probs.push(bytes.iter().sum());
            classes.push(*class);
            at = end;
        }
        if at != story.text.len() {
            return Ok(None);
        }
        let (Some(ended), Some(class)) = (story.log_probs.get(at), story.classes.get(at)) else { return Ok(None) };
        // Tokens that always stand around a text are certain; its end comes with the first of those after it.
        for (i, id) in tokenizer.text_end().into_iter().enumerate() {
            ids.push(id);
            log_probs.push(if i == 0 { *ended } else { 0.0 });
            classes.push(*class);
        }
        if let Some(first) = classes.first().copied() {
            let start = tokenizer.text_start();
            ids.splice(0..0, start.iter().copied());
            log_probs.splice(0..0, vec![0.0; start.len()]);
            classes.splice(0..0, vec![first; start.len()]);
        }
        let learnt = vec![true; ids.len()];
        documents.push(OracleDocument { ids, log_probs, classes, learnt });
    }
    Ok(Some(documents))
}

/// A story that was told as a conversation. Its answers and their ends are certain; nothing is said of the rest.
fn told(document: Document, answers: &[Vec<Class>], tokenizer: &Tokenizer) -> OracleDocument {
    let Document { ids, learnt, .. } = document;
    let mut classes = vec![Class::Syntax; ids.len()];
    // Where answers are left out, those that are not come last.
    let runs = learnt.chunk_by(|a, b| a == b).filter(|run| run.first() == Some(&true)).count();
    let mut answers = answers.iter().skip(answers.len().saturating_sub(runs));
    let mut at = 0;
    for run in learnt.chunk_by(|a, b| a == b) {
        let own = if run.first() == Some(&true) { answers.next() } else { None };
        let mut byte = 0;
        for (i, id) in ids.iter().enumerate().skip(at).take(run.len()).filter(|_| own.is_some()) {
            classes[i] = own.and_then(|own| own.get(byte)).copied().unwrap_or(Class::End);
            byte += tokenizer.token_bytes(*id).len();
        }
        at += run.len();
    }
    OracleDocument { log_probs: vec![0.0; ids.len()], ids, classes, learnt }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storybook() -> DatasetConfig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.toml");
        let text = "name = \"s\"\n[source]\nkind = \"storybook\"\nseed = 5\ndocuments = 4\nvalidation_documents = 3\n";
        std::fs::write(&path, text).unwrap();
        DatasetConfig::load(&path).unwrap()
    }

    #[test]
    fn bytes_carry_the_generators_own_numbers() {
        let documents = oracle_documents(&storybook(), &Tokenizer::bytes(), 10).unwrap().unwrap();
        assert_eq!(documents.len(), 3);
        for (index, document) in (0..).zip(&documents) {
            let story = validation_story(5, index);
            assert_eq!(document.log_probs, story.log_probs);
            assert_eq!(document.ids.last(), Some(&256));
            let text: Vec<u32> = story.text.bytes().map(u32::from).collect();
            assert_eq!(document.ids[..text.len()], text);
            assert_eq!((document.classes.len(), document.ids.len()), (text.len() + 1, text.len() + 1));
        }
        assert_eq!(oracle_documents(&storybook(), &Tokenizer::bytes(), 2).unwrap().unwrap().len(), 2);
    }

    #[test]
    fn other_tokenizers_sum_over_their_tokens() {
        let texts = (0..30).map(|index| training_story(5, index).text);
        let bpe = Tokenizer::train_bpe(texts, 400).unwrap();
        let documents = oracle_documents(&storybook(), &bpe, 3).unwrap().unwrap();
        for (index, document) in (0..).zip(&documents) {
            let story = validation_story(5, index);
            let (sum, truth): (f64, f64) = (document.log_probs.iter().sum(), story.log_probs.iter().sum());
            assert!((sum - truth).abs() < 1e-9 * truth.abs(), "{sum} {truth}");
            assert!(document.ids.len() < story.text.len(), "BPE must merge for this test to mean anything");
            assert_eq!(document.ids.len(), document.classes.len());
        }
    }

    #[test]
    fn validation_stories_are_not_training_stories() {
        let training: Vec<String> = (0..50).map(|index| training_story(5, index).text).collect();
        assert!((0..50).all(|index| !training.contains(&validation_story(5, index).text)));
    }

    #[test]
    fn a_text_source_has_no_oracle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "x").unwrap();
        let config = DatasetConfig::from_text_file(&path).unwrap();
        assert!(oracle_documents(&config, &Tokenizer::bytes(), 1).unwrap().is_none());
    }
}
