"""The host's recognisers as the sensitivity measures see them: stages, frames and tokens to judge.

One harm adds both heads as the model's own loss does: of an utterance, ctc_weight times the sum
over its frames of the KL of the CTC posteriors, plus 1 - ctc_weight times the sum over its tokens
of the KL of the decoder, teacher-forced on the transcript. The sum over frames is the KL of the
distributions over CTC paths, that over tokens the KL along the transcript: both are of the same
unit as the two losses that the host adds. Divided by the number of frames it is in nats/frame (a
model without CTC: nats/token). One number, so that bits can be weighed against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from espnet.nets.pytorch_backend.transformer.add_sos_eos import add_sos_eos
from espnet2.asr.decoder.transformer_decoder import BaseTransformerDecoder
from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder

from espnet_mpq.clusters import Cluster
from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.asr.data import Speech
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.sensitivity.judged import Batch, Judged, Stages

FRAME, TOKEN = "nats/frame", "nats/token"
# Encoders whose blocks follow each other, by their forward method: subclasses are other models.
BLOCKS = {
    cls.forward
    for cls in (ConformerEncoder, EBranchformerEncoder, TransformerEncoder, BranchformerEncoder)
}


@dataclass(frozen=True)
class Features:
    """A batch of utterances: features (B, T, F) with lengths (B,); transcripts that begin with
    sos, ids (B, L) with lengths (B,), None where no decoder is judged."""

    frames: torch.Tensor
    n_frames: torch.Tensor
    tokens: Optional[torch.Tensor] = None
    n_tokens: Optional[torch.Tensor] = None

    def to(self, device: torch.device) -> "Features":
        values = (self.frames, self.n_frames, self.tokens, self.n_tokens)
        return Features(*(None if value is None else value.to(device) for value in values))


def heads_of(model: torch.nn.Module) -> Dict[str, float]:
    """Head ("ctc", "decoder") -> its weight in the model's loss; heads without weight are out."""
    weights = {"ctc": model.ctc_weight, "decoder": 1.0 - model.ctc_weight}
    if model.ctc is None:
        del weights["ctc"]
    if model.decoder is None:
        del weights["decoder"]
    return {head: weight for head, weight in weights.items() if weight > 0}


def unit_of(model: torch.nn.Module) -> str:
    """Of the harm of this recogniser."""
    return FRAME if "ctc" in heads_of(model) else TOKEN


@torch.no_grad()
def judged_asr(
    exp: Experiment, speech: Speech, max_batch_rows: int, heads: Optional[Dict[str, float]] = None
) -> Judged:
    """The recogniser of an experiment on utterances, as the head of this file says.

    Utterances of like lengths share a batch: little padding.

    Args:
        max_batch_rows: frames and tokens of a batch, padding included.
        heads: head -> weight, in place of the model's own; {"ctc": 1} for nats/frame of the CTC
            posteriors alone.

    Raises:
        InputError: every utterance is too short for the encoder.
    """
    model = exp.model.eval()
    heads = heads_of(model) if heads is None else heads
    stages = find_stages(model, exp.architecture.clusters(), heads)
    device = next(model.parameters()).device
    batches = []
    for group in _groups(speech, max_batch_rows, _subsampling(model)):
        inputs = _features(model, speech, group, "decoder" in heads).to(device)
        batch = _batch(model, inputs, heads)
        if batch is not None:
            batches.append(batch)
    if not batches:
        raise InputError("no utterance is long enough for this recogniser", found=speech.names[:4])
    return Judged.of(model, stages, batches, FRAME if "ctc" in heads else TOKEN)


