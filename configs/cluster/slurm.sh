#!/usr/bin/env bash
# A run on several nodes that outlives its time: two minutes before the end every rank is told (SIGUSR1), one checkpoint is written,
# and the job is queued again and goes on from there.
#
#   sbatch configs/cluster/slurm.sh configs/mla-124m.toml
#
#SBATCH --job-name=lowkey
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

run=$1
# The first start makes the run; those that follow find its checkpoints.
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && resume=(--resume)

# --signal without "B:" reaches the ranks themselves. pmix or pmi2, as the MPI was built: srun --mpi=list.
srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores \
    "${LOWKEY:-target/release/lowkey}" train "$run" "${resume[@]}"
code=$?

# A run that was stopped ends with 0, as one that is finished does; which of them it was stands in outcome.json.
name=$(sed -n 's/^name = "\(.*\)"$/\1/p' "$run" | head -n 1)
if [ "$code" -eq 0 ] && grep -q '"state": *"stopped"' "runs/$name/outcome.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
