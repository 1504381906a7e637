"""The sensitivity table: cluster x bits -> predicted harm with standard error, as a JSON file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import FormatError, InputError, MismatchError, near_matches
from espnet_mpq.fields import is_in, is_number, need
from espnet_mpq.io import read_json, write_json
from espnet_mpq.plan import BITS
from espnet_mpq.sensitivity.curvature import Curvature
from espnet_mpq.sensitivity.provenance import IDENTITY, UNITS, WORDS, apart, check_provenance, short

FORMAT = "espnet_mpq.sensitivity"
VERSION = 1
METHODS = ("kl", "kl_printed", "hessian", "fisher", "nas")
CURVATURE = ("hessian", "fisher")  # made from traces
SIGNED = ("kl_printed",)  # harm may be negative
# A harm that is no signed one is at least 0; this much below is rounding.
LEAST_HARM = -1e-6
KEYS = ("format", "version", "method", "unit", "entries", "provenance", "curvature")
ENTRY = "{harm, stderr, relative_mse}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Harm of one cluster at one bit-width.

    harm in nats per token or frame; stderr its standard error (nan: one sentence only);
    relative_mse = ||w - q||^2 / ||w||^2 of the cluster's weights.
    """

    harm: float
    stderr: float
    relative_mse: float


@dataclasses.dataclass
class SensitivityTable:
    """Entries by cluster and bits, and what they were measured on (``provenance``).

    ``curvature``: the traces behind the entries of the methods hessian and fisher.
    """

    provenance: dict
    method: str = "kl"
    entries: Dict[str, Dict[int, Entry]] = dataclasses.field(default_factory=dict)
    curvature: Optional[Curvature] = None

    def add(self, cluster: str, bits: int, entry: Entry) -> None:
        self.entries.setdefault(cluster, {})[bits] = entry

    def add_curvature_entry(self, cluster: str, bits: int, relative_mse: float) -> None:
        """The entry that the traces give for weights moved by ``relative_mse`` ||W||^2."""
        average = self.provenance.get("trace") != "plain"
        harm, stderr = self.curvature.harm(cluster, relative_mse, average)
        self.add(cluster, bits, Entry(harm, stderr, relative_mse))

    def refresh(self) -> None:
        """Compute the entries again from ``curvature``, after more probes."""
        for cluster, row in self.entries.items():
            for bits, entry in row.items():
                self.add_curvature_entry(cluster, bits, entry.relative_mse)

    @property
    def unit(self) -> str:
        """Of the harms; of the method nas they are -ln p of the bits, which is no loss."""
        if self.method == "nas":
            return "nats"
        plain = self.provenance.get("trace") == "plain"
        return "none" if plain else self.provenance.get("unit", UNITS[0])

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
        value = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "unit": self.unit,
            "entries": entries,
            "provenance": self.provenance,
        }
        if self.curvature is not None:
            value["curvature"] = self.curvature.to_dict()
        return value

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
        if not is_in(METHODS)(value.get("method")):
            raise FormatError(
                f"{where} has an unknown method",
                found=repr(value.get("method")),
                expected="one of " + _listed(METHODS),
            )
        provenance = {} if value.get("provenance") is None else value["provenance"]
        check_provenance(provenance, where)
        table = cls(dict(provenance), value["method"])
        unit = value.get("unit", table.unit)
        need(unit == table.unit, where, "unit", unit, f"{table.unit!r}, for method {table.method}")
        for key in value:
            if key not in KEYS:
                todo = near_matches(key, KEYS)
                raise FormatError(f"{where}: unknown key", found=repr(key), todo=todo)
        if value.get("curvature") is not None:
            table.curvature = Curvature.from_dict(value["curvature"], where)
        rows, expected = value.get("entries"), "an object: bits -> " + ENTRY
        is_right = isinstance(rows, Mapping)
        need(is_right, where, "value of entries", rows, "an object: cluster -> bits -> " + ENTRY)
        for cluster, row in rows.items():
            need(isinstance(row, Mapping), where, f"row {cluster}", row, expected)
            for bits, entry in row.items():
                is_right = bits in map(str, BITS)
                need(is_right, where, f"row {cluster}: bits", bits, f"one of {_listed(BITS)}")
                name = f"entry {cluster} at {bits} bits"
                table.add(cluster, int(bits), _read_entry(entry, table.method, where, name))
        table._check_clusters(where)
        return table

    def _check_clusters(self, where: str) -> None:
        """Raise FormatError unless the parts of the table are of the same clusters."""
        traced = None if self.curvature is None else list(self.curvature.n_weights)
        known = self.provenance.get("clusters") or traced or list(self.entries)
        if traced is None:
            is_right = self.method not in CURVATURE or not self.entries
            need(is_right, where, "curvature", None, f"traces, as the method is {self.method}")
        else:
            here, there = apart(traced, known)
            is_right = set(traced) == set(known)
            need(is_right, where, "curvature", here, f"the clusters of the table, {short(there)}")
        for name in self.entries:
            if name not in known:
                raise FormatError(
                    f"{where}: unknown cluster", found=repr(name), todo=near_matches(name, known)
                )

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
                mine, others = apart(mine, others)
                raise MismatchError(
                    f"{here} and {there} do not belong together, {WORDS[key]}",
                    found=f"{key} {short(mine)} in {here}, {short(others)} in {there}",
                    expected="equal values",
                    todo="use another --output, or remove the file to start again",
                )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _read_entry(value: object, method: str, where: str, name: str) -> Entry:
    keys = [field.name for field in dataclasses.fields(Entry)]
    is_right = isinstance(value, Mapping) and sorted(value) == sorted(keys)
    need(is_right, where, name, value, ENTRY)
    harm, stderr, relative_mse = (value[key] for key in keys)
    is_right = is_number(harm) and (method in SIGNED or harm >= LEAST_HARM)
    kind = "a number" if method in SIGNED else f"a number that is not negative (method {method})"
    need(is_right, where, f"{name}: harm", harm, kind)
    is_right = stderr is None or (is_number(stderr) and stderr >= 0)
    need(is_right, where, f"{name}: stderr", stderr, "a number of at least 0, or null")
    is_right = is_number(relative_mse) and relative_mse >= 0
    need(is_right, where, f"{name}: relative_mse", relative_mse, "a number of at least 0")
    return Entry(float(harm), math.nan if stderr is None else float(stderr), float(relative_mse))


def open_table(path: Union[str, Path], provenance: dict, method: str) -> SensitivityTable:
    """A new table, or the one at ``path`` to go on with.

    Raises:
        MismatchError: the file was measured on something else; says both values.
    """
    table = SensitivityTable(provenance, method)
    if Path(path).exists():
        earlier = SensitivityTable.read(path)
        earlier.check_same_source(table, str(path), "this run")
        table.entries, table.curvature = earlier.entries, earlier.curvature
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
    """One table of all shards; in cluster order. Traces are pooled, and the entries follow.

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
    if merged.method in CURVATURE:
        merged.curvature = Curvature.pool(t.curvature for t in tables if t.curvature is not None)
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
    if merged.curvature is not None:
        merged.refresh()
    return merged
