//! Each command as a user runs it, on a model that a run of a second has trained.
