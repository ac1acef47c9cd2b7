//! Adapted maps on the CPU: what stands beside the frozen matrix is computed first, a few tokens at a time, and the frozen product is added
//! to it where it lies.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::autodiff::{AdaptedGradients, AdaptedOps, AdaptedState, Map};
use crate::autodiff::Wanted;
use crate::cpu::linear::{Tokens, input_gradient, project};
use crate::cpu::narrow::{Few, TOKENS};
use crate::cpu::tensors::{dims, new, numbers, wanted_like};
use crate::cpu::tile::Aligned;
use crate::norm::cpu::rms_norm;
use crate::precision::Precision;
use crate::recalled::autodiff::Recall;
use crate::swiglu::cpu::swiglu;

/// The matrices of a map.
#[derive(Clone, Copy)]
pub(super) struct Matrices<'a> {
    /// `[d_out, d_in]`
    pub(super) weight: &'a [f32],
    /// `[r, d_in]`
    a: &'a [f32],
    /// `[d_out, r]`
    b: &'a [f32],
    scale: f32,
    pub(super) d_in: usize,
    pub(super) d_out: usize,
    pub(super) r: usize,
    few: Few,
    /// Of the frozen product. Products with A and B are in f32.
    pub(super) precision: Precision,
}

/// A map's tensors side by side; those of [`Matrices`] lie in them. A packed matrix is unpacked for as long as this lives: what an
/// operation keeps is the map.
pub(super) struct Dense {
    pub(super) weight: FlexTensor,
    pub(super) a: FlexTensor,
    pub(super) b: FlexTensor,
    scale: f64,
}

impl Dense {
    pub(super) fn of(map: Map<Flex>) -> Self {
        let Map { weight, a, b, scale } = map;
        let [weight, a, b] = [weight.whole(), a, b].map(|x| x.to_contiguous());
        Self { weight, a, b, scale }
    }
}

impl<'a> Matrices<'a> {
    pub(super) fn of(map: &'a Dense, precision: Precision) -> Self {
        let ([d_out, d_in], [r, _]) = (dims::<2>(&map.weight), dims::<2>(&map.a));
        let (weight, a, b) = (map.weight.storage(), map.a.storage(), map.b.storage());
        Self { weight, a, b, scale: map.scale as f32, d_in, d_out, r, few: Few::new(r), precision }
    }

    /// What stands beside, as a forward pass reads it.
    pub(super) fn forth(self) -> Forth {
        let Self { a, b, scale, d_in, d_out, few, .. } = self;
        Forth { few, a: few.columns(a, false, 1.0), b: few.rows(b, true, scale), d_in, d_out }
    }

    /// What stands beside, as a backward pass reads it.
    pub(super) fn back(self) -> Back {
        let Self { a, b, scale, d_in, d_out, few, .. } = self;
        Back { few, a: few.rows(a, false, 1.0), b: few.columns(b, true, scale), d_in, d_out }
    }

    /// Writes sums over all tokens into gradients.
    pub(super) fn write(self, sums: Sums, [d_a, d_b]: [Option<&mut [f32]>; 2]) {
        if let Some(d_a) = d_a {
            self.few.write(&sums.a, false, 1.0, d_a);
        }
        if let Some(d_b) = d_b {
            self.few.write(&sums.b, true, self.scale, d_b);
        }
    }
}

/// A and B in a forward pass.
pub(super) struct Forth {
    few: Few,
    /// `[d_in, padded]`
    a: Aligned,
    /// `[padded, d_out]`, times the scale.
    b: Aligned,
    d_in: usize,
    d_out: usize,
}

impl Forth {
    pub(super) fn room(&self) -> Aligned {
        self.few.room()
    }

    /// `low = x Aᵀ` and `y (+)= s·low Bᵀ` of a few tokens.
    pub(super) fn pass(&self, x: &[f32], low: &mut [f32], y: &mut [f32], add: bool, room: &mut [f32]) {
        let (padded, count) = (self.few.padded(), x.len() / self.d_in);
        let room = &mut room[..count * padded];
        self.few.gather(x, self.d_in, &self.a, room);
        let r = low.len() / count;
        low.chunks_exact_mut(r).zip(room.chunks_exact(padded)).for_each(|(low, room)| low.copy_from_slice(&room[..r]));
        self.few.spread(room, &self.b, y, self.d_out, add);
    }
}

/// A and B in a backward pass.
pub(super) struct Back {
    few: Few,
    /// `[padded, d_in]`
    a: Aligned,
    /// `[d_out, padded]`, times the scale.
    b: Aligned,
    d_in: usize,
    d_out: usize,
}

