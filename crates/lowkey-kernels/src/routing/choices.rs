//! Which experts tokens go to.

use burn::tensor::{Int, Tensor};

/// Choices of experts in the order of the experts.
///
/// Token `t` makes choices `t·k … t·k + k − 1`, best first; a choice's place is its index among all choices ordered by expert, then by
/// token.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The chosen experts, best first, `[tokens, k]`.
    pub experts: Tensor<2, Int>,
    /// The place of each choice, `[tokens, k]`.
    pub places: Tensor<2, Int>,
    /// The choice at each place, `[tokens · k]`.
    pub order: Tensor<1, Int>,
    /// Where each expert's places begin, and where the last one's end, `[experts + 1]`.
    pub begins: Tensor<1, Int>,
}
