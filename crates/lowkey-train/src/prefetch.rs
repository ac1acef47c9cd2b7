//! Batches made ahead of the step that needs them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

use lowkey_batch::Batch;

use crate::error::{Error, Result};
use crate::run_data::TrainBatches;

/// Batches that wait.
const AHEAD: usize = 2;

/// The batches of consecutive steps, made by a thread of their own.
#[derive(Debug)]
pub(crate) struct Prefetch {
    batches: Receiver<Result<Batch>>,
    thread: Option<JoinHandle<()>>,
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
        let thread = Builder::new().name("batches".into()).spawn(make).map_err(|e| Error::io("thread", e))?;
        Ok(Self { batches: receiver, thread: Some(thread) })
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

impl Drop for Prefetch {
    fn drop(&mut self) {
        // Without a receiver the thread ends at its next batch.
        let (_, nobody) = sync_channel(0);
        drop(std::mem::replace(&mut self.batches, nobody));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
