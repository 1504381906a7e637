"""Which sensitivity tells which cluster hurts? Spearman with measured harm on real text, and times.

By hand:
  python tests/bench/bench_sensitivity.py agreement --data $MPQ_DATA_ROOT --folder exp/bench
  python tests/bench/bench_sensitivity.py time --data $MPQ_DATA_ROOT --folder exp/bench
The first trains an LSTM LM (PTB words) and a Transformer LM (AMI words) by the host, half an hour
of one core, and goes on where it was killed. Measured harm: nll of unseen text with one cluster
quantized, all else fp, minus that of the fp LM.

Spearman of each method's harm (on 5,000 tokens of training text) with the measured one:
                        all  1 bit 2 bits 4 bits 8 bits  probes
lstm 2 x 200   kl      0.93   0.99   0.92   0.81  -0.22
               hessian 0.91   0.93   0.95   0.81  -0.22      22
               fisher  0.92   0.83   0.95   0.90  -0.25       4
transformer    kl      0.48   0.60   0.44   0.33  -0.02
4 x 128        hessian 0.49   0.50   0.54   0.31  -0.19       4
               fisher  0.48   0.43   0.47   0.33  -0.08       4
with --max_epoch 3 (lstm, 1,350 updates, perplexity 139 of 12,000 unseen words) and 2 (transformer,
900 updates, 84.5), --test_words 12000 --max_tokens 5000. At 8 bits, and for most gates at 4, the
measured harm is below its own error. The Transformer was far from converged: quantizing
attention LOWERED the nll of unseen text there (-4.4e-3 +- 0.8e-3 nats for one block at 1 bit),
which no positive measure can foresee; its line says little about trained LMs.
Embedding of the Transformer: curvature says 19 to 20 nats at 1 bit where 0.49 were measured: the
second order is no guide so far from the fp weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from real_lms import (  # noqa: E402
    RECURRENT,
    TRANSFORMER,
    read_sentences,
    train_host_lm,
    word_list,
)

BITS = (1, 2, 4, 8)
METHODS = ("kl", "hessian", "fisher")
# corpus, host options, lm_conf
LMS = {
    "lstm": ("ptb/ptb", RECURRENT, dict(unit=200, nlayers=2, dropout_rate=0.2)),
    "transformer": (
        "ami_lm/",
        TRANSFORMER,
        dict(
            pos_enc="sinusoidal", embed_unit=128, att_unit=128, head=4, unit=512, layer=4,
            dropout_rate=0.1, positional_dropout_rate=0.1, attention_dropout_rate=0.1,
        ),
    ),
}  # fmt: skip


def texts(args, name: str, train_words: int = 0) -> dict:
    stem = {"ptb": "ptb.", "ami_lm": ""}[LMS[name][0].split("/")[0]]
    folder = args.data / LMS[name][0].split("/")[0]
    limits = {"train": train_words, "valid": 20000, "test": args.test_words}
    return {k: read_sentences(folder / f"{stem}{k}.txt.gz", n) for k, n in limits.items()}


def train(args, name: str) -> Path:
    """The experiment folder of one LM, its training text beside it."""
    text = texts(args, name, args.train_words)
    tokens = word_list(text["train"], args.vocabulary)
    _, options, conf = LMS[name]
    if args.unit:
        conf = {**conf, "unit": args.unit}
    settings = dict(options, max_epoch=args.max_epoch)
    if args.epoch_tokens:
        settings["num_iters_per_epoch"] = args.epoch_tokens // 1000
    folder = args.folder / name
    exp = train_host_lm(folder, text["train"], text["valid"], tokens, conf, **settings)
    (folder / "train.txt").write_text("\n".join(text["train"]) + "\n", encoding="utf-8")
    return exp


def sensitivity(exp: Path, method: str, max_tokens: int, *more) -> tuple:
    """(table as JSON, seconds of wall, seconds of processor)."""
    from espnet_mpq.bin.mpq import main

    output = exp.parent / f"{method}.json"
    output.unlink(missing_ok=True)
    words = ["sensitivity", "--lm_exp", exp, "--text", exp.parent / "train.txt", "--method", method]
    words += ["--text_format", "plain", "--max_tokens", max_tokens, "--output", output, *more]
    start, cpu = time.monotonic(), time.process_time()
    assert main([str(w) for w in words]) == 0
    wall_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
    return json.loads(output.read_text()), wall_s, cpu_s


def measured_harm(args, name: str, exp_path: Path) -> tuple:
    """((cluster, bits) -> (nats/token, standard error), perplexity of the fp LM) on unseen text."""
    from espnet_mpq.bin.measuring import make_meter, perplexity
    from espnet_mpq.clusters import find_clusters
    from espnet_mpq.hosts.espnet.experiment import load_fp_lm
    from espnet_mpq.hosts.espnet.text import tokenize
    from espnet_mpq.plan import ClusterSpec

    exp = load_fp_lm(exp_path)
    test = texts(args, name, 1)["test"]
    text = tokenize(exp, [(str(i), s) for i, s in enumerate(test)])
    clusters = find_clusters(exp.lm)
    meter = make_meter(exp, clusters, text, printed_form=True)
    harms = {}
    for cluster in clusters:
        for bits in BITS:
            entry = meter.entry(cluster.name, ClusterSpec(bits))
            harms[cluster.name, bits] = (entry.harm, entry.stderr)
    return harms, perplexity(meter.fp_nll_nats)


def agreement(args) -> dict:
    """Spearman of each method's harm with the measured one: all entries, and per bit-width."""
    result = {}
    for name in args.lm:
        exp = train(args, name)
        harms, ppl = measured_harm(args, name, exp)
        print(f"\n{name}: perplexity of unseen text {ppl:.1f}, measured harm in nats/token")
        for (cluster, bits), (value, stderr) in harms.items():
            print(f"{cluster:<22} {bits} bits  {value:+.2e} +- {stderr:.0e}", flush=True)
        tables, rows = {}, {}
        for method in METHODS:
            tables[method], _, cpu_s = sensitivity(exp, method, args.max_tokens)
            harm = {
                (c, int(b)): e["harm"]
                for c, row in tables[method]["entries"].items()
                for b, e in row.items()
            }
            probes = len(tables[method].get("curvature", {}).get("probes", []))
            rows[method] = {
                "all": _spearman(harms, harm, BITS),
                **{b: _spearman(harms, harm, (b,)) for b in BITS},
                "probes": probes,
                "cpu_s": cpu_s,
            }
        for cluster, bits in harms:
            entries = [(m, tables[m]["entries"][cluster][str(bits)]) for m in METHODS]
            cells = "  ".join(f"{m} {e['harm']:.2e} +- {e['stderr']:.0e}" for m, e in entries)
            print(f"{cluster:<22} {bits} bits  {cells}")
        print("Spearman   all   1 bit 2 bits 4 bits 8 bits  probes   CPU s")
        for method, row in rows.items():
            cells = " ".join(f"{row[key]:6.2f}" for key in ("all", *BITS))
            print(f"{method:<8} {cells}  {row['probes']:6d} {row['cpu_s']:7.1f}")
        result[name] = {"perplexity": ppl, "methods": rows}
    return result


