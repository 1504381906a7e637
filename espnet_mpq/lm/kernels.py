"""Which packed LMs the CPU kernels can run, and the kernel form of one that they can."""

from __future__ import annotations

from typing import Callable, Optional

import torch

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.linear import KernelMatrix
from espnet_mpq.kernels.lstm import KernelLstm
from espnet_mpq.packed.architecture import Architecture
from espnet_mpq.packed.layout import codes_name, scales_name
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.quant.grid import make_grid

MOST_COLS = 65536


def why_not(architecture: Architecture, plan: Plan) -> str:
    """Why the kernels cannot run an LM, so that the reference does; empty when they can."""
    if architecture.rnn_type != "lstm":
        return f"no kernels for {architecture.rnn_type}"
    if max(architecture.unit, architecture.nhid) > MOST_COLS:
        return f"more than {MOST_COLS} columns"
    for name, spec in plan.clusters.items():
        if spec.bits not in (1, 2, 4, 8):
            return f"cluster {name} has {spec.bits} bits"
        if spec.tying == "group":
            return f"cluster {name} has scales of groups"
    return ""


def kernel_name(architecture: Architecture, plan: Plan) -> str:
    """The kernel that would run an LM here, with the reason when it is the reference."""
    path = dispatch.choose()
    reason = why_not(architecture, plan) if path != dispatch.REFERENCE else ""
    if reason:
        return f"{dispatch.REFERENCE} ({reason})"
    if path == dispatch.REFERENCE and dispatch.library() is None:
        return f"{path} ({dispatch.why_no_library()})"
    return path


def make_lstm(
    architecture: Architecture, plan: Plan, tensor: Callable[[str], torch.Tensor]
) -> KernelLstm:
    """The kernel form of a packed LSTM LM.

    Args:
        tensor: gives a tensor of the packed file by its name there (CPU).

    Raises:
        InputError: the kernels cannot take it; ask why_not first.
    """

    def parts_of(cluster: Cluster, part: Part, spec: ClusterSpec) -> tuple:
        levels = make_grid(spec.grid, spec.bits).levels_tensor()
        codes = tensor(codes_name(cluster, part))
        return codes, tensor(scales_name(cluster, part, spec)), levels, spec.bits, part.cols

    clusters = {cluster.name: cluster for cluster in architecture.clusters()}
    found = {}
    for name, cluster in clusters.items():
        found[name] = [parts_of(cluster, part, plan.clusters[name]) for part in cluster.parts]
    matrices, biases, nhid = [], [], architecture.nhid
    for layer in range(architecture.nlayers):
        gates = [found[f"rnn.l{layer}.{gate}"] for gate in "ifgo"]
        matrices += [KernelMatrix(*gate[0]) for gate in gates]
        matrices += [KernelMatrix(*gate[1]) for gate in gates]
        bias = tensor(f"rnn.bias_ih_l{layer}") + tensor(f"rnn.bias_hh_l{layer}")
        biases += list(bias.split(nhid))
    matrices.append(KernelMatrix(*found.get("output", found["embedding"])[0]))
    biases.append(tensor("decoder.bias"))
    return KernelLstm(matrices, biases, *found["embedding"][0])


def runnable(architecture: Architecture, plan: Plan, device: torch.device, dtype) -> Optional[str]:
    """The path on which the kernels run an LM of this device and dtype; None: the reference."""
    path = dispatch.choose()
    if path == dispatch.REFERENCE or device.type != "cpu" or dtype != torch.float32:
        return None
    return None if why_not(architecture, plan) else path
