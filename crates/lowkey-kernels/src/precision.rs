//! What the products of training are computed in.

use std::cell::Cell;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The format of the operands of products with weights. Sums, norms, softmax, loss, residual stream, parameters and their gradients are
/// f32 in any case (Micikevicius et al., arXiv 1710.03740). On the CPU, which knows `f32` and `bf16`,
/// attention's products are rounded too, and those of Muon's iterations and of the small factors of adapters are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits: nothing is rounded.
    #[default]
    F32,
    /// Numbers stay f32, and NVIDIA's matrix units read 11 bits of their fraction.
    Tf32,
    /// 16 bits: 8 bits of fraction, and the range of f32.
    Bf16,
    /// 16 bits: 11 bits of fraction, numbers from 6e-8 to 65,504. Gradients need a scaled loss, which is done by itself.
    F16,
}

thread_local! {
    static CURRENT: Cell<Precision> = const { Cell::new(Precision::F32) };
}

/// Ends a stretch of [`scope`].
#[derive(Debug)]
pub struct Scope {
    before: Precision,
}

impl Drop for Scope {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// Until the result is dropped, operations that this thread begins compute in `precision`; their backward passes then do, too,
/// whenever they run.
#[must_use = "the precision holds until this is dropped"]
pub fn scope(precision: Precision) -> Scope {
    Scope { before: CURRENT.replace(precision) }
}

/// The precision of this thread.
pub(crate) fn current() -> Precision {
    CURRENT.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_ends_with_its_guard() {
        let outer = scope(Precision::F16);
        {
            let _inner = scope(Precision::Bf16);
            assert_eq!(current(), Precision::Bf16);
        }
        assert_eq!(current(), Precision::F16);
        drop(outer);
        assert_eq!(current(), Precision::F32);
    }
}
