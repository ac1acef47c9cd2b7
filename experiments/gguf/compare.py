#!/usr/bin/env python3
"""Does llama.cpp continue prompts as lowkey does?

    python experiments/gguf/compare.py MODEL=FILE.gguf [MODEL=FILE.gguf ...]
    python experiments/gguf/compare.py runs/a/checkpoints/best=exports/a/model.gguf --prompts prompts.txt --new 64

Each MODEL is a model directory, each FILE the model.gguf that `lowkey export MODEL --to gguf` made of it. For every prompt
the tokens of the prompt, the most probable continuation (ids) and its text have to be the same; llama.cpp runs on the CPU with an
F32 cache and without flash attention. Where the two continue differently although llama.cpp's logits for the two tokens are within
--tie, the prompt counts as a tie and is shown as one. Exit status 1 when anything else differs.

Run from the project's root after `cargo build --release`, with an interpreter that has llama-cpp-python (see README.md here).
"""
import argparse
import ctypes
import json
import subprocess
import sys

import numpy as np

try:
    import llama_cpp as lc
except ImportError:
    sys.exit("llama-cpp-python is needed; see README.md beside this script")

PROMPTS = """\
Once
Once upon a time
The king
In the morning
There was a
She said
What is 12 + 7?
A long time ago, in a small house by the sea,
He
I
and then the
Where did Anna put the red ball?
It was raining.  Two  spaces\tand a tab
"Good day," said the miller, "and who are you?"
UPPER CASE LETTERS
1 2 3 4 5 6 7 8 9
The end.
don't we'll they've
a
(brackets) [and] {braces}
x = y + z;
Question: who has the key? Answer:
old man walked to the market and bought""".splitlines()


