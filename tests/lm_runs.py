"""Small LM trainings in the host: their plan, options and files, for several test files."""

from __future__ import annotations

import torch
from found import find_clusters, get_mats

from espnet_mpq.quant.fake_quant import project_cluster

CHARS = ["<blank>", "<unk>", "<space>", *"abcdefghijklmnopqrstuvwxyz", "'", "<sos/eos>"]
GATES = [f"rnn.l0.{gate}" for gate in "ifgo"]
PLAN = {
    "format": "espnet_mpq.plan",
    "version": 1,
    "clusters": {
        "embedding": {"bits": 4},
        **{name: {"bits": 2} for name in GATES},
        "rnn.l0.o": {"bits": 16},
        "output": {"bits": 1, "grid": "uniform", "tying": "row"},
    },
}
ADMM = dict(mpq_gamma=0.05, mpq_dual_period=3, mpq_finish_epochs=1)
EXTRA = dict(ADMM, mpq_extragradient=True, mpq_eta1=0.02, mpq_distill=0.5)


def load(path):
    return torch.load(path, map_location="cpu")


def checkpoint(folder):
    try:
        return torch.load(folder / "checkpoint.pth", weights_only=False)
    except TypeError:  # torch 1.13 pickles without the argument
        return torch.load(folder / "checkpoint.pth")


def lm_of(host, folder, name):
    model, _ = host.LMTask.build_model_from_file(str(folder / "config.yaml"), str(folder / name))
    return model.lm


def assert_on_grid(lm):
    for cluster in find_clusters(lm):
        spec, mats = lm.plan.clusters[cluster.name], get_mats(lm, cluster)
        for mat, value in zip(mats, project_cluster(mats, spec).values):
            torch.testing.assert_close(mat, value, rtol=1e-6, atol=0)


def assert_same(a, b, **tolerance):
    a, b = load(a), load(b)
    assert a.keys() == b.keys()
    for key in a:
        if tolerance:
            torch.testing.assert_close(a[key], b[key], rtol=0, **tolerance)
        else:
            assert torch.equal(a[key], b[key]), key
