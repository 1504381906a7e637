"""Smoke runs of the speed benchmark: every system runs, and the tables say what was measured."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from bench import onnx_lm, tables
from bench.lm_systems import (
    FP32,
    HOST,
    IN_HOST,
    INT8,
    StepOfModules,
    float_weights,
    has_host,
    n_code_bytes,
    n_macs,
    random_packed,
)
from bench.timing import alternate, latency_s
from packed_models import architecture, mixed, packed_model

BITS = ("1 bit", "2 bit", "4 bit", "8 bit")


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(Path(__file__).with_name("bench_kernels.py")))["main"]


def test_smoke_latency(kernels, main, tmp_path, capsys):
    file = tmp_path / "tables.md"
    work = ["--work", str(tmp_path), "--markdown", str(file)]
    data = main(["--smoke", "--parts", "latency", *work])
    systems = {INT8, *BITS, *((HOST, IN_HOST) if has_host() else (FP32,))}
    if not onnx_lm.why_not():
        systems |= {onnx_lm.FP32, onnx_lm.INT8}
    rows = list(data["latency"].values())
    assert {(row["batch"], row["threads"]) for row in rows} == {
        (batch, n) for batch in (1, 3, 10) for n in (1, 2)
    }
    for row in rows:
        assert set(row["seconds"]) == systems
        assert all(0 < seconds < 10 for seconds in row["seconds"].values())
        assert all(0 < roof_s < 10 for roof_s in row["roof_s"].values())
        reads = {f"read {b}" for b in (1, 2, 4, 8)} if row["batch"] < 10 else set()
        assert set(row["roof_s"]) in (set(), {"macs"} | reads)
    text = file.read_text(encoding="utf-8")
    # Latencies of three batches; their roofs, where there are any, two for batches below 10.
    n_lines = text.count("\n| 2 | stack | 2 x 24 |")
    assert text in capsys.readouterr().out and n_lines == (8 if rows[0]["roof_s"] else 3)
    assert f"kernel {kernels[-1]}" in text and torch.__version__ in text


def test_smoke_search_and_load(host, kernels, main, tmp_path):
    data = main(["--smoke", "--parts", "search", "load", "--work", str(tmp_path)])
    (found,) = data["search"].values()
    for name, row in found["systems"].items():
        assert row["n_steps"] >= 1 and 0 <= row["lm_s"] < row["step_s"]
        assert (row["lm_s"] == 0) == (name == "no LM")
        assert row["share"] == pytest.approx(row["lm_s"] / row["step_s"])
    (found,) = data["load"].values()
    fp, packed = found["systems"]["fp32"], found["systems"]["2 bit"]
    # 2 x 24 with 50 tokens: 11,858 floats, and a file of 2-bit codes with its header.
    assert fp["file_bytes"] > 4 * 11858 > packed["file_bytes"]
    for row in (fp, packed):
        assert 0 < row["load_s"] < 60 and row["resident_bytes"] <= row["peak_bytes"]


def test_results_of_pieces_come_together(main, kernels, tmp_path, capsys):
    options = ["--parts", "latency", "--sizes", "1x8", "--vocab", "20", "--batch", "1"]
    options += ["--rounds", "1", "--least_s", "0", "--bits", "2", "--work", str(tmp_path)]
    main([*options, "--threads", "1", "--note", "First."])
    data = main([*options, "--threads", "2"])
    assert [row["threads"] for row in data["latency"].values()] == [1, 2]
    assert "First." in capsys.readouterr().out.rsplit("# Speed", 1)[1]
    # Rows of another machine are not mixed in.
    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace('"cpu": "', '"cpu": "another '))
    data = main([*options, "--threads", "1", "--cpu_time"])
    (row,) = data["latency"].values()
    assert row["threads"] == 1 and row["roof_s"] == {}
    with pytest.raises(SystemExit):
        main([*options, "--threads", "2", "--cpu_time"])


def test_medians_of_alternating_rounds():
    calls, values = [], {"a": iter([5.0, 1.0, 2.0]), "b": iter([7.0, 9.0, 8.0])}

    def measure(name):
        calls.append(name)
        return next(values[name])

    found = alternate({name: lambda name=name: measure(name) for name in "ab"}, 3)
    assert found == {"a": 2.0, "b": 8.0} and calls == list("ababab")
    clock = iter(range(100))
    assert latency_s(lambda tokens, state: (None, state), None, 10.0, lambda: next(clock)) > 0


def test_work_of_a_step():
    """Against the sizes of the packed tensors."""
    arch = architecture("lstm", 40, 8, 16, 3)
    packed = random_packed(arch, 4)
    codes = {n: t for n, t in packed.tensors.items() if t.dtype == torch.uint8}
    n_bytes = sum(t.numel() for n, t in codes.items() if not n.startswith("embedding"))
    assert n_code_bytes(arch, 4) == n_bytes and n_macs(arch) == 2 * n_bytes
    # It is a packed LM as any other.
    other = packed_model(arch, mixed(arch))
    assert set(packed.metadata) <= set(other.metadata)


def test_shares_and_ratios():
    row = {"layers": 2, "units": 8, "vocab": 5000, "batch": 20, "threads": 1, "date": "2026-01-02"}
    row["seconds"] = {HOST: 0.030, INT8: 0.004, "2 bit": 0.002, IN_HOST: 0.0025}
    row["roof_s"] = {"macs": 0.0015}
    cells = [cell.strip() for cell in tables.latency_table([row])[-1].split("|")[1:-1]]
    want = ["1", "step", "2 x 8", "20", "30.000", "4.000", "2.000", "2.500", "2.0x", "12.0x"]
    assert cells == want
    assert "| multiply-adds | 75 % |" in tables.roof_table([row])[-1]
    row["roof_s"]["read 2"] = 0.0005
    assert [line.split("|")[-3:-1] for line in tables.roof_table([row])[-2:]] == [
        [" multiply-adds ", " 75 % "],
        [" bytes read ", " 25 % "],
    ]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_onnx_runtime_computes_the_same_lm(tmp_path):
    arch = architecture("lstm", 30, 9, 12, 2)
    weights = float_weights(arch)
    onnx_lm.write_models(arch, weights, tmp_path / f"onnx_{arch.nlayers}x12_30")
    want_step, state = StepOfModules(arch, weights, False), None
    steps = onnx_lm.onnx_steps(arch, 1, tmp_path)
    states = dict.fromkeys(steps)
    for t in range(4):
        tokens = torch.tensor([1, 5 + t, 29])
        want, state = want_step(tokens, state)
        for name, tolerance in ((onnx_lm.FP32, 1e-5), (onnx_lm.INT8, 0.02)):
            got, states[name] = steps[name](tokens, states[name])
            assert torch.allclose(torch.from_numpy(got), want, atol=tolerance)