def _spearman(harms, predicted, bits) -> float:
    keys = [key for key in harms if key[1] in bits]
    return float(spearmanr([harms[k][0] for k in keys], [predicted[k] for k in keys])[0])


def times(args) -> dict:
    """All clusters x 4 bit-widths of a 2 x 650 LSTM LM against one epoch of the host, same text."""
    torch.set_num_threads(args.threads)
    sentences = read_sentences(args.data / "ptb" / "ptb.train.txt.gz", args.train_words or 5000)
    everything = read_sentences(args.data / "ptb" / "ptb.train.txt.gz")
    n_tokens = sum(len(s.split()) + 1 for s in sentences)
    folder = args.folder / "time"
    conf = dict(unit=650, nlayers=2)
    tokens = word_list(everything, args.vocabulary)
    exp = train_host_lm(folder, sentences, sentences[:2], tokens, conf, max_epoch=1, **RECURRENT)
    (folder / "train.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    try:
        state = torch.load(exp / "checkpoint.pth", weights_only=False)
    except TypeError:  # torch 1.13 pickles without the argument
        state = torch.load(exp / "checkpoint.pth")
    result = {"n_tokens": n_tokens, "epoch_s": state["reporter"]["stats"][1]["train"]["time"]}
    result["epoch_s"] = result["epoch_s"].total_seconds()
    print(f"{n_tokens} tokens, {args.threads} threads: one epoch {result['epoch_s']:.1f} s")
    for method in args.methods:
        table, wall_s, _ = sensitivity(exp, method, 0)
        probes = len(table.get("curvature", {}).get("probes", []))
        result[method] = wall_s
        epochs = wall_s / result["epoch_s"]
        print(
            f"{method}: {wall_s:.1f} s" + (f" ({probes} probes)" if probes else "")
            + f", {epochs:.1f} epochs; the default sample of 10,000 tokens takes as long"
            f" as an epoch on {10000 * epochs:,.0f} tokens"
        )  # fmt: skip
    return result


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("agreement", "time"))
    add("--data", type=Path, required=True, help="$MPQ_DATA_ROOT")
    add("--folder", type=Path, required=True, help="experiments go here and are gone on with")
    add("--lm", nargs="+", choices=tuple(LMS), default=list(LMS))
    add("--unit", type=int, help="instead of 200 (lstm), 512 (transformer)")
    add("--vocabulary", type=int, default=5000)
    add("--train_words", type=int, default=0, help="0 = all (time: 5000)")
    add("--test_words", type=int, default=30000)
    add("--max_epoch", type=int, default=6)
    add("--epoch_tokens", type=int, default=450000)
    add("--max_tokens", type=int, default=10000, help="of the sensitivity")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of time")
    add("--threads", type=int, default=1)
    add("--json", type=Path)
    args = parser.parse_args(argv)
    import espnet_mpq

    torch.set_num_threads(args.threads)
    espnet_mpq.register()
    result = agreement(args) if args.what == "agreement" else times(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return result


def test_smoke(data_root, tmp_path):
    """Seconds of training and few words: the ranking of bits is there already."""
    options = "--lm lstm --unit 24 --vocabulary 200 --train_words 20000 --test_words 3000"
    options += " --max_epoch 1 --max_tokens 1500"
    words = ["agreement", "--data", str(data_root), "--folder", str(tmp_path), *options.split()]
    methods = main(words)["lstm"]["methods"]
    assert methods["kl"]["all"] > 0.6 and methods["fisher"]["all"] > 0.6


if __name__ == "__main__":
    main()
