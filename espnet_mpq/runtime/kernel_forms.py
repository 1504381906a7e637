"""Which packed models the CPU kernels can run, and the kernel form of one that they can."""

from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.lstm import KernelLstm
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.packed.bits import pack_codes, unpack_codes
from espnet_mpq.packed.tensors import codes_name, scales_name, weight_name
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.quant.grid import make_grid


def reason_against(architecture: Architecture) -> str:
    """Why the kernels cannot run a model, so that the reference does; empty when they can.

    Raises:
        InputError: no kernel library.
    """
    reason = architecture.reason_against_kernels()
    if reason:
        return reason
    clusters, most = architecture.clusters(), dispatch.max_cols()
    if max(part.cols for cluster in clusters for part in cluster.parts) > most:
        return f"more than {most} columns"
    return ""


def kernel_name(architecture: Architecture) -> str:
    """The kernel that would run a model here, with the reason when it is the reference."""
    path = dispatch.choose()
    reason = reason_against(architecture) if path != dispatch.REFERENCE else ""
    if reason:
        return f"{dispatch.REFERENCE} ({reason})"
    if path == dispatch.REFERENCE and dispatch.library() is None:
        return f"{path} ({dispatch.why_no_library()})"
    return path


# Codes of 3 bits are dense in the file; the kernels look them up as codes of 4.
KERNEL_BITS = {3: 4}


def to_kernel(codes: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Codes of a packed file (rows, bytes) with the bits that the kernels take."""
    wider = KERNEL_BITS.get(bits)
    return codes if wider is None else pack_codes(unpack_codes(codes, bits, cols), wider)


def from_kernel(codes: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """The inverse of to_kernel."""
    wider = KERNEL_BITS.get(bits)
    return codes if wider is None else pack_codes(unpack_codes(codes, wider, cols), bits)


def stored_name(cluster: Cluster, part: Part, spec: ClusterSpec) -> str:
    """The tensor of the packed file that holds the codes or weights of a part."""
    return (codes_name if spec.is_coded else weight_name)(cluster, part)


def make_matrix(
    tensor: Callable[[str], torch.Tensor],
    cluster: Cluster,
    parts: Sequence[Part],
    spec: ClusterSpec,
) -> KernelMatrix:
    """The kernel form of parts of one cluster, of any bits and tying.

    Args:
        tensor: gives a tensor of the packed file by its name there (CPU).
        parts: of one width; their rows are stacked.

    Raises:
        InputError: no library, or more than dispatch.max_cols() columns.
    """
    stored = torch.cat([tensor(stored_name(cluster, part, spec)) for part in parts])
    if not spec.is_coded:
        return KernelMatrix(stored)
    levels = make_grid(spec.grid, spec.bits).levels_tensor()
    # One scale for a whole cluster or model is one tensor, whatever the part.
    names = dict.fromkeys(scales_name(cluster, part, spec) for part in parts)
    scales = torch.cat([tensor(name) for name in names])
    bits, cols = KERNEL_BITS.get(spec.bits, spec.bits), parts[0].cols
    stored = to_kernel(stored, spec.bits, cols)
    return KernelMatrix(stored, scales, levels, bits, cols, spec.group_size)


def make_lstm(
    architecture: Architecture,
    matrix: Callable[[Cluster, Sequence[Part]], KernelMatrix],
    tensor: Callable[[str], torch.Tensor],
) -> KernelLstm:
    """The kernel form of a packed LSTM LM.

    Args:
        matrix: gives the kernel form of parts of a cluster.
        tensor: gives a tensor of the packed file by its name there (CPU).

    Raises:
        InputError: the kernels cannot take it; ask reason_against first.
    """
    found = {
        cluster.name: [matrix(cluster, [part]) for part in cluster.parts]
        for cluster in architecture.clusters()
    }
    matrices, biases, nhid = [], [], architecture.nhid
    for layer in range(architecture.nlayers):
        gates = [found[f"rnn.l{layer}.{gate}"] for gate in "ifgo"]
        matrices += [gate[0] for gate in gates] + [gate[1] for gate in gates]
        bias = tensor(f"rnn.bias_ih_l{layer}") + tensor(f"rnn.bias_hh_l{layer}")
        biases += list(bias.split(nhid))
    embedding = found["embedding"][0]
    matrices.append(found["output"][0] if "output" in found else embedding)
    biases.append(tensor("decoder.bias"))
    return KernelLstm(embedding, matrices, biases)


def path_for(
    architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> Optional[str]:
    """The path on which the kernels run a model of this device and dtype; None: the reference."""
    path = dispatch.choose()
    if path == dispatch.REFERENCE or device.type != "cpu" or dtype != torch.float32:
        return None
    return None if reason_against(architecture) else path
