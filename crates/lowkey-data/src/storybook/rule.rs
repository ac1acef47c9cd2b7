//! What a story can be told from: the nonterminals of the grammar.

use super::world::World;

/// A nonterminal of the grammar, with all that the rest of the story may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    /// A whole story.
    Story,
    /// The next sentence after the opening: something happens, or the questions begin.
    Scene(World),
    /// After a question: another one, or the end.
    Close(World),
}
