"""Collect the result files of the recipe into RESULTS.md and print the tables; computes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mpq.io import read_json
from espnet_mpq.recipe import report
from espnet_mpq.report.table import markdown

LM_FILE, PACKED_FILE = "valid.loss.best.pth", "packed.safetensors"
SETS = ("dev", "eval")
LM_TYPES = {"rnn": "LSTM LM", "transformer": "Transformer LM"}
METHODS = ("uniform", "kl", "kl_printed", "hessian", "fisher", "nas")
HEADINGS = (
    "system",
    "effective bits",
    "bytes",
    "dev, quantized",
    "dev, packed",
    "eval, quantized",
    "eval, packed",
    "sensitivity, s",
    "training, s",
)
PAPER = """## The same at the published sizes

Not run here: they want a GPU. The paper's AMI LMs are trained on Fisher and three times the AMI
transcripts (15 M words, 47 k words of vocabulary); with `--token_type word --nbpe 13000` the
vocabulary is that of the AMI transcripts alone.

    ./run.sh --ngpu 1 --tag _paper --token_type word --nbpe 13000 \\
        --lm_config ../../../conf/lm/train_lm_lstm_2x1024.yaml \\
        --mpq_config ../../../conf/quantization/admm.yaml --budget 2.0
    ./run.sh --ngpu 1 --tag _paper --token_type word --nbpe 13000 --lm_type transformer \\
        --lm_config ../../../conf/lm/train_lm_transformer_6x512.yaml \\
        --mpq_config ../../../conf/quantization/admm.yaml --budget 2.0
"""


def word_perplexity(folder: Path, name: str) -> str:
    """Per word, sentence ends counted, with its standard error."""
    value = read_json(folder / f"perplexity_{name}.json")
    return f"{value['word_ppl']:.2f} ± {value['word_ppl_stderr']:.2f}"


def seconds_of(method: Path) -> tuple[str, str]:
    """Of the sensitivity or search, and of the training; "-" where there was none."""
    logs = [method / "sensitivity.log", method / "search" / "nas.log"]
    sensitivity = next((report.job_seconds(log) for log in logs if log.is_file()), None)
    training = report.training_seconds(method / "lm" / "train.log")
    return tuple(f"{value:.0f}" if value else "-" for value in (sensitivity, training))


def rows_of(lms: Path) -> list[tuple[str, ...]]:
    """One row of HEADINGS per system that has been measured."""
    rows = []
    for name, folder in (("fp", lms / "fp"), ("float", lms / "float" / "lm")):
        if not (folder / "perplexity_eval.json").is_file():
            continue
        dev, eval_ = word_perplexity(folder, "dev"), word_perplexity(folder, "eval")
        n_bytes = f"{(folder / LM_FILE).stat().st_size:,}"
        training = f"{report.training_seconds(folder / 'train.log'):.0f}"
        rows.append((name, "32", n_bytes, dev, "-", eval_, "-", "-", training))
    for method in METHODS:
        folder = lms / method
        if not (folder / "packed" / "perplexity_eval.json").is_file():
            continue
        totals = read_json(folder / "packed" / "receipt.json")["totals"]
        assert totals["n_bytes"] == (folder / "packed" / PACKED_FILE).stat().st_size
        measured = [word_perplexity(folder / lm, s) for s in SETS for lm in ("lm", "packed")]
        title = method if method == "uniform" else f"mixed, {method}"
        bits = f"{totals['effective_bits']:.3f}"
        rows.append((title, bits, f"{totals['n_bytes']:,}", *measured, *seconds_of(folder)))
    return rows


def bits_of(lms: Path) -> list[tuple[str, ...]]:
    """One row per cluster: its weights and its bits by every method."""
    receipts = {m: lms / m / "packed" / "receipt.json" for m in METHODS}
    found = {m: read_json(path)["clusters"] for m, path in receipts.items() if path.is_file()}
    rows = [("cluster", "weights", *found)]
    for i, cluster in enumerate(next(iter(found.values()))):
        bits = [str(clusters[i]["bits"]) for clusters in found.values()]
        rows.append((cluster["cluster"], f"{cluster['n_weights']:,}", *bits))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: utils/results.py --exp exp/full_bpe1000 --output RESULTS.md",
    )
    parser.add_argument("--exp", type=Path, required=True, help="experiment folder of the recipe")
    parser.add_argument("--profile", default="full", help="full or mini, for the title")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = [
        f"# AMI transcripts ({args.profile}): fp, quantized and packed LMs",
        "",
        "Perplexity per word with its standard error, sentence ends counted. quantized: float",
        "weights on the grid; packed: codes and scales, run as the host runs them. The low-bit",
        "LMs start from the fp LM; float is the fp LM after the same further training, without low",
        "bits. Times: seconds of wall clock, jobs side by side: of the sensitivity (the search of",
        "nas) and of all epochs of a training.",
    ]
    for lm_type, title in LM_TYPES.items():
        lms = args.exp / lm_type
        if not (lms / "uniform" / "packed" / "perplexity_eval.json").is_file():
            continue
        table = markdown([HEADINGS, *rows_of(lms)])
        print(f"{title}\n{table}")
        lines += ["", f"## {title}", "", table, "", "Bits of every cluster:", ""]
        lines += [markdown(bits_of(lms))]
    command = "`./run.sh --lm_type rnn` and `--lm_type transformer`, seed 0 everywhere."
    lines += ["", "## Made with", "", f"{command} {report.versions()}.", report.machine()]
    lines += ["", PAPER.rstrip("\n")]
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
