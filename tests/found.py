"""What a test needs of a small LM: architecture by its parameters, clusters, meters, weights."""

from __future__ import annotations

import torch

from espnet_mpq.architecture.gates import GATES
from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.hosts.espnet.families import vocabulary
from espnet_mpq.packed import pack
from espnet_mpq.sensitivity.judged import Batch, Judged, Stages, whole_model


def architecture_of(lm: torch.nn.Module):
    """Of an LM whose parameters are named as the host's; LSTM where 4 gates fit."""
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    if "rnn.weight_hh_l0" in shapes:
        rows, nhid = shapes["rnn.weight_hh_l0"]
        kind = next(kind for kind, gates in GATES.items() if rows == len(gates) * nhid)
        n_layers = sum("weight_hh" in name for name in shapes)
        vocab_size, unit = shapes["encoder.weight"]
        tied = "decoder.weight" not in shapes
        return RnnArchitecture(kind, vocab_size, unit, nhid, n_layers, tied)
    vocab_size, embed_unit = shapes["embed.weight"]
    unit, width = shapes["encoder.encoders.0.feed_forward.w_1.weight"]
    n_blocks = sum(name.endswith("feed_forward.w_1.weight") for name in shapes)
    return TransformerArchitecture(None, vocab_size, embed_unit, width, 1, unit, n_blocks)


def find_clusters(lm: torch.nn.Module) -> list:
    return architecture_of(lm).clusters()


def rest_parameters(lm: torch.nn.Module, clusters) -> list:
    """Name and shape of the parameters in no cluster, in the order of the module."""
    covered = {part.parameter for cluster in clusters for part in cluster.parts}
    return [(n, tuple(p.shape)) for n, p in lm.named_parameters() if n not in covered]


def weights_of(lm: torch.nn.Module, clusters=None) -> ClusterWeights:
    return ClusterWeights(lm, find_clusters(lm) if clusters is None else clusters)


def get_mats(lm: torch.nn.Module, cluster) -> list:
    return ClusterWeights(lm, [cluster]).mats(cluster.name)


def set_mats(lm: torch.nn.Module, cluster, mats) -> None:
    ClusterWeights(lm, [cluster]).set(cluster.name, mats)


def meter_of(meter, forward, lm, clusters, batches, **options):
    """A KlMeter, HessianMeter or FisherMeter; ``forward``: ids (B, T) -> logits, or Stages."""
    stages = forward if isinstance(forward, Stages) else whole_model(forward, clusters)
    judged = Judged.of(lm, stages, [Batch(x, mask, targets) for x, targets, mask in batches])
    return meter(judged, ClusterWeights(lm, clusters), **options)


def pack_lm(weights, architecture, plan, token_list, **more):
    """Packed with the special ids of ESPnet."""
    return pack.pack(weights, architecture, plan, vocabulary(token_list), **more)
