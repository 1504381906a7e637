"""Traces of the Hessian, cluster by cluster, from Hessian-vector products with random probes."""

from __future__ import annotations

import contextlib
import random
from typing import Callable, Dict, List, Optional, Sequence

import torch

from espnet_mpq.clusters import ClusterWeights, as_matrix
from espnet_mpq.errors import InputError
from espnet_mpq.sensitivity.judged import Batch, Judged
from espnet_mpq.sensitivity.provenance import PROBES

Loss = Callable[[torch.Tensor, Batch], torch.Tensor]


class TraceMeter:
    """Samples of Tr(H_cluster) for H of a mean loss, nats per row, on fixed sentences.

    Args:
        judged: the model, in eval mode (dropout off) while measuring, and the rows of its logits.
            One batch at a time has a graph.
        weights: of this model. Only they are probed: biases and norms stay float.
        probe: "rademacher" (signs, the least variance) or "gaussian" (as in the paper).
        seed: with the numbers of probe and batch it fixes a random vector, so sample k is the
            same whatever was measured before it.
    """

    def __init__(
        self,
        judged: Judged,
        weights: ClusterWeights,
        *,
        probe: str = "rademacher",
        seed: int = 0,
    ):
        if probe not in PROBES:
            raise InputError("the probe", found=repr(probe), expected=" or ".join(PROBES))
        self.judged, self._clusters = judged, list(weights.clusters.values())
        self._probe, self._seed = probe, seed
        used = {part.parameter for cluster in self._clusters for part in cluster.parts}
        named = {n: p for n, p in judged.module.named_parameters() if n in used}
        self._names, self.parameters = list(named), list(named.values())
        self.n_rows = judged.n_rows
        if not self.n_rows:
            raise InputError("no token or frame to measure on", todo="give text or speech")

    def sample(self, probe: int) -> Dict[str, float]:
        """Sample number ``probe``: cluster -> unbiased sample of the trace, from one pass."""
        raise NotImplementedError

    def _total(self, forms_of_batch: Callable[[int, torch.Tensor], List[torch.Tensor]]):
        """Cluster -> sum over batches of what ``forms_of_batch`` (number, logits of the rows)
        gives for each parameter, a tensor of its shape; sums in float64, divided by all rows."""
        totals = dict.fromkeys((cluster.name for cluster in self._clusters), 0.0)
        with differentiable(self.judged.module, self.parameters):
            for k, logits in enumerate(self.judged.logits()):
                forms = dict(zip(self._names, forms_of_batch(k, logits)))
                for cluster in self._clusters:
                    for part in cluster.parts:
                        values = as_matrix(forms[part.parameter])[part.start : part.stop]
                        totals[cluster.name] += float(values.sum(dtype=torch.float64))
        return {name: total / self.n_rows for name, total in totals.items()}

    def _random(self, shape, like: torch.Tensor, probe: int, batch: int, k: int) -> torch.Tensor:
        # torch's CPU generator looks at 32 bits of its seed only, so all numbers are hashed.
        seed = random.Random(f"{self._seed}/{probe}/{batch}/{k}").getrandbits(32)
        generator = torch.Generator().manual_seed(seed)
        values = torch.empty(shape, dtype=like.dtype)
        if self._probe == "gaussian":
            values.normal_(generator=generator)
        else:
            values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return values.to(like.device)


class HessianMeter(TraceMeter):
    """Hutchinson's estimator: z^T H z with random z has the trace as its mean.

    One product with a vector z over all clusters gives z_i . (H z)_i for every cluster i; the
    other blocks cancel in the mean. Every batch has a z of its own, which spreads less than one
    z for all. May be negative, as the loss is not convex.

    Source: Hutchinson 1990; Xu et al. 2021 (TASLP, arXiv 2112.11438), section V; product by
    differentiating g . z (Pearlmutter 1994); a z per batch is ours.

    Args:
        loss: (logits (N, V), batch) -> summed over the rows, in nats; cross entropy by default.
        others: as TraceMeter.
    """

    def __init__(
        self, judged: Judged, weights: ClusterWeights, loss: Optional[Loss] = None, **options
    ):
        super().__init__(judged, weights, **options)
        if loss is None and not judged.has_targets:
            raise InputError(
                "the Hessian needs a loss, and these rows have no targets",
                found="the frames of a recogniser",
                todo="use --method fisher, which needs none",
            )
        self._loss = loss or judged.cross_entropy

    def sample(self, probe: int) -> Dict[str, float]:
        return self._forms(
            lambda batch: [
                self._random(p.shape, p, probe, batch, k) for k, p in enumerate(self.parameters)
            ]
        )

    def forms(self, vectors: Sequence[torch.Tensor]) -> Dict[str, float]:
        """Cluster i -> z_i . (H z)_i for given vectors, one of the shape of each parameter."""
        return self._forms(lambda batch: list(vectors))

    def _forms(self, vectors_of_batch) -> Dict[str, float]:
        def forms_of_batch(batch, logits):
            vectors = vectors_of_batch(batch)
            loss = self._loss(logits, self.judged.batches[batch])
            products = hessian_product(loss, self.parameters, vectors)
            return [z * hz for z, hz in zip(vectors, products)]

        return self._total(forms_of_batch)


