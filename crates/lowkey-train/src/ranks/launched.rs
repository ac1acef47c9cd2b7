//! Who started a process as one of several, as its environment tells.

use crate::error::{Error, Result};

/// Who started this process as one of several, and what its environment says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launched {
    /// The program.
    pub by: &'static str,
    /// Which of them this is, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

/// What starts ranks that have to find each other by themselves.
pub(super) const TORCHRUN: &str = "torchrun";

impl Launched {
    /// Whether this process was started by `mpirun`, `srun` or `torchrun`, as one of at least one.
    pub fn read() -> Option<Self> {
        Self::find(|name| std::env::var(name).ok())
    }

    pub(super) fn find(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        /// Who it is, how many, which one; what must be there beside, as a job's script has the rest of it, too.
        const LAUNCHERS: [(&str, &str, &str, Option<&str>); 5] = [
            ("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", None),
            ("mpiexec", "PMI_SIZE", "PMI_RANK", None),
            ("mpirun (MVAPICH)", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", None),
            ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", Some("SLURM_STEP_ID")),
            (TORCHRUN, "WORLD_SIZE", "RANK", Some("LOCAL_RANK")),
        ];
        let number = |name: &str| variable(name)?.parse::<usize>().ok();
        LAUNCHERS.iter().find_map(|(by, size, rank, beside)| {
            let (size, rank) = (number(size)?, number(rank)?);
            beside.is_none_or(|name| variable(name).is_some()).then_some(Self { by, rank, size })
        })
    }

    /// Refuses to be one of several processes that know nothing of each other.
    ///
    /// # Errors
    /// [`Error::Launch`] with the mend.
    pub fn refuse_several(what: &str) -> Result<()> {
        match Self::read() {
            Some(Self { by, size: size @ 2.., .. }) => {
                let why =
                    format!("{by} has started {size} processes, and {what} is the work of one; start it by itself");
                Err(Error::Launch { why })
            }
            _ => Ok(()),
        }
    }
}

/// Where ranks meet that only their environment brings together, by the variables of `torchrun`.
#[cfg(any(test, feature = "nccl"))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rendezvous {
    /// The machine of rank 0, by name or number,
    address: String,
    /// and a port there, on which `torchrun` itself listens.
    port: u16,
    /// Which rank of its machine this is.
    pub(super) local_rank: usize,
}

#[cfg(any(test, feature = "nccl"))]
impl Rendezvous {
    /// That of this process, where `torchrun` has started it as one of several.
    #[cfg(feature = "nccl")]
    pub(super) fn read() -> Option<Self> {
        let launched = Launched::read().filter(|launched| launched.by == TORCHRUN && launched.size > 1);
        launched.and_then(|_| Self::find(|name| std::env::var(name).ok()))
    }

    pub(super) fn find(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        Some(Self {
            address: variable("MASTER_ADDR")?,
            port: variable("MASTER_PORT")?.parse().ok()?,
            local_rank: variable("LOCAL_RANK")?.parse().ok()?,
        })
    }

    /// What NCCL is told in `NCCL_COMM_ID`: the port after that of `torchrun`.
    pub(super) fn for_nccl(&self) -> String {
        let port = self.port.checked_add(1).unwrap_or(self.port - 1);
        match self.address.contains(':') {
            true => format!("[{}]:{port}", self.address),
            false => format!("{}:{port}", self.address),
        }
    }
}
