//! Typed values and the ordered list of keys that a GGUF file begins with.

use std::collections::{HashMap, HashSet};

use lowkey_files::printable;

/// A metadata value. The number before each kind is its code in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// 0
    U8(u8),
    /// 1
    I8(i8),
    /// 2
    U16(u16),
    /// 3
    I16(i16),
    /// 4
    U32(u32),
    /// 5
    I32(i32),
    /// 6
    F32(f32),
    /// 7
    Bool(bool),
    /// 8
    String(String),
    /// 9
    Array(Array),
    /// 10
    U64(u64),
    /// 11
    I64(i64),
    /// 12
    F64(f64),
}

/// An array of values of one kind. Arrays of arrays, which the format allows and nobody writes, are refused.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the kinds of Value")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Keys and values in the order of the file. No key stands twice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(Vec<(String, Value)>);

impl Metadata {
    /// Sets a key, at the end where it is new.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    /// The value of a text key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value of a key that holds a whole number ≥ 0 of any width.
    pub(crate) fn integer(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Value::U8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::U64(x) => Some(x),
            Value::I8(x) => u64::try_from(x).ok(),
            Value::I16(x) => u64::try_from(x).ok(),
            Value::I32(x) => u64::try_from(x).ok(),
            Value::I64(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    /// The value of a floating-point key. A 32-bit one is read as the shortest decimal number that rounds to it: 1e-6 stays 1e-6.
    pub fn number(&self, key: &str) -> Option<f64> {
        match *self.get(key)? {
            Value::F32(x) => x.to_string().parse().ok(),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A line for each key in which this differs from what was expected, and of a list the first differing element.
    pub(super) fn differences(&self, expected: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let ours: HashMap<&str, &Value> = self.iter().collect();
        for (key, value) in expected.iter() {
            match ours.get(key) {
                None => lines.push(format!("the key {key} is missing")),
                Some(found) => lines.extend(found.difference(value).map(|how| format!("{key}{how}"))),
            }
        }
        let theirs: HashSet<&str> = expected.iter().map(|(key, _)| key).collect();
        let more = self.iter().filter(|(key, _)| !theirs.contains(key));
        lines.extend(more.map(|(key, _)| format!("the key {} is none that its source gives", printable(key))));
        lines
    }

    /// From pairs that are known to have distinct keys.
    pub(super) fn from_distinct(pairs: Vec<(String, Value)>) -> Self {
        Self(pairs)
    }
}

/// The kinds of value and their codes.
pub(super) mod code {
    pub(in super::super) const U8: u32 = 0;
    pub(in super::super) const I8: u32 = 1;
    pub(in super::super) const U16: u32 = 2;
    pub(in super::super) const I16: u32 = 3;
    pub(in super::super) const U32: u32 = 4;
    pub(in super::super) const I32: u32 = 5;
    pub(in super::super) const F32: u32 = 6;
    pub(in super::super) const BOOL: u32 = 7;
    pub(in super::super) const STRING: u32 = 8;
    pub(in super::super) const ARRAY: u32 = 9;
    pub(in super::super) const U64: u32 = 10;
    pub(in super::super) const I64: u32 = 11;
    pub(in super::super) const F64: u32 = 12;
}

impl Value {
    /// How a value differs from what was expected; `None` where it does not.
    fn difference(&self, expected: &Self) -> Option<String> {
        macro_rules! lists {
            ($($kind:ident),*) => {
                match (self, expected) {
                    $((Self::Array(Array::$kind(found)), Self::Array(Array::$kind(expected))) => {
                        let at = found.iter().zip(expected).position(|(a, b)| a != b);
                        Some(match at {
                            Some(at) => {
                                let (found, expected) = (shown(&found[at]), shown(&expected[at]));
                                format!("[{at}] is {found}, its source gives {expected}")
                            }
                            None => format!(" has {} elements, its source gives {}", found.len(), expected.len()),
                        })
                    })*
                    (Self::Array(_), _) | (_, Self::Array(_)) => Some(" is of another type than its source gives".into()),
                    _ => Some(format!(" is {}, its source gives {}", shown(self), shown(expected))),
                }
            };
        }
        if self == expected {
            return None;
        }
        lists!(U8, I8, U16, I16, U32, I32, F32, Bool, String, U64, I64, F64)
    }
}

/// A value in at most a line; Debug formatting escapes what a terminal would act on.
fn shown(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

macro_rules! into_value {
    ($($kind:ident: $scalar:ty),*) => {$(
        impl From<$scalar> for Value {
            fn from(value: $scalar) -> Self {
                Self::$kind(value)
            }
        }

        impl From<Vec<$scalar>> for Value {
            fn from(values: Vec<$scalar>) -> Self {
                Self::Array(Array::$kind(values))
            }
        }
    )*};
}

into_value!(U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, F32: f32, Bool: bool, String: String, U64: u64,
            I64: i64, F64: f64);

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}