class FisherMeter(TraceMeter):
    """Samples of the trace of the Gauss-Newton matrix G = mean over rows of J^T S J.

    J: derivative of a row's logits by the weights; S = diag(p) - p p^T, the Hessian of the
    cross entropy by the logits. For cross entropy G is the Fisher matrix (targets drawn from the
    LM itself), it has no negative eigenvalue, and 1/2 d^T G d is the second-order KL(fp || moved).

    With random r of independent entries (mean 0, variance 1) for every token and word,
    a = sqrt(p) r - p (sqrt(p) . r) has mean 0 and covariance S, so || sum over tokens of J^T a ||^2
    has the mean sum of Tr(J^T S J): the cross terms of two tokens cancel. That costs one
    ordinary backward pass and is never negative; z^T G z costs two and a product with J and
    is negative for some z and cluster. Squared gradients of the observed words are
    neither: these are not drawn from the LM, so the terms between tokens of a sentence stay.

    Source: Martens, Sutskever, Swersky 2012 (curvature propagation), for cross entropy; Fisher =
    Gauss-Newton: Martens 2020 (JMLR 21), section 9.
    """

    def sample(self, probe: int) -> Dict[str, float]:
        return self._squares(
            lambda batch, logits: self._random(logits.shape, logits, probe, batch, 0)
        )

    def squares(self, random_of_batch: Sequence[torch.Tensor]) -> Dict[str, float]:
        """Cluster -> || J^T a ||^2 / rows for given r, one (N, V) per batch."""
        return self._squares(lambda batch, logits: random_of_batch[batch])

    def _squares(self, draw) -> Dict[str, float]:
        def forms_of_batch(batch, logits):
            p = torch.softmax(logits.detach(), dim=-1)
            a = p.sqrt() * draw(batch, logits)
            a = a - p * a.sum(-1, keepdim=True)
            weights = self.judged.batches[batch].row_weights
            if weights is not None:  # the matrix of a weighted sum over rows
                a = a * weights.sqrt().to(a.dtype)[:, None]
            gradients = gradient(logits, self.parameters, grad_outputs=a)
            return [g.square() for g in gradients]

        return self._total(forms_of_batch)


METERS = {"hessian": HessianMeter, "fisher": FisherMeter}


def hessian_product(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> List[torch.Tensor]:
    """H z of a scalar ``loss``, one tensor of the shape of each parameter."""
    gradients = gradient(loss, parameters, create_graph=True)
    dot = sum((g * z).sum() for g, z in zip(gradients, vectors))
    if not dot.requires_grad:  # the loss is linear
        return [torch.zeros_like(p) for p in parameters]
    return gradient(dot, parameters)


def gradient(output, parameters, **options) -> List[torch.Tensor]:
    """torch.autograd.grad with zeros for parameters that play no part."""
    found = torch.autograd.grad(output, parameters, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


@contextlib.contextmanager
def differentiable(module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]):
    """Eval mode in which every layer can be differentiated twice.

    cuDNN's recurrent layers have no second derivative (and in eval mode not even a first one),
    nor has fused attention: both are replaced by their plain forms. Weights that do not
    require gradients do so inside.
    """
    was_training, required = module.training, [p.requires_grad for p in parameters]
    module.eval()
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), _math_attention():
            yield
    finally:
        for p, value in zip(parameters, required):
            p.requires_grad_(value)
        module.train(was_training)


def _math_attention():
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch before 2.3; before 2.0 there is no fused attention to train with
        if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):
            return contextlib.nullcontext()
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)
