"""Scores many token sequences with an LM, every prefix that they share computed once."""

from __future__ import annotations

import dataclasses
import os
from typing import Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

import numpy
import torch

# Sequences of one tree: more of them share more and fill larger batches, and their states lie in
# memory together. 2,048 of an LSTM LM of 2 x 650 are 21 MB.
MOST_SEQUENCES = 2048
# Rows of log-probabilities at a time: 256 of 5,000 tokens are 5 MB.
MOST_ROWS = 256
# Nodes that a Transformer LM takes at a time; the arithmetic of attention is of every pair.
MOST_NODES = 512


class StepLm(Protocol):
    """A language model that goes on token by token, such as a recurrent one."""

    def step(self, tokens: torch.Tensor, state: Optional[object]) -> Tuple[torch.Tensor, object]:
        """Log-probabilities (B, V) of the next token after one more token (B,), and the state.

        A state is None at the start, else a tensor or a tuple of tensors (layers, B, width).
        """


class TreeLm(Protocol):
    """A language model that scores a whole prefix tree at once, such as a Transformer."""

    def tree_logits(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Scores (N, V) before the softmax of what follows every node (N,) and its ancestors.

        ``parents`` says where the token before each stands, -1 for the first one; parents come
        before their children.
        """


@dataclasses.dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of some sequences; node 0 is the empty one.

    Attributes:
        tokens: int64 (n_nodes,), the last token of each prefix; -1 for node 0.
        parents: int64 (n_nodes,), the prefix without its last token; -1 for node 0.
        depths: int64 (n_nodes,), tokens of each prefix; parents come before their children.
        paths: one int64 (length,) a sequence: the nodes of its prefixes, 1 token and up.
    """

    tokens: numpy.ndarray
    parents: numpy.ndarray
    depths: numpy.ndarray
    paths: List[numpy.ndarray]


def build_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """The prefix tree of token sequences (each with its end)."""
    nodes: Dict[Tuple[int, int], int] = {}
    tokens, parents, depths, paths = [-1], [-1], [0], []
    for sequence in sequences:
        parent, path = 0, []
        for depth, token in enumerate(sequence, 1):
            node = nodes.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                depths.append(depth)
            path.append(node)
            parent = node
        paths.append(numpy.array(path, dtype=numpy.int64))
    arrays = (numpy.array(x, dtype=numpy.int64) for x in (tokens, parents, depths))
    return PrefixTree(*arrays, paths)


def score_sequences(
    lm: object, sequences: Sequence[numpy.ndarray], sos: int
) -> Iterator[Tuple[List[int], numpy.ndarray]]:
    """Log-probability (natural) of every token given those before it.

    Sequences are sorted and go through in trees of bounded size, so memory does not grow with
    their number (beyond 4 bytes a token) and neighbours share their prefixes. Equal sequences are
    computed once.

    Args:
        lm: a StepLm or a TreeLm.
        sequences: token ids, int (length,) each, with the sentence end.
        sos: the token before the first one.

    Yields:
        (the numbers of the sequences that are equal, their float64 (length,)), in any order.
    """
    # Big-endian bytes sort as the numbers do.
    order: Dict[bytes, List[int]] = {}
    for i, sequence in enumerate(sequences):
        order.setdefault(numpy.asarray(sequence, dtype=">i4").tobytes(), []).append(i)
    is_tree_lm = hasattr(lm, "tree_logits")
    for piece in _pieces(sorted(order), is_tree_lm):
        tree = build_tree([numpy.frombuffer(key, dtype=">i4").tolist() for key in piece])
        values = (score_whole_tree if is_tree_lm else score_tree)(lm, tree, sos)
        for key, path in zip(piece, tree.paths):
            yield order[key], values[path]


def _pieces(keys: Sequence[bytes], is_tree_lm: bool) -> Iterator[List[bytes]]:
    """Sorted sequences in runs of at most MOST_SEQUENCES, or of MOST_NODES nodes (or one)."""
    piece: List[bytes] = []
    n_nodes = 1
    for key in keys:
        n_new = len(key) // 4
        if is_tree_lm and piece:
            n_new -= len(os.path.commonprefix([piece[-1], key])) // 4
        full = n_nodes + n_new > MOST_NODES if is_tree_lm else len(piece) == MOST_SEQUENCES
        if piece and full:
            yield piece
            piece, n_nodes, n_new = [], 1, len(key) // 4
        piece.append(key)
        n_nodes += n_new
    if piece:
        yield piece


@torch.no_grad()
def score_tree(lm: StepLm, tree: PrefixTree, sos: int) -> numpy.ndarray:
    """Log-probability of the last token of every prefix given the rest: float64 (n_nodes,).

    Breadth first: all prefixes of one length advance together, in batches of MOST_ROWS. Node 0
    has 0.
    """
    children = _Children(tree)
    values = numpy.zeros(len(tree.tokens))
    level, state, rows = numpy.zeros(1, dtype=numpy.int64), None, None
    while len(level):
        states = []
        for first in range(0, len(level), MOST_ROWS):
            nodes = level[first : first + MOST_ROWS]
            tokens = numpy.where(nodes == 0, sos, tree.tokens[nodes])
            before = None if rows is None else take(state, rows[first : first + MOST_ROWS])
            log_probs, after = lm.step(torch.from_numpy(tokens), before)
            at, below = children.of(nodes)
            picked = log_probs[torch.from_numpy(at), torch.from_numpy(tree.tokens[below])]
            values[below] = picked.double().numpy()
            states.append(after)
        at, below = children.of(level)
        goes_on = children.counts[below] > 0
        state, rows, level = join(states), torch.from_numpy(at[goes_on]), below[goes_on]
    return values


@torch.no_grad()
def score_whole_tree(lm: TreeLm, tree: PrefixTree, sos: int) -> numpy.ndarray:
    """As score_tree, for an LM that sees a whole tree at once."""
    children = _Children(tree)
    inner = numpy.flatnonzero(children.counts)
    place = numpy.full(len(tree.tokens), -1)
    place[inner] = numpy.arange(len(inner))
    tokens = numpy.where(inner == 0, sos, tree.tokens[inner])
    parents = numpy.where(inner == 0, -1, place[tree.parents[inner]])
    logits = lm.tree_logits(torch.from_numpy(tokens), torch.from_numpy(parents))
    at, below = children.of(inner)
    picked = logits.log_softmax(-1)[torch.from_numpy(at), torch.from_numpy(tree.tokens[below])]
    values = numpy.zeros(len(tree.tokens))
    values[below] = picked.double().numpy()
    return values


class _Children:
    """The children of every node of a tree."""

    def __init__(self, tree: PrefixTree):
        n = len(tree.tokens)
        self.counts = numpy.bincount(tree.parents[1:], minlength=n)
        self.order = numpy.argsort(tree.parents[1:], kind="stable") + 1
        self.starts = numpy.concatenate([[0], numpy.cumsum(self.counts)])

    def of(self, nodes: numpy.ndarray) -> Tuple[numpy.ndarray, numpy.ndarray]:
        """(which of ``nodes``, child) of every child of ``nodes``, in their order."""
        counts = self.counts[nodes]
        at = numpy.repeat(numpy.arange(len(nodes)), counts)
        within = numpy.arange(len(at)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        return at, self.order[self.starts[nodes][at] + within]


def take(state, rows: torch.Tensor):
    """The states of some hypotheses: columns ``rows`` of (layers, B, width) tensors."""
    if isinstance(state, tuple):
        return tuple(take(x, rows) for x in state)
    return state.index_select(1, rows)


def join(states: Sequence):
    """States of several batches as one."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], tuple):
        return tuple(join([s[k] for s in states]) for k in range(len(states[0])))
    return torch.cat(list(states), dim=1)
