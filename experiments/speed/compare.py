#!/usr/bin/env python3
"""Training speed of lowkey against PyTorch on the same shapes, in one sitting, alternating.

    python experiments/speed/compare.py --peer TORCH_TRAIN.py [--rounds 3] [--threads 2] [--modes eager compile]

Run from the project's root after `cargo build --release`, on an otherwise idle machine; the interpreter must have torch. The peer
is a script with the interface `PEER train --shape d256 --mode eager --threads N --steps K` that prints a JSON line with
`tokens_per_s` and `peak_rss_mb`. Prints one table; machines differ, so read the ratios.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARMUP = 3


def lowkey(shape, threads):
    with tempfile.TemporaryDirectory() as out:
        command = ["target/release/lowkey", "train", f"experiments/speed/{shape}.toml", "--out", out]
        command += ["--set", f"training.threads={threads}"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status != 0:
            raise SystemExit(f"lowkey failed: {' '.join(command)}")
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_s"] for line in lines[WARMUP:]]
        return statistics.median(rates), usage.ru_maxrss / 1024


def torch(peer, shape, mode, threads):
    command = [sys.executable, peer, "train", "--shape", shape, "--mode", mode, "--threads", str(threads), "--steps", "12"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    line = json.loads(result.stdout.strip().splitlines()[-1])
    return line["tokens_per_s"], line["peak_rss_mb"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["d256", "d512"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"])
    arguments = parser.parse_args()
    print(f"{'shape':6} {'side':14} {'tokens/s: median (min..max)':34} {'peak MB':>8} {'lowkey / it':>12}")
    for shape in arguments.shapes:
        rates, memory = {}, {}
        for _ in range(arguments.rounds):
            rate, peak = lowkey(shape, arguments.threads)
            rates.setdefault("lowkey", []).append(rate)
            memory["lowkey"] = peak
            for mode in arguments.modes:
                rate, peak = torch(arguments.peer, shape, mode, arguments.threads)
                rates.setdefault(f"torch {mode}", []).append(rate)
                memory[f"torch {mode}"] = peak
        own = statistics.median(rates["lowkey"])
        for side, values in rates.items():
            median = statistics.median(values)
            spread = f"{median:8.0f} ({min(values):.0f}..{max(values):.0f})"
            print(f"{shape:6} {side:14} {spread:34} {memory[side]:8.0f} {own / median:12.2f}", flush=True)


if __name__ == "__main__":
    main()
