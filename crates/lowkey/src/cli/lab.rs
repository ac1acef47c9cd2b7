//! Arguments of `lowkey lab`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Run what is not finished of an experiment
    #[command(after_help = "\
        A sweep that was stopped or killed goes on where it was: give the same command again.\n\
        --shard i/n takes every n-th run, from i = 0 on, so that several machines share a sweep:\n  \
        Slurm:       sbatch --array=0-7 --wrap 'lowkey lab run E.toml --shard $SLURM_ARRAY_TASK_ID/8'\n  \
        Kubernetes:  an Indexed Job with completions: 8,\n               \
        lowkey lab run E.toml --shard $JOB_COMPLETION_INDEX/8\n  \
        MPI:         mpirun -n 8 lowkey lab run E.toml (each rank takes its runs)\n\n\
        Examples:\n  \
        lowkey lab run experiments/rank-sweep/experiment.toml --dry-run\n  \
        lowkey lab run experiments/rank-sweep/experiment.toml --jobs 2")]
    Run(LabRunArguments),
    /// Gather the finished runs into report.html, table.md and results.csv
    #[command(after_help = "Examples:\n  \
        lowkey lab report experiments/rank-sweep/experiment.toml\n  \
        lowkey lab report experiments/rank-sweep/experiment.toml --decode 512,4096")]
    Report(LabReportArguments),
}

#[derive(Debug, Args)]
pub(crate) struct LabRunArguments {
    /// The experiment file (TOML)
    pub(crate) experiment: PathBuf,
    /// Folder of the runs [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Runs at a time [default: as many as the experiment's threads fit on the cores]
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Only every N-th run, from the I-th on, counted from 0
    #[arg(long, value_name = "I/N")]
    pub(crate) shard: Option<String>,
    /// Show the arms and what they would cost, and run nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LabReportArguments {
    /// The experiment file (TOML)
    pub(crate) experiment: PathBuf,
    /// Folder of the runs [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) runs: Option<PathBuf>,
    /// Measure how fast each arm decodes with so many tokens in the cache, for report.html
    #[arg(long, value_name = "N,N…", value_delimiter = ',')]
    pub(crate) decode: Vec<usize>,
    /// Folder to write to [default: that of the experiment file]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
