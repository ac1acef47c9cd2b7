//! The sizes that a configuration may have, whatever they are sizes of.

use crate::error::{Error, Result};

/// Most of a width: above it the parameter count could overflow, and no machine could hold the model anyway.
pub(crate) const WIDEST: usize = 1 << 20;

pub(crate) fn check_size(key: &'static str, size: usize, most: usize) -> Result<()> {
    if size == 0 || size > most {
        return Err(Error::config(key, &size, format!("must lie between 1 and {most}")));
    }
    Ok(())
}

pub(crate) fn check_heads(heads: usize, width: usize, most: usize) -> Result<()> {
    if heads.saturating_mul(width) > most {
        let why = format!("{heads} heads of width {width} are more than {most} wide together");
        return Err(Error::config("num_attention_heads", &heads, why));
    }
    Ok(())
}

pub(crate) fn even(key: &'static str, width: usize) -> Result<()> {
    if !width.is_multiple_of(2) || width > 1 << 16 {
        return Err(Error::config(
            key,
            &width,
            "the rotated width must be even (components turn in pairs) and at most 65536",
        ));
    }
    Ok(())
}
