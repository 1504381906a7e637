"""Does the KL tell which cluster hurts? Spearman of KL and true harm on PTB words, and times.

By hand: python tests/bench/bench_sensitivity.py --data $MPQ_DATA_ROOT/ptb   (about two minutes)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from scipy.stats import spearmanr

from espnet_mpq.clusters import find_clusters, get_mats
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.kl import KlMeter

IGNORE, UNK = 0, 1
BITS = (1, 2, 4, 8)


class Lm(torch.nn.Module):
    """A recurrent LM with the host's parameter names; tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, n_tokens: int, unit: int, n_layers: int, dropout_rate: float):
        super().__init__()
        self.encoder = torch.nn.Embedding(n_tokens, unit, padding_idx=IGNORE)
        self.drop = torch.nn.Dropout(dropout_rate)
        self.rnn = torch.nn.LSTM(unit, unit, n_layers, batch_first=True)
        self.decoder = torch.nn.Linear(unit, n_tokens)

    def forward(self, tokens):
        return self.decoder(self.drop(self.rnn(self.drop(self.encoder(tokens)))[0]))


def read_words(path: Path, n_words: int) -> list:
    sentences, count = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            sentences.append(line.split())
            count += len(sentences[-1]) + 1
            if n_words and count >= n_words:
                break
    return [s for s in sentences if s]


def make_batches(sentences, token_id, n_tokens: int, batch_size: int) -> list:
    """(inputs, targets, mask), sentences of like length together; sos = eos = last id."""
    rows = sorted(([token_id.get(w, UNK) for w in s] for s in sentences), key=len)
    batches = []
    for first in range(0, len(rows), batch_size):
        group = rows[first : first + batch_size]
        inputs = torch.zeros(len(group), max(map(len, group)) + 1, dtype=torch.long)
        targets = torch.zeros_like(inputs)
        for i, row in enumerate(group):
            inputs[i, : len(row) + 1] = torch.tensor([n_tokens - 1, *row])
            targets[i, : len(row) + 1] = torch.tensor([*row, n_tokens - 1])
        batches.append((inputs, targets, targets != IGNORE))
    return batches


def train(lm, batches, seconds: float, lr: float = 3e-3) -> float:
    """Adam for about ``seconds``; returns the seconds of one epoch."""
    optimizer = torch.optim.Adam(lm.parameters(), lr=lr)
    start = time.monotonic()
    n_done, order = 0, torch.Generator().manual_seed(0)
    while True:
        for i in torch.randperm(len(batches), generator=order).tolist():
            inputs, targets, mask = batches[i]
            loss = torch.nn.functional.cross_entropy(lm(inputs)[mask], targets[mask])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            n_done += 1
            elapsed = time.monotonic() - start
            if elapsed > seconds:
                return elapsed / n_done * len(batches)
        for group in optimizer.param_groups:
            group["lr"] *= 0.8


def harm_on(lm, clusters, batches, specs) -> list:
    """True harm: nll of other text with one cluster quantized minus the fp LM's, nats/token."""
    meter = KlMeter(lm, lm, clusters, batches, printed_form=True)
    harms = []
    for cluster, spec in specs:
        values = project_cluster(get_mats(lm, cluster), spec, method="mse").values
        harms.append(meter.measure({cluster.name: values})[0])
    return harms


def bench(args) -> dict:
    torch.manual_seed(args.seed)
    train_text = read_words(args.data / "ptb.train.txt.gz", args.train_words)
    test_text = read_words(args.data / "ptb.test.txt.gz", args.test_words)
    counts = Counter(w for s in train_text for w in s)
    words = [w for w, _ in counts.most_common(args.vocabulary - 3)]
    n_tokens = len(words) + 3
    token_id = {w: k + 2 for k, w in enumerate(words)}
    lm = Lm(n_tokens, args.unit, args.layers, 0.2)
    batches = make_batches(train_text, token_id, n_tokens, 32)
    epoch_s = train(lm, batches, args.train_seconds)

    clusters = find_clusters(lm)
    sample = train_text[:: max(1, len(train_text) * 22 // args.max_tokens)]
    start = time.monotonic()
    meter = KlMeter(lm, lm, clusters, make_batches(sample, token_id, n_tokens, 128))
    pairs = [(c, ClusterSpec(bits)) for c in clusters for bits in BITS]
    entries = [meter.entry(c.name, spec) for c, spec in pairs]
    kl_s = time.monotonic() - start
    test = make_batches(test_text, token_id, n_tokens, 128)
    harms = harm_on(lm, clusters, test, pairs)
    kls = [e.harm for e in entries]
    per_bits = {
        bits: float(spearmanr(kls[k :: len(BITS)], harms[k :: len(BITS)])[0])
        for k, bits in enumerate(BITS)
    }
    n_train_tokens = sum(int(m.sum()) for _, _, m in batches)
    return {
        "spearman": float(spearmanr(kls, harms)[0]),
        "spearman_per_bits": per_bits,
        "fp_perplexity_train_sample": math.exp(meter.fp_nll_nats),
        "n_tokens_kl": meter.n_tokens,
        "n_tokens_train": n_train_tokens,
        "epoch_s": epoch_s,
        "sensitivity_s": kl_s,
        "rows": [
            {
                "cluster": c.name,
                "bits": spec.bits,
                "kl": e.harm,
                "kl_stderr": e.stderr,
                "true_harm_nats": harm,
            }
            for (c, spec), e, harm in zip(pairs, entries, harms)
        ],
    }


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ptb.*.txt.gz")
    parser.add_argument("--unit", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--train_words", type=int, default=0, help="0 = all")
    parser.add_argument("--test_words", type=int, default=0, help="0 = all")
    parser.add_argument("--train_seconds", type=float, default=60)
    parser.add_argument("--max_tokens", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result = bench(args)
    for row in result["rows"]:
        print(
            f"{row['cluster']:<12} {row['bits']} bits  KL {row['kl']:.3e} +- {row['kl_stderr']:.1e}"
            f"  true harm {row['true_harm_nats']:+.3e} nats/token"
        )
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return result


def test_smoke(data_root):
    """Seconds of training and few words: the ranking of bits is there already."""
    options = "--unit 24 --vocabulary 200 --train_words 20000 --test_words 3000 --train_seconds 3"
    result = main(["--data", str(data_root / "ptb"), *options.split(), "--max_tokens", "1500"])
    assert len(result["rows"]) == 24
    assert result["spearman"] > 0.6


if __name__ == "__main__":
    main()
