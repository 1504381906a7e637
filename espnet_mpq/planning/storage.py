"""Storage: what all specs of a plan share besides their bits, and whether a table is for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence

from espnet_mpq.clusters import Cluster
from espnet_mpq.errors import InputError, MismatchError, PlanError, near_matches
from espnet_mpq.quant.spec import ClusterSpec
from espnet_mpq.sensitivity.table import SensitivityTable


@dataclass(frozen=True)
class Storage:
    """Grid, scale tying and dtype of the scales, as quant.spec.ClusterSpec and plan.Plan."""

    grid: str = "uniform"
    tying: str = "row"
    group_size: Optional[int] = None
    scale_dtype: str = "float16"

    def spec(self, bits: int) -> ClusterSpec:
        return ClusterSpec(bits, self.grid, self.tying, self.group_size)


def storage_of(
    table: SensitivityTable,
    path: str,
    asked: Mapping[str, object],
    identity: Mapping[str, str],
    clusters: Sequence[Cluster],
    remake: str,
) -> Storage:
    """The storage that ``table`` was measured for, once it is known to fit.

    Args:
        path: of the table, for messages.
        asked: grid, tying, group_size that the user gave, None for "as the table".
        identity: token_list_sha256 and checkpoint_sha256 of the model.
        clusters: of the model.
        remake: the command that makes the table of this model.

    Raises:
        MismatchError: a table of another model or storage; PlanError: unknown clusters or bits;
        InputError: entries are missing.
    """
    record = table.provenance
    pairs = [*identity.items(), *((k, v) for k, v in asked.items() if v is not None)]
    for key, here in pairs:
        if record.get(key) != here:
            raise MismatchError(
                f"{path} and this model do not belong together: {key}",
                found=repr(record.get(key)),
                expected=repr(here),
                todo=f"make the table of this model: {remake}",
            )
    _check_entries(table, path, [cluster.name for cluster in clusters])
    storage: Dict[str, object] = {key: record.get(key) for key in asked}
    storage["scale_dtype"] = record.get("scale_dtype")
    return Storage(**{key: value for key, value in storage.items() if value is not None})


def _check_entries(table: SensitivityTable, path: str, known: List[str]) -> None:
    for name in table.entries:
        if name not in known:
            todo = near_matches(name, known)
            raise PlanError(f"{path}: unknown cluster", found=repr(name), todo=todo)
    bits = table.provenance.get("bits")
    bits = bits or sorted({b for row in table.entries.values() for b in row})
    missing = [name for name in known if name not in table.entries]
    missing += [f"{c} at {b} bits" for c, b in table.missing(known, bits)]
    if missing:
        raise InputError(
            f"{path} is not complete",
            found="no " + ", ".join(missing[:4]),
            todo="run mpq sensitivity again, it goes on where it stopped (or --merge the jobs)",
        )
    for name, row in table.entries.items():
        for b in row:
            ClusterSpec(b).check(f"{name} of {path}")
