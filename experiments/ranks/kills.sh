#!/usr/bin/env bash
# Kills a rank of a run at many moments, from its start to its end: whether the job ends soon and badly, and whether the run goes on to
# the bits of one that nobody has disturbed.
#
#   experiments/ranks/kills.sh OUT
#
# Lines are written to OUT/kills.csv; exit code 1 where one of them is not as it should be. From the environment:
#   LOWKEY   the binary, built with --features mpi [target/release/lowkey]
#   MPIRUN   the mpirun of its MPI [mpirun]
#   RANKS    how many [3]
#   MOMENTS  how often [20]
#   SEED     of the random moments and ranks [1]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?OUT}")
lowkey=$(realpath "${LOWKEY:-target/release/lowkey}")
mpirun=${MPIRUN:-mpirun} ranks=${RANKS:-3} moments=${MOMENTS:-20}
RANDOM=${SEED:-1}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# More ranks than cores, as root where that is who runs it.
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

now() { date +%s%3N; }
start() { # OUT OPTIONS...
    local to=$1
    shift
    "$mpirun" -n "$ranks" "$lowkey" train experiments/ranks/run.toml --out "$to" --set model.hidden_size=32 \
        --set model.num_hidden_layers=1 --set model.intermediate_size=64 --set training.batch_size=12 --set training.steps=300 \
        --set checkpoint.every=20 --set optimizer.kind=adamw "$@" > "$to.log" 2>&1
}
of_rank() { # OUT RANK: its process
    local pid
    for pid in $(pgrep -f -- "--out $1 "); do
        if tr '\0' '\n' 2> /dev/null < "/proc/$pid/environ" | grep -qE "^(OMPI_COMM_WORLD_RANK|PMI_RANK)=$2\$"; then echo "$pid"; fi
    done
}
step_of() { tail -n 1 "$1/metrics.jsonl" 2> /dev/null | sed -n 's/.*"step":\([0-9]*\).*/\1/p'; }

begun=$(now)
start "$work/whole"
whole=$(($(now) - begun))
echo "undisturbed: $whole ms"
failed=0
echo "moment,rank,killed_after_ms,at_step,exit_code,ended_after_ms,same_bits" > "$out/kills.csv"
for ((moment = 1; moment <= moments; moment++)); do
    rank=$((RANDOM % ranks)) run=$work/run-$moment
    # One in each part of the run, its start and its end included, at a random place of it.
    after=$(((moment - 1) * whole / moments + (RANDOM * 32768 + RANDOM) % (whole / moments)))
    begun=$(now)
    start "$run" &
    job=$!
    sleep "$(awk "BEGIN { print $after / 1000 }")"
    # At the very start there is none yet.
    until pid=$(of_rank "$run" $rank) && [ -n "$pid" ]; do
        kill -0 $job 2> /dev/null || break
        sleep 0.01
    done
    step=$(step_of "$run" || true)
    killed=$(now)
    if [ -z "$pid" ] || ! kill -KILL $pid 2> /dev/null; then
        # It was faster than the first one, and is over: once more, and earlier.
        wait $job || true
        rm -rf "$run"
        whole=$((whole * 9 / 10)) moment=$((moment - 1))
        continue
    fi
    code=0
    wait $job || code=$?
    ended=$(now)
    start "$run" --resume || true
    same=yes
    for name in model.safetensors trainer.safetensors; do
        cmp -s "$work/whole/checkpoints/step-000300/$name" "$run/checkpoints/step-000300/$name" || same=no
    done
    losses() { sed 's/.*"train_loss":\([^,]*\).*/\1/' "$1/metrics.jsonl"; }
    cmp -s <(losses "$work/whole") <(losses "$run") || same=no
    echo "$moment,$rank,$((killed - begun)),${step:-0},$code,$((ended - killed)),$same" | tee -a "$out/kills.csv"
    if [ $code = 0 ] || [ $((ended - killed)) -gt 10000 ] || [ $same = no ]; then
        failed=1
        cp "$run.log" "$out/failed-$moment.log"
    fi
    rm -rf "$run"
done
exit $failed
