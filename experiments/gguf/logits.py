#!/usr/bin/env python3
"""How far are llama.cpp's logits from those that transformers computed?

    python experiments/gguf/logits.py EXPECTED.safetensors=FILE.gguf [...]

EXPECTED holds `input_ids` [B, T] and `logits` [B, T, V] of a model, FILE is the model.gguf that lowkey made of it. llama.cpp runs on
the CPU with an F32 cache and without flash attention. Exit status 1 when a logit is further away than --tolerance.
"""
import argparse
import json
import sys

import numpy as np

from compare import Llama


def tensors(path):
    """The tensors of a safetensors file."""
    raw = open(path, "rb").read()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    kinds = {"F32": np.float32, "I64": np.int64, "I32": np.int32}
    found = {}
    for name, info in header.items():
        if name != "__metadata__" and info["dtype"] in kinds:
            start, end = (8 + length + offset for offset in info["data_offsets"])
            found[name] = np.frombuffer(raw[start:end], kinds[info["dtype"]]).reshape(info["shape"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="EXPECTED.safetensors=FILE.gguf")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="largest difference of a logit [default: 2e-5]")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp logs")
    arguments = parser.parse_args()
    failed = False
    for pair in arguments.pairs:
        expected, _, path = pair.rpartition("=")
        known = tensors(expected)
        llama = Llama(path, known["input_ids"].shape[1] + 8, arguments.verbose)
        rows = [llama.logits([int(token) for token in row]) for row in known["input_ids"]]
        llama.close()
        worst = float(np.abs(np.stack(rows) - known["logits"]).max())
        largest = float(np.abs(known["logits"]).max())
        print(f"{'/'.join(expected.rsplit('/', 2)[-2:])}: max abs difference {worst:.1e}, logits up to {largest:.1f}", flush=True)
        failed |= not worst <= arguments.tolerance
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
