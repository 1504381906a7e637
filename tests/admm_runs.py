"""A controller on a small LM, its weights and gradients, for several test files."""

from __future__ import annotations

import torch
from found import find_clusters, get_mats, weights_of

from espnet_mpq.plan import uniform_plan
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.options import AdmmOptions

STATIC = dict(
    gamma=1e-3, gamma_schedule="constant", dual_period=0, projection="mse", finish_epochs=0
)


def start(lm, plan=None, optimizer=None, n_epochs=10, **options):
    plan = plan or uniform_plan(find_clusters(lm), 2)
    optimizer = optimizer or torch.optim.SGD(lm.parameters(), lr=0.1)
    admm = AdmmOptions(**{**STATIC, **options})
    controller = AdmmController(weights_of(lm), plan, optimizer, admm)
    controller.start_epoch(n_epochs)
    return controller, optimizer


def zero_gradients(lm):
    for p in lm.parameters():
        p.grad = torch.zeros_like(p)


def all_mats(controller):
    weights = controller.weights
    return {name: [m.clone() for m in weights.mats(name)] for name in weights.clusters}


def assert_on_grid(lm, plan):
    for cluster in find_clusters(lm):
        spec, mats = plan.clusters[cluster.name], get_mats(lm, cluster)
        if spec.bits < 16:
            for mat, value in zip(mats, project_cluster(mats, spec).values):
                torch.testing.assert_close(mat, value, rtol=1e-6, atol=0)
