"""What a trained super-network found: its table of -ln p, and the one-best plan in words."""

from __future__ import annotations

import math

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import MismatchError
from espnet_mpq.packed.size import packed_size
from espnet_mpq.planning.planner import Planner
from espnet_mpq.planning.storage import Storage
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.search.candidates import Candidates
from espnet_mpq.search.nas import Mixture
from espnet_mpq.sensitivity.table import Entry, SensitivityTable


def make_table(
    mixture: Mixture,
    candidates: Candidates,
    architecture: Architecture,
    weights: ClusterWeights,
    record: dict,
) -> SensitivityTable:
    """The table of method nas: harm = -ln p of every cluster's bit-widths, without error.

    Args:
        mixture, candidates: of the trained super-network.
        architecture, weights: of the fp model that the table is for.
        record: provenance; ``clusters`` and ``nas`` are added: what the options were, which plan
            is the most probable, and whether it fits the budget.

    Raises:
        MismatchError: the search was for a model of another shape.
    """
    options = mixture.options
    shapes = [(n, [part.shape for part in c.parts]) for n, c in weights.clusters.items()]
    theirs = [(n, [part.shape for part in c.parts]) for n, c in candidates.clusters.items()]
    if shapes != theirs:
        inputs = record.get("inputs", {})
        search, fp = (inputs.get(role, {}).get("path") for role in ("search", "checkpoint"))
        raise MismatchError(
            f"{search} is the search of another LM than {fp}",
            found=str(theirs)[:80],
            expected=str(shapes)[:80],
        )
    storage = Storage(options.grid, options.tying, options.group_size, options.scale_dtype)
    best = mixture.one_best()
    size = packed_size(architecture, Planner(architecture, storage).plan(best))
    found = {
        **options.to_dict(),
        "one_best": best,
        "one_best_n_bytes": size.n_bytes,
        "one_best_effective_bits": size.effective_bits,
        "budget_n_bytes": mixture.budget_n_bytes,
        "fits_budget": size.n_bytes <= mixture.budget_n_bytes,
    }
    table = SensitivityTable({**record, "clusters": list(weights.clusters), "nas": found}, "nas")
    with torch.no_grad():
        log_p = torch.log_softmax(mixture.rows().double(), dim=-1).tolist()
    dtype = SCALE_DTYPES[options.scale_dtype]
    for name, row in zip(weights.clusters, log_p):
        mats = weights.mats(name)
        for bits, value in zip(options.bits, row):
            values = project_cluster(mats, storage.spec(bits), scale_dtype=dtype).values
            # A choice, not an estimate: no standard error.
            entry = Entry(max(0.0, -value), math.nan, relative_error(mats, values))
            table.add(name, bits, entry)
    return table


def format_result(table: SensitivityTable) -> str:
    """The one-best plan and the probabilities it comes from."""
    found, columns = table.provenance["nas"], table.provenance["bits"]
    width = max(len("cluster"), *map(len, table.entries))
    lines = [f"{'cluster':<{width}} bits" + "".join(f"{f'p({b})':>8}" for b in columns)]
    for name, row in table.entries.items():
        p = "".join(f"{math.exp(-row[b].harm):>8.3f}" for b in columns)
        lines.append(f"{name:<{width}} {found['one_best'][name]:>4}{p}")
    n_bytes, budget = found["one_best_n_bytes"], found["budget_n_bytes"]
    if found["fits_budget"]:
        verdict = f"within the budget of {budget:,} bytes by itself"
    else:
        verdict = (
            f"{n_bytes - budget:,} bytes above the budget of {budget:,}: mpq plan takes the most"
            " probable plan that fits"
        )
    effective_bits = found["one_best_effective_bits"]
    lines.append(
        f"one-best plan: {n_bytes:,} bytes, {effective_bits:.4f} effective bits, {verdict}"
    )
    return "\n".join(lines)
