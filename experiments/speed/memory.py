#!/usr/bin/env python3
"""Peak memory and speed of training over the length of the sequence: one d256 sequence per step.

    python experiments/speed/memory.py
    python experiments/speed/memory.py --recompute --peer TORCH_TRAIN.py

Run from the project's root after `cargo build --release`; `--recompute` adds runs that compute activations again in the backward
pass, `--peer` (a script as `lowkey bench peer --help` describes it) the same of the other side. Writes memory.csv and memory.svg beside this script.
"""
import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

COLUMNS = ["side", "shape", "batch", "seq", "threads", "peak_rss_mb", "tokens_per_s", "step_ms", "loss_last"]
COLORS = ["#0b6e99", "#d9730d", "#448361", "#ad1a72", "#9f6b53", "#337ea9"]


def run(command):
    """Runs a command and returns the JSON object that its output is, or ends with."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout if result.stdout.startswith("{") else result.stdout.strip().splitlines()[-1])


def figure(points, title):
    """An SVG picture of {side: [(length, MiB)]}, both axes from 0, so that what grows linearly is a straight line."""
    width, height, left, right, top, bottom = 734, 420, 84, 150, 40, 50
    lengths = sorted({x for line in points.values() for x, _ in line})
    highest = max(y for line in points.values() for _, y in line)
    # A round number of MiB that makes four to eight lines.
    step = 2 ** math.ceil(math.log2(highest / 8))
    high = step * math.ceil(highest / step)

    def x_of(length):
        return left + (width - left - right) * length / lengths[-1]

    def y_of(peak):
        return height - bottom - (height - top - bottom) * peak / high

    def text(x, y, words, anchor="middle", color="#333"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>'

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">']
    svg += [f'<rect width="{width}" height="{height}" fill="white"/>', text((left + width - right) / 2, 22, title)]
    for peak in range(0, high + 1, step):
        y = y_of(peak)
        svg += [f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#ddd"/>']
        svg += [text(left - 8, y + 4, f"{peak} MiB", "end")]
    for length in lengths:
        x = x_of(length)
        svg += [f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{height - bottom}" stroke="#eee"/>']
        # The short ones stand too close together to be named.
        if length >= lengths[-1] / 8:
            svg += [text(x, height - bottom + 20, str(length))]
    svg += [text((left + width - right) / 2, height - 10, "tokens per sequence")]
    # Labels of lines that end together are moved apart.
    label_y = math.inf
    for color, (side, line) in zip(COLORS * 2, sorted(points.items(), key=lambda item: item[1][-1][1])):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        svg += [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
        svg += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{color}"/>' for x, y in line]
        label_y = min(y_of(line[-1][1]) + 4, label_y - 16)
        svg += [text(width - right + 10, label_y, side, "start", color)]
    return "\n".join(svg + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--shape", default="d256")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lowkey", default="target/release/lowkey")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for memory.csv and memory.svg")
    arguments = parser.parse_args()
    commands = {"lowkey": [arguments.lowkey, "bench", "train", "--json"]}
    if arguments.peer:
        commands["torch eager"] = [sys.executable, arguments.peer, "train"]
    if arguments.recompute:
        commands.update({f"{side}, recompute": [*command, "--recompute"] for side, command in list(commands.items())})
    points = {}
    with (arguments.out / "memory.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        table.writeheader()
        for length in arguments.lengths:
            for side, command in commands.items():
                sizes = ["--shape", arguments.shape, "--batch", 1, "--seq", length]
                sizes += ["--threads", arguments.threads, "--steps", arguments.steps, "--warmup", 1]
                figures = run([*command, *sizes])
                own = {"side": side, "shape": arguments.shape, "batch": 1, "seq": length, "threads": arguments.threads}
                table.writerow({**figures, **own})
                file.flush()
                peak, rate = figures["peak_rss_mb"], figures["tokens_per_s"]
                points.setdefault(side, []).append((length, peak))
                print(f"{side:22} {length:6} tokens: {peak:8.0f} MiB, {rate:8.0f} tokens/s", flush=True)
    title = f"Peak memory of training, {arguments.shape}, one sequence per step, f32"
    (arguments.out / "memory.svg").write_text(figure(points, title))


if __name__ == "__main__":
    main()
