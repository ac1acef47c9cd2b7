//! Controls: tasks whose difficulty is not the width of the cache.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::draw::Draw;
use super::{TokenExample, TokenTask, at_least, at_most};

/// S7: balanced brackets of several kinds (Dyck words of bounded depth; Hahn, arXiv 1906.06755). Wherever a bracket closes,
/// its kind is asked for, which is that of the innermost bracket still open.
///
/// A class per depth, `depth-1` being a bracket that is not within another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dyck {
    /// How many kinds of brackets there are.
    #[schemars(range(min = 2, max = 4096))]
    pub kinds: usize,
    /// Brackets of an example, an even number.
    #[schemars(range(min = 2, max = 65536))]
    pub length: usize,
    /// Most brackets that are open at once.
    #[schemars(range(min = 1, max = 16))]
    pub depth: usize,
}

const DEPTHS: [&str; 16] = [
    "depth-1", "depth-2", "depth-3", "depth-4", "depth-5", "depth-6", "depth-7", "depth-8", "depth-9", "depth-10",
    "depth-11", "depth-12", "depth-13", "depth-14", "depth-15", "depth-16",
];

impl TokenTask for Dyck {
    fn check(&self) -> Result<(), String> {
        at_least("kinds", self.kinds, 2)?;
        at_most("kinds", self.kinds, 1 << 12)?;
        at_least("length", self.length, 2)?;
        at_most("length", self.length, 1 << 16)?;
        at_least("depth", self.depth, 1)?;
        at_most("depth", self.depth, DEPTHS.len())?;
        if self.length.is_multiple_of(2) { Ok(()) } else { Err(format!("length = {} must be even", self.length)) }
    }

    fn positions(&self) -> usize {
        // The last bracket is only an answer.
        self.length - 1
    }

    fn words(&self) -> Vec<String> {
        let opening = (0..self.kinds).map(|kind| format!("({kind}"));
        opening.chain((0..self.kinds).map(|kind| format!("){kind}"))).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        DEPTHS.get(..self.depth).unwrap_or(&DEPTHS)
    }

    fn chance(&self) -> f64 {
        1.0 / self.kinds as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let mut open: Vec<usize> = Vec::new();
        let mut example = TokenExample::default();
        // The bracket before the one being drawn: a position is complete once its successor is known.
        let mut before = None;
        for left in (1..=self.length).rev() {
            let must_open = open.is_empty();
            let must_close = open.len() == self.depth || open.len() == left;
            let opens = must_open || (!must_close && draw.below(2) == 0);
            let (bracket, closed) = if opens {
                let kind = draw.below(self.kinds);
                open.push(kind);
                (kind, None)
            } else {
                let depth = open.len();
                let kind = open.pop().unwrap_or(0);
                (self.kinds + kind, Some(depth))
            };
            match (before, closed) {
                (Some(before), Some(depth)) => example.ask(before, bracket, (depth - 1) as u8),
                (Some(before), None) => example.read(before),
                (None, _) => {}
            }
            before = Some(bracket);
        }
        example
    }
}

/// S7: the sum of `terms` numbers modulo `modulus` (Power et al., arXiv 2201.02177), asked for after an equals sign.
///
/// There are only modulus^terms examples. Where those are few, training meets all of them, the held-out ones too: the task
/// tells whether a model can compute the sum, not whether it has found the rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModularAddition {
    /// Sums are taken modulo this number, and what is added lies below it.
    #[schemars(range(min = 2, max = 65536))]
    pub modulus: usize,
    /// How many numbers are added.
    #[serde(default = "two")]
    #[schemars(range(min = 2, max = 65536))]
    pub terms: usize,
}

fn two() -> usize {
    2
}

impl TokenTask for ModularAddition {
    fn check(&self) -> Result<(), String> {
        at_least("modulus", self.modulus, 2)?;
        at_most("modulus", self.modulus, 1 << 16)?;
        at_least("terms", self.terms, 2)?;
        at_most("terms", self.terms, 1 << 16)
    }

    fn positions(&self) -> usize {
        self.terms + 1
    }

    fn words(&self) -> Vec<String> {
        (0..self.modulus).map(|number| number.to_string()).chain(["=".to_owned()]).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["sum"]
    }

    fn chance(&self) -> f64 {
        1.0 / self.modulus as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let numbers: Vec<usize> = (0..self.terms).map(|_| draw.below(self.modulus)).collect();
        let sum = numbers.iter().sum::<usize>() % self.modulus;
        let mut example = TokenExample::reading(numbers.into_iter());
        example.ask(self.modulus, sum, 0);
        example
    }
}
