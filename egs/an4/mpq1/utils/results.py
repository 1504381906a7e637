"""Collect the result files of the recipe into RESULTS.md and print the table; computes nothing."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import espnet_mpq
from espnet_mpq.io import read_json
from espnet_mpq.report.table import markdown_table, read_row, text_table

SYSTEMS = (  # name of the folders, name in the table, packed LM that tells its bits
    ("no_lm", "no LM", None),
    ("fp", "fp LM", None),
    ("uniform", "uniform, quantized", "uniform_packed"),
    ("uniform_packed", "uniform, packed", "uniform_packed"),
    ("mixed", "mixed, quantized", "mixed_packed"),
    ("mixed_packed", "mixed, packed", "mixed_packed"),
)
NVIDIA = Path("/proc/driver/nvidia")


def system_row(exp: Path, tag: str, name: str, title: str, packed: str | None) -> dict:
    """The row of one system from its weight file, receipt, perplexity and comparison with fp."""
    other = "no_lm" if name == "fp" else name
    files = {"wer": exp / f"decode_{tag}" / f"fp_against_{other}.json", "wer_name": name}
    folder = exp / f"lm_{name}_{tag}"
    if name != "no_lm":
        files["ppl"] = folder / "perplexity_test" / "ppl"
        file_name = "packed.safetensors" if name == packed else "valid.loss.best.pth"
        files["weights"] = folder / file_name
        if packed is None:
            files["bits"] = 32
        else:
            files["receipt"] = exp / f"lm_{packed}_{tag}" / "receipt.json"
    row = read_row(title, **files)
    if row["ppl"] is not None:
        row["ppl"] = f"{row['ppl']:.4f}"  # digits that show whether packing changed anything
    if packed is not None and name != packed:
        row["effective_bits"] = f"{row['effective_bits']:.2f}*"
    return row


def plan_lines(receipt: dict) -> list[str]:
    """One line per cluster of a packed LM."""
    lines = ["| cluster | bits | weights | bytes | relative error |", "|---|---:|---:|---:|---:|"]
    for row in receipt["clusters"]:
        lines.append(
            f"| {row['cluster']} | {row['bits']} | {row['n_weights']} | {row['n_bytes']} "
            f"| {row['relative_error']:.4f} |"
        )
    return lines


def decoding_seconds(exp: Path, tag: str) -> str:
    """Time of every decoding job of the test set, as its log says in the last line."""
    times = []
    for name, title, _ in SYSTEMS:
        log = exp / f"decode_{tag}" / f"test_{name}" / "decode.log"
        found = re.findall(r"^# done in ([0-9.]+) s$", log.read_text(errors="replace"), re.M)
        times += [f"{title}: {found[-1]}"] if found else []
    return "; ".join(times)


def made_with(exp: Path, tag: str) -> list[str]:
    """Versions, machine, seed, and the time of every stage and decoding."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "espnet"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    versions.append(f"espnet_mpq {espnet_mpq.__version__}")
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [x for x in cpu_info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    seconds = {
        int(file.stem): int(file.read_text()) for file in (exp / ".stages").glob("*.seconds")
    }
    times = ", ".join(f"{stage}: {seconds[stage]}" for stage in sorted(seconds))
    return [
        "## Made with",
        "",
        "`make demo` (`./run.sh`), seed 0 everywhere. " + ", ".join(versions) + ".",
        f"{cpu}, {os.cpu_count()} cores, no GPU." if not NVIDIA.exists() else f"{cpu}, GPU.",
        f"Seconds of the last run of every stage: {times}; together {sum(seconds.values())}.",
        f"Seconds of decoding the test set, two one-thread jobs at a time: "
        f"{decoding_seconds(exp, tag)}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: utils/results.py --exp exp/full --token_tag char --output RESULTS.md",
    )
    parser.add_argument("--exp", type=Path, required=True, help="experiment folder of the recipe")
    parser.add_argument("--token_tag", required=True, help="char or bpeN")
    parser.add_argument("--corpus", default="an4", help="name in the title")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    rows = [system_row(args.exp, args.token_tag, *system) for system in SYSTEMS]
    scale = (args.exp / f"decode_{args.token_tag}" / "lm_scale").read_text().strip()
    receipt = read_json(args.exp / f"lm_mixed_packed_{args.token_tag}" / "receipt.json")
    totals = receipt["totals"]
    size = (
        f"The packed mixed LM is {totals['compression']:.1f} times smaller than the weights of the "
        f"fp LM ({totals['n_bytes']} against {totals['fp_n_bytes']} bytes)."
    )
    lines = [
        f"# {args.corpus}: shallow fusion with an fp, a quantized and a packed LM",
        "",
        f"Test set; LM scale {scale}, tuned on the dev set with the fp LM; perplexity per token;",
        "p-value: MAPSSWE, two-sided, against the fp LM. \\*: float weights on the grid,",
        "these bits once packed.",
        "",
        markdown_table(rows),
        "",
        size,
        "",
        "## Bits of the mixed LM",
        "",
        *plan_lines(receipt),
        "",
        *made_with(args.exp, args.token_tag),
    ]
    args.output.write_text("\n".join(lines) + "\n")
    print(text_table(rows))
    print(size)


if __name__ == "__main__":
    main()
