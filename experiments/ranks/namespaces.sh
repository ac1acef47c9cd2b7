#!/usr/bin/env bash
# Two hosts on a link of known speed: how long a step takes and how many bytes it sends, beside `lowkey plan`, and whether its bits are
# those of one process.
#
#   experiments/ranks/namespaces.sh OUT [LINK...]
#
# A host is a network namespace with a name and a core of its own (0 and 1), with one rank in it. They are joined by a pair of veth, or by wire.c where there is
# delay or loss, whose queues (tbf) hold them to a rate. Needs root, `ip`, `tc`, a C compiler and Open MPI. Lines are added to
# OUT/namespaces.csv. From the environment:
#   LOWKEY  the binary, built with --features mpi [target/release/lowkey]
#   STEPS   steps that are measured, behind two that are not [10]
#   MODELS  ["large medium small"]
#   CASES   sum and zero of [ranks] ["ordered:0 ordered:1 fastest:0 fastest:1"]
#   MCA     more options of mpirun
set -euo pipefail

# Open MPI starts its daemon on the other host by this script: agent HOST COMMAND...
if [ "$1" = agent ]; then
    shift 2
    exec ip netns exec lowkey-b taskset -c 1 unshare --uts sh -c "hostname lowkey-b; $*"
fi

script=$(realpath "$0")
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?OUT}")
shift
lowkey=$(realpath "${LOWKEY:-target/release/lowkey}")
steps=${STEPS:-10} cases=${CASES:-ordered:0 ordered:1 fastest:0 fastest:1} models=${MODELS:-large medium small}
# Mbit/s, microseconds one way, frames lost in a million.
declare -A links=([open]="0 0 0" [gigabit]="1000 0 0" [fast]="100 0 0" [far]="100 5000 0" [lossy]="100 5000 1000")
[ $# -gt 0 ] || set -- open gigabit fast far lossy
# The small model's steps are as long as its messages are under way.
medium="--set model.hidden_size=96 --set model.num_hidden_layers=4 --set model.intermediate_size=256"
declare -A sizes=([large]="" [medium]="$medium" [small]="--set model.hidden_size=32 --set model.num_hidden_layers=1 --set model.intermediate_size=64
    --set model.kv_lora_rank=8 --set model.qk_nope_head_dim=8 --set model.qk_rope_head_dim=8 --set model.v_head_dim=8")
mkdir -p "$out"
work=$(mktemp -d)
wire=
down() {
    if [ -n "$wire" ]; then kill "$wire" 2> /dev/null || true; wait "$wire" 2> /dev/null || true; fi
    wire=
    # Where this was cut short, ranks that have lost each other would wait as long as they are patient.
    for host in a b; do
        ip netns pids lowkey-$host 2> /dev/null | xargs -r kill -KILL 2> /dev/null || true
        ip netns del lowkey-$host 2> /dev/null || true
    done
}
trap 'down; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

up() { # RATE DELAY LOSS
    down
    for host in a b; do ip netns add lowkey-$host; done
    if [ "$2$3" = 00 ]; then
        ip link add lowkey-a0 netns lowkey-a type veth peer name lowkey-b0 netns lowkey-b
        # Frames as a cable has them, every one with headers of its own. Where that would keep the processors busy, the kernel counts
        # up to 64 KiB as one frame, as with a card that cuts them itself; their time on the link (tbf) is that of the cut ones.
        [ "$1" != 100 ] || for host in a b; do ip -n lowkey-$host link set lowkey-${host}0 gso_max_segs 1; done
    else
        cc -O2 -o "$work/wire" experiments/ranks/wire.c
        : > "$work/wire.log"
        "$work/wire" lowkey-a0 lowkey-b0 "$2" "$3" > "$work/wire.log" &
        wire=$!
        until grep -q ready "$work/wire.log"; do kill -0 "$wire"; sleep 0.05; done
        for host in a b; do ip link set lowkey-${host}0 netns lowkey-$host; done
    fi
    for host in a b; do
        local number=$([ $host = a ] && echo 1 || echo 2)
        ip -n lowkey-$host addr add 10.19.0.$number/24 dev lowkey-${host}0
        ip -n lowkey-$host link set lo up
        ip -n lowkey-$host link set lowkey-${host}0 up
        # The one that every namespace may choose, whatever the machine's is.
        ip netns exec lowkey-$host sysctl -qw net.ipv4.tcp_congestion_control=reno net.ipv6.conf.all.disable_ipv6=1
        if [ "$1" != 0 ]; then
            tc -n lowkey-$host qdisc add dev lowkey-${host}0 root tbf rate "$1"mbit burst $(($1 > 500 ? 128 : 16))kb latency 50ms
        fi
    done
}

counters() { # bytes that left a and b, and TCP segments sent again
    for host in a b; do
        ip netns exec lowkey-$host cat "/sys/class/net/lowkey-${host}0/statistics/tx_bytes"
    done
    for host in a b; do
        ip netns exec lowkey-$host awk '/^Tcp: [0-9]/ { print $13 }' /proc/net/snmp
    done
}

train() { # OUT STEPS OPTIONS...
    local out=$1 steps=$2
    shift 2
    ip netns exec lowkey-a taskset -c 0 unshare --uts sh -c 'hostname lowkey-a; exec "$@"' - mpirun --allow-run-as-root --bind-to none \
        --host 10.19.0.1:1,10.19.0.2:1 --mca plm_rsh_agent "$script agent" --mca oob_tcp_if_include 10.19.0.0/24 \
        --mca btl tcp,self --mca btl_tcp_if_include 10.19.0.0/24 ${MCA:-} -n 2 \
        "$lowkey" train experiments/ranks/run.toml --out "$out" --set training.steps="$steps" "$@" > "$out.log" 2>&1 &
    # So that a signal is heard at once.
    wait $!
}

head=link,rate_mbit_s,delay_us,loss_ppm,tcp_gbit_s,planned_gbit_s,model,sum,zero,steps,seconds_per_step,planned_s,planned_compute_s,planned_link_s
head+=,bytes_per_step_a,bytes_per_step_b,planned_bytes,segments_again,same_bits
[ -s "$out/namespaces.csv" ] || echo "$head" > "$out/namespaces.csv"
for link in "$@"; do
    read -r rate delay loss <<< "${links[$link]}"
    up "$rate" "$delay" "$loss"
    bandwidth=$(awk "BEGIN { print ($rate > 0 ? $rate / 1000 : 1000) }")
    ip netns exec lowkey-b taskset -c 1 python3 experiments/ranks/goodput.py serve 10.19.0.2 &
    tcp=$(ip netns exec lowkey-a taskset -c 0 python3 experiments/ranks/goodput.py ask 10.19.0.2 40 | awk '{ print $1 * 8 / 1e9 }')
    wait $!
    # What a connection that waits for lost frames carries is not for a plan to know: it is measured, and given to it, with what a plan
    # takes off for headers.
    [ "$loss" = 0 ] || bandwidth=$(awk "BEGIN { print $tcp * 1538 / 1448 }")
    for model in $models; do
        alone=$work/alone-$model
        [ -d "$alone" ] || "$lowkey" train experiments/ranks/run.toml --out "$alone" --set training.steps=$((steps + 2)) \
            ${sizes[$model]} > "$alone.log" 2>&1
        for case in $cases; do
            sum=${case%:*} zero=${case#*:}
            options=(${sizes[$model]} --set ranks.sum="$sum" --set ranks.zero="$zero")
            before=($(counters))
            train "$work/short" 2 "${options[@]}"
            between=($(counters))
            train "$work/long" $((steps + 2)) "${options[@]}"
            after=($(counters))
            plan=$("$lowkey" plan experiments/ranks/run.toml "${options[@]}" --ranks 2 --json \
                --bandwidth "$bandwidth" --latency $((delay > 0 ? delay : 50)))
            same=yes
            cmp -s "$alone"/checkpoints/step-*/model.safetensors "$work"/long/checkpoints/step-*/model.safetensors || same=no
            python3 - "$link,$rate,$delay,$loss,$tcp,$bandwidth,$model,$sum,$zero,$steps" "$plan" "$work/long/metrics.jsonl" "$same" \
                "${before[@]}" "${between[@]}" "${after[@]}" << 'END' | tee -a "$out/namespaces.csv"
import json, sys
from statistics import median

case, plan, metrics, same, *counters = sys.argv[1:]
ranks, times = json.loads(plan)["on_ranks"], [json.loads(line)["time_s"] for line in open(metrics)]
before, between, after = (list(map(int, counters[i : i + 4])) for i in (0, 4, 8))
steps = len(times) - 2
# The start and the end of both runs are the same: the longer one has so many steps more.
each = [((c - b) - (b - a)) / steps for a, b, c in zip(before, between, after)]
compute, link = ranks["compute_s"], ranks["link_s"]
# The last line is written behind an evaluation.
seconds = median(b - a for a, b in zip(times[1:-2], times[2:-1]))
numbers = [f"{x:.5f}" for x in (seconds, compute + link, compute, link)] + [f"{x:.0f}" for x in (*each[:2], ranks["bytes_per_step"])]
print(",".join([case, *numbers, f"{(after[2] + after[3] - between[2] - between[3])}", same]))
END
            rm -rf "$work/short" "$work/long"
        done
    done
done
