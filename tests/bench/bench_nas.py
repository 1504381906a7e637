"""Does the search by a super-network choose as well as the KL? Perplexity at equal budgets.

By hand:
  python tests/bench/bench_nas.py --data $MPQ_DATA_ROOT --folder exp/bench_nas
trains an LSTM LM of PTB words by the host, measures the KL table, searches bits by mpq nas, and
prints the perplexity on unseen text of the fp weights rounded by either plan (no training after
it). Half an hour of one core; goes on where it was killed.

Measured at the defaults (2 x 200 LSTM, 6,000 PTB words, 5 epochs on 400,000 words, 2.2 effective
bits; pipelined search: weights on one-hot paths, then bits on held-out text; perplexity on 20,000
words of PTB test; fp 126.2; AMD EPYC, one core, 2026-11-21).
Bits: embedding, gates i f g o of both layers, output.
  KL            2 1222 2124 2   2.198 bits  143.55
  NAS           2 2222 1124 2   2.198 bits  143.46   seeds 0 and 1
The plan fits by itself. The difference is far below what this text tells apart: no sign that the
search beats the KL. On a busy core the search took 12 minutes, five of them for the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from found import weights_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from real_lms import RECURRENT, read_sentences, train_host_lm, word_list  # noqa: E402


def mpq(*words) -> None:
    from espnet_mpq.bin import mpq

    if mpq.main([str(word) for word in words]):
        raise SystemExit(f"mpq {words[0]} failed")


def perplexity(exp: Path, plan_file, sentences) -> float:
    """Of the LM of ``exp``, rounded as the plan says."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.perplexity import measure
    from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
    from espnet_mpq.plan import Plan
    from espnet_mpq.training.on_grid import project_weights

    opened = load_fp_lm(exp)
    if plan_file is not None:
        project_weights(weights_of(opened.module), Plan.read(plan_file))
    text = tokenize(opened, [(f"test{i}", line) for i, line in enumerate(sentences)])
    return measure(opened, text).to_dict()["ppl"]


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="$MPQ_DATA_ROOT")
    add("--folder", type=Path, required=True, help="experiments go here and are gone on with")
    add("--unit", type=int, default=200)
    add("--vocabulary", type=int, default=6000)
    add("--train_words", type=int, default=400000)
    add("--test_words", type=int, default=20000)
    add("--max_epoch", type=int, default=5, help="of the fp LM")
    add("--budgets", type=float, nargs="+", default=[2.2], help="effective bits")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--max_tokens", type=int, default=10000, help="of the KL")
    add("--nas", nargs=argparse.REMAINDER, default=[], help="options of mpq nas; comes last")
    args = parser.parse_args(argv)
    import espnet_mpq

    espnet_mpq.register()
    text = {
        name: read_sentences(args.data / "ptb" / f"ptb.{name}.txt.gz", n_words)
        for name, n_words in (("train", args.train_words), ("valid", 20000))
    }
    test = read_sentences(args.data / "ptb" / "ptb.test.txt.gz", args.test_words)
    tokens = word_list(text["train"], args.vocabulary)
    conf = dict(unit=args.unit, nlayers=2, dropout_rate=0.2)
    epochs = dict(max_epoch=args.max_epoch)
    fp = train_host_lm(
        args.folder / "fp", text["train"], text["valid"], tokens, conf, **RECURRENT, **epochs
    )
    files = {}
    for name, sentences in text.items():
        files[name] = args.folder / f"{name}.txt"
        files[name].write_text("".join(f"{line}\n" for line in sentences), encoding="utf-8")
    common = ["--lm_exp", fp, "--text", files["train"], "--text_format", "plain"]
    table = args.folder / "kl.json"
    mpq("sensitivity", *common, "--output", table, "--max_tokens", args.max_tokens)
    result = {"fp": perplexity(fp, None, test), "plans": []}
    for budget in args.budgets:
        tables = {"kl": table}
        for seed in args.seeds:
            folder = args.folder / f"nas-{budget:g}-{seed}"
            start = time.monotonic()
            mpq(
                *("nas", *common, "--valid_text", files["valid"], "--budget", budget),
                *("--output_dir", folder, "--seed", seed, *args.nas),
            )
            print(f"search: {time.monotonic() - start:.0f} s")
            tables[f"nas, seed {seed}"] = folder / "sensitivity.json"
        for name, path in tables.items():
            folder = args.folder / f"plan-{budget:g}-{path.parent.name}-{path.stem}"
            words = ["--lm_exp", fp, "--sensitivity", path, "--budget", budget, "--repair", 0]
            mpq("plan", *words, "--output_dir", folder)
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            found = json.loads(path.read_text(encoding="utf-8"))["provenance"].get("nas", {})
            summary = plan["provenance"]["summary"]
            row = {
                "budget": budget,
                "table": name,
                "bits": " ".join(str(spec["bits"]) for spec in plan["clusters"].values()),
                "effective_bits": summary["effective_bits"],
                "joint_kl": summary["joint_kl"],
                "ppl": perplexity(fp, folder / "plan.json", test),
                "fits_by_itself": found.get("fits_budget"),
            }
            result["plans"].append(row)
    print(f"fp perplexity {result['fp']:.2f}")
    for row in result["plans"]:
        print(json.dumps(row))
    return result


if __name__ == "__main__":
    main()
