"""The sensitivity table: cluster x bits -> predicted harm with standard error, as a JSON file."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import FormatError, InputError, MismatchError
from espnet_mpq.io import read_json, write_json
from espnet_mpq.plan import GRIDS, SCALE_N_BYTES, TYINGS

FORMAT = "espnet_mpq.sensitivity"
VERSION = 1
METHODS = ("kl", "kl_printed")
# What two runs must share for their entries to stand in one table.
IDENTITY = (
    "checkpoint_sha256",
    "token_list_sha256",
    "text_sha256",
    "text_format",
    "max_tokens",
    "seed",
    "grid",
    "tying",
    "group_size",
    "scale_dtype",
)
# What a difference in one of them means.
WORDS = {
    "method": "measured with another form of the KL",
    "checkpoint_sha256": "made from another checkpoint",
    "token_list_sha256": "made with another token list",
    "text_sha256": "measured on another text",
    "text_format": "the text was read in another format",
    "max_tokens": "measured on another number of tokens",
    "seed": "measured on another sample of sentences",
    "grid": "made for another grid",
    "tying": "made for another tying of scales",
    "group_size": "made for another group size",
    "scale_dtype": "made for scales of another type",
}
# A KL divergence is at least 0; this much below is rounding.
LEAST_KL = -1e-6


@dataclasses.dataclass(frozen=True)
class Entry:
    """Harm of one cluster at one bit-width.

    harm in nats/token; stderr its standard error (nan: one sentence only);
    relative_mse = ||w - q||^2 / ||w||^2 of the cluster's weights.
    """

    harm: float
    stderr: float
    relative_mse: float


@dataclasses.dataclass
class SensitivityTable:
    """Entries by cluster and bits, and what they were measured on (``provenance``)."""

    provenance: dict
    method: str = "kl"
    entries: Dict[str, Dict[int, Entry]] = dataclasses.field(default_factory=dict)

    def add(self, cluster: str, bits: int, entry: Entry) -> None:
        self.entries.setdefault(cluster, {})[bits] = entry

    def has(self, cluster: str, bits: int) -> bool:
        return bits in self.entries.get(cluster, {})

    def missing(self, clusters: Iterable[str], bits: Iterable[int]) -> List[Tuple[str, int]]:
        """(cluster, bits) pairs without an entry, cluster by cluster."""
        bits = list(bits)
        return [(c, b) for c in clusters for b in bits if not self.has(c, b)]

    def harm(self) -> Dict[str, Dict[int, float]]:
        """Cluster -> bits -> harm, as allocate takes it."""
        return {c: {b: e.harm for b, e in row.items()} for c, row in self.entries.items()}

    def to_dict(self) -> dict:
        entries = {}
        for cluster, row in self.entries.items():
            entries[cluster] = {
                # JSON has no nan.
                str(b): {k: v if math.isfinite(v) else None for k, v in vars(row[b]).items()}
                for b in sorted(row)
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "unit": "nats/token",
            "entries": entries,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, value: Mapping, where: str = "sensitivity table") -> "SensitivityTable":
        """Read the JSON form; raises FormatError for anything else."""
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise FormatError(
                f"{where} is not a sensitivity table",
                expected=f'"format": "{FORMAT}"',
                todo="make it with `mpq sensitivity`",
            )
        if value.get("version") != VERSION:
            raise FormatError(
                f"{where} has an unknown version", found=value.get("version"), expected=VERSION
            )
        if not _is_in(METHODS)(value.get("method")):
            raise FormatError(
                f"{where} has an unknown method",
                found=repr(value.get("method")),
                expected="one of " + ", ".join(METHODS),
            )
        provenance = {} if value.get("provenance") is None else value["provenance"]
        _check_provenance(provenance, where)
        table = cls(dict(provenance), value["method"])
        try:
            for cluster, row in value["entries"].items():
                for bits, entry in row.items():
                    numbers = {k: math.nan if v is None else float(v) for k, v in entry.items()}
                    if not math.isfinite(numbers["harm"]):
                        raise ValueError(f"harm of {cluster} at {bits} bits is not a number")
                    if table.method == "kl" and numbers["harm"] < LEAST_KL:
                        raise ValueError(
                            f"harm {numbers['harm']:g} of {cluster} at {bits} bits: a KL divergence"
                            " is not negative"
                        )
                    table.add(str(cluster), int(bits), Entry(**numbers))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(
                f"{where} has a malformed entry",
                found=error,
                todo="make it again with `mpq sensitivity`",
            ) from error
        return table

    @classmethod
    def read(cls, path: Union[str, Path]) -> "SensitivityTable":
        """Read a table file; raises InputError (unreadable) or FormatError."""
        return cls.from_dict(read_json(path), str(path))

    def write(self, path: Union[str, Path]) -> None:
        """Write the table atomically."""
        write_json(path, self.to_dict())

    def check_same_source(self, other: "SensitivityTable", here: str, there: str) -> None:
        """Raise MismatchError, with both values, unless both tables were measured alike.

        ``here`` and ``there`` name this table and the other one.
        """
        pairs = [("method", self.method, other.method)]
        pairs += [(k, self.provenance.get(k), other.provenance.get(k)) for k in IDENTITY]
        for key, mine, others in pairs:
            if mine != others:
                raise MismatchError(
                    f"{here} and {there} do not belong together, {WORDS[key]}",
                    found=f"{key} {short(mine)} in {here}, {short(others)} in {there}",
                    expected="equal values",
                    todo="use another --output, or remove the file to start again",
                )


def short(value: object) -> str:
    """A value for a message; the first 12 digits of a SHA-256 are enough to tell it."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return "none" if value is None else repr(value)[:80]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_integer(value) and value >= 0


