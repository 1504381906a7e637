"""The receipt of a packed LM: what every cluster costs and how far it is from its source."""

from __future__ import annotations

from math import prod
from typing import Dict, List, Mapping, Sequence, Tuple

from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.tensors import cluster_tensors
from espnet_mpq.plan import total_n_weights

MOST_VECTORS = 60  # listed one by one in a table for people


def receipt(packed: PackedModel) -> dict:
    """Bytes, bits and errors of a packed LM as a JSON-able dict.

    Keys: ``clusters`` (one row each: cluster, kind, bits, grid, tying, n_weights, n_bytes,
    relative_error), ``shared`` (scales of tying "model"), ``rest`` (parameters kept in float),
    ``totals`` (n_weights, header_n_bytes, n_bytes of the whole file, fp_n_bytes,
    effective_bits, compression), ``architecture``, ``token_list``, ``source``.
    """
    rows: List[Dict] = []
    shared: Dict[str, int] = {}
    errors = packed.metadata["relative_error"]
    for cluster in packed.clusters:
        spec = packed.plan.clusters[cluster.name]
        n_bytes = 0
        for tensor in cluster_tensors(cluster, spec, packed.plan.scale_dtype):
            if tensor.name.startswith("model/"):
                shared[tensor.name] = tensor.n_bytes
            else:
                n_bytes += tensor.n_bytes
        row = {"cluster": cluster.name, "kind": cluster.kind, "bits": spec.bits}
        if spec.bits < 16:
            row.update(grid=spec.grid, tying=spec.tying)
            if spec.group_size is not None:
                row["group_size"] = spec.group_size
        row.update(n_weights=cluster.n_weights, n_bytes=n_bytes)
        rows.append({**row, "relative_error": float(errors[cluster.name])})
    rest = []
    for name, shape in packed.rest:
        size = prod(shape)
        rest.append(
            {"parameter": name, "shape": list(shape), "n_weights": size, "n_bytes": 4 * size}
        )
    n_weights = total_n_weights(packed.clusters, packed.rest)
    n_bytes = packed.n_bytes
    header = n_bytes - sum(spec.n_bytes for spec in packed.specs)
    return {
        "clusters": rows,
        "shared": [{"tensor": name, "n_bytes": size} for name, size in shared.items()],
        "rest": rest,
        "totals": {
            "n_weights": n_weights,
            "header_n_bytes": header,
            "n_bytes": n_bytes,
            "fp_n_bytes": 4 * n_weights,
            "effective_bits": 8.0 * n_bytes / n_weights,
            "compression": 4.0 * n_weights / n_bytes,
        },
        "error_reference": packed.metadata["error_reference"],
        "scale_dtype": packed.plan.scale_dtype,
        "architecture": packed.metadata["architecture"],
        "token_list": packed.metadata["token_list"],
        "special_ids": packed.metadata["special_ids"],
        "source": packed.metadata["source"],
        "metadata_sha256": packed.metadata["metadata_sha256"],
    }


def times_smaller(compression: float) -> str:
    """fp bytes / packed bytes in words: "7.90x smaller", or "8.33x larger" below 1."""
    if compression < 1:
        return f"{1 / compression:.2f}x larger"
    return f"{compression:.2f}x smaller"


def _kept(rest: Sequence[Mapping]) -> List[Tuple[str, int, int]]:
    """(name, weights, bytes) of what stays float: matrices one by one; vectors too, if few."""
    vectors = [row for row in rest if len(row["shape"]) < 2]
    one_by_one = rest if len(vectors) <= MOST_VECTORS else [r for r in rest if len(r["shape"]) > 1]
    rows = [(row["parameter"], row["n_weights"], row["n_bytes"]) for row in one_by_one]
    if len(one_by_one) < len(rest):
        totals = (sum(row[key] for row in vectors) for key in ("n_weights", "n_bytes"))
        rows.append((f"{len(vectors)} vectors (biases, norms, statistics)", *totals))
    return rows


def format_receipt(value: dict) -> str:
    """The receipt as a table for people; ends without a newline."""
    names = [row["cluster"] for row in value["clusters"]]
    names += [name for name, _, _ in _kept(value["rest"])]
    width = max(22, *(len(name) + 1 for name in names))
    lines = [
        f"{'cluster':<{width}}{'bits':>5} {'grid':<9}{'tying':<10}{'weights':>12}{'bytes':>12}"
        f"{'rel. error':>12}"
    ]
    for row in value["clusters"]:
        tying = row.get("tying", "-")
        if "group_size" in row:
            tying = f"{tying} {row['group_size']}"
        lines.append(
            f"{row['cluster']:<{width}}{row['bits']:>5} {row.get('grid', 'float'):<9}{tying:<10}"
            f"{row['n_weights']:>12,}{row['n_bytes']:>12,}{row['relative_error']:>12.4g}"
        )
    for row in value["shared"]:
        lines.append(f"{row['tensor']:<{width + 25}}{'':>12}{row['n_bytes']:>12,}")
    for name, n_weights, n_bytes in _kept(value["rest"]):
        lines.append(
            f"{name:<{width}}{32:>5} {'float':<9}{'-':<10}"
            f"{n_weights:>12,}{n_bytes:>12,}{'kept':>12}"
        )
    totals = value["totals"]
    lines.append(f"{'header':<{width + 25}}{'':>12}{totals['header_n_bytes']:>12,}")
    lines.append(f"{'total':<{width + 25}}{totals['n_weights']:>12,}{totals['n_bytes']:>12,}")
    against = "the fp model" if value["error_reference"] == "fp" else "the packed checkpoint"
    lines.append("")
    lines.append(f"effective bits   {totals['effective_bits']:.4f} (every stored byte counted)")
    lines.append(
        f"size             {totals['n_bytes']:,} bytes, fp {totals['fp_n_bytes']:,} bytes, "
        f"{times_smaller(totals['compression'])}"
    )
    kept = sum(row["n_weights"] for row in value["rest"])
    lines.append(f"kept in float    {kept:,} weights in {len(value['rest'])} tensors")
    lines.append(f"relative error   squared, against {against}")
    return "\n".join(lines)
