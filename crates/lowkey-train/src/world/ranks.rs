//! Gradients of several processes: each is one member, and computes the rows that are its share.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_batch::Batch;
use lowkey_model::{Parameter, objective::Figures};

use super::{Replica, World, sums_of_squares};
use crate::buckets::{BUCKET, packed, read, unpacked};
use crate::error::{Error, Result};
use crate::optimizer::{Optimizer, ParameterState, Update};
use crate::ranks::{Gpus, Meeting, Packed, Ranks, word_of};
use crate::run_config::{OptimizerSection, RanksSection};
use crate::workers::{PassSettings, StepGradients};

impl World {
    /// The same as one of several ranks, each of which has a world of one member.
    pub(crate) fn among(self, ranks: Ranks, section: RanksSection) -> Self {
        let lengths = || self.main().model.trained_parameters().iter().map(length).collect::<Vec<_>>();
        let owned = divides(&ranks, section).then(|| owned(&lengths(), ranks.size()));
        Self { ranks, sum: section.sum, owned, ..self }
    }

    /// [`World::update`] where each rank has the optimiser of its part of the parameters.
    ///
    /// # Errors
    /// [`Error::Device`] and [`Error::Transfer`] where values cannot be sent; the run must end then.
    pub(super) fn update_own(
        only: &mut Replica,
        (ranks, owned): (&Ranks, &[Range<usize>]),
        mut gradients: Vec<Tensor<1>>,
        update: &Update<'_>,
    ) -> Result<()> {
        let Replica { device, model, optimizer, workers, .. } = only;
        let (own, device) = (owned[ranks.rank()].clone(), device.clone().without_autodiff());
        let mut failed = None;
        model.update(|mut parameters| {
            let lengths: Vec<usize> = parameters.iter().map(length).collect();
            let of_each: Vec<usize> = owned.iter().map(|range| lengths[range.clone()].iter().sum()).collect();
            let mine: Vec<Parameter> = parameters.drain(own.clone()).collect();
            let gradients: Vec<Tensor<1>> = gradients.drain(own.clone()).collect();
            let new = workers.together(|| optimizer.step(mine, gradients, update));
            let sent = new.iter().map(|value| read(value.clone())).collect::<Result<Vec<_>>>();
            match sent.and_then(|numbers| ranks.gather_numbers(numbers.concat(), &of_each)) {
                Ok(all) => split(&all, &lengths, &device),
                Err(error) => {
                    failed = Some(error);
                    let mut values: Vec<_> = parameters.into_iter().map(|parameter| parameter.value).collect();
                    drop(values.splice(own.start..own.start, new));
                    values
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// The optimiser of all parameters, on the rank that writes it, where each rank has that of some; none elsewhere. All of them meet
    /// here.
    ///
    /// # Errors
    /// [`Error::Device`] where it cannot be read; as [`Ranks::agree`].
    pub(crate) fn whole_optimizer(&self, section: &OptimizerSection) -> Result<Option<Optimizer>> {
        if self.owned.is_none() {
            return Ok(None);
        }
        let Replica { model, optimizer, device, .. } = self.main();
        let (own, steps) = optimizer.state();
        let own = own.iter().flat_map(|state| state.tensors()).map(|(_, tensor)| read(tensor.clone()));
        let own = own.collect::<Result<Vec<_>>>().map(|numbers| numbers.concat());
        let all = self.ranks.gather_numbers_to_first(Meeting::Weights, own)?;
        if !self.ranks.is_first() {
            return Ok(None);
        }
        let parameters = model.trained_parameters();
        let mut whole = Optimizer::new(section, &parameters, Parameter::is_matrix);
        let kinds = whole.state().0.iter().zip(&parameters);
        // In the order in which they were read: of each parameter its tensors.
        let lengths: Vec<usize> = kinds.flat_map(|(kind, p)| vec![length(p); kind.tensors().len()]).collect();
        if lengths.iter().sum::<usize>() != all.len() {
            return Err(Error::Transfer {
                call: "gather",
                why: "the parts of the optimiser are not those of its parameters".into(),
            });
        }
        let mut tensors = split(&all, &lengths, &device.clone().without_autodiff()).into_iter();
        let missing = || Error::Transfer { call: "gather", why: "a part of the optimiser is missing".into() };
        let mut state = |kind: &ParameterState| kind.read(|_| tensors.next().ok_or_else(missing));
        let states = whole.state().0.iter().map(&mut state).collect::<Result<Vec<_>>>()?;
        whole.restore(states, steps);
        Ok(Some(whole))
    }

    /// [`World::gradients`], where other ranks compute other rows of the batch.
    ///
    /// What may fail is done before they meet; behind the meeting nothing but the transfers does.
    pub(super) fn gradients_of_ranks(
        &self,
        only: &Replica,
        batch: &Batch,
        passes: PassSettings<'_>,
    ) -> Result<Vec<StepGradients>> {
        let own = || -> Result<_> {
            let StepGradients { losses, targets, gradients, figures } = self.own_gradients(batch, passes)?.remove(0);
            let lengths: Vec<usize> = gradients.iter().map(|gradient| gradient.dims()[0]).collect();
            let numbers = figures.numbers().map_err(|why| Error::Device { what: "a step's figures", why })?;
            let mut told = Vec::new();
            (read(losses)?, numbers).pack(&mut told);
            let buckets = packed(gradients, BUCKET);
            let buckets = match self.ranks.gpus() {
                Some(gpus) => Buckets::OnGpus(gpus, buckets),
                None => Buckets::Read(buckets.into_iter().map(read).collect::<Result<_>>()?),
            };
            Ok((targets, lengths, figures, told, buckets))
        };
        let (told, rest) = match own() {
            Ok((targets, lengths, figures, told, buckets)) => (Ok(told), Some((targets, lengths, figures, buckets))),
            Err(error) => (Err(error), None),
        };
        let told = self.ranks.gather(Meeting::Gradients, told)?;
        let Some((targets, lengths, own, buckets)) = rest else {
            unreachable!("a meeting with an error ends with one")
        };
        // The losses of all passes in the order of their rows, as one process would have them.
        let device = only.device.clone().without_autodiff();
        let (mut losses, mut figures) = (Vec::new(), Figures::default());
        for bytes in told {
            let broken =
                || Error::Transfer { call: "gather", why: "the figures of another rank cannot be read".into() };
            let (more, numbers) = <(Vec<f32>, Vec<Vec<f64>>)>::unpack(&mut &bytes[..]).ok_or_else(broken)?;
            losses.extend(more);
            figures.add(own.with_numbers(&numbers, &device).ok_or_else(broken)?);
        }
        let gradients = match buckets {
            Buckets::OnGpus(gpus, buckets) => {
                let sums = buckets.into_iter().map(|bucket| gpus.sum_tensor(bucket, self.sum));
                unpacked(sums.collect(), lengths.into_iter())
            }
            Buckets::Read(mut buckets) => {
                buckets.iter_mut().try_for_each(|bucket| self.ranks.sum(bucket, self.sum))?;
                uploaded(buckets, &lengths, &device)
            }
        };
        let passes = losses.len();
        let losses = split(&losses, &[passes], &device).remove(0);
        Ok(vec![StepGradients { losses, targets, gradients, figures }])
    }

    /// Refuses weights that are not the same on all ranks. All of them meet here.
    ///
    /// # Errors
    /// [`Error::Device`] where they differ; as [`Ranks::agree`].
    pub(crate) fn agree_with_ranks(&self) -> Result<()> {
        if !self.ranks.are_several() {
            return Ok(());
        }
        let bytes: Vec<u8> = sums_of_squares(self.main()).into_iter().flat_map(u64::to_le_bytes).collect();
        match self.ranks.other_than_first(Meeting::Weights, Ok(word_of(&bytes)))? {
            None => Ok(()),
            Some(rank) => Err(Error::Device {
                what: "the same weights from every rank",
                why: format!(
                    "those of rank {rank} are not those of rank 0: their machines round differently, or sums differ from rank to \
                     rank; write sum = \"ordered\" in [ranks], and take machines of one kind"
                ),
            }),
        }
    }
}

/// Gradients in flat buckets, where they are added up.
enum Buckets<'a> {
    /// On the GPUs of the ranks,
    OnGpus(&'a Gpus, Vec<Tensor<1>>),
    /// or on the host.
    Read(Vec<Vec<f32>>),
}

/// Gradients of these lengths again, on their device.
fn uploaded(buckets: Vec<Vec<f32>>, lengths: &[usize], device: &Device) -> Vec<Tensor<1>> {
    let mut gradients = Vec::with_capacity(lengths.len());
    for bucket in buckets {
        let (mut held, mut numbers) = (gradients.len(), 0);
        while held < lengths.len() && numbers + lengths[held] <= bucket.len() {
            numbers += lengths[held];
            held += 1;
        }
        gradients.extend(split(&bucket, &lengths[gradients.len()..held], device));
    }
    gradients
}

/// Whether each rank has a part of the optimiser.
fn divides(ranks: &Ranks, section: RanksSection) -> bool {
    ranks.are_several() && section.zero == 1
}

/// The parameters that the optimiser of a rank is of: all, or its part of them.
pub(crate) fn optimized(ranks: &Ranks, section: RanksSection, parameters: &[Parameter]) -> Range<usize> {
    if !divides(ranks, section) {
        return 0..parameters.len();
    }
    let lengths: Vec<usize> = parameters.iter().map(length).collect();
    owned(&lengths, ranks.size()).swap_remove(ranks.rank())
}

/// Parts of about as many numbers, one for each rank, of whole parameters in their order.
fn owned(lengths: &[usize], ranks: usize) -> Vec<Range<usize>> {
    let total = lengths.iter().sum::<usize>().max(1);
    // A parameter belongs to the rank in whose share of all numbers its middle lies.
    let owners: Vec<usize> = lengths
        .iter()
        .scan(0, |before, length| {
            let middle = *before + length / 2;
            *before += length;
            Some((middle * ranks / total).min(ranks - 1))
        })
        .collect();
    let first = |rank: usize| owners.partition_point(|owner| *owner < rank);
    (0..ranks).map(|rank| first(rank)..first(rank + 1)).collect()
}

fn length(parameter: &Parameter) -> usize {
    parameter.shape.iter().product()
}

/// Tensors of these lengths from numbers that lie one after the other.
fn split(numbers: &[f32], lengths: &[usize], device: &Device) -> Vec<Tensor<1>> {
    let mut rest = numbers;
    let tensors = lengths.iter().map(|length| {
        let (own, more) = rest.split_at(*length);
        rest = more;
        Tensor::from_data(TensorData::new(own.to_vec(), [*length]), device)
    });
    tensors.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_and_about_as_large() {
        for (lengths, ranks) in [(&[5, 5, 5, 5][..], 2), (&[100, 1, 1, 1, 40, 60], 3), (&[1], 4), (&[7, 0, 7], 2)] {
            let parts = owned(lengths, ranks);
            assert_eq!((parts.len(), parts[0].start, parts[ranks - 1].end), (ranks, 0, lengths.len()));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
            let largest = parts.iter().map(|part| lengths[part.clone()].iter().sum::<usize>()).max().unwrap();
            let most = lengths.iter().max().unwrap();
            assert!(largest <= lengths.iter().sum::<usize>().div_ceil(ranks) + most, "{parts:?}");
        }
        assert_eq!(owned(&[100, 1, 1, 1, 40, 60], 3), [0..1, 1..5, 5..6]);
    }

    #[test]
    fn numbers_become_the_tensors_that_they_were() {
        let found = split(&[1.0, 2.0, 3.0, 4.0], &[1, 0, 3], &Device::flex());
        let found: Vec<Vec<f32>> = found.into_iter().map(|tensor| read(tensor).unwrap()).collect();
        assert_eq!(found, [vec![1.0], vec![], vec![2.0, 3.0, 4.0]]);
    }
}
