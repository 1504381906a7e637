"""Ways to a low-bit LSTM LM on AMI text: post-training, ADMM variants, straight-through.

LSTM LM 1 x 160 over 1,000 words, 150,000 words of training text, all clusters at 2 bits
(uniform grid, one scale per row), Adam 1e-3, 370 updates an epoch, one thread. Perplexity
(valid) of the projected LM after every epoch; one seed, about 0.3 is noise. Taken with
an earlier scale search (post-training 54.52): the ADMM rows down to "gamma 1e-4 ... once"
but for the first:

    fp                                     51.31
    post-training (mse)                    54.55
    fp trained on, then post-training      54.69 54.54 55.19 55.54 55.63 56.63
    straight-through                       52.11 52.66 55.20 54.68 55.26 56.26
    ADMM as published (no extragradient)   54.49 54.04 53.42 53.86 53.24 53.97
      + table saved                        54.49 54.53 55.20 52.92 54.64 53.71
      dual every 50 updates                54.59 53.88 53.95 53.86 53.67 53.61
    gamma 1e-3 x 2 an epoch, once          54.49 53.82 53.57 53.08 52.97 52.55
      dual every 50 updates                54.59 53.34 53.11 52.84 52.84 52.41
    gamma 1e-3 x 4 an epoch, once          54.49 53.70 52.84 52.53 52.56 52.58
    gamma 1e-4 x 4 an epoch, once          54.86 54.44 54.56 53.47 52.76 52.47
      dual every 20 updates                54.51 53.61 53.29 53.68 53.85 54.02
      dual every 50 updates                54.57 53.76 53.53 53.28 52.22 51.68
        table saved                        63.72 59.52 57.15 53.45 51.51 51.56
        + 1 finishing epoch                54.57 53.76 53.53 53.28 52.22 51.61
        + 2 finishing epochs at 3e-3       54.57 53.76 53.53 53.28 52.39 52.77
        + distillation 0.5                 54.81 53.42 53.11 52.98 52.06 51.87
        + distillation 0.5, finishing, 8   54.81 53.42 53.11 52.98 52.06 51.87 51.66 51.73
        table saved + 1 finishing epoch    63.72 59.52 57.15 53.45 51.51 51.38

The last line with "weights" until the table has settled (saved "auto") is the default:
54.57 53.76 53.53 53.28 51.51 51.38. An epoch costs about 8 s of CPU, 12 s with distillation.
On 10,000 words (23 updates an epoch, fp 43.2, post-training 44.2) 10 epochs end at 43.2
with the dual every 50 updates and at 43.8 to 44.2 every 5 or 15.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

import torch
from found import find_clusters, get_mats, set_mats, weights_of

from espnet_mpq.plan import uniform_plan
from espnet_mpq.rounding.model import Rounder
from espnet_mpq.sensitivity.judged import Batch, Judged, Stages
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.distillation import kl_distillation
from espnet_mpq.training.on_grid import project, project_weights
from espnet_mpq.training.options import AdmmOptions, QatOptions
from espnet_mpq.training.qat import QatController

IGNORE, UNK = 0, 1


class Lm(torch.nn.Module):
    """A recurrent LM with the host's parameter names; tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, n_tokens: int, unit: int, dropout_rate: float):
        super().__init__()
        self.encoder = torch.nn.Embedding(n_tokens, unit, padding_idx=IGNORE)
        self.rnn = torch.nn.LSTM(unit, unit, 1, batch_first=True)
        self.decoder = torch.nn.Linear(unit, n_tokens)
        self.drop = torch.nn.Dropout(dropout_rate)

    def forward(self, tokens):
        output, _ = self.rnn(self.drop(self.encoder(tokens)))
        return self.decoder(self.drop(output))


def read_words(path: Path, n_words: int):
    sentences, count = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if 4 <= len(words) <= 30:
                sentences.append(words)
                count += len(words)
            if count >= n_words:
                break
    return sentences


def batches(sentences, token_id, batch_size: int):
    """Padded (inputs, targets) with sos = eos = last id, sentences of like length together."""
    eos = max(token_id.values()) + 1
    rows = sorted(([token_id.get(w, UNK) for w in s] for s in sentences), key=len)
    done = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        longest = max(map(len, part)) + 1
        inputs = torch.zeros(len(part), longest, dtype=torch.long)
        targets = torch.zeros_like(inputs)
        for i, row in enumerate(part):
            inputs[i, : len(row) + 1] = torch.tensor([eos] + row)
            targets[i, : len(row) + 1] = torch.tensor(row + [eos])
        done.append((inputs, targets))
    return done


