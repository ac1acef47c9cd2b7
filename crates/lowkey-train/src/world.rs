//! Who trains a model together: one device, or several in step (data parallel training).
//!
//! A [`World`] deals the rows of a batch to its members, equal parts in their order, a pure function of the number of rows and of
//! members. Each computes the gradients of its rows, all are added up once per step in a few flat buckets, and every member then takes
//! the same step with the same numbers, so that the replicas stay equal to the last bit and none is ever sent. The loop above asks for
//! gradients and hands back an update; it does not know how many members there are. What only one has to do (evaluate, write, speak)
//! the first one does.
//!
//! The members are devices of one process ([`Reducer`]), or one of each of several processes (`world/ranks.rs`); nothing else here or
//! above depends on where they are.

mod ranks;

use std::ops::Range;

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{Device, Tensor, TensorData};
use lowkey_batch::Batch;
use lowkey_kernels::Precision;
use lowkey_kernels::device::{has_collectives, is_cpu};
use lowkey_kernels::optim::{self, Gate};
use lowkey_model::{CausalLm, objective::Figures};

use crate::buckets::{BUCKET, packed, read, sums, unpacked};
use crate::error::{Error, Result};
use crate::optimizer::{Optimizer, Update};
use crate::other_model::Counterpart;
use crate::ranks::Ranks;
use crate::run_config::RankSum;
use crate::workers::{PassSettings, StepGradients, Workers};
pub(crate) use ranks::optimized;

/// The model on one device, with what trains it there.
#[derive(Debug)]
pub(crate) struct Replica {
    /// Where it lies; records gradients.
    pub(crate) device: Device,
    /// The model.
    pub(crate) model: CausalLm,
    /// Its optimiser.
    pub(crate) optimizer: Optimizer,
    /// Threads that share its rows.
    pub(crate) workers: Workers,
    /// What the device has found of the last step.
    pub(crate) gate: Option<Gate>,
    /// The model that the objective is held against, where there is one.
    pub(crate) other: Option<Counterpart>,
}

impl Replica {
    /// How its own passes are taken.
    fn passes<'a>(&'a self, passes: PassSettings<'a>) -> PassSettings<'a> {
        PassSettings { other: self.other.as_ref(), ..passes }
    }
}

/// The members that train together, and how their gradients become one.
#[derive(Debug)]
pub(crate) struct World {
    members: Vec<Replica>,
    reducer: Reducer,
    /// The processes that share the batch, with one member each where there are several,
    ranks: Ranks,
    /// how they add up,
    sum: RankSum,
    /// and the trained parameters that the optimiser of each is of, where each has a part of it.
    owned: Option<Vec<Range<usize>>>,
}

/// Who adds up gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reducer {
    /// The devices among themselves (NCCL).
    Devices,
    /// The host, which every gradient then passes through.
    Host,
}

impl World {
    /// `first` and its copies; `others` have the same values.
    pub(crate) fn new(first: Replica, others: Vec<Replica>) -> Self {
        let mut members = vec![first];
        members.extend(others);
        let devices: Vec<&Device> = members.iter().map(|replica| &replica.device).collect();
        let distinct = devices.iter().enumerate().all(|(i, device)| !devices[..i].contains(device));
        let collectives = distinct && devices.iter().all(|device| has_collectives(device));
        let by_host = std::env::var_os("LOWKEY_REDUCE").is_some_and(|value| value == "host");
        let reducer = if collectives && !by_host { Reducer::Devices } else { Reducer::Host };
        Self { members, reducer, ranks: Ranks::default(), sum: RankSum::default(), owned: None }
    }

    /// Those in this process, in their order.
    pub(crate) fn members(&self) -> &[Replica] {
        &self.members
    }

    /// The first one.
    pub(crate) fn main(&self) -> &Replica {
        &self.members[0]
    }

