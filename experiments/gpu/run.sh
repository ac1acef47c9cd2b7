#!/usr/bin/env bash
# All that a GPU has to show, in one go: what it is, the kernels' tests, loss curves against the CPU, speed beside PyTorch.
#
#   experiments/gpu/run.sh DEVICE OUT
#
# DEVICE as `lowkey devices` names it. OUT is a folder for logs, figures and a summary. From the environment:
#   LOWKEY  the binary [target/release/lowkey], built with the device's feature
#   TESTS   the kernels' test binary; without it no tests
#   PEER    the PyTorch script of experiments/speed/compare.py; without it only lowkey is timed
#   PYTHON  an interpreter, with torch if there is a PEER [python3]
#   STEPS   steps of the loss curves [100]
#   SHAPES  shapes to time ["d768 d1536"]
# Each part has a time of its own and none stops the others: the whole ends within nine minutes. Exit code 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
device=${1:?DEVICE} out=${2:?OUT}
lowkey=${LOWKEY:-target/release/lowkey} python=${PYTHON:-python3} steps=${STEPS:-100} shapes=${SHAPES-d768 d1536}
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.csv
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    if timeout "$limit" "$@" > "$out/$name.log" 2>&1; then state=passed; else state="failed ($?)" failed=1; fi
    printf '%-22s %-14s %4d s\n' "$name" "$state" $((SECONDS - begun)) | tee -a "$out/summary.txt"
}

train() { # NAME DEVICE SET...
    local name=$1 on=$2
    shift 2
    RUST_LOG=lowkey_kernels=info "$lowkey" train configs/quickstart.toml --out "$out/runs/$name" --overwrite --device "$on" --set training.steps="$steps" \
        --set lr_scheduler.warmup_steps=$((steps < 20 ? steps / 2 : 10)) --set eval.every=0 --set eval.batches=1 --set metrics.every=1 "$@"
}

: > "$out/summary.txt"
part devices 30 "$lowkey" devices --json
if [ -n "${TESTS:-}" ]; then
    part kernels 120 env LOWKEY_TEST_DEVICE="$device" "$TESTS" attention:: block:: cached:: fused:: optim:: gpu::
fi
export -f train
export lowkey out steps
part train-cpu 90 bash -c 'train cpu cpu'
part train-f32 60 bash -c "train f32 $device"
part curves-f32 10 "$python" experiments/gpu/curves.py "$out/runs/cpu" "$out/runs/f32" --within 1e-3
for dtype in bf16 f16; do
    if "$lowkey" bench train --shape d256 --batch 1 --seq 32 --steps 1 --warmup 0 --device "$device" --dtype $dtype > /dev/null 2>&1; then
        part "train-$dtype" 60 bash -c "train $dtype $device --set training.dtype=$dtype"
        part "curves-$dtype" 10 "$python" experiments/gpu/curves.py "$out/runs/f32" "$out/runs/$dtype" --within 0.05
    else
        printf '%-22s not on this device\n' "train-$dtype" | tee -a "$out/summary.txt"
    fi
done
for shape in $shapes; do
    # bf16 where the device has it: what the peer computes in.
    dtype=f32
    if [ -d "$out/runs/bf16" ]; then dtype=bf16; fi
    part "speed-$shape" 150 "$python" experiments/speed/compare.py --what train --shapes "$shape" --device "$device" --dtype $dtype \
        --rounds 2 --steps 8 --warmup 4 --lowkey "$lowkey" --out "$out/speed-$shape.csv" ${PEER:+--peer "$PEER"}
done
cat "$out"/curves-*.log "$out"/speed-*.log 2> /dev/null | tee -a "$out/summary.txt"
exit $failed
