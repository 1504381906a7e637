"""Traces, errors, harms and the stopping rule from samples with known answers."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from found import weights_of

from espnet_mpq.errors import FormatError, MismatchError
from espnet_mpq.sensitivity.curvature import Curvature
from espnet_mpq.sensitivity.table import SensitivityTable, merge, shard_path


def make(*samples, probes=None):
    curvature = Curvature({"a": 4, "b": 10}, {"a": 2.0, "b": 50.0})
    for probe, values in zip(probes or range(len(samples)), samples):
        curvature.samples[probe] = dict(zip("ab", values))
    return curvature


def test_trace_stderr_and_harm():
    curvature = make((1.0, -3.0), (2.0, 1.0), (6.0, -1.0))
    mean, stderr = curvature.trace("a")
    assert mean == 3.0 and stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    # 1/2 x 3 / 4 weights x ||Q - W||^2 = 0.25 x 2
    assert curvature.harm("a", 0.25) == pytest.approx((0.1875, stderr / 16))
    assert curvature.harm("a", 0.25, average=False) == pytest.approx((1.5, stderr / 2))
    trace, stderr = curvature.trace("b")
    assert trace == -1.0 and curvature.negative() == [("b", -1.0, stderr)]
    assert curvature.harm("b", 0.5) == pytest.approx((0.0, 0.5 * 25 / 10 * stderr))
    assert math.isnan(make((1.0, 2.0)).trace("a")[1])
    assert all(map(math.isnan, make().trace("a")))


def test_squared_norm_and_weights_are_those_of_the_clusters():
    lm = torch.nn.Module()
    lm.encoder = torch.nn.Embedding(5, 2)
    lm.rnn = torch.nn.RNN(2, 3)
    lm.decoder = torch.nn.Linear(3, 5)
    curvature = Curvature.of(weights_of(lm))
    assert curvature.n_weights == {"embedding": 10, "rnn.l0.h": 15, "output": 15}
    square = lm.rnn.weight_ih_l0.square().sum() + lm.rnn.weight_hh_l0.square().sum()
    assert curvature.squared_norm["rnn.l0.h"] == pytest.approx(square.item(), rel=1e-6)


def test_it_stops_when_what_matters_is_precise():
    spread = [(10 + d, 10 + d) for d in (-1, 1, -1, 1)]
    relative = math.sqrt(4 / 3 / 4) / 10
    assert make(*spread).is_precise(relative * 1.01)
    assert not make(*spread).is_precise(relative * 0.99)
    assert not make(*spread[:3]).is_precise(1.0)  # too few to tell
    # Removing "a" costs 10 x 2 / 4 = 5, "b" 0.001 x 50 / 10: far less than 1 % of the sum, so
    # that its own error of 29 % is precise enough.
    small = [(10.0 + d, 0.001 + 0.0005 * d) for d in (-1, 1, -1, 1)]
    assert make(*small).trace("b")[1] > 0.28 * 0.001
    assert make(*small).is_precise(relative * 1.01)
    assert not make(*[(a, 1000 * b) for a, b in small]).is_precise(relative * 1.01)


def test_pool_counts_every_probe_once():
    pooled = Curvature.pool(
        [make((1.0, 0.0), (3.0, 0.0), probes=[0, 2]), make((5.0, 0.0), (3.0, 0.0), probes=[1, 2])]
    )
    assert sorted(pooled.samples) == [0, 1, 2] and pooled.trace("a")[0] == 3.0
    for weights, norms, found in (
        ({"a": 4}, {"a": 2.0}, "cluster b: found 0 weights, squared norm 0; expected 10, 50"),
        ({"a": 5, "b": 10}, {"a": 2.0, "b": 50.0}, "cluster a: found 5 weights"),
        ({"a": 4, "b": 10}, {"a": 2.0, "b": 51.0}, "cluster b: found 10 weights, squared norm 51;"),
    ):
        with pytest.raises(MismatchError, match=f"different LMs.*{found}"):
            Curvature.pool([make(), Curvature(weights, norms)])


def table(curvature, method="hessian", **provenance):
    made = SensitivityTable({"clusters": ["a", "b"], "bits": [2], **provenance}, method)
    made.curvature = curvature
    return made


def test_table_keeps_the_samples(tmp_path):
    made = table(make((1.0, -2.0), (3.0, 1.0), probes=[0, 4]))
    made.add_curvature_entry("a", 2, 0.25)
    made.add_curvature_entry("b", 2, 0.5)
    made.write(tmp_path / "t.json")
    value = json.loads((tmp_path / "t.json").read_text())
    assert value["unit"] == "nats/token" and value["curvature"]["probes"] == [0, 4]
    assert value["curvature"]["clusters"]["a"] == {
        "n_weights": 4, "squared_norm": 2.0, "trace": 2.0, "stderr": 1.0, "samples": [1.0, 3.0],
    }  # fmt: skip
    again = SensitivityTable.read(tmp_path / "t.json")
    assert again.curvature == made.curvature and again.entries == made.entries
    assert again.harm() == {"a": {2: 0.5 * 2 / 4 * 0.5}, "b": {2: 0.0}}
    again.curvature.samples[1] = {"a": 8.0, "b": 4.0}
    again.refresh()
    assert again.harm()["a"][2] == pytest.approx(0.5 * 4 / 4 * 0.5)
    assert again.harm()["b"][2] == pytest.approx(0.5 * 1 / 10 * 25)
    assert table(make(), trace="plain").to_dict()["unit"] == "none"


def test_merge_pools_probes_and_gathers_entries(tmp_path):
    for job, (name, probes, samples) in enumerate(
        (("a", [0, 2], [(1.0, 2.0), (2.0, 2.0)]), ("b", [1], [(6.0, 5.0)])), 1
    ):
        shard = table(make(*samples, probes=probes), trace="plain", probe="gaussian")
        shard.add_curvature_entry(name, 2, 0.5)
        shard.write(shard_path(tmp_path / "t.json", job))
    merged = merge(tmp_path / "t.json", 2)
    assert merged.curvature.trace("a")[0] == 3.0
    assert merged.harm() == {"a": {2: 3.0 * 0.5 * 2}, "b": {2: 3.0 * 0.5 * 50}}


def test_traces_and_entries_of_different_clusters_are_refused():
    value = table(make((1.0, 1.0), (2.0, 2.0))).to_dict()
    value["entries"] = {"a": {"2": {"harm": 1.0, "stderr": 0.5, "relative_mse": 0.5}}}
    assert SensitivityTable.from_dict(value).harm() == {"a": {2: 1.0}}
    for change, found in (
        ({"curvature": None}, "curvature: found None; expected traces, as the method is hessian"),
        ({"provenance": {"clusters": ["a", "c"]}}, "['b']; expected the clusters of the table"),
        ({"provenance": {"clusters": ["a"]}}, "curvature: found ['b']; expected"),
        ({"provenance": {}, "entries": {"c": value["entries"]["a"]}}, "unknown cluster: found 'c'"),
    ):
        with pytest.raises(FormatError, match=re.escape(found)):
            SensitivityTable.from_dict({**value, **change}, "t.json")
    value["provenance"] = {}
    assert set(SensitivityTable.from_dict(value).curvature.n_weights) == {"a", "b"}


ROW = {"n_weights": 4, "squared_norm": 1.0, "samples": [1.0, 2.0]}


@pytest.mark.parametrize(
    "change, found",
    [
        (3, "curvature: found 3"),
        ({"probes": [0]}, "list of samples of a: found [1.0, 2.0]; expected 1 numbers"),
        ({"probes": ["x", "y"]}, "list of probes: found ['x', 'y']"),
        ({"probes": [0, 0]}, "list of probes: found [0, 0]; expected the numbers of probes, each"),
        ({"probes": "01"}, "list of probes: found '01'"),
        ({"clusters": 3}, "curvature of clusters: found 3"),
        ({"clusters": {"a": {"n_weights": 4}}}, "curvature of a: found {'n_weights': 4}"),
        ({"clusters": {"a": {**ROW, "n_weights": 0}}}, "n_weights of a: found 0"),
        ({"clusters": {"a": {**ROW, "n_weights": 10**400}}}, "n_weights of a: found 1000"),
        ({"clusters": {"a": {**ROW, "squared_norm": -1}}}, "squared_norm of a: found -1"),
        ({"clusters": {"a": {**ROW, "samples": [1.0, math.inf]}}}, "samples of a: found [1.0, inf"),
        ({"clusters": {"a": {**ROW, "samples": "ab"}}}, "samples of a: found 'ab'"),
    ],
)
def test_malformed_curvature_is_refused(change, found):
    value = table(make((1.0, 1.0), (2.0, 2.0))).to_dict()
    value["curvature"] = {**value["curvature"], **change} if isinstance(change, dict) else change
    with pytest.raises(FormatError, match="t.json has a malformed .*" + re.escape(found)):
        SensitivityTable.from_dict(value, "t.json")
