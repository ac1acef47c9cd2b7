"""From full keys and values to latents: what each way to choose them loses, and what a short training brings back.

    python3 study.py LOWKEY STORIES260K TINYSHAKESPEARE.txt OUT

needs a built `lowkey`, a directory of the published model stories260K and the text of tiny shakespeare; writes results.csv and table.md into
OUT, whatever else it makes beside them, and goes on where it was stopped.
"""

import concurrent.futures
import csv
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

LOWKEY, STORIES, TEXT, OUT = (pathlib.Path(argument).resolve() for argument in sys.argv[1:5])
ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEDS = (1, 2, 3)
BUDGETS = ("50%", "25%", "12.5%")
WAYS = ("weights", "activations", "readers", "best")
CALIBRATION_TOKENS = 8192
# The source is trained for so many steps of 16 × 256 characters, and healed for a tenth of them.
STEPS = 2000


def lowkey(*arguments):
    command = [str(LOWKEY), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def loss(model, text, *more):
    return json.loads(lowkey("eval", model, "--data", text, "--json", *more))["loss"]


def written(path, parts):
    """A text of parts that come one after the other, made once."""
    if not path.exists():
        path.write_text("".join(parts))
    return path


def stories(name, seeds):
    """What stories260K tells by itself: the text that its loss is least on."""
    told = lambda seed: lowkey(
        "generate", STORIES, "--prompt", "", "--temperature", "1", "--top-p", "1", "--seed", seed, "--max-new-tokens", "500"
    )
    return written(OUT / f"{name}.txt", (told(seed).strip() + "\n\n" for seed in seeds))


def trained(name, run, *settings):
    """The last weights of a run."""
    out = OUT / "runs" / name
    if not (out / "outcome.json").exists():
        lowkey("train", run, "--out", out, "--overwrite", *(word for setting in settings for word in ("--set", setting)))
    return max((out / "checkpoints").glob("step-*"))


def converted(name, source, budget, way, text):
    out = OUT / "models" / name
    report = OUT / "models" / f"{name}.json"
    if not report.exists():
        said = lowkey(
            "convert", source, "--to", "mla", "--kv-rank-budget", budget, "--data", text, "--tokens", CALIBRATION_TOKENS,
            *(() if way == "best" else ("--importance", way)), "--out", out, "--overwrite", "--json",
        )  # fmt: skip
        report.write_text(said)
    return out, json.loads(report.read_text())["report"]


def interval(losses):
    """Mean and half of the 95 % interval of three values (Student's t with two degrees of freedom)."""
    return statistics.mean(losses), 4.303 * statistics.stdev(losses) / math.sqrt(len(losses))


def shown(losses):
    mean, half = interval(losses)
    return f"{mean:.4f} ± {half:.4f}"


def one_shot(rows, name, source, held_out, calibration):
    before = loss(source, held_out)
    rows.append({"part": "one-shot", "source": name, "way": "source", "loss": before})

    def row(case):
        budget, way, seed = case
        model, report = converted(f"{name}-{budget}-{way}-{seed}", source, budget, way, calibration[seed])
        return {
            "part": "one-shot", "source": name, "budget": budget, "way": way, "seed": seed, "loss": loss(model, held_out),
            "cache_numbers": report["cache_numbers"], "qk_rope_head_dim": report["qk_rope_head_dim"],
            "kv_ranks": "/".join(map(str, report["kv_ranks"])),
        }  # fmt: skip

    # A conversion keeps about one core busy.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(row, itertools.product(BUDGETS, WAYS, SEEDS)))
    rows += found
    lines = [f"| {name} ({before:.4f}) | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for budget in BUDGETS:
        lost = lambda way: [row["loss"] - before for row in found if (row["budget"], row["way"]) == (budget, way)]
        lines.append(f"| {budget} of the cache | " + " | ".join(shown(lost(way)) for way in WAYS) + " |")
    return lines + [""]


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "models").mkdir(exist_ok=True)
    rows, lines = [], []

    held_out = stories("stories-held-out", range(1000, 1040))
    calibration = {seed: stories(f"stories-{seed}", range(100 * seed, 100 * seed + 40)) for seed in SEEDS}
    lines += one_shot(rows, "stories260k", STORIES, held_out, calibration)

    # The usual split of tiny shakespeare: the last tenth is held out.
    text = TEXT.read_text()
    learnt = len(text) * 9 // 10
    held_out = written(OUT / "shakespeare-held-out.txt", text[learnt:])
    pieces = {seed: text[learnt * (seed - 1) // 3 :][:100_000] for seed in SEEDS}
    calibration = {seed: written(OUT / f"shakespeare-{seed}.txt", pieces[seed]) for seed in SEEDS}
    dataset = OUT / "tinyshakespeare.toml"
    dataset.write_text((ROOT / "datasets" / "tinyshakespeare.toml").read_text())
    written(OUT / "tinyshakespeare.txt", text)
    quickstart = ROOT / "configs" / "quickstart.toml"
    common = [f'data.dataset="{dataset}"', "eval.prompts=[]", "optimizer.lr=3e-3"]
    source = trained("gqa", quickstart, *common, f"training.steps={STEPS}", "model.attention=gqa", "model.num_key_value_heads=2")
    lines += one_shot(rows, "shakespeare", source, held_out, calibration)

    before = loss(source, held_out)
    narrow, report = converted("shakespeare-25%-best-1", source, "25%", "best", calibration[1])
    rope = report["qk_rope_head_dim"]
    rank = report["cache_numbers"] // len(report["kv_ranks"]) - rope
    teacher = f'kind="distillation", teacher="{source}", share=0.9'
    objectives = {
        "next token": 'kind="next_token"',
        "distillation": teacher,
        "distillation of attention too": f"{teacher}, attention_weight=0.5",
    }
    healed = {}
    for way, objective in objectives.items():
        healed[way] = []
        for seed in SEEDS:
            model = trained(
                f"healed-{way.replace(' ', '-')}-{seed}", ROOT / "configs" / "finetune" / "heal.toml", f'init.from="{narrow}"',
                f'data.dataset="{dataset}"', "eval.prompts=[]", f"training.steps={STEPS // 10}", f"run.seed={seed}",
                f"objective=[{{{objective}}}]",
            )  # fmt: skip
            healed[way].append(loss(model, held_out))
            rows.append({"part": "healed", "source": "shakespeare", "budget": "25%", "way": way, "seed": seed, "loss": healed[way][-1]})
    scratch = []
    for seed in SEEDS:
        model = trained(
            f"mla-{seed}", quickstart, *common, f"training.steps={STEPS}", f"run.seed={seed}",
            f"model.kv_lora_rank={rank}", f"model.qk_rope_head_dim={rope}", f"model.qk_nope_head_dim={32 - rope}",
        )  # fmt: skip
        scratch.append(loss(model, held_out))
        rows.append({"part": "scratch", "source": "shakespeare", "budget": "25%", "way": "mla", "seed": seed, "loss": scratch[-1]})
    line = lambda name, losses: f"| {name} | {shown(losses)} | {100 * (statistics.mean(losses) / before - 1):+.1f} % |"
    lines += [
        "| shakespeare, a quarter of the cache | loss | beside the source |", "|---|---|---|",
        f"| source, {STEPS} steps | {before:.4f} | |",
        *(line(f"healed, {STEPS // 10} steps, {way}", losses) for way, losses in healed.items()),
        line(f"MLA from scratch, {STEPS} steps", scratch),
    ]  # fmt: skip

    keys = ["part", "source", "budget", "way", "seed", "loss", "cache_numbers", "qk_rope_head_dim", "kv_ranks"]
    with open(OUT / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, keys, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


main()
