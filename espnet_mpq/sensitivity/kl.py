"""KL sensitivity: how far the LM's predictions move when one cluster is quantized."""

from __future__ import annotations

import contextlib
import math
from typing import Callable, Iterable, List, Mapping, Sequence, Tuple, Union

import torch

from espnet_mpq.clusters import Cluster, get_mats, set_mats
from espnet_mpq.errors import InputError
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.stages import Stages, whole_lm
from espnet_mpq.sensitivity.table import Entry
from espnet_mpq.statistics import ratio_of_sums

Batch = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Mats = Mapping[str, Sequence[torch.Tensor]]
CACHE_N_BYTES = 2 << 30
KL_PIECE = 1 << 16  # numbers
OUTPUT_ROWS = 512  # tokens whose logits are made at once: few enough for the processor's cache


class KlMeter:
    """Measures KL(fp || changed LM) in nats per token on fixed sentences.

    Args:
        forward: input ids (B, T) -> logits (B, T, V); or the LM's Stages, which is faster: the
            fp activations that enter the stage of a changed cluster are kept.
        lm: the LM that ``forward`` runs, holding its fp weights; put in eval mode while measuring
            (dropout off), every sentence from a fresh state.
        clusters: of this LM.
        batches: (inputs, targets, mask), each (B, T), one row per sentence; kept in memory.
        printed_form: the paper's printed sum, ln P_fp(w) - ln P_q(w) of the observed word only
            (noisy, may be negative), in place of the sum over the whole vocabulary.
        cache_n_bytes: keep the fp log-probabilities, and the activations entering one stage,
            when they need no more than this; else they are computed again for every batch.

    Source: Xu et al. 2021 (TASLP, arXiv 2112.11438), KL sensitivity; the whole-vocabulary sum and
    the standard error are ours.
    """

    def __init__(
        self,
        forward: Union[Stages, Callable[[torch.Tensor], torch.Tensor]],
        lm: torch.nn.Module,
        clusters: Sequence[Cluster],
        batches: Iterable[Batch],
        *,
        printed_form: bool = False,
        cache_n_bytes: int = CACHE_N_BYTES,
    ):
        device = next(lm.parameters()).device
        self._batches = [tuple(t.to(device) for t in batch) for batch in batches]
        self._stages = forward if isinstance(forward, Stages) else whole_lm(forward, clusters)
        self._lm = lm
        self._clusters = {cluster.name: cluster for cluster in clusters}
        self.printed_form = printed_form
        self.n_tokens = sum(int(mask.sum()) for _, _, mask in self._batches)
        if not self.n_tokens:
            raise InputError("no token to measure on", todo="give a text with sentences")
        self._inputs = [inputs for inputs, _, _ in self._batches]
        self._kept = (0, self._inputs)
        self.fp_nll_nats = self._fp_pass(cache_n_bytes)

    @torch.no_grad()
    def _fp_pass(self, cache_n_bytes: int) -> float:
        """Fills the cache; mean nll of the fp LM in nats per token."""
        self._cache: List[torch.Tensor] = []
        nll, fits = 0.0, True
        with _evaluating(self._lm):
            for inputs, targets, mask in self._batches:
                hidden = self._stages.run(inputs, inputs)[mask]
                self._keeps = self._total_n_bytes(hidden) <= cache_n_bytes
                log_p = self._log_probs(hidden)
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

    def _total_n_bytes(self, rows: torch.Tensor) -> int:
        return rows.element_size() * self.n_tokens * (rows.numel() // len(rows))

    def _log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, V) float32 of what enters the output stage."""
        return torch.log_softmax(self._stages.output(hidden).float(), dim=-1)

    def _entering(self, stage: int) -> List[torch.Tensor]:
        """What enters ``stage`` in every batch, with the weights as they are (fp ones).

        The last answer is kept and moved on: clusters in order cost one pass for all of them.
        """
        at, xs = self._kept
        if at > stage:
            at, xs = 0, self._inputs
        for layer in self._stages.layers[at:stage]:
            xs = [layer(x, inputs) for x, inputs in zip(xs, self._inputs)]
        self._kept = (stage, xs)
        return xs

    @torch.no_grad()
    def measure(self, mats: Mats) -> Tuple[float, float]:
        """(harm, standard error) in nats/token with the weights of some clusters replaced.

        The standard error takes sentences as independent, tokens of one sentence not (ratio
        estimator; Cochran, Sampling Techniques, eq. 6.13); nan for a single sentence.
        """
        fp = {name: [m.clone() for m in self._mats(name)] for name in mats}
        start = min(self._stages.first[name] for name in mats) if self._keeps and mats else 0
        sums, counts = [], []
        with _evaluating(self._lm):
            entering = self._entering(start)
            try:
                self._set(mats)
                for k, (inputs, targets, mask) in enumerate(self._batches):
                    if self._cache:
                        log_p = self._cache[k]
                    else:
                        self._set(fp)
                        log_p = self._log_probs(self._stages.run(inputs, inputs)[mask])
                        self._set(mats)
                    hidden = self._stages.run(entering[k], inputs, start)[mask]
                    per_token = self._divergence(log_p, hidden, targets[mask]).double()
                    rows = mask.nonzero()[:, 0]
                    total = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
                    sums += total.index_add_(0, rows, per_token).tolist()
                    counts += mask.sum(1).tolist()
            finally:
                self._set(fp)
        return ratio_of_sums(sums, counts)

    def _divergence(self, log_p, hidden, targets) -> torch.Tensor:
        """Harm of every token (N,): fp log-probabilities against the LM's as it is now."""
        pieces = []
        for start in range(0, len(hidden), OUTPUT_ROWS):
            rows = slice(start, start + OUTPUT_ROWS)
            log_q = self._log_probs(hidden[rows])
            if not self.printed_form:
                pieces.append(kl(log_p[rows], log_q))
                continue
            fp = log_p[rows] if log_p.dim() == 1 else _observed(log_p[rows], targets[rows])
            pieces.append(fp - _observed(log_q, targets[rows]))
        return torch.cat(pieces)

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
