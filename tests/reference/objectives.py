#!/usr/bin/env python3
"""What torch computes for the objectives: losses of pairs of answers with their slopes, and distances between distributions.

    python objectives.py            # writes objectives.json anew
    python objectives.py --check    # computes everything again and compares

The formulas are written down as TRL 1.10 states them, in float64, and torch differentiates them.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F

FILE = pathlib.Path(__file__).resolve().parent / "objectives.json"

# (beta, label_smoothing, gamma, cpo_alpha)
SETTINGS = [(0.1, 0.0, 0.5, 1.0), (0.1, 0.2, 0.5, 0.0), (2.0, 0.45, 1.4, 0.3)]


def pair_loss(name, setting, policy, reference, tokens):
    """`policy` and `reference`: sums of the chosen and the rejected answer."""
    beta, smoothing, gamma, alpha = setting
    mean = policy / tokens
    ratios = policy - reference
    margin = ratios[0] - ratios[1]
    mean_ratios = ratios / tokens
    mean_margin = mean_ratios[0] - mean_ratios[1]
    if name == "sigmoid":
        return -F.logsigmoid(beta * margin)
    if name == "sigmoid_norm":
        return -F.logsigmoid(beta * mean_margin)
    if name == "ipo":
        return (mean_margin - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return torch.relu(1 - beta * margin)
    if name == "robust":
        right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    if name == "simpo":
        return -F.logsigmoid(beta * (mean[0] - mean[1] - gamma / beta)) - alpha * mean[0]
    if name == "orpo":
        log_odds = (mean[0] - mean[1]) - (torch.log1p(-torch.exp(mean[0])) - torch.log1p(-torch.exp(mean[1])))
        return -mean[0] - beta * F.logsigmoid(log_odds)
    raise ValueError(name)


def pairs(random):
    found = []
    for name in ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "simpo", "orpo"]:
        for setting in SETTINGS:
            for spread in [1.0, 30.0]:
                tokens = random.integers(1, 40, 2)
                policy = -tokens * (0.1 + random.random(2) * 3)
                reference = policy + spread * random.standard_normal(2)
                sums = torch.tensor(policy, requires_grad=True)
                loss = pair_loss(name, setting, sums, torch.tensor(reference), torch.tensor(tokens))
                (slopes,) = torch.autograd.grad(loss, sums)
                found.append(dict(
                    loss_type=name, setting=setting, tokens=tokens.tolist(), policy=policy.tolist(),
                    reference=reference.tolist(), loss=loss.item(), slopes=slopes.tolist(),
                ))
    return found


def jsd(student, teacher, beta, temperature):
    """TRL's generalized_jsd_loss of one row, summed over the vocabulary."""
    s, t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return divergence(s, t, beta)


def divergence(s, t, beta):
    if beta == 0:
        return F.kl_div(s, t, reduction="sum", log_target=True)
    if beta == 1:
        return F.kl_div(t, s, reduction="sum", log_target=True)
    beta = torch.tensor(beta, dtype=s.dtype)
    m = torch.logsumexp(torch.stack([s + torch.log1p(-beta), t + torch.log(beta)]), dim=0)
    of_teacher = F.kl_div(m, t, reduction="sum", log_target=True)
    of_student = F.kl_div(m, s, reduction="sum", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def bucketed(student, teacher, top, beta, temperature):
    """The same of the teacher's `top` likeliest tokens, and all others together."""
    s, t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    ids = torch.topk(t, top).indices
    rest = torch.ones_like(t, dtype=torch.bool)
    rest[ids] = False
    with_tail = lambda x: torch.cat([x[ids], torch.logsumexp(x[rest], -1)[None]])
    return divergence(with_tail(s), with_tail(t), beta)


def distances(random):
    found = []
    for vocab in [3, 19, 67]:
        for beta in [0.0, 0.1, 0.5, 0.9, 1.0]:
            for temperature, top in [(1.0, 0), (0.9, 0), (2.0, 0), (1.0, 2), (1.5, vocab // 2)]:
                logits = 2 * random.standard_normal((2, vocab))
                student = torch.tensor(logits[0], requires_grad=True)
                teacher = torch.tensor(logits[1])
                loss = bucketed(student, teacher, top, beta, temperature) if top else jsd(student, teacher, beta, temperature)
                (slopes,) = torch.autograd.grad(loss, student)
                found.append(dict(
                    beta=beta, temperature=temperature, top=top, student=logits[0].tolist(), teacher=logits[1].tolist(),
                    loss=loss.item(), slopes=slopes.tolist(),
                ))
    return found


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--check", action="store_true", help="compute everything again and compare")
    check = arguments.parse_args().check
    torch.set_num_threads(1)
    random = np.random.Generator(np.random.Philox(7))
    made = dict(pairs=pairs(random), distances=distances(random))
    if check:
        stored = json.loads(FILE.read_text())
        numbers = lambda cases: np.array([[c["loss"], *c["slopes"]][i] for c in cases for i in range(len(c["slopes"]) + 1)])
        wrong = [part for part in made if not np.allclose(numbers(made[part]), numbers(stored[part]), rtol=1e-12, atol=1e-14)]
        print("\n".join(f"{part} differ" for part in wrong) or "everything is as it was")
        sys.exit(bool(wrong))
    lines = lambda cases: "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]"
    FILE.write_text("{" + ",\n".join(f'"{part}": {lines(cases)}' for part, cases in made.items()) + "}\n")


if __name__ == "__main__":
    main()
