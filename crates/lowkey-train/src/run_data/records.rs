//! What a run says of records, and what a user should know of them.

use std::sync::Arc;

use lowkey_data::prepare::{ChatSummary, Skipped};
use lowkey_data::{DatasetConfig, Packing, Prepared, Sampler, sampler::LeftOut, tokenizer::Part};

use crate::error::{Error, Result};
use crate::run_config::DataSection;

/// Refuses keys that mean nothing for a dataset of records.
pub(super) fn check_keys(dataset: &DatasetConfig, section: &DataSection) -> Result<()> {
    // Of a mixture the key is for the others.
    if dataset.is_chat() && section.packing == Some(Packing::Stream) && section.mixture.is_empty() {
        return Err(Error::config("data.packing", "stream", "records are never cut anywhere; leave the key out"));
    }
    Ok(())
}

/// What was left out of a dataset of records: by its preparation, and because it is longer than a sequence.
pub(super) fn notes(prepared: &Prepared, section: &DataSection) -> Result<Vec<String>> {
    let name = &prepared.manifest.dataset.name;
    let mut notes = Vec::new();
    if let Some(ChatSummary { skipped: Skipped { records, first: Some(first) }, .. }) = &prepared.manifest.chat {
        notes.push(format!(
            "{name}: {records} records cannot be used and are left out (chat.skip_bad); the first: {first}"
        ));
    }
    if prepared.train.is_masked() {
        let (seq_len, too_long) = (section.seq_len, section.too_long.unwrap_or_default());
        let shard = Arc::new(prepared.train.clone());
        let LeftOut { dropped, cut } = Sampler::of_records(shard, seq_len, 2, 0, too_long, true)?.left_out();
        let what = if prepared.train.is_pairs() { "pairs" } else { "records" };
        if dropped > 0 {
            let mend = "raise it, or cut them with data.too_long = \"cut\"";
            notes.push(format!(
                "{name}: {dropped} {what} are longer than data.seq_len = {seq_len} and are left out; {mend}"
            ));
        }
        if cut > 0 {
            notes.push(format!("{name}: {cut} {what} are longer than data.seq_len = {seq_len} and lose their end"));
        }
    }
    Ok(notes)
}

/// The first training record, with what is learnt of it.
pub(super) fn example(prepared: &Prepared) -> Result<Option<Vec<Part>>> {
    Ok(if prepared.train.is_masked() { prepared.example(0)? } else { None })
}
