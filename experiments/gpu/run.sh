#!/usr/bin/env bash
# All that a GPU has to show, in one go: what it is, the kernels' tests, loss curves against the CPU, speed beside PyTorch, and where
# its time goes.
#
#   experiments/gpu/run.sh DEVICE OUT
#
# DEVICE as `lowkey devices` names it. OUT is a folder for logs, figures and a summary. From the environment:
#   LOWKEY  the binary [target/release/lowkey], built with the device's feature
#   OTHER   another build of it, with the feature cuda-nvrtc say, timed beside the first
#   TESTS   test binaries (lowkey_kernels-*, lowkey_train-*), with spaces between; without them no tests
#   TEXT    tinyshakespeare.txt, for the curves of configs/shakespeare-char.toml [those of configs/quickstart.toml]
#   PEER    a PyTorch script with the interface of `lowkey bench peer`; without it and OTHER only lowkey is timed
#   PYTHON  an interpreter, with torch if there is a PEER [python3]
#   STEPS   steps of the loss curves [300]
#   SHAPES  shapes to time, the first one in most detail ["d768 d1536"]
#   ROUNDS  of each side in a comparison [2 on the first shape, 1 on the others]
#   PARTS   what to run, in this order ["tests speed curves"]
#   LIMIT   seconds that all of it may take [530]
# Each part has a time of its own and none stops the others: the whole ends within LIMIT. Exit code 1 where a part failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/../.."
device=${1:?DEVICE} out=${2:?OUT}
lowkey=${LOWKEY:-target/release/lowkey} python=${PYTHON:-python3} steps=${STEPS:-300} shapes=${SHAPES-d768 d1536}
parts=${PARTS:-tests speed curves} deadline=$((SECONDS + ${LIMIT:-530}))
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.csv "$out"/*.json
: > "$out/summary.txt"
failed=0
say() { printf '%-22s %-14s %s\n' "$1" "$2" "$3" | tee -a "$out/summary.txt"; }

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS left=$((deadline - SECONDS)) state
    shift 2
    if [ $left -lt 5 ]; then
        say "$name" "left out" "no time"
        failed=1
        return 1
    fi
    # What does not end when asked to is killed: a run that was asked finishes its step and saves first.
    if timeout -k 5 $((limit < left ? limit : left)) "$@" > "$out/$name.log" 2>&1; then state=passed; else state="failed ($?)" failed=1; fi
    say "$name" "$state" "$((SECONDS - begun)) s"
    [ "$state" = passed ]
}

# A run of one of the two models whose loss is followed, 256 tokens a step for the large one: what a CPU can do, too.
train() { # MODEL NAME DEVICE SET...
    local model=$1 name=$2 on=$3
    shift 3
    local run=configs/quickstart.toml set=()
    case $model in
        small) if [ -n "${TEXT:-}" ]; then run=configs/shakespeare-char.toml set=(--set data.path="$TEXT"); fi ;;
        large)
            run=configs/mla-124m.toml
            set=(--set data.dataset=datasets/storybook.toml --set data.seq_len=256 --set training.batch_size=1
                --set 'eval.prompts=[]' --set checkpoint.keep=1 --set optimizer.lr=3e-4)
            ;;
    esac
    # In this process's place, so that whoever ends it ends the run.
    RUST_LOG=lowkey_kernels=info exec "$lowkey" train "$run" --out "$out/runs/$model-$name" --overwrite --device "$on" "${set[@]}" \
        --set training.steps="$steps" --set lr_scheduler.warmup_steps=$((steps / 3)) --set eval.every=0 --set eval.batches=1 \
        --set checkpoint.every=0 --set metrics.every=1 --set metrics.tensorboard=false "$@"
}
export -f train
export lowkey out steps

# A run ends with an evaluation on the whole held-out text, which is part of its time; its last step is logged with one.
curve() { # MODEL NAME SECONDS DEVICE SET...
    local model=$1 name=$2 limit=$3 on=$4
    shift 4
    part "train-$model-$name" "$limit" bash -c "train $model $name $on $*"
}

follow() { # MODEL A B WITHIN LEAST
    part "curves-$1-$3" 10 "$python" experiments/gpu/curves.py "$out/runs/$1-$2" "$out/runs/$1-$3" --within "$4" --least "$5"
}

# The CPU's run, as far as it comes: of its steps, those that it has taken are compared.
on_cpu() { # MODEL
    local left=$((deadline - SECONDS - 40)) state=passed
    if [ $left -lt 5 ]; then
        say "train-$1-cpu" "left out" "no time"
        return
    fi
    timeout -k 5 $left bash -c "train $1 cpu cpu" > "$out/train-$1-cpu.log" 2>&1 || state="ended ($?)"
    say "train-$1-cpu" "$state" ""
}

part devices 60 bash -c '"$lowkey" devices --json > "$out/devices.json"'
# What the device calculates in, of 16 bits; bf16 is what the peer computes in.
formats=$("$python" - "$out/devices.json" "$device" << 'PYTHON'
import json, sys
devices = json.load(open(sys.argv[1]))["devices"]
kind = sys.argv[2].split(":")[0]
dtypes = next((d["properties"]["dtypes"] for d in devices if sys.argv[2] == d["name"] or d["name"].split(":")[0] == kind), [])
print(*(format for format in ("bf16", "f16") if format in dtypes))
PYTHON
) || failed=1
dtype=f32
case " $formats " in *" bf16 "*) dtype=bf16 ;; esac

for of in $parts; do
    case $of in
        tests)
            for binary in ${TESTS:-}; do
                # Plain kernels: the others are held to them where they are chosen, and choosing takes minutes for so many shapes.
                # shellcheck disable=SC2046 # one name a word
                part "tests-$(basename "$binary" | sed 's/-.*//')" 200 env LOWKEY_TEST_DEVICE="$device" LOWKEY_TUNE=off \
                    "$binary" --nocapture $(cat .ci/gpu-tests)
            done
            ;;
        speed)
            rounds=2 limit=170
            for shape in $shapes; do
                timing=(--shape "$shape" --device "$device" --dtype $dtype --steps 8 --warmup 4)
                if [ -n "${PEER:-}${OTHER:-}" ]; then
                    part "speed-$shape" $limit "$lowkey" bench peer "${timing[@]}" --rounds "${ROUNDS:-$rounds}" --csv "$out/speed-$shape.csv" \
                        ${PEER:+--python "$python" --script "$PEER"} ${OTHER:+--other "$OTHER"}
                else
                    part "speed-$shape" $limit "$lowkey" bench train "${timing[@]}"
                fi
                rounds=1 limit=110
            done
            for shape in ${shapes%% *}; do
                part "kernels-$shape" 90 "$lowkey" bench ops --shape "$shape" --device "$device" --dtype $dtype --steps 4 --warmup 2
            done
            ;;
        curves)
            # The CPU's runs take longest and need no GPU: they go on beside the others.
            for model in small large; do on_cpu $model; done &
            for model in small large; do
                curve $model f32 90 "$device"
                for format in $formats; do
                    curve $model $format 90 "$device" --set training.dtype=$format
                    follow $model f32 $format 0.05 $((steps * 9 / 10))
                done
            done
            wait
            for model in small large; do follow $model cpu f32 1e-3 $((steps < 10 ? steps : 10)); done
            ;;
        *) say "$of" unknown "parts are tests, speed, curves" && failed=1 ;;
    esac
done
cat "$out"/curves-*.log "$out"/speed-*.log "$out"/kernels-*.log 2> /dev/null | tee -a "$out/summary.txt"
exit $failed
