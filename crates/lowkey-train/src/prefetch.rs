//! Batches made ahead of the step that needs them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use lowkey_batch::Batch;

use crate::error::{Error, Result};
use crate::run_data::TrainBatches;

/// Batches that wait.
const AHEAD: usize = 2;

/// The batches of consecutive steps, made by a thread of their own.
#[derive(Debug)]
pub(crate) struct Prefetch {
    batches: Receiver<Result<Batch>>,
}

impl Prefetch {
    /// The batches of steps `from..to`. The thread ends with them, or when this is dropped.
    ///
    /// # Errors
    /// [`Error::Io`] where the operating system gives no thread.
    pub(crate) fn new(batches: Arc<TrainBatches>, from: u64, to: u64) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let make = move || {
            for step in from..to {
                let batch = batches.batch(step);
                let last = batch.is_err();
                if sender.send(batch).is_err() || last {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("batches".into()).spawn(make).map_err(|e| Error::io("thread", e))?;
        Ok(Self { batches: receiver })
    }

    /// The next batch.
    ///
    /// # Errors
    /// [`Error::Device`] where the thread has died; what it met where the batch cannot be made.
    pub(crate) fn next(&self) -> Result<Batch> {
        let ended = |_| Error::Device { what: "a batch", why: "the thread that makes them ended".into() };
        self.batches.recv().map_err(ended)?
    }
}
