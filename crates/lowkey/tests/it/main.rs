//! What only the whole shows: reference checkpoints, resumption after a kill, bad input, and the shape of the workspace.
//!
//! One binary, so that the tests link Burn once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod bad_input;
mod bench;
mod commands;
mod companions;
mod convert;
mod elastic;
mod export;
mod finetune;
mod gpu;
mod hub;
mod interrupted;
mod lab;
mod output;
mod reference;
mod reference_text;
mod report;
mod resume;
mod schema;
mod several;
mod tasks;
mod template;
mod text;
mod tidy;
