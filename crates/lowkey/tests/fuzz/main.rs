//! Files that somebody else wrote, damaged in every way that a program can think of: no reader may panic, take more memory
//! than the size of the files accounts for, hang, or refuse without naming the file.
//!
//! Every input has a number, and the number is the seed of its damage: the same on every machine. `cargo test` tries a few
//! thousand of each kind. A million of each, side by side:
//!
//! ```sh
//! LOWKEY_FUZZ_INPUTS=1000000 cargo test --release -p lowkey --test fuzz -- --nocapture
//! ```
//!
//! `LOWKEY_FUZZ_ONE=<number>` tries that input alone and says what came of it; name the test too. Each input is a folder in
//! memory where the system has one (`/dev/shm`), else below the target folder. A faulty one stays there as
//! `fault-<number>`, and where the process was killed or aborted, the folder of the last input is still as it was read.
//!
//! A new reader is a [`driver::Target`]: folders to start from, damage, and a call.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod allocation;
mod config;
mod driver;
mod finetune;
mod gguf;
mod models;
mod mutate;
mod records;
mod tokenizers;
mod weights;

#[global_allocator]
static ALLOCATOR: allocation::Counting = allocation::Counting;

#[test]
fn weights() {
    driver::fuzz(&weights::Single);
}

#[test]
fn quantised() {
    driver::fuzz(&weights::Quantised);
}

#[test]
fn index() {
    driver::fuzz(&weights::Index);
}

#[test]
fn config() {
    driver::fuzz(&config::Config);
}

#[test]
fn tokenizer() {
    driver::fuzz(&tokenizers::Tokenizers::new());
}

#[test]
fn gguf() {
    driver::fuzz(&gguf::Gguf);
}

#[test]
fn checksums() {
    driver::fuzz(&records::Checksums);
}

#[test]
fn export() {
    driver::fuzz(&records::Export);
}

#[test]
fn prepared() {
    driver::fuzz(&records::Prepared);
}

#[test]
fn finetuning() {
    driver::fuzz(&finetune::Records);
}

#[test]
fn templates() {
    driver::fuzz(&finetune::Templates);
}

#[test]
fn adapters() {
    driver::fuzz(&finetune::Adapters);
}
