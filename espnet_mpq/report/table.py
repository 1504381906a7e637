"""Tables of results: lays out what the files of other steps say; computes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

from espnet_mpq.errors import InputError, MpqError, near_matches
from espnet_mpq.io import atomic_write, read_json

EXAMPLE = """example:
  python -m espnet_mpq.report.table --markdown --title "AN4 test" --output RESULTS.md \\
      --system name=fp weights=exp/lm/valid.loss.best.pth bits=32 ppl=exp/ppl_fp/ppl \\
               wer=exp/compare.json \\
      --system name=mixed weights=exp/packed/packed.safetensors \\
               receipt=exp/packed/receipt.json ppl=exp/ppl_packed/ppl wer=exp/compare.json
"""
HEADINGS = {
    "system": "system",
    "effective_bits": "effective bits",
    "n_bytes": "MB on disk",
    "ppl": "perplexity",
    "wer_percent": "WER %",
    "errors": "sub/del/ins",
    "p_value": "p-value",
}
SYSTEM_KEYS = ("name", "weights", "bits", "receipt", "ppl", "wer", "wer_name")

Row = Dict[str, Union[str, float, None]]


def read_row(
    name: str,
    *,
    weights: Optional[str] = None,
    bits: Optional[Union[str, float]] = None,
    receipt: Optional[str] = None,
    ppl: Optional[str] = None,
    wer: Optional[str] = None,
    wer_name: Optional[str] = None,
) -> Row:
    """One line of a table from the files of one system; what is not given stays empty.

    Args:
        name: what the line is called.
        weights: weight file whose size on disk is shown.
        bits: effective bits of a system without receipt (32 for the fp LM).
        receipt: receipt.json of a packed LM: effective bits and, without ``weights``, bytes.
        ppl: file with the perplexity: the host's `ppl`, or JSON with the key "ppl".
        wer: comparison written by `mpq compare --json`; p-values belong to its second system.
        wer_name: name of the system in that comparison (default: ``name``).

    Raises:
        InputError: a file is missing, damaged or lacks what is asked of it.
    """
    row: Row = dict.fromkeys(HEADINGS)
    row["system"] = name
    if bits is not None:
        row["effective_bits"] = _number(bits, f"bits of {name}")
    if receipt:
        totals = _member(read_json(receipt), "totals", receipt)
        row["effective_bits"] = _member(totals, "effective_bits", receipt)
        row["n_bytes"] = _member(totals, "n_bytes", receipt)
    if weights:
        row["n_bytes"] = _n_bytes_on_disk(weights)
    if ppl:
        row["ppl"] = _read_ppl(ppl)
    if wer:
        comparison = read_json(wer)
        systems = _member(comparison, "systems", wer)
        counts = _member(systems, wer_name or name, wer)
        row["wer_percent"] = counts["wer_percent"]
        row["errors"] = f"{counts['n_sub']}/{counts['n_del']}/{counts['n_ins']}"
        if (wer_name or name) == list(systems)[1]:
            row["p_value"] = comparison["mapsswe"]["p_value"]
    return row


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal; columns that no row fills are left out."""
    return columns(_cells(rows))


def markdown_table(rows: Sequence[Row]) -> str:
    """The same as a Markdown table."""
    return markdown(_cells(rows))


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row the headings, as aligned columns: the first to the left."""
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row the headings, as a Markdown table."""
    rule = ["---"] + ["---:"] * (len(cells[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def _cells(rows: Sequence[Row]) -> List[List[str]]:
    if not rows:
        raise InputError("a table without systems", expected="at least one --system")
    keys = [k for k in HEADINGS if any(row.get(k) is not None for row in rows)]
    return [[HEADINGS[k] for k in keys]] + [[_cell(k, row.get(k)) for k in keys] for row in rows]


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if key == "n_bytes":
        megabytes = value / 1e6
        return f"{megabytes:.2f}" if megabytes >= 1 else f"{megabytes:.4f}"
    if key == "p_value":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    return value if isinstance(value, str) else f"{value:.2f}"


def _member(mapping, key: str, path):
    if not isinstance(mapping, dict) or key not in mapping:
        known = near_matches(key, mapping) if isinstance(mapping, dict) else None
        raise InputError(f"{path} has no {key!r}", todo=known)
    return mapping[key]


def _number(value, what: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError(what, found=repr(value), expected="a number") from error


def _n_bytes_on_disk(path: Union[str, Path]) -> int:
    try:
        return Path(path).stat().st_size  # follows links: the host's best model is one
    except OSError as error:
        raise InputError(f"cannot read {path}", found=error.strerror) from error


def _read_ppl(path: Union[str, Path]) -> float:
    if str(path).endswith(".json"):
        return _number(_member(read_json(path), "ppl", path), str(path))
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}", found=error.strerror) from error
    return _number(content.strip(), str(path))


def main(command: Optional[Sequence[str]] = None) -> None:
    """Write one table to the terminal and, on request, into a file."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mpq.report.table",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--system",
        action="append",
        nargs="+",
        required=True,
        metavar="KEY=VALUE",
        help="one line of the table; keys: " + ", ".join(SYSTEM_KEYS),
    )
    parser.add_argument("--title", help="a heading above the table")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--append", action="store_true", help="add to the file instead")
    args = parser.parse_args(command)

    rows = [read_row(**_settings(pairs)) for pairs in args.system]
    table = markdown_table(rows) if args.markdown else text_table(rows)
    if args.title:
        table = (f"## {args.title}\n\n" if args.markdown else f"{args.title}\n") + table
    print(table)
    if args.output:
        output = Path(args.output)
        before = output.read_text(encoding="utf-8") if args.append and output.exists() else ""
        atomic_write(output, before + table + "\n")


def _settings(pairs: Sequence[str]) -> Dict[str, str]:
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or key not in SYSTEM_KEYS:
            raise InputError(
                "--system",
                found=repr(pair),
                expected="KEY=VALUE",
                todo=near_matches(key, SYSTEM_KEYS),
            )
        settings[key] = value
    if "name" not in settings:
        raise InputError("--system", found=" ".join(pairs), expected="name=... among them")
    return settings


if __name__ == "__main__":
    try:
        main()
    except MpqError as error:
        sys.exit(f"table: error: {error}")
