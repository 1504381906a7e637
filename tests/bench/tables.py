"""Markdown tables of the measured rows."""

from __future__ import annotations

from typing import List, Sequence

from bench import onnx_lm
from bench.lm_systems import FP32, HOST, IN_HOST, INT8
from bench.mixed import GATE_BITS, GROUP_BITS, GROUPS, MIXED, group_name

BASES = (HOST, FP32, INT8, onnx_lm.FP32, onnx_lm.INT8)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], n_left: int = 1) -> List[str]:
    """Lines of a table; the first ``n_left`` columns are aligned to the left."""
    rule = ["---" if k < n_left else "---:" for k in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def lm_name(row: dict) -> str:
    return f"{row['layers']} x {row['units']}"


def times(value) -> str:
    return "-" if value is None else f"{value:.1f}x"


def ms(value) -> str:
    return "-" if value is None else f"{1e3 * value:.3f}"


def ratio(a, b):
    return None if a is None or b is None else a / b


def part(row: dict) -> str:
    """The whole step, or the stack of LSTM layers where the vocabulary is a token one."""
    return "stack" if row["vocab"] < 100 else "step"


def _order(rows: Sequence[dict]) -> List[dict]:
    return sorted(
        rows, key=lambda r: (r["threads"], -r["vocab"], r["layers"] * r["units"] ** 2, r["batch"])
    )


def latency_table(rows: Sequence[dict]) -> List[str]:
    """Milliseconds per system; ratios of the 2-bit LM."""
    rows = _order(rows)
    bases = [name for name in BASES if any(name in row["seconds"] for row in rows)]
    bits = _bits(rows)
    head = ["threads", "part", "LM", "batch", *bases, *(f"{b} bit" for b in bits)]
    in_host = any(IN_HOST in row["seconds"] for row in rows)
    base = bases[0] if bases else FP32
    against = [name for name in (INT8, onnx_lm.INT8) if name in bases]
    head += ([IN_HOST] if in_host else []) + [f"2 bit: {name} /" for name in against]
    head += [f"batch_score: {base} /" if in_host else f"2 bit: {base} /"]
    lines = []
    for row in rows:
        s = row["seconds"]
        cells = [str(row["threads"]), part(row), lm_name(row), str(row["batch"])]
        cells += [ms(s.get(name)) for name in bases] + [ms(s.get(f"{b} bit")) for b in bits]
        cells += [ms(s.get(IN_HOST))] if in_host else []
        cells += [times(ratio(s.get(name), s.get("2 bit"))) for name in against]
        cells += [times(ratio(s.get(base), s.get(IN_HOST, s.get("2 bit"))))]
        lines.append(cells)
    return table(head, lines, 3)


def roof_table(rows: Sequence[dict]) -> List[str]:
    """Share of the roof per bit-width."""
    rows = [row for row in _order(rows) if row["roof_s"]]
    if not rows:
        return ["No roof: portable C++, thread time, or no compiler."]
    bits = _bits(rows)
    lines = []
    for row in rows:
        for bound, name in (("multiply-adds", "macs"), ("bytes read", "read {}")):
            cells = [str(row["threads"]), part(row), lm_name(row), str(row["batch"]), bound]
            roofs = [row["roof_s"].get(name.format(b)) for b in bits]
            shares = [ratio(r, row["seconds"].get(f"{b} bit")) for r, b in zip(roofs, bits)]
            cells += ["-" if share is None else f"{100 * share:.0f} %" for share in shares]
            if any(roofs):
                lines.append(cells)
    return table(["threads", "part", "LM", "batch", "bound", *(f"{b} bit" for b in bits)], lines, 3)


def _bits(rows: Sequence[dict]) -> List[int]:
    return sorted({int(n.split()[0]) for row in rows for n in row["seconds"] if n.endswith(" bit")})


def load_table(rows: Sequence[dict]) -> List[str]:
    head = ["LM", "system", "file, MB", "load, s", "resident, MB", "peak, MB"]
    lines = []
    for row in sorted(rows, key=lambda r: r["layers"] * r["units"] ** 2):
        for name, v in row["systems"].items():
            sizes = [f"{v[k] / 1e6:.1f}" for k in ("file_bytes", "resident_bytes", "peak_bytes")]
            lines.append([lm_name(row), name, sizes[0], f"{v['load_s']:.2f}", *sizes[1:]])
    return table(head, lines, 2)


def search_table(rows: Sequence[dict]) -> List[str]:
    head = ["LM", "system", "step of the search, ms", "LM in it, ms", "share"]
    lines = []
    for row in sorted(rows, key=lambda r: r["layers"] * r["units"] ** 2):
        for name, v in row["systems"].items():
            share = "-" if name == "no LM" else f"{100 * v['share']:.1f} %"
            lines.append([lm_name(row), name, ms(v["step_s"]), ms(v["lm_s"]), share])
    return table(head, lines, 2)


def mixed_table(rows: Sequence[dict]) -> List[str]:
    """Gates of 1, 2, 4, 8 bits against the mean of the uniform LMs: what their parts cost."""
    lines = []
    for row in _order(rows):
        s = row["seconds"]
        uniform = [s[f"{b} bit"] for b in GATE_BITS.values()]
        mean = sum(uniform) / len(uniform)
        cells = [lm_name(row), str(row["batch"]), *map(ms, uniform), ms(mean), ms(s[MIXED])]
        lines.append([*cells, f"{s[MIXED] / mean:.2f}"])
    bits = [f"{b} bit" for b in GATE_BITS.values()]
    return table(["LM", "batch", *bits, "their mean", MIXED, f"{MIXED} / mean"], lines)


def group_table(rows: Sequence[dict]) -> List[str]:
    """Scales of groups of columns against a scale a row, all of one bit-width."""
    names, lines = [group_name(size) for size in GROUPS], []
    for row in _order(rows):
        s, base = row["seconds"], row["seconds"][f"{GROUP_BITS} bit"]
        cells = [lm_name(row), str(row["batch"]), ms(base), *(ms(s[name]) for name in names)]
        lines.append([*cells, *(f"{s[name] / base:.2f}" for name in names)])
    return table(["LM", "batch", "a row", *names, *(f"{n} / a row" for n in names)], lines)


def transformer_table(rows: Sequence[dict]) -> List[str]:
    """batch_score by prefix length and what the prefixes share; ratios of the 2-bit LM."""
    rows = sorted(
        rows, key=lambda r: (r["layers"] * r["units"] ** 2, r["length"], r["batch"], -r["shared"])
    )
    bits = _bits(rows)
    names = [HOST, INT8, *(f"{b} bit" for b in bits)]
    head = ["LM", "prefixes", "tokens", "batch", "distinct tokens", *names]
    lines = []
    for row in rows:
        s = row["seconds"]
        cells = [lm_name(row), "shared" if row["shared"] else "apart", str(row["length"])]
        cells += [str(row["batch"]), str(row["n_distinct"]), *(ms(s.get(name)) for name in names)]
        lines.append(cells + [times(ratio(s[name], s.get("2 bit"))) for name in (HOST, INT8)])
    return table([*head, *(f"2 bit: {name} /" for name in (HOST, INT8))], lines, 2)


def decode_table(rows: Sequence[dict]) -> List[str]:
    """Whole decoding by test set and system."""
    head = ["test set", "system", "decoding, s", "LM in it, s", "share", "s per s of audio"]
    lines = []
    for row in rows:
        for name, v in row["systems"].items():
            share = f"{100 * v['lm_s'] / v['all_s']:.1f} %" if v["lm_s"] else "-"
            cells = [row["set"], name, f"{v['all_s']:.2f}", f"{v['lm_s']:.2f}", share]
            lines.append([*cells, f"{v['all_s'] / row['audio_s']:.3f}"])
    return table(head, lines, 2)
