//! Tasks that repeat what was read: by place (copy) or by content (induction).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::draw::Draw;
use super::{TokenExample, TokenTask, at_least, at_most};

/// S5: copying. `length` independent symbols, scattered in their order among `noise` blanks; a separator, after which the
/// symbols are told again.
///
/// Without noise each answer stands a fixed number of places back, and a rotated key finds it. With noise (selective copying,
/// Gu & Dao, arXiv 2312.00752, section 4.1) the blanks must be told from the symbols and left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Copying {
    /// How many different symbols there are.
    #[schemars(range(min = 2, max = 65534))]
    pub symbols: usize,
    /// Symbols to copy, in an example.
    #[schemars(range(min = 1, max = 65536))]
    pub length: usize,
    /// Blanks among them, which are to be left out.
    #[serde(default)]
    #[schemars(range(max = 65536))]
    pub noise: usize,
}

/// Most words, and most positions, of these tasks.
const MOST: usize = 1 << 16;

impl TokenTask for Copying {
    fn check(&self) -> Result<(), String> {
        at_least("symbols", self.symbols, 2)?;
        at_most("symbols", self.symbols, MOST - 2)?;
        at_least("length", self.length, 1)?;
        at_most("length", self.length, MOST)?;
        at_most("noise", self.noise, MOST)
    }

    fn positions(&self) -> usize {
        2 * self.length + self.noise
    }

    fn words(&self) -> Vec<String> {
        let symbols = (0..self.symbols).map(|symbol| format!("s{symbol}"));
        symbols.chain(["_", "|"].map(str::to_owned)).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["copy"]
    }

    fn chance(&self) -> f64 {
        1.0 / self.symbols as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let symbols: Vec<usize> = (0..self.length).map(|_| draw.below(self.symbols)).collect();
        let (blank, separator) = (self.symbols, self.symbols + 1);
        let mut place = vec![false; self.length + self.noise];
        for at in draw.distinct(self.length + self.noise, self.length) {
            place[at] = true;
        }
        let mut left = symbols.iter();
        let text = place.into_iter().map(|symbol| if symbol { left.next() } else { None }.copied().unwrap_or(blank));
        let mut example = TokenExample::reading(text);
        let mut before = separator;
        for symbol in symbols {
            example.ask(before, symbol, 0);
            before = symbol;
        }
        example
    }
}

/// S5: induction. `length` different symbols in random order, then `repeat` of them once more, from a random place on; within
/// the repetition each next symbol is asked for.
///
/// Where the repetition begins differs between examples, so that for its first answer (class `first`) the only way is to find
/// what followed the same symbol before: two blocks, one to mark each symbol with its predecessor (Olsson et al.,
/// arXiv 2209.11895). Later answers stand as far back as the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Induction {
    /// How many different symbols there are, at least as many as `length`.
    #[schemars(range(min = 2, max = 65536))]
    pub symbols: usize,
    /// Symbols of an example before the repetition, at least as many as `repeat`.
    #[schemars(range(min = 2, max = 65536))]
    pub length: usize,
    /// Symbols that are repeated; the first is given and not asked for.
    #[schemars(range(min = 2))]
    pub repeat: usize,
}

impl TokenTask for Induction {
    fn check(&self) -> Result<(), String> {
        at_least("repeat", self.repeat, 2)?;
        at_most("length", self.length, MOST)?;
        at_least("length", self.length, self.repeat)?;
        at_least("symbols", self.symbols, self.length)?;
        at_most("symbols", self.symbols, MOST)
    }

    fn positions(&self) -> usize {
        self.length + self.repeat - 1
    }

    fn words(&self) -> Vec<String> {
        (0..self.symbols).map(|symbol| format!("s{symbol}")).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["first", "later"]
    }

    fn chance(&self) -> f64 {
        // One of the symbols of the example but for the one just read.
        1.0 / (self.length - 1) as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let symbols = draw.distinct(self.symbols, self.length);
        let start = draw.below(self.length - self.repeat + 1);
        let mut example = TokenExample::reading(symbols.iter().copied());
        for (i, pair) in symbols[start..start + self.repeat].windows(2).enumerate() {
            if let [now, next] = pair {
                example.ask(*now, *next, u8::from(i > 0));
            }
        }
        example
    }
}
