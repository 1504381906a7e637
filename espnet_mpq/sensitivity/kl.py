"""KL sensitivity: how far a model's predictions move when one cluster is quantized."""

from __future__ import annotations

import math
from typing import List, Mapping, Optional, Protocol, Sequence, Tuple

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.quant.spec import ClusterSpec
from espnet_mpq.sensitivity.judged import Judged
from espnet_mpq.sensitivity.table import Entry
from espnet_mpq.statistics import ratio_of_sums

Mats = Mapping[str, Sequence[torch.Tensor]]
CACHE_N_BYTES = 2 << 30
KL_PIECE = 1 << 16  # numbers
OUTPUT_ROWS = 512  # tokens whose logits are made at once: few enough for the processor's cache


class Rounding(Protocol):
    """Second-order rounding of one cluster, all others float, or of all of them."""

    def round_one(self, name: str, spec: ClusterSpec, scale_dtype: str = "float16"):
        """What rounding.model.Rounder.round_one returns: mats and biases."""

    def round_all(self, plan):
        """The same for a plan."""


class KlMeter:
    """Measures KL(fp || changed model) in nats per row (token, frame) on fixed sentences.

    Args:
        judged: the model, holding its fp weights, and the rows to measure on. Its stages save
            time: the fp activations that enter the stage of a changed cluster are kept.
        weights: of the same model, cluster by cluster.
        printed_form: the paper's printed sum, ln P_fp(w) - ln P_q(w) of the observed word only
            (noisy, may be negative), in place of the sum over the whole vocabulary.
        rounder: rounds clusters as they will be stored (rounding.model.Rounder); None: to the
            nearest levels.
        cache_n_bytes: keep the fp log-probabilities, and the activations entering one stage,
            when they need no more than this; else they are computed again for every batch.

    Source: Xu et al. 2021 (TASLP, arXiv 2112.11438), KL sensitivity; the whole-vocabulary sum and
    the standard error are ours.
    """

    def __init__(
        self,
        judged: Judged,
        weights: ClusterWeights,
        *,
        printed_form: bool = False,
        rounder: Optional[Rounding] = None,
        cache_n_bytes: int = CACHE_N_BYTES,
    ):
        self.judged, self.weights, self.rounder = judged, weights, rounder
        self._batches, self._stages = judged.batches, judged.stages
        self.printed_form = printed_form
        self.n_rows = judged.n_rows
        self._n_judged = sum(int(batch.mask.sum()) for batch in judged.batches)
        if not self.n_rows:
            raise InputError("no token or frame to measure on", todo="give text or speech")
        if printed_form and not judged.has_targets:
            raise InputError("the printed form needs targets", found="batches without them")
        self._inputs = [batch.inputs for batch in self._batches]
        self._kept = (0, self._inputs)
        self.fp_nll_nats = self._fp_pass(cache_n_bytes)

    @torch.no_grad()
    def _fp_pass(self, cache_n_bytes: int) -> float:
        """Fills the cache; mean nll of the fp model in nats per row, nan without targets."""
        self._cache: List[torch.Tensor] = []
        nll, fits = 0.0, True
        with self.judged.evaluating():
            for batch in self._batches:
                hidden = batch.rows(self._stages.run(batch.inputs, batch.inputs))
                self._keeps = self._total_n_bytes(hidden) <= cache_n_bytes
                log_p = self._log_probs(hidden)
                targets = batch.row_targets
                if not bool(torch.isfinite(log_p.amax(-1)).all()):
                    raise InputError(
                        "the model's log-probabilities are not finite", todo="check the checkpoint"
                    )
                if targets is None:
                    nll = math.nan
                else:
                    observed = _observed(log_p, targets)
                    nll -= float(observed.double().sum())
                    log_p = observed.clone() if self.printed_form else log_p
                fits = fits and self._total_n_bytes(log_p) <= cache_n_bytes
                if fits:
                    self._cache.append(log_p)
        if not fits:
            self._cache = []
        if math.isinf(nll):
            raise InputError(
                "the model's log-probabilities are not finite", todo="check the checkpoint"
            )
        return nll / self.n_rows

    def _total_n_bytes(self, rows: torch.Tensor) -> int:
        return rows.element_size() * self._n_judged * (rows.numel() // len(rows))

    def _log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 of what enters the output stage."""
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
    def measure(
        self, mats: Mats, biases: Optional[Mapping[str, torch.Tensor]] = None
    ) -> Tuple[float, float]:
        """(harm, standard error) in nats per row with the weights of some clusters replaced.

        ``biases``: parameters that stay float and change with them, by name.

        The standard error takes sentences as independent, tokens of one sentence not (ratio
        estimator; Cochran, Sampling Techniques, eq. 6.13); nan for a single sentence.
        """
        fp = {name: [m.clone() for m in self.weights.mats(name)] for name in mats}
        parameters = dict(self.judged.module.named_parameters())
        biases = biases or {}
        fp_biases = {name: parameters[name].detach().clone() for name in biases}

        def write(clusters: Mats, others: Mapping[str, torch.Tensor]) -> None:
            for name, values in clusters.items():
                self.weights.set(name, values)
            for name, value in others.items():
                parameters[name].copy_(value)

        start = min(self._stages.first[name] for name in mats) if self._keeps and mats else 0
        sums, counts = [], []
        with self.judged.evaluating():
            entering = self._entering(start)
            try:
                write(mats, biases)
                for k, batch in enumerate(self._batches):
                    inputs = batch.inputs
                    if self._cache:
                        log_p = self._cache[k]
                    else:
                        write(fp, fp_biases)
                        log_p = self._log_probs(batch.rows(self._stages.run(inputs, inputs)))
                        write(mats, biases)
                    hidden = batch.rows(self._stages.run(entering[k], inputs, start))
                    per_row = self._divergence(log_p, hidden, batch.row_targets).double()
                    n_sentences, sentence = len(batch.mask), batch.sentence
                    if batch.weights is not None:
                        per_row = per_row * batch.row_weights
                    zeros = per_row.new_zeros(n_sentences)
                    sums += zeros.index_add(0, sentence, per_row).tolist()
                    counts += zeros.index_add(0, sentence, batch.row_counts).tolist()
            finally:
                write(fp, fp_biases)
        return ratio_of_sums(sums, counts)

    def _divergence(
        self, log_p: torch.Tensor, hidden: torch.Tensor, targets: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Harm of every row (N,): fp log-probabilities (N, V), or (N,) in the printed form, against
        the model's as it is now, from what enters its output stage (N, H)."""
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

    def entry(self, name: str, spec: ClusterSpec, scale_dtype: str = "float16") -> Entry:
        """The sensitivity of one cluster quantized as ``spec`` says, all else fp."""
        mats, biases = [m.float().cpu() for m in self.weights.mats(name)], None
        if self.rounder is None:
            dtype = SCALE_DTYPES[scale_dtype]
            values = project_cluster(mats, spec, method="mse", scale_dtype=dtype).values
        else:
            rounded = self.rounder.round_one(name, spec, scale_dtype)
            values, biases = [m.cpu() for m in rounded.mats[name]], rounded.biases
        harm, stderr = self.measure({name: values}, biases)
        return Entry(harm, stderr, relative_error(mats, values))


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


def _observed(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, targets[:, None])[:, 0]
