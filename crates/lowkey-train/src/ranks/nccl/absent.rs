//! What stands for NCCL in a build that has none.

use std::convert::Infallible;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::comm::Wire;
use super::launched::Launched;
use super::seat::Seat;
use crate::error::{Error, Result};
use crate::run_config::RankSum;

/// There are none.
#[derive(Debug)]
pub(crate) struct Gpus(Infallible);

pub(super) fn join(launched: &Launched, _: fn(&str)) -> Result<(Box<dyn Wire>, Arc<Gpus>)> {
    let Launched { by, size, .. } = launched;
    let why = format!(
        "{by} has started {size} processes, which meet through NCCL, and this build has none; build with --features cuda, or start them \
         by an mpirun and build with --features mpi, or start one process"
    );
    Err(Error::Launch { why })
}

/// Nobody is to meet there.
pub fn say_where_to_meet() {}

pub(super) fn name() -> Result<Vec<u8>> {
    Err(none())
}

pub(super) fn serial_number(_: &Device) -> Result<Vec<u8>> {
    Err(none())
}

fn none() -> Error {
    let why = "this build has no NCCL; build with --features cuda, or write [ranks] transport = \"mpi\"";
    Error::Launch { why: why.into() }
}

impl Gpus {
    pub(super) fn link(_: &Device, _: (usize, usize), _: Vec<u8>, _: fn(&str)) -> Self {
        unreachable!("refused before, as there is no NCCL")
    }

    pub(super) fn check_is_of(&self, _: &Device) -> Result<()> {
        match self.0 {}
    }

    pub(super) fn seat(&self) -> &Seat {
        match self.0 {}
    }

    pub(super) fn leave(&self) {
        match self.0 {}
    }

    pub(crate) fn sum_tensor(&self, _: Tensor<1>, _: RankSum) -> Tensor<1> {
        match self.0 {}
    }
}