def _is_in(known: Iterable[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in known


def _is_list(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


# Key of the provenance -> (check, what it must be); every key may be absent or null.
PROVENANCE = {
    **{key: (_is_text, "a string") for key in IDENTITY if key.endswith("_sha256")},
    "text_format": (_is_text, "a string"),
    "max_tokens": (_is_count, "an integer, at least 0"),
    "seed": (_is_integer, "an integer"),
    "group_size": (_is_count, "an integer"),
    "grid": (_is_in(GRIDS), " or ".join(GRIDS)),
    "tying": (_is_in(TYINGS), " or ".join(TYINGS)),
    "scale_dtype": (_is_in(SCALE_N_BYTES), " or ".join(SCALE_N_BYTES)),
    "clusters": (_is_list(_is_text), "a list of names"),
    "bits": (_is_list(_is_integer), "a list of integers"),
}


def _check_provenance(provenance: object, where: str) -> None:
    def refuse(name: str, value: object, expected: str) -> None:
        raise FormatError(
            f"{where} has a malformed {name}",
            found=repr(value)[:80],
            expected=expected,
            todo="make it again with `mpq sensitivity`",
        )

    if not isinstance(provenance, Mapping):
        refuse("provenance", provenance, "an object")
    for key, (check, expected) in PROVENANCE.items():
        value = provenance.get(key)
        if value is not None and not check(value):
            refuse(key, value, expected)
    inputs = provenance.get("inputs", {})
    if not isinstance(inputs, Mapping):
        refuse("inputs", inputs, "an object")
    for role, file in inputs.items():
        if not isinstance(file, Mapping) or not all(
            isinstance(file.get(key), str) for key in ("path", "sha256")
        ):
            refuse(f"input {role}", file, "path and sha256")


def open_table(path: Union[str, Path], provenance: dict, method: str) -> SensitivityTable:
    """A new table, or the one at ``path`` to go on with.

    Raises:
        MismatchError: the file was measured on something else; says both values.
    """
    table = SensitivityTable(provenance, method)
    if Path(path).exists():
        earlier = SensitivityTable.read(path)
        earlier.check_same_source(table, str(path), "this run")
        table.entries = earlier.entries
    return table


def shard_path(path: Union[str, Path], job: int) -> Path:
    """Where job number ``job`` (from 1) of a sharded run writes: sens.json -> sens.3.json."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{job}{path.suffix}")


def select_shard(pairs: Sequence, job: Optional[int], n_jobs: Optional[int]) -> list:
    """The pairs of job ``job`` of ``n_jobs`` (from 1); all of them without sharding."""
    if job is None and n_jobs is None:
        return list(pairs)
    if job is None or n_jobs is None or not 1 <= job <= n_jobs:
        raise InputError(
            "--job and --n_jobs go together",
            found=f"job {job} of {n_jobs}",
            expected="--job I --n_jobs N with 1 <= I <= N",
        )
    return list(pairs[job - 1 :: n_jobs])


def merge(path: Union[str, Path], n_jobs: int) -> SensitivityTable:
    """One table of all shards; in cluster order.

    Raises:
        InputError: a shard or an entry is missing, MismatchError: the shards differ in source.
    """
    if n_jobs < 1:
        raise InputError("--merge", found=n_jobs, expected="the number of jobs, at least 1")
    paths = [shard_path(path, job) for job in range(1, n_jobs + 1)]
    absent = [str(p) for p in paths if not p.is_file()]
    if absent:
        raise InputError(
            "shards are missing", found="no " + ", ".join(absent), todo="run these jobs first"
        )
    tables = [SensitivityTable.read(p) for p in paths]
    merged = SensitivityTable(dict(tables[0].provenance), tables[0].method)
    found = {}
    for table, shard in zip(tables, paths):
        merged.check_same_source(table, str(paths[0]), str(shard))
        for cluster, row in table.entries.items():
            found.setdefault(cluster, {}).update(row)
    clusters = merged.provenance.get("clusters") or list(found)
    bits = merged.provenance.get("bits") or sorted({b for row in found.values() for b in row})
    merged.entries = {c: found[c] for c in clusters if c in found}
    gaps = merged.missing(clusters, bits)
    if gaps:
        raise InputError(
            f"{len(gaps)} entries are in no shard",
            found="no " + ", ".join(f"{c} at {b} bits" for c, b in gaps[:4]),
            todo="run the jobs again; finished entries are kept",
        )
    return merged