/// Gradients of A and B, summed over tokens: `[padded, d_in]` and, without the scale, `[padded, d_out]`.
pub(super) struct Sums {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Sums {
    /// Adds up in order.
    pub(super) fn all(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut sum, part| {
            sum.a.iter_mut().zip(part.a).for_each(|(sum, part)| *sum += part);
            sum.b.iter_mut().zip(part.b).for_each(|(sum, part)| *sum += part);
            sum
        })
    }
}

impl Back {
    pub(super) fn sums(&self) -> Sums {
        let padded = self.few.padded();
        Sums { a: vec![0.0; padded * self.d_in], b: vec![0.0; padded * self.d_out] }
    }

    pub(super) fn room(&self) -> Aligned {
        Aligned::zeros(2 * TOKENS * self.few.padded())
    }

    /// Of a few tokens the gradient of `x Aᵀ`, in the first numbers of `room`; adds to that of B.
    pub(super) fn gather<'a>(&self, d_y: &[f32], low: &[f32], sums: &mut Sums, room: &'a mut [f32]) -> &'a [f32] {
        let (padded, count) = (self.few.padded(), d_y.len() / self.d_out);
        let (d_low, wide) = room.split_at_mut(count * padded);
        self.few.gather(d_y, self.d_out, &self.b, d_low);
        let (r, wide) = (low.len() / count, &mut wide[..count * padded]);
        wide.chunks_exact_mut(padded).zip(low.chunks_exact(r)).for_each(|(wide, low)| wide[..r].copy_from_slice(low));
        self.few.collect(wide, d_y, self.d_out, &mut sums.b);
        d_low
    }

    /// Adds to the gradient of A.
    pub(super) fn collect(&self, d_low: &[f32], x: &[f32], sums: &mut Sums) {
        self.few.collect(d_low, x, self.d_in, &mut sums.a);
    }

    /// The gradient of the input that comes from here.
    pub(super) fn spread(&self, d_low: &[f32], d_x: &mut [f32], add: bool) {
        self.few.spread(d_low, &self.a, d_x, self.d_in, add);
    }

    /// Numbers of a token between A and B where they lie in rows that fill vectors.
    pub(super) fn padded(&self) -> usize {
        self.few.padded()
    }
}

/// Tokens that are one task. Their sums are added up in order: how many threads there are does not matter.
pub(super) const SHARE: usize = 8 * TOKENS;

/// An input, where it lies or formed anew.
enum Source<'a> {
    Given(&'a [f32]),
    Norm { x: &'a [f32], gain: &'a [f32], eps: f32 },
    Swiglu { gate: &'a [f32], up: &'a [f32] },
}

impl<'a> Source<'a> {
    fn of(input: &'a Recall<Flex>) -> Self {
        match input {
            Recall::Given(x) => Self::Given(x.storage()),
            Recall::Norm { x, gain, eps } => Self::Norm { x: x.storage(), gain: gain.storage(), eps: *eps as f32 },
            Recall::Swiglu { gate, up } => Self::Swiglu { gate: gate.storage(), up: up.storage() },
        }
    }

    /// Some of its numbers, whole rows of them; where they have to be formed, in `room`.
    fn part<'b>(&'b self, from: usize, count: usize, room: &'b mut [f32]) -> &'b [f32] {
        match self {
            Self::Given(x) => &x[from..from + count],
            Self::Norm { x, gain, eps } => {
                let room = &mut room[..count];
                let width = gain.len();
                rms_norm(Tokens::dense(&x[from..from + count], width), gain, *eps, 1.0, room, width);
                room
            }
            Self::Swiglu { gate, up } => {
                let room = &mut room[..count];
                swiglu(&gate[from..from + count], &up[from..from + count], room);
                room
            }
        }
    }
}

/// Adds `x Wᵀ + s·low Bᵀ` to `y`, or writes it there, and `low = x Aᵀ`.
fn forward(x: &[f32], map: Matrices, low: &mut [f32], y: &mut [f32], add: bool) {
    let (forth, Matrices { d_in, d_out, r, .. }) = (map.forth(), map);
    let shares = y.par_chunks_mut(SHARE * d_out).zip(low.par_chunks_mut(SHARE * r)).zip(x.par_chunks(SHARE * d_in));
    shares.for_each(|((y, low), x)| {
        let mut room = forth.room();
        let few = y.chunks_mut(TOKENS * d_out).zip(low.chunks_mut(TOKENS * r)).zip(x.chunks(TOKENS * d_in));
        few.for_each(|((y, low), x)| forth.pass(x, low, y, add, &mut room));
    });
    project(map.precision, Tokens::dense(x, d_in), map.weight, d_in, y, true);
}

