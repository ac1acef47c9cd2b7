//! `lowkey schema`.

use crate::cli::SchemaArguments;
use crate::output::{say, say_json};
use crate::schema::{FileKind, reference};

pub(crate) fn schema(arguments: &SchemaArguments) -> anyhow::Result<()> {
    if let Some(kind) = arguments.file {
        return say_json(&kind.schema());
    }
    let schemas = FileKind::ALL.map(|kind| (kind.title(), kind.schema()));
    say(reference(schemas.iter().map(|(title, schema)| (*title, schema))).trim_end());
    Ok(())
}
