//! Rows of a Parquet file with lists and groups in them, as JSON objects.

use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row, reader::RowIter};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::columns::{damaged, guarded};
use super::meter::Meter;
use super::{Found, FoundRecords, LARGEST_RECORD, unusable};
use crate::error::{Error, Result};

/// Values of a column that are decoded at a time.
const VALUES: usize = 64;

/// Groups and lists in one another at most.
const DEEPEST: usize = 32;

/// The rows of a file, with those of its columns that are in `fields`; a field that is null is left out.
pub(super) fn objects(path: &Path, fields: &[&str], meter: &Meter) -> Result<FoundRecords> {
    let file = lowkey_files::open(path)?;
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    let (rows, count) = guarded(path, || {
        let reader = SerializedFileReader::new(file).map_err(|e| damaged(path, &e))?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        if schema.columns().iter().any(|column| column.path().parts().len() > DEEPEST) {
            return Err(unusable(path, format!("its columns lie more than {DEEPEST} levels deep")));
        }
        let root = schema.root_schema();
        let wanted: Vec<_> = root.get_fields().iter().filter(|field| fields.contains(&field.name())).cloned().collect();
        if wanted.is_empty() {
            let names: Vec<&str> = root.get_fields().iter().map(|field| field.name()).collect();
            return Err(unusable(path, format!("none of its columns {names:?} is one of {fields:?}")));
        }
        let count = reader.metadata().file_metadata().num_rows();
        let projection = Type::group_type_builder(root.name()).with_fields(wanted).build();
        let projection = projection.map_err(|e| damaged(path, &e))?;
        let rows = RowIter::from_file_into(Box::new(reader)).project(Some(projection));
        Ok((rows.map_err(|e| damaged(path, &e))?.with_batch_size(VALUES), count))
    })?;
    let (path, mut rows, mut number) = (path.to_path_buf(), rows, 0);
    let mut meter = meter.of_rows(length, u64::try_from(count).unwrap_or(0));
    Ok(Box::new(std::iter::from_fn(move || {
        let row = guarded(&path, || rows.next().transpose().map_err(|e| damaged(&path, &e)));
        number += 1;
        meter.add(1);
        Some(row.transpose()?.map(|row| {
            let mut left = LARGEST_RECORD;
            Found { unit: "row", number, value: object(&row, &mut left) }
        }))
    })))
}

/// A row, or a group in one; at most `left` bytes of text.
fn object(row: &Row, left: &mut usize) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    for (name, field) in row.get_column_iter() {
        match value(field, left).map_err(|why| format!("{name}: {why}"))? {
            Value::Null => {}
            value => {
                object.insert(name.clone(), value);
            }
        }
    }
    Ok(object)
}

fn value(field: &Field, left: &mut usize) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(yes) => Value::Bool(*yes),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float(n) => Number::from_f64(f64::from(*n)).map_or(Value::Null, Value::Number),
        Field::Double(n) => Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Field::Str(text) => Value::String(bounded(text, left)?),
        Field::Bytes(bytes) => {
            let text = std::str::from_utf8(bytes.data())
                .map_err(|e| format!("invalid UTF-8 at byte {} of the text", e.valid_up_to()))?;
            Value::String(bounded(text, left)?)
        }
        Field::Group(row) => Value::Object(object(row, left)?),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(|item| value(item, left)).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, item) in map.entries() {
                let Field::Str(key) = key else { return Err("a map whose keys are no text".to_owned()) };
                object.insert(bounded(key, left)?, value(item, left)?);
            }
            Value::Object(object)
        }
        other => return Err(format!("a value of a type that no record has ({other})")),
    })
}

fn bounded(text: &str, left: &mut usize) -> Result<String, String> {
    *left = left
        .checked_sub(text.len())
        .ok_or_else(|| format!("is longer than {} MiB, the most that is read: divide it", LARGEST_RECORD >> 20))?;
    Ok(text.to_owned())
}
