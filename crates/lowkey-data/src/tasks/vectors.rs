//! Tasks of real vectors, where the latent's bound is one of linear algebra.
//!
//! A position reads a vector of `input_width` numbers in place of a token, and what is asked is a vector of `output_width`
//! numbers. One channel is 1 at every position: a model can make it large beside the rest, so that a norm, which divides by a
//! vector's length, divides by almost the same number everywhere. It can do so at every norm whose input is wider than the
//! signal, but not at the latent's, which is where [`super::theory::normalised_floor`] comes from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::draw::Draw;
use super::{VectorExample, VectorTask, at_least, at_most};

/// Widest vector of a task.
const WIDEST: usize = 1 << 14;

/// S1: linear recall. `items` vectors v ~ N(0, I) of `width` numbers; then as many queries without content, each of which
/// asks for the item that stands `items` places back.
///
/// Channels: the item's numbers (0 in a query), a constant 1, and 1 in a query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearRecall {
    /// Width of an item: how many numbers it has.
    #[schemars(range(min = 1, max = 16384))]
    pub width: usize,
    /// Items of an example.
    #[schemars(range(min = 1, max = 16384))]
    pub items: usize,
}

impl VectorTask for LinearRecall {
    fn check(&self) -> Result<(), String> {
        at_least("width", self.width, 1)?;
        at_most("width", self.width, WIDEST)?;
        at_least("items", self.items, 1)?;
        at_most("items", self.items, 1 << 14)
    }

    fn positions(&self) -> usize {
        2 * self.items
    }

    fn input_width(&self) -> usize {
        self.width + 2
    }

    fn output_width(&self) -> usize {
        self.width
    }

    fn example(&self, draw: &mut Draw) -> VectorExample {
        let items: Vec<Vec<f32>> = (0..self.items).map(|_| draw.normals(self.width)).collect();
        let mut example = VectorExample::default();
        for item in &items {
            example.read(item.iter().copied().chain([1.0, 0.0]), self.width);
        }
        for item in &items {
            example.ask(std::iter::repeat_n(0.0, self.width).chain([1.0, 1.0]), item);
        }
        example
    }
}

/// S4: multi-key match. Each of `items` items has `attributes` vectors of `key_width` numbers, uniform on the sphere of radius
/// √key_width, and a value ~ N(0, I) of `value_width` numbers. A query shows one attribute of one item, and asks for its value.
///
/// Channels: the attributes one after the other (in a query all but the shown one are 0), the value (0 in a query), a constant
/// 1, and 1 for the attribute that a query shows. With one head per attribute all heads read keys from the same latent, which
/// must carry attributes · key_width + value_width numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MultiKeyMatch {
    /// Keys of an item. `attributes` times `key_width` may be at most 16384.
    #[schemars(range(min = 1, max = 4096))]
    pub attributes: usize,
    /// Width of a key: how many numbers it has.
    #[schemars(range(min = 1, max = 4096))]
    pub key_width: usize,
    /// Width of a value: how many numbers it has.
    #[schemars(range(min = 1, max = 4096))]
    pub value_width: usize,
    /// Items of an example.
    #[schemars(range(min = 1, max = 4096))]
    pub items: usize,
    /// Queries of an example.
    #[schemars(range(min = 1, max = 4096))]
    pub queries: usize,
}

impl VectorTask for MultiKeyMatch {
    fn check(&self) -> Result<(), String> {
        for (key, size) in [
            ("attributes", self.attributes),
            ("key_width", self.key_width),
            ("value_width", self.value_width),
            ("items", self.items),
            ("queries", self.queries),
        ] {
            at_least(key, size, 1)?;
            at_most(key, size, 1 << 12)?;
        }
        at_most("attributes · key_width", self.attributes * self.key_width, WIDEST)
    }

    fn positions(&self) -> usize {
        self.items + self.queries
    }

    fn input_width(&self) -> usize {
        self.attributes * self.key_width + self.value_width + 1 + self.attributes
    }

    fn output_width(&self) -> usize {
        self.value_width
    }

    fn example(&self, draw: &mut Draw) -> VectorExample {
        let keys: Vec<Vec<Vec<f32>>> = (0..self.items)
            .map(|_| (0..self.attributes).map(|_| on_sphere(draw.normals(self.key_width))).collect())
            .collect();
        let values: Vec<Vec<f32>> = (0..self.items).map(|_| draw.normals(self.value_width)).collect();
        let mut example = VectorExample::default();
        for (keys, value) in keys.iter().zip(&values) {
            let channels = keys.iter().flatten().copied().chain(value.iter().copied());
            let flags = std::iter::once(1.0).chain(std::iter::repeat_n(0.0, self.attributes));
            example.read(channels.chain(flags), self.value_width);
        }
        for _ in 0..self.queries {
            let (item, shown) = (draw.below(self.items), draw.below(self.attributes));
            let of = |attribute: usize| {
                let key = &keys[item][attribute];
                key.iter().map(move |x| if attribute == shown { *x } else { 0.0 })
            };
            let channels = (0..self.attributes).flat_map(of).chain(std::iter::repeat_n(0.0, self.value_width));
            let flags = (0..self.attributes).map(|attribute| if attribute == shown { 1.0 } else { 0.0 });
            example.ask(channels.chain([1.0]).chain(flags), &values[item]);
        }
        example
    }
}

/// A vector brought to the length √width.
fn on_sphere(vector: Vec<f32>) -> Vec<f32> {
    let square: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum();
    let factor = (vector.len() as f64 / square.max(f64::MIN_POSITIVE)).sqrt();
    vector.into_iter().map(|x| (f64::from(x) * factor) as f32).collect()
}
