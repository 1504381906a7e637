"""Parts "mixed" and "transformer" of the speed benchmark: what they time, what they print."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from bench import mixed, tables, transformer
from bench.lm_systems import HOST, INT8, random_of_plan, random_packed
from packed_models import architecture

BITS = ("1 bit", "2 bit", "4 bit", "8 bit")


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(Path(__file__).with_name("bench_kernels.py")))["main"]


def cells(line: str) -> list:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_smoke(host, kernels, main, tmp_path, capsys):
    file = tmp_path / "tables.md"
    work = ["--work", str(tmp_path), "--markdown", str(file)]
    data = main(["--smoke", "--parts", "mixed", "transformer", *work])
    groups = {"groups of 32", "groups of 64", "groups of 128"}
    assert len(data["mixed"]) == 3 and len(data["transformer"]) == 10
    for row in data["mixed"].values():
        assert set(row["seconds"]) == {*BITS, "mixed", *groups}
        assert all(0 < seconds < 10 for seconds in row["seconds"].values())
    for row in data["transformer"].values():
        assert set(row["seconds"]) == {HOST, INT8, *BITS}
        assert all(0 < seconds < 10 for seconds in row["seconds"].values())
        apart = row["batch"] * row["length"]
        assert row["n_distinct"] == apart if not row["shared"] else row["n_distinct"] <= apart
    text = file.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert text.count("\n| 2 x 24 |") == 2 * 3 and text.count("\n| 1 x 16 |") == 10


def test_mixed_stack_has_the_codes_of_its_parts():
    arch = architecture("lstm", 16, 8, 8, 3)
    plan = mixed.mixed_plan(arch)
    for layer in range(3):
        found = {gate: plan.clusters[f"rnn.l{layer}.{gate}"].bits for gate in "ifgo"}
        assert found == {"i": 1, "f": 2, "g": 4, "o": 8}

    def n_code_bytes(packed):
        codes = (n for n in packed.tensors if n.startswith("rnn") and n.endswith(".codes"))
        return sum(packed.tensors[n].numel() for n in codes)

    uniform = [n_code_bytes(random_packed(arch, b)) for b in (1, 2, 4, 8)]
    assert n_code_bytes(random_of_plan(arch, plan)) == sum(uniform) / 4


def test_ratios_of_mixed_and_groups():
    row = {"layers": 2, "units": 8, "vocab": 16, "batch": 10, "threads": 1}
    row["seconds"] = dict(zip(BITS, (0.001, 0.002, 0.003, 0.006)), mixed=0.0036)
    row["seconds"].update({"groups of 32": 0.004, "groups of 64": 0.003, "groups of 128": 0.002})
    want = ["2 x 8", "10", "1.000", "2.000", "3.000", "6.000", "3.000", "3.600", "1.20"]
    assert cells(tables.mixed_table([row])[-1]) == want
    want = ["2 x 8", "10", "2.000", "4.000", "3.000", "2.000", "2.00", "1.50", "1.00"]
    assert cells(tables.group_table([row])[-1]) == want


def test_row_of_a_transformer():
    row = {"layers": 6, "units": 512, "length": 20, "batch": 10, "shared": True, "n_distinct": 31}
    row["seconds"] = {HOST: 0.04, INT8: 0.02, "2 bit": 0.005}
    want = ["6 x 512", "shared", "20", "10", "31", "40.000", "20.000", "5.000", "8.0x", "4.0x"]
    assert cells(tables.transformer_table([row])[-1]) == want


class Recorder:
    """An LM whose state is the prefix itself."""

    def __init__(self):
        self.lengths = []

    def batch_score(self, ys, states, xs):
        self.lengths.append(ys.shape[1])
        for y, state in zip(ys.tolist(), states):
            assert y[:-1] == (state or [])
        return None, ys.tolist()


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("batch", (1, 2, 10))
@pytest.mark.parametrize("length", (2, 3, 30))
def test_states_belong_to_their_prefixes(length, batch, shared):
    torch.manual_seed(batch)
    beam, lm = transformer.Beam(batch, length, 50, shared), Recorder()
    states = beam.states(lm, walk=True)
    assert lm.lengths == list(range(1, length - 1))
    lm.lengths.clear()
    ticks = iter(range(100))
    # Two ticks a pass and one between them: five steps a second.
    assert beam.seconds(lm, states, 2.0, lambda: next(ticks)) == 1 / transformer.N_STEPS
    once = list(range(length - 1, length + transformer.N_STEPS))
    assert lm.lengths == 2 * once


@pytest.mark.parametrize("shared", (True, False))
def test_distinct_tokens_are_those_that_a_packed_lm_keeps(host, shared):
    torch.manual_seed(0)
    arch = transformer.sized("1x16", 20)
    lm, beam = transformer.packed_lm(arch, 2), transformer.Beam(4, 12, 20, shared)
    states = beam.grown(lm, beam.states(lm, walk=True), 11)
    kept = {id(token) for state in states for token in state}
    assert beam.n_distinct == len(kept) + 4  # and the newest
    assert beam.n_distinct < 48 if shared else beam.n_distinct == 48


def test_prefixes_share_about_what_those_of_a_real_search_do():
    """Distinct tokens of ten hypotheses at 16, 20 and 24 tokens, measured while decoding AN4."""
    torch.manual_seed(0)
    for length, measured in ((16, 71), (20, 88), (24, 113)):
        found = [transformer.Beam(10, length, 50, True).n_distinct for _ in range(50)]
        assert sum(found) / len(found) == pytest.approx(measured, rel=0.2)


def test_states_of_the_host_made_at_once_are_those_of_a_walk(host):
    torch.manual_seed(0)
    lm = transformer.host_lm(transformer.sized("2x16", 20))
    beam = transformer.Beam(3, 8, 20, shared=True)
    with torch.no_grad():
        found = [lm.batch_score(beam.ys[6], beam.states(lm, walk), None)[0] for walk in (0, 1)]
    assert torch.allclose(*found, atol=1e-5)
