#!/usr/bin/env bash
# Several GPUs of one machine: one process with all of them against one rank on each, and both against one GPU that takes as many passes.
# On NVIDIA's, ranks also move their gradients by NCCL, started by MPI and without it.
#
#   experiments/gpu/ranks.sh KIND COUNT OUT
#
# KIND is `cuda`, `vulkan` or `wgpu`. OUT is a folder for runs and a summary. From the environment:
#   LOWKEY  the binary [target/release/lowkey], built with --features KIND,mpi
#   RUN     the run file [configs/quickstart.toml]
#   STEPS   steps of each run [40]
#   ROWS    of each batch [the run file's]
#   MORE    further arguments of `lowkey train`, with spaces between
#   MPIRUN  what starts ranks [mpirun]
# Prints tokens/s of each and whether losses and weights are the same bits; exit code 1 where those of the ranks are not.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=${1:?KIND} count=${2:?COUNT} out=${3:?OUT}
lowkey=${LOWKEY:-target/release/lowkey} run=${RUN:-configs/quickstart.toml} steps=${STEPS:-40} mpirun=${MPIRUN:-mpirun}
mkdir -p "$out"

rows=${ROWS:-$(python3 -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["training"]["batch_size"])' "$run")}
# shellcheck disable=SC2206 # one word each
few=(--set "training.steps=$steps" --set lr_scheduler.warmup_steps=2 --set eval.batches=1 --set "training.batch_size=$rows"
    --set "training.micro_batch_size=$((rows / count))" --overwrite ${MORE:-})
# Where there is one device of the kind, all of it share that one.
found=$("$lowkey" devices | grep -c "^ *$kind:" || true)
each=$(for i in $(seq 0 $((count - 1))); do printf ',%s:%d' "$kind" $((i < found ? i : 0)); done)

train() { # NAME COMMAND...
    local name=$1
    shift
    "$@" --out "$out/$name" "${few[@]}" > "$out/$name.log" 2>&1 || { echo "$name failed: $(tail -1 "$out/$name.log")"; exit 1; }
    python3 - "$out/$name" <<'P'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
rates = sorted(line["tokens_per_s"] for line in lines[len(lines) // 4:])
print(f"{run.name:10} {rates[len(rates) // 2]:12.0f} tokens/s, loss {lines[-1]['train_loss']:.6f} at step {lines[-1]['step']}")
P
}
weights() { find "$out/$1/checkpoints/" -name '*.safetensors' -path "*$(printf '%06d' "$steps")*" -exec sha256sum {} + | awk '{print $1}' | sort; }

train one "$lowkey" train "$run" --device "$kind:0"
train process "$lowkey" train "$run" --device "${each#,}"
train ranks "$mpirun" -n "$count" "$lowkey" train "$run" --device "$kind"
# Each rank finds the others by its environment, as those that torchrun starts do.
by_environment() {
    local ranks=() rank
    for rank in $(seq 0 $((count - 1))); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 timeout 900 "$@" &
        ranks+=($!)
    done
    for rank in "${ranks[@]}"; do wait "$rank" || { kill "${ranks[@]}" 2> /dev/null; return 1; }; done
}
if [ "$kind" = cuda ]; then
    train nccl "$mpirun" -n "$count" "$lowkey" train "$run" --device cuda --set ranks.transport=nccl
    train environment by_environment "$lowkey" train "$run" --device cuda
    train fastest "$mpirun" -n "$count" "$lowkey" train "$run" --device cuda --set ranks.transport=nccl --set ranks.sum=fastest
fi
same() { if [ "$(weights "$1")" = "$(weights "$2")" ]; then echo "$1 and $2: the same bits"; else echo "$1 and $2: other bits"; return 1; fi; }
# In these NCCL adds up in an order of its own.
same one process || true
[ "$kind" != cuda ] || same one fastest || true
failed=0
same one ranks || failed=1
[ "$kind" != cuda ] || { same one nccl || failed=1; same one environment || failed=1; }
exit "$failed"
