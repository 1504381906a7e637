"""The LMs that are timed against each other; LSTM ones as step(tokens, state)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Dict, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.timing import Step  # noqa: E402
from packed_models import FloatRnn, uniform  # noqa: E402

# Architecture  # noqa: E402
from espnet_mpq.architecture.base import Architecture  # noqa: E402
from espnet_mpq.packed.format import PackedModel  # noqa: E402
from espnet_mpq.packed.tensors import DTYPES, parts_by_codes, tensor_specs  # noqa: E402
from espnet_mpq.plan import ClusterSpec, Plan  # noqa: E402
from espnet_mpq.runtime.rnn_lm import PackedRnn  # noqa: E402

HOST, FP32, INT8 = "ESPnet fp32", "torch fp32", "torch int8"
IN_HOST = "2 bit, batch_score"


def has_host() -> bool:
    return importlib.util.find_spec("espnet2") is not None


def float_weights(arch: Architecture) -> Dict[str, torch.Tensor]:
    """Small uniform weights, as torch initialises an LSTM: states stay in their usual range."""
    bound = arch.nhid**-0.5
    return {
        name: torch.empty(shape).uniform_(-bound, bound)
        for name, shape in arch.state_shapes().items()
    }


def random_of_plan(arch: Architecture, plan: Plan) -> PackedModel:
    """Random codes and scales, for timing alone: no projection, no hashes."""
    tensors = {}
    width = max(part.cols for cluster in arch.clusters() for part in cluster.parts)
    for spec in tensor_specs(arch, plan):
        if spec.role == "codes":
            tensors[spec.name] = codes = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
            cluster, part = parts_by_codes(arch)[spec.name]
            bits = plan.clusters[cluster.name].bits
            codes[:, -1] &= 255 >> (-part.cols * bits % 8)  # the padding is zero
        else:
            value = torch.rand(spec.shape) * width**-0.5
            if spec.role == "scales":
                value *= 2.0 ** (1 - plan.clusters[spec.name.split("/")[0]].bits)
            tensors[spec.name] = value.to(DTYPES[spec.dtype][0])
    return PackedModel({"architecture": arch.to_dict(), "plan": plan.to_dict()}, tensors)


def random_packed(arch: Architecture, bits: int) -> PackedModel:
    """random_of_plan at one bit-width, a scale a row."""
    return random_of_plan(arch, uniform(arch, ClusterSpec(bits)))


class StepOfModules:
    """PyTorch's own LSTM and Linear, in fp32 or with its dynamic int8; stacked states."""

    def __init__(self, arch: Architecture, weights: dict, dynamic_int8: bool):
        self.model = FloatRnn(arch, weights)
        if dynamic_int8:
            kinds = {torch.nn.LSTM, torch.nn.Linear}
            self.model = torch.ao.quantization.quantize_dynamic(self.model, kinds)

    @torch.no_grad()
    def __call__(self, tokens, state):
        hidden, state = self.model.rnn(self.model.encoder(tokens[:, None]), state)
        return self.model.decoder(hidden)[:, 0].log_softmax(-1), state


def host_lm(arch: Architecture, weights: dict):
    """The host's float LM."""
    from espnet2.lm.seq_rnn_lm import SequentialRNNLM

    lm = SequentialRNNLM(
        arch.vocab_size, unit=arch.unit, nhid=arch.nhid, nlayers=arch.nlayers, rnn_type="lstm"
    )
    lm.load_state_dict(weights)
    return lm.eval()


def packed_in_host(arch: Architecture, packed: PackedModel):
    """The packed LM as the host's searches see it."""
    from espnet_mpq.hosts.espnet.lm.packed_rnn import MpqPackedRNNLM

    lm = MpqPackedRNNLM(arch.vocab_size, packed.plan.to_dict(), arch.unit, arch.nhid, arch.nlayers)
    lm.load(packed)
    return lm


def packed_runtime(packed: PackedModel) -> PackedRnn:
    runtime = PackedRnn(packed.architecture, packed.plan)
    runtime.load(packed)
    return runtime


def step_of_batch_score(lm) -> Step:
    """batch_score as the host's beam search calls it: one state a hypothesis in and out."""

    @torch.no_grad()
    def step(tokens, state):
        state = [None] * len(tokens) if state is None else state
        return lm.batch_score(tokens[:, None], state, None)

    return step


def lm_steps(arch: Architecture, bits: Sequence[int], with_host: bool) -> Dict[str, Step]:
    """name -> step of every system but ONNX Runtime; threads follow torch's setting."""
    weights, steps = float_weights(arch), {}
    if with_host:
        steps[HOST] = step_of_batch_score(host_lm(arch, weights))
    else:
        steps[FP32] = StepOfModules(arch, weights, False)
    steps[INT8] = StepOfModules(arch, weights, True)
    for b in bits:
        packed = random_packed(arch, b)
        steps[f"{b} bit"] = packed_runtime(packed).step
        if with_host and b == 2:
            steps[IN_HOST] = step_of_batch_score(packed_in_host(arch, packed))
    return steps


def n_macs(arch: Architecture) -> int:
    """Multiply-adds of one hypothesis' step, nothing padded; the embedding is a look-up."""
    first = 4 * arch.nhid * (arch.unit + arch.nhid)
    others = 4 * arch.nhid * 2 * arch.nhid * (arch.nlayers - 1)
    return first + others + arch.nhid * arch.vocab_size


def n_code_bytes(arch: Architecture, bits: int) -> int:
    """Bytes of codes that a step reads whatever the batch, nothing padded, scales left out."""
    return n_macs(arch) * bits // 8