/// Gradients from that of the result: of A and B, and of the input what comes from them.
fn backward(d_y: &[f32], map: Matrices, source: Option<&Source>, low: &[f32], d_x: Option<&mut [f32]>) -> Option<Sums> {
    let (back, Matrices { d_in, d_out, r, .. }) = (map.back(), map);
    let count = d_y.len() / d_out;
    let mut targets: Vec<Option<&mut [f32]>> = match d_x {
        Some(d_x) => d_x.chunks_mut(SHARE * d_in).map(Some).collect(),
        None => (0..count.div_ceil(SHARE)).map(|_| None).collect(),
    };
    let shares = targets.par_iter_mut().zip(d_y.par_chunks(SHARE * d_out)).zip(low.par_chunks(SHARE * r)).enumerate();
    let parts: Vec<Sums> = shares
        .map(|(i, ((target, d_y), low))| {
            let (mut sums, mut room) = (back.sums(), back.room());
            let mut formed = vec![0.0; TOKENS * d_in];
            for (j, (d_y, low)) in d_y.chunks(TOKENS * d_out).zip(low.chunks(TOKENS * r)).enumerate() {
                let d_low = back.gather(d_y, low, &mut sums, &mut room);
                let (at, tokens) = (j * TOKENS * d_in, d_y.len() / d_out);
                if let Some(source) = source {
                    let x = source.part(i * SHARE * d_in + at, tokens * d_in, &mut formed);
                    back.collect(d_low, x, &mut sums);
                }
                if let Some(d_x) = target {
                    back.spread(d_low, &mut d_x[at..at + tokens * d_in], false);
                }
            }
            sums
        })
        .collect();
    Sums::all(parts)
}

impl AdaptedOps for Flex {
    fn adapted(x: FlexTensor, map: Map<Self>, _: Recall<Self>, precision: Precision) -> FlexTensor {
        let [y, _] = Self::adapted_saving(None, x, map, precision);
        y
    }

    fn add_adapted(
        residual: FlexTensor,
        x: FlexTensor,
        map: Map<Self>,
        _: Recall<Self>,
        precision: Precision,
    ) -> FlexTensor {
        let [y, _] = Self::adapted_saving(Some(residual), x, map, precision);
        y
    }
}

impl AdaptedGradients for Flex {
    fn adapted_saving(
        residual: Option<FlexTensor>,
        x: FlexTensor,
        map: Map<Self>,
        precision: Precision,
    ) -> [FlexTensor; 2] {
        let (x, map) = (x.to_contiguous(), Dense::of(map));
        let ([batch, seq, _], [r, _]) = (dims::<3>(&x), dims::<2>(&map.a));
        let (map, add) = (Matrices::of(&map, precision), residual.is_some());
        // Where nobody else holds the residual, the sum takes its place.
        let mut y = residual.map_or_else(|| new([batch, seq, map.d_out]), |residual| residual.to_contiguous());
        let mut low = new([batch, seq, r]);
        forward(x.storage(), map, low.storage_mut(), y.storage_mut(), add);
        [y, low]
    }

    fn adapted_grad(
        saved: AdaptedState<Self>,
        grad: FlexTensor,
        precision: Precision,
        [of_x, of_a, of_b]: Wanted<3>,
    ) -> [Option<FlexTensor>; 3] {
        let AdaptedState { input, map, low } = saved;
        let (map, low, grad) = (Dense::of(map), low.to_contiguous(), grad.to_contiguous());
        let [batch, seq, _] = dims::<3>(&grad);
        let matrices = Matrices::of(&map, precision);
        let mut d_x = of_x.then(|| new([batch, seq, matrices.d_in]));
        let [mut d_a, mut d_b] = wanted_like([&map.a, &map.b], [of_a, of_b]);
        let input = input.map(|input| match input {
            Recall::Given(x) => Recall::Given(x.to_contiguous()),
            Recall::Norm { x, gain, eps } => Recall::Norm { x: x.to_contiguous(), gain: gain.to_contiguous(), eps },
            Recall::Swiglu { gate, up } => Recall::Swiglu { gate: gate.to_contiguous(), up: up.to_contiguous() },
        });
        let source = input.as_ref().map(Source::of);
        let d_y = grad.storage();
        let sums = backward(d_y, matrices, source.as_ref(), low.storage(), numbers(&mut d_x));
        if let Some(sums) = sums {
            matrices.write(sums, [numbers(&mut d_a), numbers(&mut d_b)]);
        }
        if let Some(d_x) = numbers(&mut d_x) {
            input_gradient(precision, d_y, matrices.weight, matrices.d_in, d_x, true);
        }
        [d_x, d_a, d_b]
    }
}
