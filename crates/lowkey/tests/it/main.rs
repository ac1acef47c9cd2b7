//! What only the whole shows: reference checkpoints, resumption after a kill, bad input, and the shape of the workspace.
//!
//! One binary, so that the tests link Burn once.

mod bad_input;
mod commands;
mod reference;
mod resume;
mod tidy;
