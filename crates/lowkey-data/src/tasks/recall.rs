//! Tasks that a cache decides: what was read must be given back when it is asked for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::draw::Draw;
use super::theory;
use super::{TokenExample, TokenTask, at_least, at_most, digit};

/// S2: attributes of records. Each of `records` records is one token that stands for `attributes` independent symbols;
/// then one attribute of each is asked for, in the order of the records.
///
/// One token per record, so that all of its log₂ symbols · attributes bits must go through the latent of one position.
/// The answer to query i stands `records` places back: a rotated key finds it without knowing what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Records {
    /// Records of an example.
    #[schemars(range(min = 1, max = 65536))]
    pub records: usize,
    /// Symbols of a record. `symbols` to the power of `attributes` may be at most 65536.
    #[schemars(range(min = 1))]
    pub attributes: usize,
    /// How many different symbols there are.
    #[schemars(range(min = 2, max = 36))]
    pub symbols: usize,
}

/// Most words of a task.
const MOST_WORDS: usize = 1 << 16;

impl Records {
    /// All different records; past any bound where there are too many to count.
    fn kinds(&self) -> usize {
        u32::try_from(self.attributes).ok().and_then(|a| self.symbols.checked_pow(a)).unwrap_or(usize::MAX)
    }

    /// Attribute `attribute` of record `record`, the first one being its highest digit.
    fn symbol(&self, record: usize, attribute: usize) -> usize {
        let lower = self.attributes - 1 - attribute;
        record / self.symbols.pow(lower as u32) % self.symbols
    }
}

impl TokenTask for Records {
    fn check(&self) -> Result<(), String> {
        at_least("records", self.records, 1)?;
        at_least("attributes", self.attributes, 1)?;
        at_least("symbols", self.symbols, 2)?;
        at_most("symbols", self.symbols, 36)?;
        at_most("records", self.records, 1 << 16)?;
        at_most("symbols to the power of attributes", self.kinds(), MOST_WORDS)
    }

    fn positions(&self) -> usize {
        2 * self.records
    }

    fn words(&self) -> Vec<String> {
        let record = |record| {
            let digits = (0..self.attributes).map(|attribute| digit(self.symbol(record, attribute)));
            format!("r{}", digits.collect::<String>())
        };
        let queries = (0..self.attributes).map(|attribute| format!("a{attribute}"));
        let answers = (0..self.symbols).map(|symbol| format!("s{}", digit(symbol)));
        (0..self.kinds()).map(record).chain(queries).chain(answers).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["recall"]
    }

    fn chance(&self) -> f64 {
        1.0 / self.symbols as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let records: Vec<usize> = (0..self.records).map(|_| draw.below(self.kinds())).collect();
        let mut example = TokenExample::reading(records.iter().copied());
        let (queries, answers) = (self.kinds(), self.kinds() + self.attributes);
        for record in records {
            let attribute = draw.below(self.attributes);
            example.ask(queries + attribute, answers + self.symbol(record, attribute), 0);
        }
        example
    }
}

/// S3: multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927, section 4 and appendix E): `pairs` keys, each
/// followed by its value; after them each key once more, at distances drawn from a power law, to be answered with its value.
///
/// Keys and values of an example are distinct. What is not a query is a blank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mqar {
    /// Pairs of an example.
    #[schemars(range(min = 1, max = 65536))]
    pub pairs: usize,
    /// Positions of an example, at least four times `pairs`.
    #[schemars(range(min = 4, max = 1048576))]
    pub length: usize,
    /// How many different keys there are, at least as many as `pairs`.
    #[schemars(range(min = 1, max = 32768))]
    pub keys: usize,
    /// How many different values there are, at least as many as `pairs`.
    #[schemars(range(min = 1, max = 32768))]
    pub values: usize,
    /// How far from its pair a key is asked: slot x has the weight a · x^(a−1), where a is this number, above 0 and at most 1.
    #[serde(default = "zoology_power")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub power: f64,
}

fn zoology_power() -> f64 {
    0.01
}

