"""Collect the result files of the recipe into RESULTS.md and print the table; computes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mpq.io import read_json
from espnet_mpq.recipe import report
from espnet_mpq.report.table import markdown_table, read_row, text_table

LM_FILE, PACKED_FILE = "valid.loss.best.pth", "packed.safetensors"


def systems(sensitivity: str) -> list[tuple[str, str, str | None]]:
    """(name of the LM folder, name in the table, folder of the packed LM that tells its bits)."""
    rows = [("no_lm", "no LM", None), ("fp", "fp LM", None)]
    methods = {"uniform": "uniform"}
    if sensitivity != "uniform":
        methods[sensitivity] = "mixed" if sensitivity == "kl" else f"mixed ({sensitivity})"
    for method, title in methods.items():
        packed = f"{method}/packed"
        rows += [(f"{method}/lm", f"{title}, quantized", packed)]
        rows += [(packed, f"{title}, packed", packed)]
    return rows


def system_row(lms: Path, decode: Path, name: str, title: str, packed: str | None) -> dict:
    """The row of one system from its weight file, receipt, perplexity and comparison with fp."""
    plain = name.replace("/", "_")
    other = "no_lm" if name == "fp" else plain
    files = {"wer": decode / f"fp_against_{other}.json", "wer_name": plain}
    if name != "no_lm":
        files["ppl"] = lms / name / "perplexity_test.json"
        files["weights"] = lms / name / (PACKED_FILE if name == packed else LM_FILE)
        if packed is None:
            files["bits"] = 32
        else:
            files["receipt"] = lms / packed / "receipt.json"
    row = read_row(title, **files)
    if row["ppl"] is not None:
        row["ppl"] = f"{row['ppl']:.4f}"  # digits that show whether packing changed anything
    if packed is not None and name != packed:
        row["effective_bits"] = f"{row['effective_bits']:.2f}*"
    return row


def decoding_seconds(decode: Path, rows: list) -> str:
    """Time of every decoding job of the test set."""
    times = []
    for name, title, _ in rows:
        seconds = report.job_seconds(decode / f"test_{name.replace('/', '_')}" / "decode.log")
        times += [f"{title}: {seconds:.1f}"] if seconds else []
    return "; ".join(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: utils/results.py --exp exp/full_char --stages 'data asr' --output R.md",
    )
    parser.add_argument("--exp", type=Path, required=True, help="experiment folder of the recipe")
    parser.add_argument("--lm_type", default="rnn", help="folder of the LMs in it")
    parser.add_argument("--sensitivity", default="kl", help="of the mixed precision LM")
    parser.add_argument("--stages", required=True, help="names of the stages, in order")
    parser.add_argument("--command", default="./run.sh", help="what made the results")
    parser.add_argument("--corpus", default="an4", help="name in the title")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    lms = args.exp / args.lm_type
    decode = lms / f"decode_{args.sensitivity}"
    rows = systems(args.sensitivity)
    table = [system_row(lms, decode, *row) for row in rows]
    scale = (decode / "lm_scale").read_text().strip()
    receipt = read_json(lms / args.sensitivity / "packed" / "receipt.json")
    totals = receipt["totals"]
    kind = "uniform" if args.sensitivity == "uniform" else "mixed"
    size = (
        f"The packed {kind} LM is {totals['compression']:.1f} times smaller than the weights of "
        f"the fp LM ({totals['n_bytes']} against {totals['fp_n_bytes']} bytes)."
    )
    seconds = report.stage_seconds([args.exp / ".stages", lms / ".stages"], args.stages.split())
    lines = [
        f"# {args.corpus}: shallow fusion with an fp, a quantized and a packed LM",
        "",
        f"Test set; LM scale {scale}, tuned on the dev set with the fp LM; perplexity per token;",
        "p-value: MAPSSWE, two-sided, against the fp LM. \\*: float weights on the grid,",
        "these bits once packed.",
        "",
        markdown_table(table),
        "",
        size,
        "",
        f"## Bits of the {kind} LM",
        "",
        *report.plan_lines(receipt),
        "",
        "## Made with",
        "",
        f"`{args.command}`, seed 0 everywhere. {report.versions()}.",
        report.machine(),
        report.stage_times(seconds),
        "Seconds of decoding the test set, two one-thread jobs at a time: "
        f"{decoding_seconds(decode, rows)}.",
    ]
    args.output.write_text("\n".join(lines) + "\n")
    print(text_table(table))
    print(size)


if __name__ == "__main__":
    main()
