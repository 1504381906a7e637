"""Plans: JSON form, refusals, and bytes counted by hand."""

import itertools

import pytest
import torch
from found import find_clusters, rest_parameters

from espnet_mpq.errors import PlanError
from espnet_mpq.plan import (
    ClusterSpec,
    Plan,
    budget_n_bytes,
    cluster_n_bytes,
    plan_size,
    uniform_plan,
)


class RnnLm(torch.nn.Module):
    """Parameter names of ESPnet's SequentialRNNLM without ESPnet."""

    def __init__(self, vocab=11, unit=6, nhid=5, nlayers=2, rnn=torch.nn.LSTM, tie=False):
        super().__init__()
        self.encoder = torch.nn.Embedding(vocab, unit)
        self.rnn = rnn(unit, nhid, nlayers, batch_first=True)
        self.decoder = torch.nn.Linear(nhid, vocab)
        if tie:
            self.decoder.weight = self.encoder.weight


@pytest.fixture
def lm():
    return RnnLm()


def test_json_round_trip(tmp_path, lm):
    clusters = find_clusters(lm)
    plan = uniform_plan(clusters, 2, grid="paper", tying="group", group_size=4)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert Plan.from_dict(plan.to_dict(provenance=False)) == plan
    assert list(plan.clusters) == [
        "embedding",
        *[f"rnn.l{layer}.{gate}" for layer in (0, 1) for gate in "ifgo"],
        "output",
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["clusters"]["output"].update(bits=5), ("output", "5", "1, 2, 3, 4, 8")),
        (lambda d: d["clusters"]["output"].update(bits=True), ("output", "True")),
        (lambda d: d["clusters"]["output"].update(bits=2.0), ("output", "2.0")),
        (lambda d: d["clusters"]["output"].update(bits=[2]), ("output", "[2]")),
        (lambda d: d["clusters"]["output"].update(grid=["paper"]), ("grid", "paper")),
        (lambda d: d["clusters"]["output"].update(tying={}), ("tying", "{}")),
        (lambda d: d.update(scale_dtype=[]), ("scale_dtype", "[]")),
        (lambda d: d.update(scale_dtype=None), ("scale_dtype", "None")),
        (lambda d: d.update(version=1.0), ("version", "1.0")),
        (lambda d: d.update(provenance=["a"]), ("provenance", "['a']")),
        (lambda d: d["clusters"]["output"].update(bits="2"), ("output", "'2'")),
        (lambda d: d["clusters"]["output"].update(grid="papr"), ("grid", "papr", "paper")),
        (lambda d: d["clusters"]["output"].update(tying="rows"), ("tying", "rows")),
        (lambda d: d["clusters"]["output"].update(group_size=4), ("group_size", "'row'")),
        (
            lambda d: d["clusters"]["output"].update(tying="group", group_size=0),
            ("group_size", "0"),
        ),
        (lambda d: d["clusters"]["output"].update(bit=2), ("'bit'", "bits")),
        (lambda d: d["clusters"]["output"].pop("bits"), ("output", "no bits")),
        (lambda d: d.update(version=2), ("version", "2", "1")),
        (lambda d: d.update(format="other"), ("format", "other")),
        (lambda d: d.update(cluster={}), ("'cluster'", "clusters")),
        (lambda d: d.update(scale_dtype="bfloat16"), ("bfloat16", "float16")),
        (lambda d: d.update(clusters={}), ("no clusters",)),
        (lambda d: d.pop("clusters"), ("clusters",)),
        (lambda d: d.update(clusters=3), ("not a plan", "found clusters: 3", "expected {")),
        (lambda d: d["clusters"].update(output="x"), ("no bits: found 'x'", '{"bits": 4}')),
    ],
)
def test_refusals_name_what_is_wrong(lm, change, words):
    value = uniform_plan(find_clusters(lm), 2).to_dict()
    change(value)
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(value)
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_no_plan_is_named(tmp_path):
    path = tmp_path / "plan.json"
    for text, found in (("[]", "found []"), ('"x"', "found 'x'"), ("{}", "found clusters: None")):
        path.write_text(text)
        with pytest.raises(PlanError) as caught:
            Plan.read(path)
        assert str(caught.value).startswith(f"{path}: plan: not a plan: {found}; expected {{")


def test_check_names_unknown_and_missing_clusters(lm):
    clusters = find_clusters(lm)
    good = uniform_plan(clusters, 4)
    good.check(clusters)
    renamed = dict(good.clusters)
    renamed["rnn.l0.x"] = renamed.pop("rnn.l0.i")
    with pytest.raises(PlanError, match=r"rnn\.l0\.x.*did you mean 'rnn\.l0\.[ifgo]'"):
        Plan(renamed).check(clusters)
    short = dict(good.clusters)
    short.pop("output")
    with pytest.raises(PlanError, match="without bits.*output"):
        Plan(short).check(clusters)


