"""Weight clusters of the host's recognisers: one a sublayer of every block, and single layers."""

from __future__ import annotations

import re
from typing import List, Optional

import torch

from espnet_mpq.architecture.listed import ListedArchitecture, Name, list_module
from espnet_mpq.errors import InputError

# "encoder.encoders.3.feed_forward.w_1" -> stack "encoder", block 3, sublayer "feed_forward"
_BLOCK = re.compile(r"(\w+)\.(?:encoders|decoders|layers|blocks)\.(\d+)\.(\w+)(?:\.|$)")
# The host's name of a sublayer -> (ours, kind); others keep the host's name, its kind "block".
SUBLAYERS = {
    "feed_forward_macaron": ("ffn_macaron", "feed_forward"),
    "feed_forward": ("ffn", "feed_forward"),
    "attn": ("attn", "attention"),
    "self_attn": ("self_attn", "attention"),
    "src_attn": ("src_attn", "attention"),
    "conv_module": ("conv", "convolution"),
    "cgmlp": ("cgmlp", "convolution"),
    "merge_proj": ("merge", "merge"),
}
# Single layers whose name in the host says more than people need.
SINGLES = {
    "encoder.embed.out.0": ("encoder.embed.out", "subsampling"),
    "decoder.embed.0": ("decoder.embed", "embedding"),
    "decoder.output_layer": ("decoder.output_layer", "output"),
    "decoder.output": ("decoder.output_layer", "output"),
    "ctc.ctc_lo": ("ctc.ctc_lo", "output"),
}
# Matrices that are no layers: position biases of attention, normalised kernels of positions.
KEEP = ("*.pos_bias_?", "*.weight_g", "*.weight_v")


def cluster_of(path: str) -> Optional[Name]:
    """(cluster, kind) of the layer at ``path`` in the model; None: a cluster of its own name.

    Blocks are named as the host counts them: "encoder.0.attn", "decoder.5.src_attn".
    """
    if path in SINGLES:
        return SINGLES[path]
    block = _BLOCK.match(path)
    if block is None:
        return None
    stack, number, sublayer = block.groups()
    if stack == "encoder" and sublayer == "self_attn":  # no other attention to tell it from
        sublayer = "attn"
    name, kind = SUBLAYERS.get(sublayer, (sublayer, "block"))
    return f"{stack}.{number}.{name}", kind


def architecture_of(model: torch.nn.Module) -> ListedArchitecture:
    """The shape and clusters of an ESPnetASRModel, as its checkpoints have them.

    Kept float: all vectors and buffers, depthwise kernels, position biases, and convolutions of
    one input channel (the first of conv2d subsampling), which see the features themselves.

    Raises:
        InputError: a recogniser whose weights are not all in layers that can be packed.
    """
    keep = [*KEEP, *_first_convolutions(model)]
    title = f"recogniser {type(model.encoder).__name__}"
    if model.decoder is not None:
        title += f" + {type(model.decoder).__name__}"
    if model.ctc is not None:
        title += " + CTC"
    try:
        architecture = list_module(
            model, vocab_size=model.vocab_size, title=title, cluster_of=cluster_of, keep=keep
        )
        architecture.clusters()
    except InputError as error:
        raise InputError(
            f"no packed file can hold this {title}",
            found=error,
            expected="weights in Linear, Conv1d, Conv2d, Embedding and LSTM layers only",
        ) from error
    return architecture


def _first_convolutions(model: torch.nn.Module) -> List[str]:
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d)
    return [
        f"{path}.weight"
        for path, layer in model.named_modules()
        if isinstance(layer, convolutions) and layer.in_channels == 1
    ]
