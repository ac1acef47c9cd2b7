//! TensorBoard event files: protobuf messages in the TFRecord framing.
//!
//! Format: `tensorflow/core/util/event.proto`, `tensorflow/core/framework/summary.proto` and
//! `tensorflow/core/lib/io/record_writer.h` (length, masked CRC-32C of the length, data, masked CRC-32C of the data).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Error, Result};

/// The subset of `tensorflow.Event` that scalars need.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// `START` with a step tells TensorBoard to drop what an earlier, killed process wrote from that step on, the step itself included.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SESSION_START: i32 = 1;

/// An open event file.
#[derive(Debug)]
pub(crate) struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `dir` for a run that goes on after `step`, whose own scalars stay.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] where the file cannot be created.
    pub(crate) fn create(dir: &Path, step: u64) -> Result<Self> {
        lowkey_files::write::create_dir(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files of a folder in the order of their names.
        let name =
            format!("events.out.tfevents.{}.{:09}.{}.lowkey", now.as_secs(), now.subsec_nanos(), std::process::id());
        let path = dir.join(name);
        let file = lowkey_files::write::append(&path)?;
        let mut writer = Self { path, file };
        writer.write(&Event { file_version: Some("brain.Event:2".into()), ..writer.event(0) })?;
        writer.write(&Event { session_log: Some(SessionLog { status: SESSION_START }), ..writer.event(step + 1) })?;
        Ok(writer)
    }

    /// Appends scalars of one step.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(impl AsRef<str>, f64)]) -> Result<()> {
        let value = values
            .iter()
            .map(|(tag, value)| Scalar { tag: tag.as_ref().to_owned(), simple_value: *value as f32 })
            .collect();
        self.write(&Event { summary: Some(Summary { value }), ..self.event(step) })
    }

    fn event(&self, step: u64) -> Event {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Event { wall_time, step: step as i64, ..Event::default() }
    }

    fn write(&mut self, event: &Event) -> Result<()> {
        self.file.write_all(&record(&event.encode_to_vec())).map_err(|e| Error::io(&self.path, e))
    }
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a file back with checks of its own.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let crc = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap());
            assert_eq!(crc, masked_crc(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + length];
            let crc = u32::from_le_bytes(bytes[at + 12 + length..at + 16 + length].try_into().unwrap());
            assert_eq!(crc, masked_crc(data));
            events.push(Event::decode(data).unwrap());
            at += 16 + length;
        }
        events
    }

    #[test]
    fn scalars_come_back_and_those_of_the_step_gone_on_after_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 40).unwrap();
        writer.scalars(41, &[("train_loss", 2.5), ("lr", 0.125)]).unwrap();
        let events = read(&writer.path);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!((events[1].step, events[1].session_log.as_ref().unwrap().status), (41, SESSION_START));
        let summary = events[2].summary.as_ref().unwrap();
        assert_eq!(events[2].step, 41);
        assert_eq!(summary.value[0], Scalar { tag: "train_loss".into(), simple_value: 2.5 });
        assert_eq!(summary.value[1].simple_value, 0.125);
    }

    #[test]
    fn the_crc_mask_is_tensorflows() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720 B.4 polynomial check value).
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