    /// What adds up gradients, in words; none where there is nothing to add.
    pub(crate) fn reducer(&self) -> Option<&'static str> {
        match self.reducer {
            _ if self.ranks.are_several() => self.ranks.reducer(self.sum),
            _ if self.members.len() == 1 => None,
            Reducer::Devices => Some("the devices among themselves (NCCL)"),
            Reducer::Host => Some("the host"),
        }
    }

    /// Loss and gradients of the whole batch, once for each replica.
    ///
    /// # Errors
    /// [`Error::Device`] where gradients cannot be read back to be added up, [`Error::Io`] where what another model said cannot be
    /// kept.
    pub(crate) fn gradients(&self, batch: &Batch, passes: PassSettings<'_>) -> Result<Vec<StepGradients>> {
        match &self.members[..] {
            [only] if self.ranks.are_several() => self.gradients_of_ranks(only, batch, passes),
            [_] => self.own_gradients(batch, passes),
            _ => self.reduced(self.own_gradients(batch, passes)?),
        }
    }

    /// What each member of this process contributes to them: the gradients of its own rows.
    ///
    /// # Errors
    /// As for all.
    pub(crate) fn own_gradients(&self, batch: &Batch, passes: PassSettings<'_>) -> Result<Vec<StepGradients>> {
        let (first, count) = match self.members.len() {
            1 => (self.ranks.rank(), self.ranks.size()),
            members => (0, members),
        };
        let own = self.each((first..first + self.members.len()).collect(), |replica, i| {
            let rows = share(batch.rows, batch.unit(), i, count);
            replica.workers.gradients_of(&replica.model, batch, rows, replica.passes(passes), &replica.device)
        });
        for replica in &self.members {
            replica.other.as_ref().map_or(Ok(()), Counterpart::in_order)?;
        }
        Ok(own)
    }

    /// Adds up the replicas' parts.
    fn reduced(&self, own: Vec<StepGradients>) -> Result<Vec<StepGradients>> {
        let lengths: Vec<usize> = own.iter().take(1).flat_map(|own| &own.gradients).map(|g| g.dims()[0]).collect();
        let targets = own.first().map_or(0, |own| own.targets);
        let mut figures = Figures::default();
        own.iter().for_each(|own| figures.add(own.figures.clone()));
        // Those of the host are added up; of a device's each member has as many.
        let beside = own.first().map_or(0, |own| own.figures.on_device().len());
        let packed = |own: StepGradients| {
            // Along the axis: the sum over all would be one of atomic additions on a GPU, in an order that changes.
            let losses = own.losses.sum_dim(0);
            packed(own.gradients.into_iter().chain([losses]).chain(own.figures.on_device()).collect(), BUCKET)
        };
        let sums = match self.reducer {
            Reducer::Devices => {
                let devices: Vec<Device> =
                    self.members.iter().map(|replica| replica.device.clone().without_autodiff()).collect();
                self.each(own, |_, own| {
                    let sum = |bucket| all_reduce(bucket, ReduceOperation::Sum, devices.clone()).resolve();
                    packed(own).into_iter().map(sum).collect::<Vec<_>>()
                })
            }
            Reducer::Host => {
                let parts = self.each(own, |_, own| packed(own).into_iter().map(read).collect::<Result<Vec<_>>>());
                let sums = sums(parts.into_iter().collect::<Result<_>>()?);
                self.each(vec![(); self.members.len()], |replica, ()| {
                    let device = replica.device.clone().without_autodiff();
                    let upload = |sum: &Vec<f32>| Tensor::from_data(TensorData::new(sum.clone(), [sum.len()]), &device);
                    sums.iter().map(upload).collect()
                })
            }
        };
        let unpacked = |buckets: Vec<Tensor<1>>| {
            let numbers = std::iter::repeat_n(1, 1 + beside);
            let mut gradients = unpacked(buckets, lengths.iter().copied().chain(numbers));
            let mut sums = gradients.split_off(lengths.len()).into_iter();
            let losses = sums.next().unwrap_or_else(|| unreachable!("the losses come behind the gradients"));
            StepGradients { losses, targets, gradients, figures: figures.clone().with_sums(sums) }
        };
        Ok(sums.into_iter().map(unpacked).collect())
    }

    /// Gives every replica its new values.
    ///
    /// # Errors
    /// Where each rank has a part of the optimiser: [`Error::Transfer`] where the others' values do not come.
    pub(crate) fn update(
        &mut self,
        results: Vec<StepGradients>,
        gates: Vec<Option<Gate>>,
        update: impl Fn(Option<&Gate>) -> Update<'_> + Sync,
    ) -> Result<()> {
        let one = |replica: &mut Replica, (result, gate): (StepGradients, Option<Gate>)| {
            replica.gate = gate;
            let Replica { model, optimizer, workers, gate, .. } = replica;
            let update = update(gate.as_ref());
            let gradients = result.gradients;
            workers.together(|| model.update(|parameters| optimizer.step(parameters, gradients, &update)));
        };
        let work = results.into_iter().zip(gates);
        match &mut self.members[..] {
            [only] => match &self.owned {
                Some(owned) => {
                    for (result, gate) in work {
                        Self::update_own(only, (&self.ranks, owned), result.gradients, &update(gate.as_ref()))?;
                    }
                }
                None => work.for_each(|work| one(only, work)),
            },
            all => std::thread::scope(|scope| {
                for (replica, work) in all.iter_mut().zip(work) {
                    scope.spawn(|| one(replica, work));
                }
            }),
        }
        Ok(())
    }

    /// Compiles and chooses a GPU's kernels for the optimiser of each member of this process.
    pub(crate) fn warm_up_optimizers(&self, precision: Precision) {
        let own = self.owned.as_ref().map(|owned| owned[self.ranks.rank()].clone());
        for Replica { model, optimizer, .. } in &self.members {
            let parameters = model.trained_parameters();
            optimizer.warm_up(&parameters[own.clone().unwrap_or(0..parameters.len())], precision);
        }
    }

    /// Waits until everything that is queued is done.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn finish(&self) -> Result<()> {
        for replica in &self.members {
            replica.device.sync().map_err(|e| Error::Device { what: "a step", why: format!("{e:?}") })?;
        }
        Ok(())
    }

    /// Whether all replicas have the same numbers, as far as their sums of squares tell.
    pub(crate) fn agree(&self) -> bool {
        let [main, others @ ..] = &self.members[..] else { return true };
        if others.is_empty() {
            return true;
        }
        let first = sums_of_squares(main);
        others.iter().all(|replica| sums_of_squares(replica) == first)
    }

    /// Runs `job` for each replica, in a thread of its own where there are several; results in their order.
    fn each<T: Send, R: Send>(&self, items: Vec<T>, job: impl Fn(&Replica, T) -> R + Sync) -> Vec<R> {
        if let [only] = &self.members[..] {
            return items.into_iter().map(|item| job(only, item)).collect();
        }
        std::thread::scope(|scope| {
            let job = &job;
            let threads: Vec<_> =
                self.members.iter().zip(items).map(|(replica, item)| scope.spawn(move || job(replica, item))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, R>| {
                thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
            };
            threads.into_iter().map(join).collect()
        })
    }
}

