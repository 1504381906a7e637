"""Rounds the clusters of a model: one alone, or all, each after those whose outputs enter it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.plan import Plan
from espnet_mpq.quant.covariance import Covariance
from espnet_mpq.quant.fake_quant import ClusterProjection, project_clusters
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.quant.second_order import Joined, mean_shift, round_cluster
from espnet_mpq.quant.spec import ClusterSpec
from espnet_mpq.rounding.embedding import OUTPUT_ROWS, embedding_covariance
from espnet_mpq.rounding.inputs import Input, Moments, Owners, Watch
from espnet_mpq.sensitivity.judged import Judged

Piece = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]


@dataclass
class Rounded:
    """What rounding makes of a model.

    Attributes:
        mats: cluster -> float32 (rows, cols) per part, on the grid of its spec.
        biases: parameter -> its new value (rows,), so that the mean outputs stay.
        errors: cluster -> (output error, that of plain rounding), summed over its inputs.
    """

    mats: Dict[str, List[torch.Tensor]] = field(default_factory=dict)
    biases: Dict[str, torch.Tensor] = field(default_factory=dict)
    errors: Dict[str, Tuple[float, float]] = field(default_factory=dict)


class Rounder:
    """Second-order rounding of a model by what enters its matrices on some sentences.

    Args:
        judged: the model, its stages and the sentences; a recurrent layer must be a stage of its
            own. In eval mode while a method runs, and as it was when the method returns.
        weights: of the model's clusters, float.

    Raises:
        InputError: no token.
    """

    def __init__(self, judged: Judged, weights: ClusterWeights):
        if not judged.n_rows:
            raise InputError("no token to round with", todo="give a text with sentences")
        self.judged, self.weights = judged, weights
        self.parameters = dict(judged.module.named_parameters())
        self.owners = Owners(judged.module)
        self._last = len(judged.stages.layers)
        self._kept = 0, self._inputs()  # fp activations that enter a stage
        self._moments: Dict[Input, Moments] = {}  # of that stage, all else fp
        self._found: Dict[int, List[Input]] = {}
        self._embeddings: Dict[str, torch.Tensor] = {}
        self._fp: Dict[str, torch.Tensor] = {}  # all parameters, while some are changed

    @torch.no_grad()
    def round_one(self, name: str, spec: ClusterSpec, scale_dtype: str = "float16") -> Rounded:
        """The cluster as round_all rounds it where all others stay float.

        Clusters asked for in the order of their stages cost one pass for all of them.
        """
        stage = self.judged.stages.first[name]
        with self._changing():
            if self._kept[0] != stage:
                self._moments = {}
            at, xs = self._kept if self._kept[0] <= stage else (0, self._inputs())
            for k in range(at, stage):
                xs = self._next(k, xs)
            self._kept = stage, xs
            run = _Run(self, Plan({name: spec}, scale_dtype))
            run.stage(stage, xs, self._moments)
            if self._is_tied(name):
                for k in range(stage, self._last):
                    xs = self._next(k, xs)
                run.stage(self._last, xs)
        return run.rounded

    @torch.no_grad()
    def round_all(self, plan: Plan) -> Rounded:
        """All clusters of the plan, in the order of the stages and of the inputs within them.

        What enters a matrix comes from the part that is rounded already; the matrix is changed
        first so that its outputs come as near as they can to those of the float model, then
        rounded.
        """
        with self._changing():
            run, xs = _Run(self, plan), self._inputs()
            fs = xs  # the same in the float model
            for k in range(self._last):
                run.stage(k, xs, fs=fs)
                xs = self._next(k, xs)
                with self._float():
                    fs = self._next(k, fs)
            run.stage(self._last, xs, fs=fs)
        return run.rounded

    def inputs(self, stage: int, xs: Sequence[torch.Tensor]) -> List[Input]:
        """The inputs of a stage, in the order of their use; ``xs`` enter the stage."""
        if stage not in self._found:
            x, inputs, _ = next(self._pieces(stage, xs))
            self._found[stage] = self._watch(stage).find(x, inputs)
        return self._found[stage]

    def measure(
        self,
        stage: int,
        wanted: Input,
        xs: Sequence[torch.Tensor],
        fs: Optional[Sequence[torch.Tensor]] = None,
    ) -> Moments:
        """Moments of one input of a stage with the model as it is now.

        ``fs`` enter the stage in the float model; None: the float model is what it is now.
        """
        moments, watch = Moments(), self._watch(stage)
        fp_pieces = self._pieces(stage, xs if fs is None else fs)
        for piece, (f, inputs, mask) in zip(self._pieces(stage, xs), fp_pieces):
            rows, fp_rows = watch.rows(wanted, *piece), None
            if fs is not None:
                with self._float():
                    fp_rows = watch.rows(wanted, f, inputs, mask)
            moments.add(rows, fp_rows)
        return moments

    def embedding_covariance(self, parameter: str) -> torch.Tensor:
        """See rounding.embedding; of the model as it is at the first call, which is float."""
        if parameter not in self._embeddings:
            found = embedding_covariance(self.judged, self.owners, parameter)
            self._embeddings[parameter] = found
        return self._embeddings[parameter]

    def n_reads(self, n_rows: int) -> torch.Tensor:
        """(n_rows,) float64: how often every token is read."""
        counts = torch.zeros(n_rows, dtype=torch.float64, device=self.weights.device)
        for batch in self.judged.batches:
            counts += torch.bincount(batch.inputs[batch.mask], minlength=n_rows)
        return counts

    def _is_tied(self, name: str) -> bool:
        """Whether the cluster is an embedding and the output matrix at once."""
        embeddings = self.owners.modules(torch.nn.Embedding)
        read = {self.owners.names[module]["weight"] for module in embeddings}
        own = {part.parameter for part in self.weights.clusters[name].parts}
        return any(self.owners.is_output_too(parameter) for parameter in own & read)

    def _pieces(self, stage: int, xs: Sequence[torch.Tensor]) -> Iterator[Piece]:
        """(x, inputs, mask) that enter a stage; mask None where all positions of x count."""
        for x, batch in zip(xs, self.judged.batches):
            if stage < self._last:
                yield x, batch.inputs, batch.mask
            else:
                for rows in batch.rows(x).split(OUTPUT_ROWS):
                    yield rows, batch.inputs, None

    def _watch(self, stage: int) -> Watch:
        stages = self.judged.stages
        if stage == self._last:
            return Watch(lambda x, inputs: stages.output(x), self.owners)
        own = [c for c in self.weights.clusters.values() if stages.first[c.name] == stage]
        names = [part.parameter for cluster in own for part in cluster.parts]
        return Watch(stages.layers[stage], self.owners, names)

    def _inputs(self) -> List[torch.Tensor]:
        return [batch.inputs for batch in self.judged.batches]

    def _next(self, stage: int, xs: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        layer = self.judged.stages.layers[stage]
        return [layer(x, inputs) for x, inputs in zip(xs, self._inputs())]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """In eval mode; afterwards the weights are what they were."""
        self._fp = {name: p.detach().clone() for name, p in self.parameters.items()}
        with self.judged.evaluating():
            try:
                yield
            finally:
                self._load(self._fp)
                self._fp = {}

    @contextlib.contextmanager
    def _float(self) -> Iterator[None]:
        """The float model, while another one is being made of it."""
        changed = {
            name: p.detach().clone()
            for name, p in self.parameters.items()
            if not torch.equal(p, self._fp[name])
        }
        self._load({name: self._fp[name] for name in changed})
        yield
        self._load(changed)

    @torch.no_grad()
    def _load(self, values: Dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)


class _Run:
    """One way through the stages: rounds the clusters of a plan and writes them into the model."""

    def __init__(self, rounder: Rounder, plan: Plan):
        self.rounder, self.plan, self.rounded = rounder, plan, Rounded()
        weights = rounder.weights
        self.fp = {n: [m.float().clone() for m in weights.mats(n)] for n in plan.clusters}
        self.dtype = SCALE_DTYPES[plan.scale_dtype]
        self.plain = project_clusters(self.fp, plan.clusters, scale_dtype=self.dtype)
        self.done: Dict[str, set] = {name: set() for name in plan.clusters}

    def stage(
        self, stage: int, xs, moments: Optional[Dict[Input, Moments]] = None, fs=None
    ) -> None:
        """Round what the stage uses; xs enter it, and fs in the float model (None: the same).

        ``moments`` keeps those of its inputs for other runs.
        """
        rounder, moments = self.rounder, {} if moments is None else moments
        for found in rounder.inputs(stage, xs):
            users = [name for name in self.plan.clusters if self._uses(name, found)]
            if users and found.kind != "embedding" and found not in moments:
                moments[found] = rounder.measure(stage, found, xs, fs)
            for name in users:
                uses = self._uses(name, found)
                todo = [use for use in uses if use[0] not in self.done[name]]
                if todo:
                    self._round(name, todo, found, moments.get(found))
                if found in moments:
                    for use in uses:
                        self._shift(name, use, moments[found])

    def _uses(self, name: str, found: Input) -> List[List[int]]:
        """The parts of a cluster that an input enters; those side by side in one list."""
        parts = self.rounder.weights.clusters[name].parts
        place = {part.parameter: k for k, part in enumerate(parts)}
        uses = [[place[p] for p in use if p in place] for use in found.uses]
        return [use for use in uses if use]

    def _round(self, name: str, uses, found: Input, measured: Optional[Moments]) -> None:
        """Round float parts of a cluster that an input enters."""
        spec, plain, counts = self.plan.clusters[name], self.plain[name], None
        parts = [k for use in uses for k in use]
        mats = [self.fp[name][k] for k in parts]
        correction = None
        if measured is None:
            covariance = Covariance(self.rounder.embedding_covariance(found.names[0]))
            counts = self.rounder.n_reads(len(mats[0]))
        else:
            has_bias = self.rounder.owners.bias_of(found.names[0]) is not None
            covariance = Covariance(measured.covariance(has_bias))
            correction = measured.correction(has_bias)
        place = {k: i for i, k in enumerate(parts)}
        uses = [tuple(place[k] for k in use) for use in uses]  # places among ``parts``
        if correction is not None:
            for use in uses:
                joined = torch.cat([mats[i] for i in use], 1).double()
                moved = (joined + joined @ correction).float()
                pieces = moved.split([mats[i].shape[1] for i in use], 1)
                for i, piece in zip(use, pieces):
                    mats[i] = piece.contiguous()
        values = [plain.values[k] for k in parts]
        if spec.is_coded:
            joined = [Joined(use, covariance, counts) for use in uses]
            kept = ([of[k] for k in parts] for of in (plain.values, plain.scales, plain.codes))
            is_shared = spec.tying in ("model", "cluster")
            is_alone = spec.tying == "cluster" and len(parts) == len(plain.values)
            values = round_cluster(
                mats,
                spec,
                joined,
                scale_dtype=self.dtype,
                start=ClusterProjection(*kept),
                fit_scales=is_alone or not is_shared,
            ).values
        mine = self.rounded.mats.setdefault(name, list(plain.values))
        for k, value in zip(parts, values):
            mine[k] = value
        self.done[name].update(parts)
        rest = self.fp[name]
        now = [mine[k] if k in self.done[name] else rest[k] for k in range(len(rest))]
        self.rounder.weights.set(name, now)
        errors = [0.0, 0.0]
        for use in uses:
            for i, other in enumerate((values, [plain.values[k] for k in parts])):
                difference = torch.cat([mats[k] - other[k] for k in use], 1)
                errors[i] += float(covariance.error(difference).sum())
        before = self.rounded.errors.get(name, (0.0, 0.0))
        self.rounded.errors[name] = before[0] + errors[0], before[1] + errors[1]

    def _shift(self, name: str, use: List[int], measured: Moments) -> None:
        """Let the bias keep the mean output of the rows of some parts side by side."""
        parts = [self.rounder.weights.clusters[name].parts[k] for k in use]
        bias = self.rounder.owners.bias_of(parts[0].parameter)
        if bias is None:
            return
        cols = [part.cols for part in parts]
        fp_means, means = measured.fp_mean.split(cols), measured.mean.split(cols)
        mats, values = ([of[name][k] for k in use] for of in (self.fp, self.rounded.mats))
        target = self.rounder.parameters[bias]
        target[parts[0].start : parts[0].stop] += mean_shift(mats, values, fp_means, means)
        self.rounded.biases[bias] = target.detach().clone()
