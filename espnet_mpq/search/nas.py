"""Bit-widths as a softmax: the probabilities of every cluster's candidates under a byte budget."""

from __future__ import annotations

from typing import Dict, Mapping, Optional, Sequence, Union

import torch

from espnet_mpq.clusters import Cluster
from espnet_mpq.errors import InputError
from espnet_mpq.plan import cluster_n_bytes
from espnet_mpq.search.nas_options import NasOptions

Draw = Dict[str, Union[int, torch.Tensor]]  # cluster -> bits, or weights of the candidates


class Mixture(torch.nn.Module):
    """The architecture: one logit per cluster and candidate, and what the candidates cost.

    In train mode a draw gives every cluster weights over its candidates that sum to one
    (phase "weights": one candidate, uniformly at random); in eval mode its most probable one.

    Args:
        clusters: of the LM.
        options: NasOptions.
        fixed_n_bytes: bytes of the packed file besides the clusters' codes and scales.
        budget_n_bytes: of the whole file; None: none (phase "weights").

    Attributes:
        logits: float32 (n_clusters * n_bits,), cluster by cluster.
        n_bytes: float64 (n_clusters, n_bits), plan.cluster_n_bytes of every candidate.
        temperature: T of relaxed draws and of `expected_n_bytes`.

    Raises:
        InputError: not even the smallest choice fits the budget.

    Source: DARTS over bit-widths, Xu et al. 2021 (arXiv 2112.11438, section IV); Gumbel-softmax
    and the two phases from arXiv 2206.11643.
    """

    def __init__(
        self,
        clusters: Sequence[Cluster],
        options: NasOptions,
        fixed_n_bytes: int,
        budget_n_bytes: Optional[int],
    ):
        super().__init__()
        self.options = options
        self.names = [cluster.name for cluster in clusters]
        self.fixed_n_bytes = fixed_n_bytes
        table = [
            [cluster_n_bytes(c, s, options.scale_dtype) for s in options.specs().values()]
            for c in clusters
        ]
        self.register_buffer("n_bytes", torch.tensor(table, dtype=torch.float64), persistent=False)
        self.logits = torch.nn.Parameter(torch.zeros(len(self.names) * len(options.bits)))
        self.temperature = options.temperature
        least = fixed_n_bytes + sum(map(min, table))
        uniform = [fixed_n_bytes + sum(row[n] for row in table) for n in range(len(options.bits))]
        self.budget_n_bytes = max(uniform) if budget_n_bytes is None else budget_n_bytes
        if self.budget_n_bytes < least:
            raise InputError(
                "the budget is too small for this LM (header, scales and biases count)",
                found=f"{budget_n_bytes} bytes",
                expected=f"at least {least} bytes",
            )
        fitting = [b for b, size in zip(options.bits, uniform) if size <= self.budget_n_bytes]
        self.start_bits = fitting[-1] if fitting else options.bits[0]
        if budget_n_bytes is None:
            self.start_bits = options.bits[(len(options.bits) - 1) // 2]

    def _apply(self, function, *args, **kwargs):
        # Bytes stay float64, whatever .half() or .to(dtype) make of the LM.
        n_bytes = self.n_bytes
        super()._apply(function, *args, **kwargs)
        self.n_bytes = n_bytes.to(self.logits.device)
        return self

    def rows(self) -> torch.Tensor:
        """The logits as (n_clusters, n_bits)."""
        return self.logits.view(len(self.names), len(self.options.bits))

    def probabilities(self, temperature: float = 1.0) -> torch.Tensor:
        """softmax(a / T), (n_clusters, n_bits)."""
        return torch.softmax(self.rows() / temperature, dim=-1)

    def draw(self) -> Draw:
        """Cluster -> weights of its candidates (n_bits,), or the bits of the only one."""
        if not self.training:
            return self.one_best()
        shape = (len(self.names), len(self.options.bits))
        if self.options.phase == "weights":
            chosen = torch.randint(shape[1], shape[:1]).tolist()
            return {name: self.options.bits[k] for name, k in zip(self.names, chosen)}
        rows = self.rows()
        if self.options.relaxation == "gumbel":
            # Drawn on the CPU: the same numbers whatever the device.
            rows = rows - torch.empty(shape).exponential_().log().to(rows)
        return dict(zip(self.names, torch.softmax(rows / self.temperature, dim=-1)))

    def one_best(self) -> Dict[str, int]:
        """Cluster -> its most probable bits.

        Equal logits, as before any update: the largest bits that fit the budget when all
        clusters have them; without a budget the middle one of the candidates.
        """
        best = {}
        for name, row in zip(self.names, self.rows().tolist()):
            ranked = [(a, b == self.start_bits, b) for a, b in zip(row, self.options.bits)]
            best[name] = max(ranked)[2]
        return best

    @torch.no_grad()
    def hold(self, before: torch.Tensor) -> None:
        """Take back what carried the one-best plan from within the budget to above it.

        Clusters that grew get their logits of ``before`` (a clone of ``logits``) back, so the
        plan is no larger than it was.
        """
        after, best = self.logits.clone(), self.one_best()
        self.logits.copy_(before)
        old = self.one_best()
        fitted = self.choice_n_bytes(old) <= self.budget_n_bytes
        self.logits.copy_(after)
        if fitted and self.choice_n_bytes(best) > self.budget_n_bytes:
            grown = torch.tensor([best[name] > old[name] for name in self.names])
            kept = grown.repeat_interleave(len(self.options.bits)).to(after.device)
            self.logits.copy_(torch.where(kept, before, after))

    def choice_n_bytes(self, choice: Mapping[str, int]) -> int:
        """Bytes of the whole file for a choice of bits."""
        columns = [self.options.bits.index(choice[name]) for name in self.names]
        own = self.n_bytes[torch.arange(len(columns)), torch.tensor(columns)]
        return self.fixed_n_bytes + int(own.sum())

    def expected_n_bytes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Bytes of the whole file, expected under (n_clusters, n_bits); float64 scalar."""
        return self.fixed_n_bytes + (probabilities.double() * self.n_bytes).sum()

    def overshoot(self, n_bytes):
        """(bytes - budget) / (budget - what cannot be saved); 0.1: ten per cent too large."""
        least = self.fixed_n_bytes + float(self.n_bytes.min(dim=1)[0].sum())
        # A budget at the very minimum still needs a scale.
        scale = max(self.budget_n_bytes - least, 0.1 * (self.budget_n_bytes - self.fixed_n_bytes))
        return (n_bytes - self.budget_n_bytes) / max(scale, 1.0)


class Penalty:
    """What size adds to the loss, in nats.

    "budget": the augmented Lagrangian of expected bytes <= budget,
        max(0, m + rho g)^2 / (2 rho), g = overshoot of the bytes expected at softmax(a / T).
    The multiplier m follows g (dual ascent), so no weight needs to be swept. As T falls the
    expectation tends to the bytes of the one-best plan. In the last epochs m gets a boost that
    grows until that plan itself fits; then Mixture.hold keeps it within the budget.
    "paper": beta * sum p sqrt(bits), p = softmax(a).

    Source: "paper" is Xu et al. 2021 with probabilities for logits; "budget" is own.
    """

    GROWTH, LEAST = 1.2, 0.1  # of the boost per update; overshoot it reckons with at least

    def __init__(self, mixture: Mixture):
        self.mixture, self.options = mixture, mixture.options
        self.multiplier = self.boost = 0.0

    def __call__(self) -> torch.Tensor:
        """Scalar that carries the gradient to the logits."""
        mixture, options = self.mixture, self.options
        if options.penalty == "paper":
            roots = torch.tensor(options.bits).sqrt().to(mixture.logits)
            return options.beta * (mixture.probabilities() * roots).sum()
        expected = mixture.expected_n_bytes(mixture.probabilities(mixture.temperature))
        force = self.multiplier + self.boost + options.rho * mixture.overshoot(expected)
        return force.clamp(min=0.0).square() / (2 * options.rho)

    @torch.no_grad()
    def update(self, settling: bool = False) -> None:
        """One step of the multiplier, after one of the logits."""
        mixture = self.mixture
        if self.options.penalty == "paper":
            return
        rate = self.options.multiplier_rate * self.options.rho
        expected = mixture.expected_n_bytes(mixture.probabilities(mixture.temperature))
        overshoot = float(mixture.overshoot(expected))
        self.multiplier = max(0.0, self.multiplier + rate * overshoot)
        over = mixture.overshoot(mixture.choice_n_bytes(mixture.one_best()))
        if settling and over > 0:
            self.boost = self.GROWTH * (self.boost + rate * max(over, self.LEAST))
        else:
            self.boost = 0.0
