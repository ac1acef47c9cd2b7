#!/usr/bin/env python3
"""How far two runs of one run file are apart, step by step.

    python experiments/gpu/curves.py RUN_A RUN_B [--within 1e-3] [--least 100]

Prints the largest differences of training loss and gradient norm; exit code 1 where the losses differ by more, or where the runs have
fewer steps in common.
"""
import argparse
import json
import sys
from pathlib import Path


def figures(run, key):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {step["step"]: step[key] for step in map(json.loads, lines)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("--within", type=float, help="largest difference of losses, nats")
    parser.add_argument("--least", type=int, default=1, help="steps that the runs must have in common")
    arguments = parser.parse_args()
    losses = [figures(run, "train_loss") for run in arguments.runs]
    norms = [figures(run, "grad_norm") for run in arguments.runs]
    both = sorted(losses[0].keys() & losses[1].keys())
    if len(both) < arguments.least:
        raise SystemExit(f"the runs have {len(both)} steps in common, fewer than {arguments.least}")
    loss, at = max((abs(losses[0][step] - losses[1][step]), step) for step in both)
    norm = max(abs(norms[0][step] - norms[1][step]) / norms[0][step] for step in both)
    a, b = arguments.runs
    last = f"{losses[0][both[-1]]:.4f} and {losses[1][both[-1]]:.4f} at the last"
    print(f"{a.name} and {b.name}: {len(both)} steps, losses within {loss:.1e} (step {at}), norms within {norm:.1e}; {last}")
    sys.exit(arguments.within is not None and not loss <= arguments.within)


if __name__ == "__main__":
    main()
