"""Collect the result files of the recipe into RESULTS.md; computes nothing but sizes and ratios."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SYSTEMS = (  # folder name, name in the table, where its bits are known from
    ("no_lm", "no LM", None),
    ("fp", "fp LM", None),
    ("uniform", "uniform, quantized", "uniform_packed"),
    ("uniform_packed", "uniform, packed", "uniform_packed"),
    ("mixed", "mixed, quantized", "mixed_packed"),
    ("mixed_packed", "mixed, packed", "mixed_packed"),
)


def lm_row(exp: Path, tag: str, name: str, packed: str | None) -> dict[str, str]:
    """Effective bits, size on disk and perplexity of one LM, as table cells."""
    if name == "no_lm":
        return {"bits": "-", "mb": "-", "ppl": "-"}
    folder = exp / f"lm_{name}_{tag}"
    weights = folder / ("packed.safetensors" if name == packed else "valid.loss.best.pth")
    bits = 32.0
    if packed is not None:
        receipt = json.loads((exp / f"lm_{packed}_{tag}" / "receipt.json").read_text())
        bits = receipt["totals"]["effective_bits"]
    ppl = float((folder / "perplexity_test" / "ppl").read_text())
    float_stored = packed is not None and name != packed
    return {
        "bits": f"{bits:.2f}" + ("*" if float_stored else ""),
        "mb": f"{weights.stat().st_size / 1e6:.3f}",
        "ppl": f"{ppl:.4f}",
    }


def wer_cells(decode: Path, name: str) -> tuple[str, str, str]:
    """WER in percent, sub/del/ins counts and p-value against the fp LM."""
    other = "no_lm" if name == "fp" else name
    comparison = json.loads((decode / f"fp_against_{other}.json").read_text())
    counts = comparison["systems"][name]
    p_value = "-" if name == "fp" else f"{comparison['mapsswe']['p_value']:.3f}"
    errors = f"{counts['n_sub']}/{counts['n_del']}/{counts['n_ins']}"
    return f"{counts['wer_percent']:.2f}", errors, p_value


def plan_lines(receipt: dict) -> list[str]:
    """One line per cluster of a packed LM."""
    lines = ["| cluster | bits | weights | bytes | relative error |", "|---|---|---|---|---|"]
    for row in receipt["clusters"]:
        lines.append(
            f"| {row['cluster']} | {row['bits']} | {row['n_weights']} | {row['n_bytes']} "
            f"| {row['relative_error']:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: utils/results.py --exp exp/full --token_tag char --output RESULTS.md",
    )
    parser.add_argument("--exp", type=Path, required=True, help="experiment folder of the recipe")
    parser.add_argument("--token_tag", required=True)
    parser.add_argument("--corpus", default="an4", help="name in the title")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    decode = args.exp / f"decode_{args.token_tag}"
    scale = (decode / "lm_scale").read_text().strip()
    lines = [
        f"# {args.corpus}: shallow fusion with an fp, a quantized and a packed LM",
        "",
        f"Test set. LM scale {scale}, tuned on the dev set with the fp LM. Perplexity per token. "
        "p: MAPSSWE, two-sided, against the fp LM.",
        "",
        "| system | effective bits | MB on disk | perplexity | WER % | sub/del/ins | p vs fp |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title, packed in SYSTEMS:
        lm = lm_row(args.exp, args.token_tag, name, packed)
        rate, errors, p_value = wer_cells(decode, name)
        cells = [title, lm["bits"], lm["mb"], lm["ppl"], rate, errors, p_value]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "\\* float weights on the grid; these bits once packed.", ""]
    mixed = args.exp / f"lm_mixed_packed_{args.token_tag}"
    receipt = json.loads((mixed / "receipt.json").read_text())
    totals = receipt["totals"]
    lines += [
        f"The packed mixed LM is {totals['compression']:.1f} times smaller than the fp LM's "
        f"{totals['n_weights']} weights ({totals['n_bytes']} of {totals['fp_n_bytes']} bytes).",
        "",
        *plan_lines(receipt),
    ]
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