def find_stages(
    model: torch.nn.Module, clusters: Iterable[Cluster], heads: Dict[str, float]
) -> Stages:
    """Stages of a recogniser in eval mode: what comes before the blocks of the encoder, each
    block, the way to the decoder, each block of the decoder, both heads.

    The last gives logits (B, T + L, V): those of the frames, then those of the tokens. Models
    whose encoder is no plain chain of blocks have one stage in place of all of the encoder's.
    """
    encoder, layers = model.encoder, []
    first: Dict[str, int] = {}
    clusters = list(clusters)
    if type(encoder).forward in BLOCKS and _is_chain(encoder):
        layers.append(lambda x, inputs: _front(model, inputs))
        for number, block in enumerate(encoder.encoders):
            _note(first, clusters, f"encoder.{number}.", len(layers))
            layers.append(partial(_block, block))
        ends = partial(_after_blocks, model)
    else:
        layers.append(lambda x, inputs: _encode(model, inputs))
        ends = lambda x: x  # noqa: E731
    _note(first, clusters, "postencoder.", len(layers))
    decoder = model.decoder if "decoder" in heads else None
    has_blocks = decoder is not None and (
        type(decoder).forward is BaseTransformerDecoder.forward
        and not getattr(decoder, "gradient_checkpoint_layers", ())  # newer hosts
    )
    if has_blocks:
        _note(first, clusters, "decoder.embed", len(layers))
        layers.append(lambda x, inputs: _to_decoder(decoder, *ends(x), inputs))
        for number, block in enumerate(decoder.decoders):
            _note(first, clusters, f"decoder.{number}.", len(layers))
            layers.append(partial(_decoder_block, block))
        last = partial(_heads_of_states, model, decoder, heads)
    else:
        _note(first, clusters, "decoder.", len(layers))
        last = lambda x, inputs: _heads(model, decoder, heads, *ends(x), inputs)  # noqa: E731
    for name in ("ctc.", "decoder.output_layer"):
        _note(first, clusters, name, len(layers))
    layers.append(last)
    return Stages(layers, lambda logits: logits, {c.name: first.get(c.name, 0) for c in clusters})


def _note(first: Dict[str, int], clusters: Sequence[Cluster], prefix: str, stage: int) -> None:
    first.update((c.name, stage) for c in clusters if c.name.startswith(prefix))


def _is_chain(encoder: torch.nn.Module) -> bool:
    """Whether no CTC of inner blocks acts on later ones."""
    return not (
        getattr(encoder, "interctc_use_conditioning", False)
        or getattr(encoder, "ctc_trim", False)
        or getattr(encoder, "interctc_layer_idx", None)
    )


class _Caught(Exception):
    """Carries what was about to enter a module."""


def _entering(module: torch.nn.Module, run, *args) -> tuple:
    """The arguments with which ``run`` first calls ``module``; the rest of it is not run."""

    def catch(module, inputs):
        raise _Caught(inputs)

    handle = module.register_forward_pre_hook(catch)
    try:
        run(*args)
    except _Caught as caught:
        return caught.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} was not called")


def _preencoded(model, inputs: Features) -> Tuple[torch.Tensor, torch.Tensor]:
    if model.preencoder is None:
        return inputs.frames, inputs.n_frames
    return model.preencoder(inputs.frames, inputs.n_frames)


def _front(model, inputs: Features) -> tuple:
    """What enters the first block: (x, mask), x with or without its positions."""
    return _entering(model.encoder.encoders[0], model.encoder, *_preencoded(model, inputs))


def _block(block: torch.nn.Module, x: tuple, inputs: Features) -> tuple:
    return block(*x)


def _after_blocks(model, x: tuple) -> Tuple[torch.Tensor, torch.Tensor]:
    """(encoder output (B, T, D), lengths) after the last block, as the encoders' forward ends."""
    rows, mask = x
    rows = rows[0] if isinstance(rows, tuple) else rows
    if getattr(model.encoder, "normalize_before", True):
        rows = model.encoder.after_norm(rows)
    lengths = mask.squeeze(1).sum(1)
    return rows, lengths if model.postencoder is None else model.postencoder(rows, lengths)


def _encode(model, inputs: Features) -> Tuple[torch.Tensor, torch.Tensor]:
    """As ESPnetASRModel.encode from the features on."""
    conf = {"ctc": model.ctc} if not _is_chain(model.encoder) else {}
    rows, lengths, _ = model.encoder(*_preencoded(model, inputs), **conf)
    rows = rows[0] if isinstance(rows, tuple) else rows
    return (rows, lengths) if model.postencoder is None else model.postencoder(rows, lengths)