def test_cluster_bytes_by_hand(lm):
    gate = {c.name: c for c in find_clusters(lm)}["rnn.l0.i"]  # parts 5 x 6 and 5 x 5
    assert [p.shape for p in gate.parts] == [(5, 6), (5, 5)]
    # codes: 6 and 5 columns at 2 bits are 2 bytes a row each; row scales 5 + 5 of 2 bytes
    assert cluster_n_bytes(gate, ClusterSpec(2)) == 5 * 2 + 5 * 2 + 10 * 2
    assert cluster_n_bytes(gate, ClusterSpec(1)) == 5 * 1 + 5 * 1 + 10 * 2
    assert cluster_n_bytes(gate, ClusterSpec(8, tying="cluster")) == 55 + 2
    assert cluster_n_bytes(gate, ClusterSpec(4, tying="model")) == 5 * 3 + 5 * 3
    # groups of 4 columns: two per row in both parts
    assert cluster_n_bytes(gate, ClusterSpec(4, tying="group", group_size=4)) == 30 + 20 * 2
    assert cluster_n_bytes(gate, ClusterSpec(16)) == 55 * 2
    assert cluster_n_bytes(gate, ClusterSpec(32), "float32") == 55 * 4


def test_effective_bits_of_the_float_model_is_32(lm):
    clusters = find_clusters(lm)
    rest = rest_parameters(lm, clusters)
    size = plan_size(uniform_plan(clusters, 32), clusters, rest)
    assert size.n_weights == sum(p.numel() for p in lm.parameters())
    assert size.effective_bits == 32.0


def test_a_budget_in_bits_is_rounded_down_to_bytes():
    assert budget_n_bytes(1000, 2.0) == 250 and budget_n_bytes(1001, 2.0) == 250
    assert budget_n_bytes(4000, 3.01) == 1505
    assert budget_n_bytes(1000, 2.0, 77) == budget_n_bytes(1000, None, 77) == 77
    assert budget_n_bytes(1000) is None
    assert budget_n_bytes(10**9, 1e308) == 2**62  # a number, not an overflow
    for bits in (0.1, 1.7, 2.3, 21.9):
        for n_weights in (1, 7, 650, 12345):
            n_bytes = budget_n_bytes(n_weights, bits)
            assert 8 * n_bytes / n_weights <= bits < 8 * (n_bytes + 1) / n_weights


def test_model_scales_are_counted_once_per_bits_and_grid(lm):
    clusters = find_clusters(lm)
    rest = rest_parameters(lm, clusters)
    bare = plan_size(uniform_plan(clusters, 2, tying="model"), clusters, rest)
    mixed = dict(uniform_plan(clusters, 2, tying="model").clusters)
    mixed["rnn.l0.i"] = ClusterSpec(2, "paper", "model")
    assert plan_size(Plan(mixed), clusters, rest).n_bytes == bare.n_bytes + 2


@pytest.mark.parametrize("rnn", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("tie", [False, True])
def test_clusters_cover_every_matrix_once(rnn, tie):
    lm = RnnLm(unit=5, nhid=5, rnn=rnn, tie=tie)
    clusters = find_clusters(lm)
    covered = {}
    for part in itertools.chain.from_iterable(c.parts for c in clusters):
        covered.setdefault(part.parameter, []).append((part.start, part.stop))
    matrices = {n: p for n, p in lm.named_parameters() if p.dim() == 2}
    assert set(covered) == set(matrices)
    for name, ranges in covered.items():
        edges = [0] + [stop for _, stop in sorted(ranges)]
        assert sorted(ranges) == list(zip(edges[:-1], edges[1:]))
        assert edges[-1] == matrices[name].shape[0]
    rest = rest_parameters(lm, clusters)
    assert plan_size(uniform_plan(clusters, 32), clusters, rest).effective_bits == 32.0


def test_inline_keeps_hashes_and_seed_of_the_provenance_alone(lm):
    plan = uniform_plan(find_clusters(lm), 2)
    full = {
        "tool_version": "1",
        "command_line": "mpq plan",
        "options": {"seed": 7, "output_dir": "x"},
        "inputs": {
            "checkpoint": {"path": "a.pth", "sha256": "a" * 64},
            "sensitivity": {"path": "s.json", "sha256": "b" * 64},
            "config": {"path": "config.yaml", "sha256": "c" * 64},
        },
        "token_list_sha256": "d" * 64,
        "text_sha256": "e" * 64,
    }
    expected = {
        "checkpoint_sha256": "a" * 64,
        "sensitivity_sha256": "b" * 64,
        "token_list_sha256": "d" * 64,
        "text_sha256": "e" * 64,
        "seed": 7,
    }
    inline = Plan(plan.clusters, provenance=full).inline()
    assert inline["provenance"] == expected
    assert Plan.from_dict(inline).inline() == inline  # the flat record stays as it is
    flat = Plan(plan.clusters, provenance={**full, "seed": 3, "text_sha256": None})
    assert flat.source()["seed"] == 3 and "text_sha256" not in flat.source()
    assert plan.inline() == plan.to_dict(provenance=False)
    odd = Plan(plan.clusters, provenance={"inputs": [1], "options": "x", "seed": True})
    assert odd.source() == {}
