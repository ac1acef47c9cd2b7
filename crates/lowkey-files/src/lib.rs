//! What lowkey does to a disk: the only crate that creates, replaces, renames or removes files and folders.
//!
//! Everything lowkey writes is somebody's days of work, and everything it reads may come from a stranger. Five rules follow,
//! and each lives here once.
//!
//! - **Whole or absent.** A file or folder is written beside its place, synced, and takes its name in one step
//!   ([`write()`], [`NewFile`], [`Staging`]). A process that is killed or meets a full disk at any moment leaves the old one or
//!   the new one under the name.
//! - **Nothing hidden stays.** What is written aside has a name that follows from its place (`.NAME.lowkey-new`), so that the
//!   same command clears away what a killed one left. Names drawn at random would pile up for ever.
//! - **Only what lowkey made is replaced.** A folder that it writes carries a [mark](mark::Mark), `lowkey.json`, which names its
//!   files and their hashes. A folder without one, with a file more, or with a file that somebody has edited since, is not
//!   lowkey's to remove, whatever it is called ([`Staging::begin`], [`Owned::claim`]).
//! - **One writer.** Two processes that write the same thing find out by a lock, never by each other's half-written files
//!   ([`lock::Lock`]). Locks neither follow links nor empty what they find.
//! - **A name from a file or a peer is no path** until [`is_plain_name`] says so; only regular files are read ([`open`]),
//!   never a pipe or a device, and never more than the reader allows ([`read()`]); and such a name is shown with its control
//!   characters escaped ([`printable`]).
//!
//! All calls to the system go through the C library, so that a test can stop each of them.
//!
//! # Example
//!
//! A file that is written whole, and read with a bound:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("note.txt");
//!
//! lowkey_files::write(&path, b"whole or absent")?;
//! assert_eq!(lowkey_files::read_text(&path, 1 << 10)?, "whole or absent");
//!
//! // More than the reader allows is an error, not a long wait.
//! assert!(lowkey_files::read(&path, 5).is_err());
//! # Ok(())
//! # }
//! ```

pub mod companions;
mod error;
pub mod hash;
pub mod lock;
pub mod mark;
mod names;
mod owned;
mod read;
mod room;
pub mod staging;
pub mod write;

pub use error::{Error, Result};
pub use names::{is_plain_name, printable, printable_lines};
pub use owned::{Owned, is_claimed};
pub use read::{open, read, read_text};
pub use room::room;
pub use staging::{Replace, Staging, recover};
pub use write::{NewFile, write, write_json};
