"""What a Transformer LM remembers of prefixes: keys and values of every token, shared in a trie."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch


class PastToken:
    """The keys and values that one token of a prefix left in all layers; never written again.

    Hypotheses that grew from one prefix hold the same PastToken objects, so a beam costs memory
    for the trie of its prefixes and not for every prefix.

    Args:
        keys_values: (2 * layers, att_unit): key of layer 0, value of layer 0, key of layer 1, ...
        visible: False for token 0 (padding, blank), which nothing attends to, as in the host.
    """

    __slots__ = ("keys_values", "visible")

    def __init__(self, keys_values: torch.Tensor, visible: bool):
        self.keys_values, self.visible = keys_values, visible


# The state of one hypothesis: its tokens so far, () at the start.
Prefix = Tuple[PastToken, ...]


class Memory:
    """Keys and values for one step of a batch: every past token once, then the newest ones.

    Args:
        prefixes: one a hypothesis, of any lengths.
        visible: of the newest token of every hypothesis, as in PastToken.
        layers: of the LM.
        like: (att_unit,), of the device and dtype to compute with.
    """

    def __init__(
        self, prefixes: Sequence[Prefix], visible: Sequence[bool], layers: int, like: torch.Tensor
    ):
        tokens = list(dict.fromkeys(token for prefix in prefixes for token in prefix))
        self.prefixes, self.visible, self.n_past = prefixes, visible, len(tokens)
        new = like.new_empty(2 * layers, len(like))
        columns = [token.keys_values for token in tokens] + [new] * len(prefixes)
        # (2 * layers, n_past + batch, att_unit); attend fills in the newest tokens.
        self.keys_values = torch.stack(columns, dim=1).to(like)
        # Python's bytes: a tensor operation costs more than hundreds of these assignments.
        n, column = len(columns), dict(zip(tokens, range(len(tokens))))
        hidden = bytearray(b"\1") * (len(prefixes) * n)
        for row, prefix in enumerate(prefixes):
            for token in prefix:
                hidden[row * n + column[token]] = not token.visible
            hidden[row * n + len(tokens) + row] = not visible[row]
        mask = torch.frombuffer(hidden, dtype=torch.bool).view(-1, n).to(like.device)
        # Added to the scores; (batch, n_past + batch).
        self.bias = like.new_zeros(mask.shape).masked_fill_(mask, torch.finfo(like.dtype).min)
        seeing = (
            seen or any(token.visible for token in prefix)
            for prefix, seen in zip(prefixes, visible)
        )
        # Where a hypothesis has nothing to look at, the host gives zeros.
        self.blind = None if all(seeing) else mask.all(dim=1, keepdim=True)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, heads: int
    ) -> torch.Tensor:
        """Attention of the newest token of every hypothesis to its prefix and itself.

        Args:
            query, key, value: of the newest tokens, (batch, att_unit).

        Returns:
            (batch, att_unit).
        """
        batch, width = query.shape
        keys, values = self.keys_values[2 * layer], self.keys_values[2 * layer + 1]
        keys[self.n_past :], values[self.n_past :] = key, value
        size = width // heads
        q = (query * size**-0.5).view(batch, heads, size).transpose(0, 1)
        k, v = (x.view(-1, heads, size).transpose(0, 1) for x in (keys, values))
        shares = torch.baddbmm(self.bias.unsqueeze(0), q, k.transpose(1, 2)).softmax(dim=-1)
        if self.blind is not None:
            shares = shares.masked_fill(self.blind, 0.0)
        return (shares @ v).transpose(0, 1).reshape(batch, width)

    def extended(self) -> List[Prefix]:
        """The prefixes with their newest tokens, after attend has seen all layers."""
        # Clones: a view would keep the tokens of all hypotheses alive as long as one of them lives.
        new = self.keys_values[:, self.n_past :].unbind(1)
        return [
            (*prefix, PastToken(keys_values.clone(), seen))
            for prefix, keys_values, seen in zip(self.prefixes, new, self.visible)
        ]


def attend_to_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor, heads: int
) -> torch.Tensor:
    """Attention of every token to itself and those before it, token 0 left out.

    Args:
        query, key, value: (batch, length, att_unit).
        tokens: int64 (batch, length).

    Returns:
        (batch, length, att_unit).

    Source: the host's MultiHeadedAttention and TransformerLM._target_mask (Vaswani et al. 2017,
    eq. 1).
    """
    batch, length, width = query.shape
    shape = (batch, length, heads, width // heads)
    q, k, v = (x.view(shape).transpose(1, 2) for x in (query, key, value))
    later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    hidden = (later | (tokens == 0)[:, None])[:, None]
    scores = q @ k.transpose(2, 3) / (width // heads) ** 0.5
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    shares = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
    return (shares @ v).transpose(1, 2).reshape(batch, length, width)


def ancestors(parents: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """What every node of a prefix tree may look at, and how many tokens are before it.

    Args:
        parents: int64 (n,), the node before each; -1 for a first one; parents come first.

    Returns:
        bool (n, n), true where the column is the row or one of its ancestors; int64 (n,).
    """
    seen = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen, seen.sum(1) - 1


def attend_to_ancestors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, heads: int
) -> torch.Tensor:
    """Attention of every node of a prefix tree to those it may look at.

    Args:
        query, key, value: (n, att_unit).
        hidden: bool (n, n), true where the row may not look at the column.

    Returns:
        (n, att_unit).
    """
    n, width = query.shape
    q, k, v = (x.view(n, heads, width // heads).transpose(0, 1) for x in (query, key, value))
    scores = (q @ k.transpose(1, 2)) / (width // heads) ** 0.5
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    shares = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
    return (shares @ v).transpose(0, 1).reshape(n, width)
