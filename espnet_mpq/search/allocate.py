"""Exact choice of bits per cluster: the least predicted harm that fits, and the Pareto front."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from espnet_mpq.errors import InputError

Table = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Point:
    """One choice of bits: stored bytes (fixed ones included), predicted harm, cluster -> bits."""

    n_bytes: int
    harm: float
    choice: Dict[str, int]


def pareto_front(
    harm: Table, n_bytes: Table, fixed_n_bytes: int = 0, budget_n_bytes: Optional[int] = None
) -> List[Point]:
    """All choices that no other one beats in bytes and harm, by rising bytes and falling harm.

    Args:
        harm: cluster -> bits -> predicted harm (any finite number, negative ones too).
        n_bytes: cluster -> bits -> stored bytes, for the same clusters and bits.
        fixed_n_bytes: bytes that no choice changes (header, float rest).
        budget_n_bytes: cuts the front there.

    Returns:
        Of choices with equal bytes and harm one; empty when nothing fits the budget.

    Raises:
        InputError: malformed tables.

    Source: own; a multiple-choice knapsack, solved by dynamic programming over the
    non-dominated (bytes, harm) pairs, so exact without any tolerance.
    """
    names, all_bits = _check(harm, n_bytes)
    smallest_rest = [0]
    for name in reversed(names):
        smallest_rest.append(smallest_rest[-1] + min(n_bytes[name].values()))
    smallest_rest.reverse()
    sizes, harms = np.zeros(1, np.int64), np.zeros(1)
    steps: List[Tuple[np.ndarray, np.ndarray]] = []  # per cluster: previous state, option taken
    for k, (name, bits) in enumerate(zip(names, all_bits)):
        option_sizes = np.array([n_bytes[name][b] for b in bits], np.int64)
        option_harms = np.array([harm[name][b] for b in bits])
        new_sizes = (sizes[:, None] + option_sizes).ravel()
        new_harms = (harms[:, None] + option_harms).ravel()
        order = np.lexsort((new_harms, new_sizes))
        if budget_n_bytes is not None:
            limit = budget_n_bytes - fixed_n_bytes - smallest_rest[k + 1]
            order = order[new_sizes[order] <= limit]
        order = order[_falls(new_harms[order])]
        steps.append((order // len(bits), order % len(bits)))
        sizes, harms = new_sizes[order], new_harms[order]
    states = np.arange(len(sizes))
    options = np.empty((len(names), len(sizes)), np.int64)
    for k in reversed(range(len(names))):
        previous, option = steps[k]
        options[k] = option[states]
        states = previous[states]
    return [
        Point(
            int(size) + fixed_n_bytes,
            float(total),
            {name: all_bits[k][options[k, i]] for k, name in enumerate(names)},
        )
        for i, (size, total) in enumerate(zip(sizes, harms))
    ]


def by_harm(
    harm: Table, n_bytes: Table, fixed_n_bytes: int, budget_n_bytes: int
) -> Iterator[Point]:
    """All choices that fit, by rising harm: the first is the optimum, the others are for costs
    that ``n_bytes`` bounds from below only.

    Best-first search; the exact front of the clusters still open tells what can be reached, so
    no step is wasted. Arguments as in `pareto_front`; raises InputError for malformed tables.
    """
    names, all_bits = _check(harm, n_bytes)
    room = budget_n_bytes - fixed_n_bytes
    fronts = [(np.zeros(1, np.int64), np.zeros(1))]  # of the last 0, 1, 2... clusters
    smallest_before = sum(min(n_bytes[name].values()) for name in names)
    for name, bits in zip(reversed(names), reversed(all_bits)):
        smallest_before -= min(n_bytes[name].values())
        sizes, harms = fronts[-1]
        sizes = (sizes[:, None] + np.array([n_bytes[name][b] for b in bits], np.int64)).ravel()
        harms = (harms[:, None] + np.array([harm[name][b] for b in bits])).ravel()
        order = np.lexsort((harms, sizes))
        order = order[sizes[order] <= room - smallest_before]  # bytes may be negative
        order = order[_falls(harms[order])]
        fronts.append((sizes[order], harms[order]))

    def entry(chosen: Tuple[int, ...], size: int, total: float):
        sizes, harms = fronts[len(names) - len(chosen)]
        k = int(np.searchsorted(sizes, room - size, side="right")) - 1
        return (total + harms[k], size + int(sizes[k]), chosen, size, total) if k >= 0 else None

    heap = [e for e in [entry((), 0, 0.0)] if e]
    while heap:
        _, _, chosen, size, total = heapq.heappop(heap)
        if len(chosen) == len(names):
            yield Point(size + fixed_n_bytes, float(total), dict(zip(names, chosen)))
            continue
        name, bits = names[len(chosen)], all_bits[len(chosen)]
        for b in bits:
            following = entry((*chosen, b), size + n_bytes[name][b], total + harm[name][b])
            if following:
                heapq.heappush(heap, following)


def repair(
    start: Mapping[str, int],
    start_joint: float,
    harm: Table,
    n_bytes: Table,
    budget_n_bytes: int,
    measure,
    n_measurements: int = 12,
) -> Tuple[Dict[str, int], float]:
    """Swap bits between clusters where the measured joint harm falls: for harms that do not add up.

    Tries moves (one cluster to other bits, or two at once) that stay within the budget, in the
    order of predicted harm, measures each, and keeps those that help.

    Args:
        measure: choice -> measured joint harm; called at most ``n_measurements`` times.
        budget_n_bytes: of the clusters alone, fixed bytes taken off.

    Returns:
        (choice, its measured joint harm); ``start`` itself when nothing helps.
    """
    choice, joint = dict(start), start_joint
    tried = {tuple(sorted(choice.items()))}
    while n_measurements > 0:
        move = _best_move(choice, harm, n_bytes, budget_n_bytes, tried)
        if move is None:
            break
        tried.add(tuple(sorted(move.items())))
        measured = measure(move)
        n_measurements -= 1
        if measured < joint:
            choice, joint = move, measured
    return choice, joint


def _best_move(
    choice: Dict[str, int], harm: Table, n_bytes: Table, budget_n_bytes: int, tried: set
) -> Optional[Dict[str, int]]:
    """The choice of least predicted harm that is one or two changes away, fits and is new."""
    size = sum(n_bytes[name][bits] for name, bits in choice.items())
    singles = [
        (harm[a][bits] - harm[a][old], n_bytes[a][bits] - n_bytes[a][old], a, bits)
        for a, old in choice.items()
        for bits in harm[a]
        if bits != old
    ]
    pairs = [
        (x[0] + y[0], x[1] + y[1], x, y)
        for i, x in enumerate(singles)
        for y in singles[:i]
        if x[2] != y[2]
    ]
    moves = [(change, grown, (one,)) for one in singles for change, grown in [one[:2]]]
    moves += [(change, grown, (x, y)) for change, grown, x, y in pairs]
    for _, grown, changes in sorted(moves, key=lambda move: move[0]):
        if size + grown <= budget_n_bytes:
            moved = {**choice, **{name: bits for _, _, name, bits in changes}}
            if tuple(sorted(moved.items())) not in tried:
                return moved
    return None


def _falls(values: np.ndarray) -> np.ndarray:
    """Mask of the values below every one before them."""
    mask = np.ones(len(values), bool)
    if len(values):
        mask[1:] = values[1:] < np.minimum.accumulate(values)[:-1]
    return mask


def _check(harm: Table, n_bytes: Table) -> Tuple[List[str], List[List[int]]]:
    names = list(harm)
    if not names or set(names) != set(n_bytes):
        raise InputError(
            "harm and bytes must name the same clusters",
            found=f"{sorted(harm)} and {sorted(n_bytes)}",
        )
    all_bits = [sorted(harm[name]) for name in names]
    for name, bits in zip(names, all_bits):
        if not bits or set(bits) != set(n_bytes[name]):
            raise InputError(
                f"cluster {name}: harm and bytes must have the same bits",
                found=f"{bits} and {sorted(n_bytes[name])}",
            )
        for b in bits:
            value = harm[name][b]
            if not np.isfinite(value):
                raise InputError(f"cluster {name}, {b} bits: harm is not finite", found=value)
    return names, all_bits