def _to_decoder(decoder, rows: torch.Tensor, lengths: torch.Tensor, inputs: Features) -> tuple:
    """(encoder output, what enters the decoder's first block)."""
    entering = _entering(
        decoder.decoders[0], decoder, rows, lengths, inputs.tokens, inputs.n_tokens
    )
    return rows, entering


def _decoder_block(block: torch.nn.Module, x: tuple, inputs: Features) -> tuple:
    return x[0], block(*x[1])


def _heads_of_states(model, decoder, heads: Dict[str, float], x: tuple, inputs: Features):
    rows, (states, *_) = x
    if decoder.normalize_before:
        states = decoder.after_norm(states)
    return _joined(model, heads, rows, decoder.output_layer(states))


def _heads(model, decoder, heads: Dict[str, float], rows, lengths, inputs: Features):
    logits = None
    if decoder is not None:
        logits = decoder(rows, lengths, inputs.tokens, inputs.n_tokens)[0]
    return _joined(model, heads, rows, logits)


def _joined(model, heads: Dict[str, float], rows: torch.Tensor, logits) -> torch.Tensor:
    # CTC.log_softmax applies no dropout; its loss does, even in eval mode.
    parts = [model.ctc.ctc_lo(rows)] if "ctc" in heads else []
    parts += [logits] if "decoder" in heads else []
    return torch.cat(parts, dim=1)


def _groups(speech: Speech, max_batch_rows: int, subsampling: int) -> List[List[int]]:
    """Numbers of the utterances of every batch, by rising length."""
    groups: List[List[int]] = []
    for i in sorted(range(len(speech)), key=lambda i: len(speech.samples[i])):
        n_tokens = 0 if speech.tokens[i] is None else len(speech.tokens[i])
        rows = len(speech.samples[i]) // subsampling + n_tokens + 1
        if not groups or (len(groups[-1]) + 1) * rows > max_batch_rows:
            groups.append([])
        groups[-1].append(i)
    return groups


def _subsampling(model) -> int:
    """Samples of a row of the encoder, about; for the size of batches alone."""
    return 4 * int(getattr(model.frontend, "hop_length", 160))


def _features(model, speech: Speech, group: Sequence[int], needs_tokens: bool) -> Features:
    """Through the frontend and the normalization, which no cluster is part of."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    samples = [torch.from_numpy(speech.samples[i]) for i in group]
    n_samples = torch.tensor([len(x) for x in samples])
    device = next(model.parameters()).device
    frames, n_frames = model._extract_feats(pad(samples).to(device), n_samples.to(device))
    if model.normalize is not None:
        frames, n_frames = model.normalize(frames, n_frames)
    if not needs_tokens:
        return Features(frames, n_frames)
    ids = [torch.from_numpy(speech.tokens[i]) for i in group]
    tokens, _ = add_sos_eos(
        pad(ids, padding_value=model.ignore_id), model.sos, model.eos, model.ignore_id
    )
    n_tokens = torch.tensor([len(x) + 1 for x in ids])
    return Features(frames, n_frames, tokens, n_tokens)


def _batch(model, inputs: Features, heads: Dict[str, float]) -> Optional[Batch]:
    """With the rows that are judged; None where the encoder refuses the batch as too short."""
    try:
        rows, lengths = _encode(model, inputs)
    except Exception as error:
        if type(error).__name__ == "TooShortUttError":  # the host's, of several modules
            return None
        raise
    masks, weights, counts = [], [], []

    def add(length: int, lengths: torch.Tensor, weight: float, counted: bool) -> None:
        mask = torch.arange(length, device=rows.device)[None] < lengths.to(rows.device)[:, None]
        masks.append(mask)
        weights.append(torch.full(mask.shape, weight, device=rows.device))
        counts.append(torch.full(mask.shape, float(counted), device=rows.device))

    if "ctc" in heads:
        add(rows.shape[1], lengths, heads["ctc"], True)
    if "decoder" in heads:
        add(inputs.tokens.shape[1], inputs.n_tokens, heads["decoder"], "ctc" not in heads)
    mask, weight, count = (torch.cat(parts, dim=1) for parts in (masks, weights, counts))
    return Batch(inputs, mask, None, weight, count) if bool(mask.any()) else None
