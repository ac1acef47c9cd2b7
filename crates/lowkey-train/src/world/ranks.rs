//! Gradients of several processes: each is one member, and computes the rows that are its share.

use burn::tensor::{Tensor, TensorData};
use lowkey_batch::Batch;

use super::{Replica, World, share, sums_of_squares};
use crate::buckets::{BUCKET, packed, read};
use crate::error::{Error, Result};
use crate::other_model::Counterpart;
use crate::ranks::{Meeting, Packed, Ranks, word_of};
use crate::run_config::RankSum;
use crate::workers::{PassSettings, StepGradients, joined};

impl World {
    /// The same as one of several ranks, each of which has a world of one member.
    pub(crate) fn among(self, ranks: Ranks, sum: RankSum) -> Self {
        Self { ranks, sum, ..self }
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
        let (rank, size, device) = (self.ranks.rank(), self.ranks.size(), &only.device);
        let rows = share(batch.rows, batch.unit(), rank, size);
        let own = || -> Result<_> {
            let own = only.workers.gradients_of(&only.model, batch, rows, only.passes(passes), device);
            only.other.as_ref().map_or(Ok(()), Counterpart::in_order)?;
            let StepGradients { losses, targets, gradients, pairs } = own;
            let lengths: Vec<usize> = gradients.iter().map(|gradient| gradient.dims()[0]).collect();
            let mut figures = Vec::new();
            (read(losses)?, pairs).pack(&mut figures);
            let buckets = packed(gradients, BUCKET).into_iter().map(read).collect::<Result<Vec<_>>>()?;
            Ok((targets, lengths, figures, buckets))
        };
        let (figures, rest) = match own() {
            Ok((targets, lengths, figures, buckets)) => (Ok(figures), Some((targets, lengths, buckets))),
            Err(error) => (Err(error), None),
        };
        let figures = self.ranks.gather(Meeting::Gradients, figures)?;
        let Some((targets, lengths, mut buckets)) = rest else { unreachable!("a meeting with an error ends with one") };
        buckets.iter_mut().try_for_each(|bucket| self.ranks.sum(bucket, self.sum))?;
        // The losses of all passes in the order of their rows, as one process would have them.
        let (mut losses, mut pairs) = (Vec::new(), Vec::new());
        for bytes in figures {
            let broken = || Error::Mpi { call: "gather", why: "the figures of another rank cannot be read".into() };
            let (more, of_pairs) = <(Vec<f32>, Option<_>)>::unpack(&mut &bytes[..]).ok_or_else(broken)?;
            losses.extend(more);
            pairs.push(of_pairs);
        }
        let device = device.clone().without_autodiff();
        let tensor = |numbers: Vec<f32>| {
            let length = numbers.len();
            Tensor::<1>::from_data(TensorData::new(numbers, [length]), &device)
        };
        let (mut numbers, mut at) = (buckets.into_iter(), 0);
        let mut bucket = numbers.next().unwrap_or_default();
        let mut gradients = Vec::with_capacity(lengths.len());
        for length in lengths {
            if at + length > bucket.len() {
                (bucket, at) = (numbers.next().unwrap_or_default(), 0);
            }
            gradients.push(tensor(bucket[at..at + length].to_vec()));
            at += length;
        }
        Ok(vec![StepGradients { losses: tensor(losses), targets, gradients, pairs: joined(pairs) }])
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