/// What tells a replica's weights from others, as bits.
fn sums_of_squares(replica: &Replica) -> Vec<u64> {
    let values: Vec<_> = replica.model.parameters().into_iter().map(|p| p.value).collect();
    optim::sums_of_squares(&values).into_iter().map(f64::to_bits).collect()
}

/// The rows of a batch that member `member` of `members` computes; `unit` of them belong together.
fn share(rows: usize, unit: usize, member: usize, members: usize) -> Range<usize> {
    let units = rows / unit;
    units * member / members * unit..units * (member + 1) / members * unit
}

/// How many threads each of `count` replicas has of `threads`.
pub(crate) fn threads_each(threads: usize, count: usize) -> usize {
    (threads / count.max(1)).max(1)
}

/// Refuses devices that could not keep in step.
///
/// # Errors
/// [`Error::Config`] for devices of different kinds, whose arithmetic differs in the last bit.
pub(crate) fn check_kinds(devices: &[Device]) -> Result<()> {
    let part = |device: &Device| match lowkey_kernels::device::properties(device) {
        Some(properties) => properties.part,
        None if is_cpu(device) => "the CPU".to_owned(),
        None => "an unknown device".to_owned(),
    };
    let parts: Vec<String> = devices.iter().map(part).collect();
    match parts.iter().find(|part| **part != parts[0]) {
        Some(other) => {
            let why = format!("{} and {other} do not round alike; take devices of one kind", parts[0]);
            Err(Error::config("run.devices", parts.join(", "), why))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
