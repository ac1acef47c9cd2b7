"""Peak memory of short runs beside what `lowkey plan` says of them: ten steps each, with two evaluations and checkpoints.

    python3 experiments/speed/plan.py                 # LOWKEY names the binary [target/release/lowkey]

Linux only: the peak is the largest resident set that the system counted.
"""

import json
import os
import random
import subprocess
import tempfile
from pathlib import Path

LOWKEY = os.path.abspath(os.environ.get("LOWKEY", "target/release/lowkey"))
SMALL, MIDDLE, LARGE, TINY = [128, 4, 352, 64], [256, 8, 704, 64], [512, 8, 1408, 128], [32, 2, 64, 16]
# Width, heads, feed-forward and latent; layers; narrower ranks; sequences of a pass and of a batch, their length; threads; recompute.
CASES = [
    (SMALL, 4, [], [8, 8, 256], 2, "none"),
    (SMALL, 4, [], [8, 8, 256], 1, "none"),
    (SMALL, 4, [], [2, 8, 256], 2, "none"),
    (SMALL, 4, [], [8, 8, 256], 2, "block"),
    (SMALL, 4, [8, 16, 32], [8, 8, 256], 2, "none"),
    (SMALL, 4, [8, 16, 32], [8, 8, 256], 2, "block"),
    (SMALL, 4, [], [32, 32, 256], 2, "none"),
    (SMALL, 4, [], [2, 2, 1024], 2, "none"),
    (SMALL, 12, [], [8, 8, 256], 2, "none"),
    (MIDDLE, 6, [], [8, 8, 256], 2, "none"),
    (MIDDLE, 6, [], [8, 8, 256], 2, "block"),
    (MIDDLE, 6, [16, 32], [8, 8, 256], 2, "none"),
    (MIDDLE, 6, [], [1, 1, 4096], 2, "none"),
    (MIDDLE, 6, [], [1, 1, 4096], 2, "block"),
    (LARGE, 6, [], [4, 4, 128], 2, "none"),
    (LARGE, 6, [], [16, 16, 128], 2, "none"),
    (LARGE, 8, [], [4, 4, 512], 2, "none"),
    (LARGE, 12, [], [2, 2, 256], 2, "none"),
    (TINY, 1, [], [4, 4, 64], 2, "none"),
]


def run_file(case):
    (hidden, heads, inner, latent), layers, ranks, (rows, batch, seq), threads, recompute = case
    elastic = f"[model.elastic]\nranks = {ranks}\n" if ranks else ""
    return f"""
[run]
name = "plan"
[model]
attention = "mla"
hidden_size = {hidden}
num_hidden_layers = {layers}
num_attention_heads = {heads}
intermediate_size = {inner}
kv_lora_rank = {latent}
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
{elastic}
[data]
path = "text.txt"
seq_len = {seq}
[optimizer]
lr = 1e-3
[training]
steps = 10
batch_size = {batch}
micro_batch_size = {rows}
threads = {threads}
recompute = "{recompute}"
[eval]
every = 5
batches = {2 if seq < 4096 else 1}
[checkpoint]
every = 5
"""


def peak_mib(command, dir):
    """Runs a command and returns the largest resident set of its process."""
    child = subprocess.Popen(command, cwd=dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"{command}: {status}")
    return usage.ru_maxrss / 1024


def main():
    words = ["the", "cat", "saw", "a", "dog", "on", "mats", "and", "sang", "to", "birds", "of", "snow"]
    draw = random.Random(1)
    text = " ".join(draw.choice(words) for _ in range(200_000))
    apart = []
    print(f"{'width, heads, ff, latent':26} {'layers':>6} {'ranks':>12} {'rows/batch/seq':>15} {'threads':>7} {'again':>6}"
          f" {'planned':>8} {'peak':>7}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as dir:
            Path(dir, "text.txt").write_text(text)
            Path(dir, "run.toml").write_text(run_file(case))
            plan = subprocess.run([LOWKEY, "plan", "run.toml", "--json"], cwd=dir, capture_output=True, text=True, check=True)
            planned = json.loads(plan.stdout)["train_bytes"] / (1 << 20)
            peak = peak_mib([LOWKEY, "train", "run.toml"], dir)
        sizes, layers, ranks, rows, threads, recompute = case
        apart.append(abs(planned / peak - 1))
        print(f"{str(sizes):26} {layers:6} {str(ranks):>12} {'/'.join(map(str, rows)):>15} {threads:7} {recompute:>6}"
              f" {planned:8.0f} {peak:7.0f} {100 * (planned / peak - 1):+5.0f} %", flush=True)
    print(f"{100 * sum(apart) / len(apart):.1f} % apart on average, {100 * max(apart):.1f} % at most")


if __name__ == "__main__":
    main()
