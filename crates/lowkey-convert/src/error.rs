//! What can go wrong.

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model whose attention this cannot be done to.
    #[error("{what} is not possible: {why}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What stands against it, and the mend.
        why: String,
    },
    /// A setting out of range.
    #[error("{field} = {value}: {why}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// The value found.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// A text that nothing can be measured on.
    #[error("the calibration text: {why}")]
    Text {
        /// What is wrong with it.
        why: String,
    },
    /// A weight that is NaN or infinite.
    #[error("{tensor} holds {value}; a model whose weights are not finite computes nothing: take an older checkpoint")]
    NotFinite {
        /// The parameter.
        tensor: String,
        /// The first such number in it.
        value: f32,
    },
    /// Numbers that overflowed on the way through the model.
    #[error(
        "layer {layer}: {what} overflows on this text, although every weight is finite: the model does not compute"
    )]
    Overflow {
        /// Index of the layer.
        layer: usize,
        /// The matrix.
        what: &'static str,
    },
    /// A solver that did not converge.
    #[error("layer {layer}: no decomposition of {what} was found, although its numbers are finite; report this")]
    Decomposition {
        /// Index of the layer.
        layer: usize,
        /// The matrix.
        what: &'static str,
    },
    /// A device that does not give back what it computed.
    #[error("reading back {what} failed: {why}")]
    Device {
        /// The numbers.
        what: &'static str,
        /// The device's message.
        why: String,
    },
    /// A model that cannot be built.
    #[error(transparent)]
    Model(#[from] lowkey_model::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