def loss_nats(lm, batch, teacher=None, weight=0.0):
    inputs, targets = batch
    logits = lm(inputs)
    mask = targets != IGNORE
    loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
    if teacher is None:
        return loss
    with torch.no_grad():
        goal = teacher(inputs)
    return (1 - weight) * loss + weight * kl_distillation(logits, goal, mask)


@torch.no_grad()
def perplexity(lm, data) -> float:
    lm.eval()
    total = count = 0.0
    for batch in data:
        n_tokens = int((batch[1] != IGNORE).sum())
        total += float(loss_nats(lm, batch)) * n_tokens
        count += n_tokens
    return math.exp(total / count)


def epoch_order(n: int, epoch: int):
    return random.Random(epoch).sample(range(n), n)


def train_float(lm, train, valid, n_epochs, lr):
    optimizer = torch.optim.Adam(lm.parameters(), lr=lr)
    best, kept = math.inf, None
    for epoch in range(n_epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 ** max(0, epoch - n_epochs // 2)
        lm.train()
        for k in epoch_order(len(train), epoch):
            optimizer.zero_grad()
            loss_nats(lm, train[k]).backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 5.0)
            optimizer.step()
        ppl = perplexity(lm, valid)
        if ppl < best:
            best, kept = ppl, copy.deepcopy(lm.state_dict())
    lm.load_state_dict(kept)
    return best


def round_by_second_order(lm, train, plan, n_tokens=20_000):
    """Put an LM on the grid by second-order rounding; returns its scales and codes."""
    layers = [lambda x, inputs: lm.encoder(x), lambda x, inputs: lm.rnn(x)[0]]
    first = {name: 1 for name in plan.clusters}
    stages = Stages(layers, lm.decoder, {**first, "embedding": 0, "output": 2})
    text = [Batch(inputs, targets != IGNORE) for inputs, targets in train]
    random.Random(0).shuffle(text)
    few, n_rows = [], 0
    for batch in text:
        few += [batch] if n_rows < n_tokens else []
        n_rows += batch.n_rows
    rounded = Rounder(Judged.of(lm, stages, few), weights_of(lm)).round_all(plan)
    parameters = dict(lm.named_parameters())
    with torch.no_grad():
        for name, bias in rounded.biases.items():
            parameters[name].copy_(bias)
    return project(rounded.mats, plan)


def train_admm(fp, train, valid, plan, options, distill, n_epochs, lr, second_order=False):
    """Perplexity of the quantized LM after every epoch, by ADMM or (QatOptions) by QAT."""
    lm = copy.deepcopy(fp)
    optimizer = torch.optim.Adam(lm.parameters(), lr=lr)
    if isinstance(options, QatOptions):
        start = round_by_second_order(lm, train, plan) if second_order else None
        controller = QatController(weights_of(lm), plan, optimizer, options, start)
        controller.n_updates_in_epoch = len(train)
    else:
        controller = AdmmController(weights_of(lm), plan, optimizer, options)
    found = []
    for epoch in range(n_epochs):
        torch.manual_seed(epoch)
        controller.start_epoch(n_epochs - epoch)
        lm.train()
        for k in epoch_order(len(train), epoch):

            def gradient(batch=train[k]):
                loss_nats(lm, batch, fp if distill else None, distill).backward()
                torch.nn.utils.clip_grad_norm_(lm.parameters(), 5.0)

            state = torch.get_rng_state()

            def again(state=state, gradient=gradient):
                torch.set_rng_state(state)
                gradient()

            controller.gradient_at = again
            optimizer.zero_grad()
            gradient()
            optimizer.step()
        controller.end_epoch()
        found.append(perplexity(lm, valid))
    return found, controller


def train_straight_through(fp, train, valid, plan, distill, n_epochs, lr):
    """Forward with projected weights, gradient applied to the float ones (the papers' mod-BP)."""
    lm = copy.deepcopy(fp)
    optimizer = torch.optim.Adam(lm.parameters(), lr=lr)
    clusters = {cluster.name: cluster for cluster in find_clusters(lm)}
    mats = {name: get_mats(lm, cluster) for name, cluster in clusters.items()}
    weights = list(lm.parameters())
    table, found = project(mats, plan), []
    for epoch in range(n_epochs):
        torch.manual_seed(epoch)
        lm.train()
        for k in epoch_order(len(train), epoch):
            kept = [p.detach().clone() for p in weights]
            table = project(mats, plan, "als", table, 1)
            for name, cluster in clusters.items():
                set_mats(lm, cluster, table.values(name))
            optimizer.zero_grad()
            loss_nats(lm, train[k], fp if distill else None, distill).backward()
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            with torch.no_grad():
                for p, value in zip(weights, kept):
                    p.copy_(value)
            optimizer.step()
        work = copy.deepcopy(lm)
        project_weights(weights_of(work), plan)
        found.append(perplexity(work, valid))
    return found


def variants():
    """name -> (AdmmOptions or QatOptions, distillation weight[, second-order start])"""
    published = dict(gamma=1e-3, gamma_schedule="constant", dual_period=0, projection="mse")
    return {
        "ADMM as published": (AdmmOptions(**published, finish_epochs=0), 0.0),
        "  + table saved": (AdmmOptions(**published, finish_epochs=0, saved="table"), 0.0),
        "  + extragradient": (AdmmOptions(**published, finish_epochs=0, extragradient=True), 0.0),
        "  + finishing": (AdmmOptions(**published), 0.0),
        "ADMM growing, once per epoch": (
            AdmmOptions(dual_period=0, projection="mse", finish_epochs=0),
            0.0,
        ),
        "ADMM growing, every 20": (AdmmOptions(dual_period=20, finish_epochs=0), 0.0),
        "ADMM growing, every 50": (AdmmOptions(finish_epochs=0), 0.0),
        "  + table saved ": (AdmmOptions(finish_epochs=0, saved="table"), 0.0),
        "  + finishing = default": (AdmmOptions(), 0.0),
        "  + distillation 0.5": (AdmmOptions(), 0.5),
        "QAT from plain rounding": (QatOptions(), 0.0),
        "QAT": (QatOptions(), 0.0, True),
        "  + distillation 0.5 (QAT)": (QatOptions(), 0.5, True),
        "  without decay (QAT)": (QatOptions(decay=False), 0.5, True),
        "  without freezing (QAT)": (QatOptions(freeze=0.0), 0.5, True),
        "  blend (QAT)": (QatOptions(blend=0.3), 0.5, True),
        "  pull (QAT)": (QatOptions(pull_period=20), 0.5, True),
    }


def invented_text(n_sentences: int, seed: int):
    """Sentences of a small random Markov chain, for the smoke mode."""
    words = [f"w{i}" for i in range(40)]
    follow = {w: random.Random(i).sample(words, 3) for i, w in enumerate(words)}
    chance, sentences = random.Random(seed), []
    for _ in range(n_sentences):
        sentence = [chance.choice(words)]
        while len(sentence) < 12:
            sentence.append(chance.choice(follow[sentence[-1]]))
        sentences.append(sentence)
    return sentences


def main(arguments=None) -> dict:
    """Print one line per system; returns name -> perplexities per epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, invented text, two systems")
    parser.add_argument("--only", nargs="*", help="parts of the names of the systems to run")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--n_epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.smoke:
        texts = invented_text(400, 1), invented_text(100, 2)
        n_tokens, unit, n_float_epochs = 43, 24, 8
        args.only = args.only or ["default"]
    else:
        folder = Path(os.environ["MPQ_DATA_ROOT"]) / "ami_lm"
        texts = (
            read_words(folder / "train.txt.gz", 150_000),
            read_words(folder / "valid.txt.gz", 20_000),
        )
        n_tokens, unit, n_float_epochs = 1000, 160, 8
    counts = Counter(word for sentence in texts[0] for word in sentence)
    token_id = {w: i + 2 for i, (w, _) in enumerate(counts.most_common(n_tokens - 3))}
    train, valid = (batches(text, token_id, size) for text, size in zip(texts, (32, 64)))

    torch.manual_seed(0)
    fp = Lm(n_tokens, unit, 0.2)
    results = {"fp": [train_float(fp, train, valid, n_float_epochs, 3e-3)]}
    plan = uniform_plan(find_clusters(fp), args.bits)
    quantized = copy.deepcopy(fp)
    project_weights(weights_of(quantized), plan)
    results["post-training"] = [perplexity(quantized, valid)]
    quantized = copy.deepcopy(fp)
    table = round_by_second_order(quantized, train, plan)
    for name in plan.clusters:
        weights_of(quantized).set(name, table.values(name))
    results["second-order rounding"] = [perplexity(quantized, valid)]
    for name in ("fp", "post-training", "second-order rounding"):
        print(f"{name:32s} {results[name][0]:.2f}", flush=True)
    systems = {**variants(), "straight-through": None}
    for name, setting in systems.items():
        if args.only and not any(part in name for part in args.only):
            continue
        start_s = time.process_time()
        if setting is None:
            found = train_straight_through(fp, train, valid, plan, 0.0, args.n_epochs, args.lr)
        else:
            options, distill, *start = setting
            more = distill, args.n_epochs, args.lr, *start
            found, _ = train_admm(fp, train, valid, plan, options, *more)
        results[name.strip()] = found
        spent_s = time.process_time() - start_s
        print(f"{name:32s}", *(f"{ppl:.2f}" for ppl in found), f"({spent_s:.0f} s)", flush=True)
    return results


if __name__ == "__main__":
    main()