impl TokenTask for Mqar {
    fn check(&self) -> Result<(), String> {
        at_least("pairs", self.pairs, 1)?;
        at_most("pairs", self.pairs, 1 << 16)?;
        at_least("length", self.length, 4 * self.pairs)?;
        at_most("length", self.length, 1 << 20)?;
        at_least("keys", self.keys, self.pairs)?;
        at_least("values", self.values, self.pairs)?;
        at_most("keys", self.keys, MOST_WORDS / 2)?;
        at_most("values", self.values, MOST_WORDS / 2)?;
        if !(self.power > 0.0 && self.power <= 1.0) {
            return Err(format!("power = {} must lie above 0 and not above 1", self.power));
        }
        Ok(())
    }

    fn positions(&self) -> usize {
        self.length
    }

    fn words(&self) -> Vec<String> {
        let keys = (0..self.keys).map(|key| format!("k{key}"));
        let values = (0..self.values).map(|value| format!("v{value}"));
        keys.chain(values).chain(["_".to_owned()]).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["recall"]
    }

    fn chance(&self) -> f64 {
        // One of the values that stand in the example.
        1.0 / self.pairs as f64
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let keys = draw.distinct(self.keys, self.pairs);
        let values = draw.distinct(self.values, self.pairs);
        let pairs: Vec<(usize, usize)> = keys.into_iter().zip(values).collect();
        let slots = (self.length - 2 * self.pairs) / 2;
        let mut asked: Vec<Option<(usize, usize)>> = vec![None; slots];
        let mut weights: Vec<f64> = (1..=slots).map(|x| (x as f64).powf(self.power - 1.0)).collect();
        for pair in &pairs {
            // Drawn without replacement: a slot that is taken weighs nothing any more.
            let mut ticket = draw.unit() * weights.iter().sum::<f64>();
            let free = |weights: &[f64]| weights.iter().rposition(|weight| *weight > 0.0);
            let hit = weights.iter().position(|weight| {
                ticket -= weight;
                *weight > 0.0 && ticket < 0.0
            });
            // Rounding can leave a rest of the ticket behind the last slot.
            if let Some(slot) = hit.or_else(|| free(&weights)) {
                weights[slot] = 0.0;
                asked[slot] = Some(*pair);
            }
        }
        let blank = self.keys + self.values;
        let mut example = TokenExample::reading(pairs.iter().flat_map(|(key, value)| [*key, self.keys + value]));
        for slot in asked {
            match slot {
                Some((key, value)) => example.ask(key, self.keys + value, 0),
                None => example.read(blank),
            }
            example.read(blank);
        }
        while example.input_ids.len() < self.length {
            example.read(blank);
        }
        example
    }
}

/// S6: position only. Different symbols in random order, and at each position the one that stood `lag` places back is the
/// answer, from the first position on that has one.
///
/// Nothing but the place tells the symbols apart, so that a single block without a rotated key knows only which symbols it
/// has read: it is right with probability 1/t at position t, whatever its rank ([`theory::position_chance`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// How many different symbols there are, at least as many as `length`.
    #[schemars(range(min = 2, max = 65536))]
    pub symbols: usize,
    /// Positions of an example, more than `lag`.
    #[schemars(range(min = 2, max = 65536))]
    pub length: usize,
    /// How many places back the answer stands.
    #[schemars(range(min = 1))]
    pub lag: usize,
}

impl TokenTask for Position {
    fn check(&self) -> Result<(), String> {
        at_least("lag", self.lag, 1)?;
        at_most("length", self.length, MOST_WORDS)?;
        at_least("length", self.length, self.lag.saturating_add(1))?;
        at_least("symbols", self.symbols, self.length)?;
        at_most("symbols", self.symbols, MOST_WORDS)
    }

    fn positions(&self) -> usize {
        self.length
    }

    fn words(&self) -> Vec<String> {
        (0..self.symbols).map(|symbol| format!("s{symbol}")).collect()
    }

    fn classes(&self) -> &'static [&'static str] {
        &["recall"]
    }

    fn chance(&self) -> f64 {
        theory::position_chance(self.length, self.lag)
    }

    fn example(&self, draw: &mut Draw) -> TokenExample {
        let symbols = draw.distinct(self.symbols, self.length);
        let mut example = TokenExample::default();
        for (t, symbol) in symbols.iter().enumerate() {
            match t.checked_sub(self.lag) {
                Some(back) => example.ask(*symbol, symbols[back], 0),
                None => example.read(*symbol),
            }
        }
        example
    }
}
