"""RESULTS.md as a whole: every section with when it was measured; no row is lost by writing it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import List, Sequence

from bench import tables


def machine_line(data: dict) -> str:
    m = data["machine"]
    packages = ", ".join(f"{name} {v}" for name, v in m["packages"].items())
    return (
        f"{m['cpu']}, {m['cores']} cores; kernel {m['kernel']} (of {', '.join(m['paths'])}); "
        f"Python {m['python']}, {packages}."
    )


def _subject(row: dict) -> str:
    """What one line of `when` names a row by."""
    if "set" in row:
        return row["set"]
    threads = f", {row['threads']} threads" if row.get("threads", 1) > 1 else ""
    return tables.lm_name(row) + threads


def when(rows: Sequence[dict]) -> str:
    """When rows were measured, at which revision, with the notes of that run."""
    groups: dict = {}
    for row in rows:
        stamp = (row["date"], row.get("revision", ""), *row.get("notes", ()))
        groups.setdefault(stamp, []).append(_subject(row))
    lines = []
    for (date, revision, *notes), subjects in groups.items():
        at = f"{date}, revision {revision}" if revision else date
        which = "" if len(groups) == 1 else f" ({'; '.join(dict.fromkeys(subjects))})"
        lines.append(" ".join([f"Measured {at}{which}.", *notes]))
    return "\n".join(lines)


def render(data: dict) -> str:
    """The whole file; sections that were not measured are left out."""
    lines = ["# Speed of packed LMs", ""]
    lines += ["Made by `make bench` (`tests/bench/bench_kernels.py`).", "", machine_line(data)]
    for section, title, text, make in SECTIONS:
        rows = list(data.get(section, {}).values())
        if rows:
            lines += ["", f"## {title}", "", text.strip(), "", *make(rows), "", when(rows)]
    return "\n".join(lines).rstrip() + "\n"


def row_names(text: str) -> Counter:
    """(section, cells aligned to the left) of every table row, and how often they occur."""
    found, section, rule = Counter(), "", None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            section = line[3:]
        elif not line.startswith("|"):
            rule = None
        elif set(line) <= set("|-: "):
            rule = cells
        elif rule:
            left = [cell for cell, mark in zip(cells, rule) if not mark.endswith(":")]
            found[(section, *left)] += 1
    return found


def lost_rows(old: str, new: str) -> List[str]:
    """The rows of ``old`` that ``new`` lacks, one line each."""
    had = row_names(old)
    lost = had - row_names(new)
    return [f"{' | '.join(name)}: {n} of {had[name]} rows" for name, n in lost.items()]


def write(data: dict, file: Path, aside: Path, replace: bool = False) -> bool:
    """Put the tables into ``file``, or into ``aside`` if that would lose rows of another run.

    Args:
        replace: write although rows are lost.

    Returns:
        Whether ``file`` was written.
    """
    text, old = render(data), ""
    if file.is_file():
        old = file.read_text(encoding="utf-8")
    lost = [] if replace else lost_rows(old, text)
    if lost:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        shown = "\n  ".join(lost[:20] + ["..."] * (len(lost) > 20))
        print(
            f"{file} was not written: it has rows that this run and the JSON of earlier runs do "
            f"not have:\n  {shown}\nThe new tables are in {aside}. Measure those rows too, name "
            "the JSON of the run that made them (--results), or give them up (--replace)."
        )
        return False
    file.write_text(text, encoding="utf-8")
    return True


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
MIXED_TEXT = """\
Milliseconds of the LSTM layers (16 tokens), one thread, stacked states, all in the same rounds.
mixed: in every layer the gates i, f, g, o have 1, 2, 4, 8 bits. Were it to cost what its parts
cost, it would take the mean of the four uniform LMs. A scale a row.
"""
GROUP_TEXT = """\
The same stacks at 2 bits, in the same rounds: a scale for every group of columns of every row
against a scale a row.
"""
TRANSFORMER_TEXT = """\
Milliseconds of `batch_score` with the states of the step before, as the host's beam search calls
it, one thread; five steps from the stated prefix length on. Layers x attention units, heads of 64,
inner width four times as large, 128 embedding units, 5,000 tokens, random weights. ESPnet fp32: its
TransformerLM with its own cache (layer outputs; keys and values of the whole prefix are computed
again at every step). torch int8: that LM after `quantize_dynamic` of Linear. shared: all hypotheses
grew from one, and at every step one in five is given up for a second continuation of a random one;
they share about as much as those of AN4's decoding do. apart: no two have a token in common.
distinct tokens: those of all prefixes, shared ones once. All LMs get the same prefixes.
"""
SEARCH_TEXT = """\
BatchBeamSearch: beam 10, 5,000 tokens, attention decoder of 6 blocks and width 256, CTC prefix
scores, 250 frames, one thread; random weights. LM: all calls of the search into the LM.
"""
LOAD_TEXT = """\
`LMTask.build_model_from_file` and the first token's scores, in a fresh process, 5,000 tokens,
files in the page cache. Resident: bytes more than before, at the end; peak: the most on the way.
"""
DECODE_TEXT = """\
`tests/bench/bench_decode.py`: ESPnet's Speech2Text on the recipe's trained models, from samples to
the best hypothesis, one thread; imports, loading and reading of files are not counted. The systems
take turns utterance by utterance; medians over rounds of the seconds of the whole set.
"""
SECTIONS = (
    ("latency", "One step of an LM, milliseconds", STEP_TEXT, tables.latency_table),
    ("latency", "Share of the roof", ROOF_TEXT, tables.roof_table),
    ("mixed", "Mixed bits inside a layer", MIXED_TEXT, tables.mixed_table),
    ("mixed", "Scales of groups", GROUP_TEXT, tables.group_table),
    ("transformer", "One step of a Transformer LM", TRANSFORMER_TEXT, tables.transformer_table),
    ("search", "The LM in the host's beam search", SEARCH_TEXT, tables.search_table),
    ("decode", "Decoding a test set", DECODE_TEXT, tables.decode_table),
    ("load", "Load time and memory", LOAD_TEXT, tables.load_table),
)
