#!/usr/bin/env python3
"""Speed and memory of lowkey against PyTorch on the same shapes, in one sitting, alternating.

    python experiments/speed/compare.py --peer TORCH_TRAIN.py
    python experiments/speed/compare.py --peer TORCH_TRAIN.py --what train --shapes d256 --modes eager --rounds 5

Run from the project's root after `cargo build --release`, on an otherwise idle machine, with an interpreter that has torch. Every
round runs each side once (A B A B ...), each run in a process of its own. Prints ratios and writes every single run to a CSV file.

The peer is a script with this interface, whose last line of output is a JSON object with `tokens_per_s` and `peak_rss_mb`, in
training also `params` and `flops_per_token`:

    PEER train  --shape d256 --batch 8 --seq 256 --mode eager|compile --threads N --steps K --warmup K
    PEER decode --shape d256 --context 4096 --new K --way absorbed --threads N

With --device, training is measured on a GPU; the peer then gets `--device cuda --dtype f32|bf16` too, and memory is `gpu_mb` of
lowkey (what it has reserved) against `peak_gpu_mb` of the peer.
"""
import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

# Sequences and tokens of each as `lowkey bench` has them by default, and one long sequence.
BATCHES = {"d256": [(8, 256), (1, 2048)], "d512": [(4, 512), (1, 2048)], "d768": [(16, 1024)], "d1536": [(8, 2048)]}
CONTEXTS = (512, 4096, 32768)
COLUMNS = ["what", "shape", "batch", "length", "side", "round", "threads", "tokens_per_s", "step_ms", "ms_per_token", "peak_rss_mb"]
COLUMNS += ["device", "dtype", "gpu_mb"]
COLUMNS += ["params", "flops_per_token", "model_flops_per_s", "mfu", "loss_first", "loss_last", "bandwidth_fraction"]


def run(command):
    """Runs a command and returns the JSON object that its output ends with."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{result.stderr[-2000:]}")
    text = result.stdout
    # A whole pretty object, or the last line of more.
    figures = json.loads(text if text.startswith("{") else text.strip().splitlines()[-1])
    # One context and one way were asked for.
    return {**figures, **figures["rows"][0]} if "rows" in figures else figures


def sides(case, arguments):
    """Names and commands of what is compared on a case, lowkey first."""
    what, shape, batch, length = case
    if what == "train":
        common = ["train", "--shape", shape, "--batch", batch, "--seq", length]
        common += ["--threads", arguments.threads, "--steps", arguments.steps, "--warmup", arguments.warmup]
        of_peer = ["--dtype", arguments.dtype, "--device", "cpu" if arguments.device == "cpu" else "cuda"]
        of_lowkey = ["--dtype", arguments.dtype, "--device", arguments.device]
        modes = {f"torch {mode}": ["--mode", mode, *of_peer] for mode in arguments.modes}
    else:
        common = ["decode", "--shape", shape, "--context", length, "--new", arguments.new, "--way", "absorbed"]
        common += ["--threads", arguments.threads]
        modes, of_lowkey = {"torch eager": []}, []
    found = {"lowkey": [arguments.lowkey, "bench", *common, *of_lowkey, "--json"]}
    if arguments.peer:
        found.update({name: [sys.executable, arguments.peer, *common, *mode] for name, mode in modes.items()})
    return found


def agree(case, runs):
    """Both sides must have had the same model and counted the same work."""
    for key in ("params", "flops_per_token"):
        values = {name: figures[0][key] for name, figures in runs.items() if key in figures[0]}
        if len({float(value) for value in values.values()}) > 1:
            raise SystemExit(f"{case}: {key} differs: {values}")


def report(case, runs):
    what, shape, batch, length = case
    rate = {name: [figures["tokens_per_s"] for figures in all_figures] for name, all_figures in runs.items()}
    keys = ("gpu_mb", "peak_gpu_mb", "peak_rss_mb")
    peak = {name: [next((f[k] for k in keys if f.get(k)), float("nan")) for f in all] for name, all in runs.items()}
    own_rate, own_peak = statistics.median(rate["lowkey"]), statistics.median(peak["lowkey"])
    for name, rates in rate.items():
        median, memory = statistics.median(rates), statistics.median(peak[name])
        spread = f"{median:8.1f} ({min(rates):.1f}..{max(rates):.1f})"
        sizes = f"{batch} x {length}"
        print(
            f"{what:7}{shape:7}{sizes:10}{name:15}{spread:30}{own_rate / median:7.2f}{memory:9.0f}{own_peak / memory:8.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the other side's script; without it only lowkey is measured")
    parser.add_argument("--what", nargs="+", default=["train", "decode"], choices=["train", "decode"])
    parser.add_argument("--shapes", nargs="+", default=["d256", "d512"], choices=list(BATCHES))
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], help="of the peer, in training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a training run")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of training, as lowkey names it: cpu, cuda, vulkan")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"], help="of training")
    parser.add_argument("--new", type=int, default=64, help="timed tokens of a decoding run")
    parser.add_argument("--lowkey", default="target/release/lowkey", help="the binary")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.csv")
    arguments = parser.parse_args()
    cases = []
    for what in arguments.what:
        for shape in arguments.shapes:
            lengths = BATCHES[shape] if what == "train" else [(1, context) for context in CONTEXTS]
            cases += [(what, shape, batch, length) for batch, length in lengths]
    print(f"{'':39}{'tokens/s':30}{'lowkey':>7}{'peak':>9}{'lowkey':>8}")
    print(f"{'what':7}{'shape':7}{'sizes':10}{'side':15}{'median (min..max)':30}{'/ it':>7}{'MiB':>9}{'/ it':>8}")
    with arguments.out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        table.writeheader()
        for case in cases:
            commands, runs = sides(case, arguments), {}
            for count in range(1, arguments.rounds + 1):
                for name, command in commands.items():
                    figures = run(command)
                    runs.setdefault(name, []).append(figures)
                    what, shape, batch, length = case
                    own = {"what": what, "shape": shape, "batch": batch, "length": length, "side": name, "round": count}
                    table.writerow({**figures, **own, "threads": arguments.threads})
                    file.flush()
            agree(case, runs)
            report(case, runs)


if __name__ == "__main__":
    main()
