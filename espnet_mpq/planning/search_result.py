"""What a trained super-network found: its table of -ln p, and the one-best plan in words."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Tuple

import torch

from espnet_mpq.bin.options import provenance
from espnet_mpq.clusters import find_clusters, get_mats
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
from espnet_mpq.io import token_list_sha256
from espnet_mpq.planning.planner import Planner
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.kl import relative_mse
from espnet_mpq.sensitivity.table import Entry, SensitivityTable

KL_TOKENS = 10000  # on which mpq plan measures the joint KL


def open_search(folder: Path) -> Tuple[object, Path]:
    """The super-network of an experiment, and the checkpoint whose architecture counts.

    Raises:
        InputError: the experiment is none of a search, or has only its first phase.
    """
    best = folder / "valid.nas_loss.best.pth"
    opened = load_fp_lm(folder, str(best.resolve()) if best.exists() else None)
    if getattr(opened.lm, "nas", None) is None:
        raise InputError(
            f"{folder} is no search of bits",
            found=f"lm: {opened.args.lm}",
            expected="lm: mpq_nas_seq_rnn or mpq_nas_transformer",
        )
    if opened.lm.nas.options.phase == "weights":
        raise InputError(
            f"{folder} is the first phase of a search, without an architecture",
            todo="train the second phase with train_lm_nas.yaml",
        )
    return opened.lm, opened.checkpoint


def make_table(args: argparse.Namespace, exp, lm, checkpoint: Path) -> SensitivityTable:
    """The table of method nas: harm = -ln p of every cluster's bit-widths, without error.

    ``args`` are those of `mpq nas`. The provenance says in ``nas`` what the options were, which
    plan is the most probable, and whether it fits the budget.

    Raises:
        MismatchError: the search was for an LM of another shape than ``exp``.
    """
    options, clusters = lm.nas.options, find_clusters(exp.lm)
    shapes = [(c.name, [part.shape for part in c.parts]) for c in clusters]
    theirs = [(n, [p.shape for p in c.parts]) for n, c in lm.candidates.clusters.items()]
    if shapes != theirs:
        raise MismatchError(
            f"{checkpoint} is the search of another LM than {exp.checkpoint}",
            found=str(theirs)[:80],
            expected=str(shapes)[:80],
        )
    planner = Planner(exp, None, None, options.grid, options.tying, options.group_size)
    planner.scale_dtype = options.scale_dtype
    best = lm.nas.one_best()
    size = planner.size(best)
    files = {"config": exp.config, "checkpoint": exp.checkpoint, "text": args.text}
    record = provenance(args, {**files, "search": checkpoint})
    record.update(
        checkpoint_sha256=record["inputs"]["checkpoint"]["sha256"],
        token_list_sha256=token_list_sha256(exp.token_list),
        text_sha256=record["inputs"]["text"]["sha256"],
        text_format=args.text_format,
        max_tokens=KL_TOKENS,
        seed=args.seed,
        grid=options.grid,
        tying=options.tying,
        group_size=options.group_size,
        scale_dtype=options.scale_dtype,
        clusters=[cluster.name for cluster in clusters],
        bits=list(options.bits),
        nas={
            **options.to_dict(),
            "one_best": best,
            "one_best_n_bytes": size.n_bytes,
            "one_best_effective_bits": size.effective_bits,
            "budget_n_bytes": lm.nas.budget_n_bytes,
            "fits_budget": size.n_bytes <= lm.nas.budget_n_bytes,
        },
    )
    table = SensitivityTable(record, "nas")
    with torch.no_grad():
        log_p = torch.log_softmax(lm.nas.rows().double(), dim=-1).tolist()
    specs, dtype = options.specs(), getattr(torch, options.scale_dtype)
    for cluster, row in zip(clusters, log_p):
        mats = get_mats(exp.lm, cluster)
        for bits, value in zip(options.bits, row):
            values = project_cluster(mats, specs[bits], scale_dtype=dtype).values
            # A choice, not an estimate: no standard error.
            entry = Entry(max(0.0, -value), math.nan, relative_mse(mats, values))
            table.add(cluster.name, bits, entry)
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
