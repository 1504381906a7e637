"""The covariance that an embedding matrix is rounded with: what its rows do to the loss."""

from __future__ import annotations

from typing import List

import torch

from espnet_mpq.rounding.inputs import Moments, Owners, rows_of
from espnet_mpq.sensitivity.judged import Judged

OUTPUT_ROWS = 512  # tokens whose logits are made at once


def embedding_covariance(
    judged: Judged, owners: Owners, parameter: str, seed: int = 0
) -> torch.Tensor:
    """(C, C) float64: an error e of a row costs 1/2 e C e' nats each time its token is read.

    C is the mean of g g', g the gradient of the loss by the embedded token, the targets drawn
    from the model's own predictions (the Fisher matrix, which is the curvature of the KL). A
    matrix that is the output matrix too is summed with the mean of h h', h what it is multiplied
    with: a row is right or wrong there about as often as its token is read.

    Source: own; g = W' d for the matrices W that read the rows, so W' W is the case of equally
    important, independent outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    read, output = Moments(), Moments()
    leaves: List[torch.Tensor] = []

    def embedding(module, args, result):
        if owners.names[module]["weight"] == parameter:
            leaves.append(result.detach().requires_grad_(True))
            return leaves[-1]

    def linear(module, args):
        if owners.names[module].get("weight") == parameter:
            output.add(rows_of(args[0], None))

    handles = [m.register_forward_hook(embedding) for m in owners.modules(torch.nn.Embedding)]
    handles += [m.register_forward_pre_hook(linear) for m in owners.modules(torch.nn.Linear)]
    try:
        # cuDNN has no backward pass of recurrent layers in eval mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            for batch in judged.batches:
                leaves.clear()
                hidden = batch.rows(judged.stages.run(batch.inputs, batch.inputs))
                gradient = _loss_gradient(judged.stages.output, hidden.detach(), generator)
                for found in torch.autograd.grad(hidden, leaves, gradient):
                    read.add(rows_of(found, batch.mask))
    finally:
        for handle in handles:
            handle.remove()
    matrix = read.covariance(centred=False)
    return matrix + output.covariance(centred=False) if output.n else matrix


def _loss_gradient(output, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of the summed loss by what enters the output stage, the targets drawn."""
    pieces = []
    for rows in hidden.split(OUTPUT_ROWS):
        rows = rows.clone().requires_grad_(True)
        logits = output(rows).float()
        p = logits.detach().softmax(-1).cpu()
        targets = torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        pieces.append(torch.autograd.grad(loss, rows)[0])
    return torch.cat(pieces)
