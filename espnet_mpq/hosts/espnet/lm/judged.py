"""The host's LMs as the sensitivity measures see them: their stages, and sentences to judge on."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Iterable

import torch
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM

from espnet_mpq.clusters import Cluster
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.sensitivity.judged import Batch, Judged, Stages, whole_model
from espnet_mpq.text import TokenizedText, batches


def judged_lm(exp: Experiment, text: TokenizedText, max_batch_tokens: int) -> Judged:
    """The LM of an experiment on the sentences of ``text``, every one from a fresh state.

    Sentences of like lengths share a batch: little padding.
    """
    order = sorted(range(len(text)), key=lambda i: len(text.ids[i]))
    text = dataclasses.replace(text, ids=[text.ids[i] for i in order])
    pieces = batches(
        text, exp.vocabulary.special_ids, batch_size=128, max_batch_tokens=max_batch_tokens
    )
    stages = find_stages(exp.module, exp.architecture.clusters())
    return Judged.of(
        exp.module,
        stages,
        (Batch(inputs, mask, targets) for inputs, targets, mask in pieces),
    )


def find_stages(lm: torch.nn.Module, clusters: Iterable[Cluster]) -> Stages:
    """Stages of an LM of the host in eval mode, each sentence from a fresh state.

    Recurrent LMs: embedding, every layer, output. Transformer LMs: embedding, every block,
    output with its norm. Known by their forward method, so a subclass with another one is
    taken as a whole.
    """
    forward = type(lm).forward
    if forward is SequentialRNNLM.forward and not lm.rnn.bidirectional and lm.rnn.batch_first:
        return _recurrent(lm, clusters)
    if forward is TransformerLM.forward and lm.encoder.intermediate_layers is None:
        return _transformer(lm, clusters)
    return whole_model(lambda inputs: lm(inputs, None)[0], clusters)


def _recurrent(lm: SequentialRNNLM, clusters: Iterable[Cluster]) -> Stages:
    layers = [lambda x, inputs: lm.encoder(inputs)]
    layers += [partial(_rnn_layer, lm.rnn, k) for k in range(lm.rnn.num_layers)]
    return Stages(layers, lm.decoder, _first(clusters, "rnn.l", len(layers)))


def _rnn_layer(rnn: torch.nn.RNNBase, k: int, x: torch.Tensor, inputs) -> torch.Tensor:
    """Layer ``k`` alone, from a zero state; (B, T, H) -> (B, T, H)."""
    run = getattr(torch, rnn.mode.lower())  # torch.lstm, gru, rnn_tanh or rnn_relu
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if rnn.bias else 2]
    weights = [getattr(rnn, f"{name}_l{k}") for name in names]
    zero = x.new_zeros(1, x.shape[0], rnn.hidden_size)
    state = (zero, zero) if rnn.mode == "LSTM" else zero
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    return run(x, state, weights, rnn.bias, 1, 0.0, False, False, True)[0]


def _transformer(lm: TransformerLM, clusters: Iterable[Cluster]) -> Stages:
    encoder = lm.encoder

    def block(layer, x, inputs):
        return layer(x, lm._target_mask(inputs))[0]

    def output(rows):
        return lm.decoder(encoder.after_norm(rows) if encoder.normalize_before else rows)

    layers = [lambda x, inputs: encoder.embed(lm.embed(inputs))]
    layers += [partial(block, layer) for layer in encoder.encoders]
    return Stages(layers, output, _first(clusters, "blocks.", len(layers)))


def _first(clusters: Iterable[Cluster], prefix: str, n_layers: int) -> dict:
    """Cluster -> stage: embedding (tied ones too) 0, layer or block k 1 + k, output the last."""
    first = {"embedding": 0, "output": n_layers}
    for cluster in clusters:
        if cluster.name.startswith(prefix):
            first[cluster.name] = 1 + int(cluster.name[len(prefix) :].split(".")[0])
    return first
