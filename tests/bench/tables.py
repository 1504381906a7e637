"""Markdown tables of the measured rows."""

from __future__ import annotations

from typing import List, Sequence

from bench import onnx_lm
from bench.lm_systems import FP32, HOST, IN_HOST, INT8

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


def head_lines(data: dict) -> List[str]:
    m = data["machine"]
    rows = [row for section in ("latency", "load", "search") for row in data[section].values()]
    dates = sorted({row["date"] for row in rows})
    when = " to ".join(dates[:1] + dates[-1:] if len(dates) > 1 else dates)
    packages = ", ".join(f"{name} {v}" for name, v in m["packages"].items())
    lines = [
        f"{m['cpu']}, {m['cores']} cores; kernel {m['kernel']} (of {', '.join(m['paths'])}); "
        f"Python {m['python']}, {packages}; {when}."
    ]
    return lines + data["notes"]


def render(data: dict) -> str:
    """The whole file; sections that were not measured are left out."""
    lines = ["# Speed of packed LMs", ""]
    lines += ["Made by `make bench` (`tests/bench/bench_kernels.py`).", "", *head_lines(data), ""]
    latency = list(data["latency"].values())
    if latency:
        lines += ["## One step of an LM, milliseconds", "", STEP_TEXT, *latency_table(latency)]
        lines += ["", "## Share of the roof", "", ROOF_TEXT, *roof_table(latency), ""]
    if data["search"]:
        lines += ["## The LM in the host's beam search", "", SEARCH_TEXT]
        lines += [*search_table(list(data["search"].values())), ""]
    if data["load"]:
        lines += ["## Load time and memory", "", LOAD_TEXT]
        lines += [*load_table(list(data["load"].values())), ""]
    return "\n".join(lines).rstrip() + "\n"


STEP_TEXT = """\
Medians of rounds in which all systems take turns. step: embedding, LSTM layers, output layer of
5,000 tokens, log-softmax; stack: the same with 16 tokens, so the LSTM layers alone. ESPnet fp32
and "batch_score" take and give one state a hypothesis, as the beam search calls them; the others
take stacked states. torch int8: `quantize_dynamic` of LSTM and Linear; ORT int8:
`quantize_dynamic` of ONNX Runtime (DynamicQuantizeLSTM, MatMulInteger).
"""
ROOF_TEXT = """\
The time that the machine needs at least, over the time that we need. Multiply-adds: those of the
unpadded problem over the measured peak of the path's own 8-bit instructions. Bytes read (batch 1):
the codes that a step reads over the measured rate at which as many resident bytes are read. Both
are measured between the systems, in the same rounds. 1 bit may pass 100 %: path avx512vbmi looks up
sums of four activations instead of multiplying.
"""
SEARCH_TEXT = """\
BatchBeamSearch: beam 10, 5,000 tokens, attention decoder of 6 blocks and width 256, CTC prefix
scores, 250 frames, one thread; random weights. LM: all calls of the search into the LM.
"""
LOAD_TEXT = """\
`LMTask.build_model_from_file` and the first token's scores, in a fresh process, 5,000 tokens,
files in the page cache. Resident: bytes more than before, at the end; peak: the most on the way.
"""