class Llama:
    """A GGUF file in llama.cpp, one token after the other."""

    def __init__(self, path, context, verbose):
        # Kept: llama.cpp calls it later.
        self.log = lc.llama_log_callback(lambda level, text, _: print(text.decode(errors="replace"), end="", file=sys.stderr) if verbose else None)
        lc.llama_log_set(self.log, ctypes.c_void_p(0))
        lc.llama_backend_init()
        parameters = lc.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            sys.exit(f"{path}: llama.cpp does not load it; --verbose shows why")
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.size = lc.llama_vocab_n_tokens(self.vocab)
        self.context = context

    def tokens(self, text):
        """Ids of a prompt: special tokens in it count, and those that the file wants before a text are added."""
        raw = text.encode()
        room = (lc.llama_token * (len(raw) + 8))()
        count = lc.llama_tokenize(self.vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def whole(self, ids):
        """Text of the ids of a whole text, without what was put before it."""
        tokens, room = (lc.llama_token * len(ids))(*ids), ctypes.create_string_buffer(16 * len(ids) + 64)
        count = lc.llama_detokenize(self.vocab, tokens, len(ids), room, len(room), True, False)
        return room.raw[: max(count, 0)].decode("utf-8", errors="replace")

    def text(self, ids):
        """Text of ids, special tokens left out."""
        pieces = []
        for token in ids:
            room = ctypes.create_string_buffer(256)
            count = lc.llama_token_to_piece(self.vocab, token, room, len(room), 0, False)
            pieces.append(room.raw[: max(count, 0)])
        return b"".join(pieces).decode("utf-8", errors="replace")

    def open(self):
        parameters = lc.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.context
        parameters.n_threads = parameters.n_threads_batch = 2
        parameters.type_k = parameters.type_v = 0  # F32
        if hasattr(parameters, "flash_attn_type"):
            parameters.flash_attn_type = 0  # off
        return lc.llama_init_from_model(self.model, parameters)

    def feed(self, context, tokens, at, every):
        """Logits after the last of more tokens, or after every one."""
        batch = lc.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i + 1 == len(tokens)
        if lc.llama_decode(context, batch) != 0:
            sys.exit("llama_decode failed")
        places = range(len(tokens)) if every else [len(tokens) - 1]
        row = lambda i: np.ctypeslib.as_array(lc.llama_get_logits_ith(context, i), shape=(self.size,)).copy()
        rows = [row(i) for i in places]
        lc.llama_batch_free(batch)
        return np.stack(rows)

    def logits(self, tokens):
        """Logits after each of the tokens."""
        context = self.open()
        rows = self.feed(context, tokens, 0, True)
        lc.llama_free(context)
        return rows

    def greedy(self, prompt, count):
        """The most probable continuation and the logits that each of its tokens was chosen from."""
        context = self.open()
        ids, rows, at, new = [], [], 0, prompt
        while len(ids) < count:
            row = self.feed(context, new, at, False)[0]
            at += len(new)
            rows.append(row)
            ids.append(int(row.argmax()))
            new = ids[-1:]
        lc.llama_free(context)
        return ids, rows

    def close(self):
        lc.llama_model_free(self.model)


def lowkey(program, model, prompt, count):
    command = [program, "generate", model, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(count)]
    result = subprocess.run([*command, "--ignore-eos", "--json"], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout)


def compare(llama, ours, prompt, count, tie):
    """`equal`, `tie` or what differs; and the smallest distance of a choice from the next best."""
    tokens = llama.tokens(prompt)
    if len(tokens) != ours["prompt_tokens"]:
        return f"the prompt has {len(tokens)} tokens in llama.cpp, {ours['prompt_tokens']} here", None
    # A tokenizer of SentencePiece's kind reads a text with a space before it.
    if llama.whole(tokens) not in (prompt, " " + prompt):
        return f"the prompt's tokens read {llama.whole(tokens)!r}", None
    ids, rows = llama.greedy(tokens, count)
    margin = min(float(np.diff(np.partition(row, -2)[-2:])[0]) for row in rows)
    for i, (theirs, mine) in enumerate(zip(ids, ours["ids"])):
        if theirs != mine:
            gap = float(rows[i][theirs] - rows[i][mine])
            kind = "tie" if gap <= tie else "differs"
            return f"{kind} at token {i}: {theirs} there, {mine} here, {gap:.1e} apart", margin
    if len(ours["ids"]) != count:
        return f"{len(ours['ids'])} tokens here, {count} there", margin
    if llama.text(ids) != ours["text"]:
        return f"the same tokens read {llama.text(ids)!r} there, {ours['text']!r} here", margin
    return "equal", margin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="MODEL=FILE.gguf")
    parser.add_argument("--prompts", help="a file with one prompt on each line [default: built in]")
    parser.add_argument("--new", type=int, default=48, help="tokens to add to each [default: 48]")
    parser.add_argument("--tie", type=float, default=1e-4, help="largest distance of two logits that counts as a tie [default: 1e-4]")
    parser.add_argument("--context", type=int, default=512, help="tokens that llama.cpp keeps room for [default: 512]")
    parser.add_argument("--lowkey", default="target/release/lowkey", help="the program [default: target/release/lowkey]")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp logs")
    arguments = parser.parse_args()
    prompts = PROMPTS
    if arguments.prompts:
        prompts = [line for line in open(arguments.prompts, encoding="utf-8").read().splitlines() if line]
    failed = False
    print(f"{'file':<32} {'prompts':>7} {'equal':>6} {'ties':>5} {'differ':>6} {'closest choice':>15}")
    for pair in arguments.pairs:
        model, _, path = pair.rpartition("=")
        if not model:
            parser.error(f"{pair} is not MODEL=FILE.gguf")
        llama = Llama(path, arguments.context, arguments.verbose)
        outcomes = []
        for prompt in prompts:
            ours = lowkey(arguments.lowkey, model, prompt, arguments.new)
            outcomes.append((prompt, *compare(llama, ours, prompt, arguments.new, arguments.tie)))
        llama.close()
        equal = sum(outcome == "equal" for _, outcome, _ in outcomes)
        ties = sum(outcome.startswith("tie") for _, outcome, _ in outcomes)
        differ = len(outcomes) - equal - ties
        margins = [margin for _, _, margin in outcomes if margin is not None]
        closest = f"{min(margins):.1e}" if margins else "-"
        name = "/".join(path.rsplit("/", 2)[-2:])
        print(f"{name:<32} {len(outcomes):>7} {equal:>6} {ties:>5} {differ:>6} {closest:>15}", flush=True)
        for prompt, outcome, _ in outcomes:
            if outcome != "equal":
                print(f"    {prompt[:40]!r}: {outcome}")
        failed |= differ > 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
