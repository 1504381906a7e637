"""KL sensitivity: how far the LM's predictions move when one cluster is quantized."""

from __future__ import annotations

import contextlib
import math
from typing import Callable, Iterable, List, Mapping, Sequence, Tuple

import torch

from espnet_mpq.clusters import Cluster, get_mats, set_mats
from espnet_mpq.errors import InputError
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.table import Entry

Batch = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Mats = Mapping[str, Sequence[torch.Tensor]]
CACHE_N_BYTES = 2 << 30
KL_PIECE = 1 << 16  # numbers


class KlMeter:
    """Measures KL(fp || changed LM) in nats per token on fixed sentences.

    Args:
        forward: input ids (B, T) -> logits (B, T, V).
        lm: the LM that ``forward`` runs, holding its fp weights; put in eval mode while measuring
            (dropout off), every sentence from a fresh state.
        clusters: of this LM.
        batches: (inputs, targets, mask), each (B, T), one row per sentence; kept in memory.
        printed_form: the paper's printed sum, ln P_fp(w) - ln P_q(w) of the observed word only
            (noisy, may be negative), in place of the sum over the whole vocabulary.
        cache_n_bytes: keep the fp log-probabilities when they need no more than this, else
            compute them again for every batch (twice the time).

    Source: Xu et al. 2021 (TASLP, arXiv 2112.11438), KL sensitivity; the whole-vocabulary sum and
    the standard error are ours.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        lm: torch.nn.Module,
        clusters: Sequence[Cluster],
        batches: Iterable[Batch],
        *,
        printed_form: bool = False,
        cache_n_bytes: int = CACHE_N_BYTES,
    ):
        device = next(lm.parameters()).device
        self._batches = [tuple(t.to(device) for t in batch) for batch in batches]
        self._forward, self._lm = forward, lm
        self._clusters = {cluster.name: cluster for cluster in clusters}
        self.printed_form = printed_form
        self.n_tokens = sum(int(mask.sum()) for _, _, mask in self._batches)
        if not self.n_tokens:
            raise InputError("no token to measure on", todo="give a text with sentences")
        self.fp_nll_nats = self._fp_pass(cache_n_bytes)

    @torch.no_grad()
    def _fp_pass(self, cache_n_bytes: int) -> float:
        """Fills the cache; mean nll of the fp LM in nats per token."""
        self._cache: List[torch.Tensor] = []
        nll, fits = 0.0, True
        with _evaluating(self._lm):
            for inputs, targets, mask in self._batches:
                log_p = self._log_probs(inputs, mask)
                nll -= float(_observed(log_p, targets[mask]).double().sum())
                if self.printed_form:
                    log_p = _observed(log_p, targets[mask]).clone()
                fits = fits and self._total_n_bytes(log_p) <= cache_n_bytes
                if fits:
                    self._cache.append(log_p)
        if not fits:
            self._cache = []
        if not math.isfinite(nll):
            raise InputError(
                "the LM's log-probabilities are not finite", todo="check the checkpoint"
            )
        return nll / self.n_tokens

    def _total_n_bytes(self, log_p: torch.Tensor) -> int:
        return log_p.element_size() * self.n_tokens * (log_p.numel() // len(log_p))

    def _log_probs(self, inputs, mask) -> torch.Tensor:
        """(tokens of the mask, V) float32."""
        return torch.log_softmax(self._forward(inputs)[mask].float(), dim=-1)

    @torch.no_grad()
    def measure(self, mats: Mats) -> Tuple[float, float]:
        """(harm, standard error) in nats/token with the weights of some clusters replaced.

        The standard error takes sentences as independent, tokens of one sentence not (ratio
        estimator; Cochran, Sampling Techniques, eq. 6.13); nan for a single sentence.
        """
        fp = {name: [m.clone() for m in self._mats(name)] for name in mats}
        sums, counts = [], []
        with _evaluating(self._lm):
            try:
                self._set(mats)
                for k, (inputs, targets, mask) in enumerate(self._batches):
                    log_q = self._log_probs(inputs, mask)
                    if self.printed_form:
                        log_q = _observed(log_q, targets[mask])
                    if self._cache:
                        log_p = self._cache[k]
                    else:
                        self._set(fp)
                        log_p = self._log_probs(inputs, mask)
                        if self.printed_form:
                            log_p = _observed(log_p, targets[mask])
                        self._set(mats)
                    per_token = (log_p - log_q if self.printed_form else kl(log_p, log_q)).double()
                    rows = mask.nonzero()[:, 0]
                    total = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
                    sums += total.index_add_(0, rows, per_token).tolist()
                    counts += mask.sum(1).tolist()
            finally:
                self._set(fp)
        return ratio_of_sums(sums, counts)

    def _mats(self, name: str) -> List[torch.Tensor]:
        return get_mats(self._lm, self._clusters[name])

    def _set(self, mats: Mats) -> None:
        for name, values in mats.items():
            set_mats(self._lm, self._clusters[name], values)

    def entry(self, name: str, spec, scale_dtype: str = "float16") -> Entry:
        """The sensitivity of one cluster quantized as ``spec`` says, all else fp."""
        weights = [m.float().cpu() for m in self._mats(name)]
        dtype = getattr(torch, scale_dtype)
        values = project_cluster(weights, spec, method="mse", scale_dtype=dtype).values
        harm, stderr = self.measure({name: values})
        return Entry(harm, stderr, relative_mse(weights, values))


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats for log-probabilities (N, V) -> (N,).

    Uses sum p (exp(-d) - 1 + d) with d = log p - log q: the same value, as both sum to one, but
    no term is negative, so float32 keeps the tiny divergences of 8 bits.
    """
    # Pieces that stay in the processor's cache are three times as fast.
    n_rows = max(1, KL_PIECE // max(1, log_p.shape[1]))
    pieces = zip(log_p.split(n_rows), log_q.split(n_rows))
    return torch.cat([_kl_piece(p, q) for p, q in pieces])


def _kl_piece(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    d = log_q - log_p
    if d.numel() and float(d.max()) > 80.0:  # exp(d) would overflow; such a KL is not tiny
        return (log_q.exp() - log_p.exp() - log_p.exp() * d).sum(-1)
    return torch.expm1(d).sub_(d).mul_(log_p.exp()).sum(-1)


def relative_mse(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> float:
    """||w - q||^2 / ||w||^2 over all matrices; 0 for all-zero weights."""
    error = sum(float((w.double() - q.double()).square().sum()) for w, q in zip(weights, values))
    norm = sum(float(w.double().square().sum()) for w in weights)
    return error / norm if norm else 0.0


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> Tuple[float, float]:
    """sum(sums) / sum(counts) and its linearised standard error over the pairs."""
    n, total = len(sums), sum(counts)
    mean = math.fsum(sums) / total
    if n < 2:
        return mean, math.nan
    square = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts))
    return mean, math.sqrt(square * n / (n - 1)) / total


def _observed(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, targets[:, None])[:, 0]


@contextlib.contextmanager
def _evaluating(lm: torch.nn.Module):
    was_training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(was_training)
