//! Results as bytes, which is how they travel between ranks: to the last bit.

use lowkey_model::objective::preference::PairFigures;

/// What can be sent to another rank.
pub(crate) trait Packed: Sized {
    /// Adds its bytes.
    fn pack(&self, bytes: &mut Vec<u8>);
    /// The first value of some bytes, which are moved on behind it; none where they hold none.
    fn unpack(bytes: &mut &[u8]) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Packed for $number {
            fn pack(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }

            fn unpack(bytes: &mut &[u8]) -> Option<Self> {
                let (first, rest) = bytes.split_first_chunk()?;
                *bytes = rest;
                Some(Self::from_le_bytes(*first))
            }
        }
    )*};
}

numbers!(f32, f64, i64, u64);

impl<T: Packed> Packed for Vec<T> {
    fn pack(&self, bytes: &mut Vec<u8>) {
        (self.len() as u64).pack(bytes);
        self.iter().for_each(|one| one.pack(bytes));
    }

    fn unpack(bytes: &mut &[u8]) -> Option<Self> {
        let length = u64::unpack(bytes)?;
        (0..length).map(|_| T::unpack(bytes)).collect()
    }
}

impl<A: Packed, B: Packed> Packed for (A, B) {
    fn pack(&self, bytes: &mut Vec<u8>) {
        self.0.pack(bytes);
        self.1.pack(bytes);
    }

    fn unpack(bytes: &mut &[u8]) -> Option<Self> {
        Some((A::unpack(bytes)?, B::unpack(bytes)?))
    }
}

impl<T: Packed> Packed for Option<T> {
    fn pack(&self, bytes: &mut Vec<u8>) {
        u64::from(self.is_some()).pack(bytes);
        self.iter().for_each(|one| one.pack(bytes));
    }

    fn unpack(bytes: &mut &[u8]) -> Option<Self> {
        match u64::unpack(bytes)? {
            0 => Some(None),
            _ => Some(Some(T::unpack(bytes)?)),
        }
    }
}

impl Packed for PairFigures {
    fn pack(&self, bytes: &mut Vec<u8>) {
        let Self { pairs, loss, rewards, preferred, log_p } = *self;
        [pairs, preferred].iter().for_each(|count| (*count as u64).pack(bytes));
        [loss, rewards[0], rewards[1], log_p[0], log_p[1]].iter().for_each(|sum| sum.pack(bytes));
    }

    fn unpack(bytes: &mut &[u8]) -> Option<Self> {
        let mut count = || Some(u64::unpack(bytes)? as usize);
        let (pairs, preferred) = (count()?, count()?);
        let mut sum = || f64::unpack(bytes);
        let (loss, rewards, log_p) = (sum()?, [sum()?, sum()?], [sum()?, sum()?]);
        Some(Self { pairs, loss, rewards, preferred, log_p })
    }
}
