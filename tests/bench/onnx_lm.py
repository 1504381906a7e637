"""The same LSTM LM in ONNX Runtime, fp32 and dynamically quantized to int8.

Needs two packages that nothing else here needs:  pip install onnx onnxruntime
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Dict, Tuple

import numpy as np
import torch
from bench.timing import Step

from espnet_mpq.architecture.base import Architecture

FP32, INT8 = "ORT fp32", "ORT int8"
OPSET, IR_VERSION = 17, 9


def why_not() -> str:
    """Why there is no column of ONNX Runtime; empty when there is one."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return (
        f"{' and '.join(missing)} not installed (pip install onnx onnxruntime)" if missing else ""
    )


def _onnx_gates(matrix: torch.Tensor) -> np.ndarray:
    """Rows of PyTorch's gates i, f, g, o in ONNX's order i, o, f, c (its name for g)."""
    i, f, g, o = matrix.chunk(4)
    return torch.cat([i, o, f, g]).unsqueeze(0).numpy()


def float_model(arch: Architecture, weights: Dict[str, torch.Tensor]):
    """ModelProto: tokens (B,), h0, c0, ... (1, B, nhid) -> log_probs (B, V), new_h0, new_c0, ..."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs, outputs, **options) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, **options))

    node("Gather", [constant("embedding", weights["encoder.weight"].numpy()), "tokens"], ["row"])
    node("Unsqueeze", ["row", constant("axis", np.array([0]))], ["x0"])
    for k in range(arch.nlayers):
        biases = [_onnx_gates(weights[f"rnn.bias_{kind}_l{k}"]) for kind in ("ih", "hh")]
        inputs = [
            f"x{k}",
            constant(f"W{k}", _onnx_gates(weights[f"rnn.weight_ih_l{k}"])),
            constant(f"R{k}", _onnx_gates(weights[f"rnn.weight_hh_l{k}"])),
            constant(f"B{k}", np.concatenate(biases, axis=1)),
            *("", f"h{k}", f"c{k}"),
        ]
        node("LSTM", inputs, [f"y{k}", f"new_h{k}", f"new_c{k}"], hidden_size=arch.nhid)
        node("Squeeze", [f"y{k}", constant(f"axis{k}", np.array([1]))], [f"x{k + 1}"])
    node("Squeeze", [f"x{arch.nlayers}", "axis"], ["hidden"])
    node("MatMul", ["hidden", constant("output", weights["decoder.weight"].t().numpy())], ["bare"])
    node("Add", ["bare", constant("bias", weights["decoder.bias"].numpy())], ["logits"])
    node("LogSoftmax", ["logits"], ["log_probs"], axis=-1)

    def value(name: str, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    states = [f"{kind}{k}" for k in range(arch.nlayers) for kind in "hc"]
    shape = [1, "batch", arch.nhid]
    graph = helper.make_graph(
        nodes,
        "lstm_lm",
        [value("tokens", ["batch"], TensorProto.INT64), *(value(s, shape) for s in states)],
        [
            value("log_probs", ["batch", arch.vocab_size]),
            *(value(f"new_{s}", shape) for s in states),
        ],
        constants,
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def write_models(arch: Architecture, weights: Dict[str, torch.Tensor], folder: Path) -> None:
    """fp32.onnx and int8.onnx (DynamicQuantizeLSTM, MatMulInteger), each put in place whole."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fp32, int8 = (Path(temporary) / name for name in ("fp32.onnx", "int8.onnx"))
        onnx.save(float_model(arch, weights), str(fp32))
        quantize_dynamic(
            str(fp32),
            str(int8),
            op_types_to_quantize=["LSTM", "MatMul"],
            weight_type=QuantType.QInt8,
        )
        kinds = {node.op_type for node in onnx.load(str(int8)).graph.node}
        assert {"DynamicQuantizeLSTM", "MatMulInteger"} <= kinds, kinds
        int8.replace(folder / int8.name)
        fp32.replace(folder / fp32.name)


class OnnxStep:
    """step(tokens, state) of a file; the state is a list of numpy arrays."""

    def __init__(self, file: Path, arch: Architecture, n_threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        self.names = [f"{kind}{k}" for k in range(arch.nlayers) for kind in "hc"]
        self.nhid = arch.nhid

    def __call__(self, tokens: torch.Tensor, state) -> Tuple[np.ndarray, list]:
        if state is None:
            state = [np.zeros((1, len(tokens), self.nhid), np.float32)] * len(self.names)
        inputs = {"tokens": tokens.numpy(), **dict(zip(self.names, state))}
        log_probs, *state = self.session.run(None, inputs)
        return log_probs, state


def onnx_steps(arch: Architecture, n_threads: int, work: Path) -> Dict[str, Step]:
    """Both systems; their files are made once, under ``work``."""
    folder = work / f"onnx_{arch.nlayers}x{arch.nhid}_{arch.vocab_size}"
    if not (folder / "fp32.onnx").is_file():
        from bench.lm_systems import float_weights

        write_models(arch, float_weights(arch), folder)
    return {
        FP32: OnnxStep(folder / "fp32.onnx", arch, n_threads),
        INT8: OnnxStep(folder / "int8.onnx", arch, n_threads),
    }
