"""LM experiments of the host (fp, quantized, packed) as scorers of n-best lists."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch

from espnet_mpq.decode.nbest import listed
from espnet_mpq.decode.part_scores import TokenScorer
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.opened import Experiment, load_lm
from espnet_mpq.hosts.espnet.lm.tokenizer import build_tokenizer, find_tokenizer_files
from espnet_mpq.io import sha256_file
from espnet_mpq.kernels import dispatch
from espnet_mpq.runtime.prefixes import ancestors

TOKENS_FROM = ("text", "nbest")
SPACE, WORD_START = "<space>", "▁"
N_LOOKED_AT = 200


def open_scorer(
    name: str,
    lm_exp: Union[str, Path],
    lm_file: Optional[str] = None,
    *,
    backward: bool = False,
    per_word: bool = False,
    tokens_from: str = "text",
) -> TokenScorer:
    """A scorer of an LM experiment.

    Args:
        name: of the part of the total score.
        tokens_from: "text": the words of a hypothesis go through the LM's own tokenizer; "nbest":
            the tokens of the first pass are taken as they are, as in shallow fusion.
        backward, per_word: as TokenScorer.

    Raises:
        InputError, MismatchError, FormatError, HostError: as load_lm and build_tokenizer.
    """
    exp = load_lm(lm_exp, lm_file)
    lm = step_lm(exp.module)
    identity: Dict[str, object] = {
        **exp.identity,
        "tokens_from": tokens_from,
        "kernels": not kernel_of(exp).startswith(dispatch.REFERENCE),
    }
    if tokens_from == "text":
        for option, path in find_tokenizer_files(exp.args, str(exp.config)).items():
            identity[f"{option}_sha256"] = sha256_file(path)
    return TokenScorer(name, lm, HostTokenizer(exp, tokens_from), identity, backward, per_word)


def kernel_of(exp: Experiment) -> str:
    """What computes an LM: a kernel, the reference, or the host."""
    return exp.module.packed.kernel() if exp.is_packed else f"{dispatch.REFERENCE} (float weights)"


class HostTokenizer:
    """Text or first-pass tokens -> token ids of an LM, with the sentence end.

    Args:
        tokens_from: as open_scorer.
    """

    def __init__(self, exp: Experiment, tokens_from: str = "text"):
        self.sos, self.eos = exp.vocabulary.special_ids["sos"], exp.vocabulary.special_ids["eos"]
        self.unk, self.tokens_from = exp.vocabulary.special_ids["unk"], tokens_from
        self.where, self.token_type = exp.config, getattr(exp.args, "token_type", None)
        self.n_tokens = self.n_unknown = 0
        self.token_ids = {token: i for i, token in enumerate(exp.vocabulary.tokens)}
        if tokens_from == "text":
            self.host = build_tokenizer(exp.args, str(exp.config))

    def check(self, hyps: Sequence[Tuple[str, Optional[str]]]) -> None:
        """Raises InputError when the first hypotheses have no token that the LM knows."""
        n_known = n_tokens = 0
        for text, tokens in hyps[:N_LOOKED_AT]:
            ids = self.encode(text, tokens)[0][:-1]
            n_tokens += len(ids)
            n_known += sum(i != self.unk for i in ids)
        self.n_tokens = self.n_unknown = 0
        if n_tokens and not n_known:
            raise MismatchError(
                f"the LM of {self.where} knows no token of the hypotheses",
                found=repr(hyps[0][0][:80]),
                expected=f"tokens such as {' '.join(list(self.token_ids)[2:8])}",
                todo="check the language and letter case (upper, lower)",
            )

    def encode(
        self, text: str, tokens: Optional[str] = None
    ) -> Tuple[List[int], Optional[List[int]]]:
        """(ids with the sentence end, the word of each of them).

        Raises:
            InputError, MismatchError: first-pass tokens that are not there or not the LM's.
        """
        if self.tokens_from == "nbest":
            names = self._first_pass(text, tokens)
            ids = [self.token_ids[name] for name in names]
        else:
            names = self.host.tokenizer.text2tokens(self.host.text_cleaner(text)) if text else []
            ids = self.host.token_id_converter.tokens2ids(names)
        self.n_tokens += len(ids)
        self.n_unknown += ids.count(self.unk)
        return [*ids, self.eos], self._words(names)

    def _first_pass(self, text: str, tokens: Optional[str]) -> List[str]:
        if tokens is None:
            raise InputError("the n-best lists have no tokens", todo="give --tokens text")
        names = tokens.split()
        odd = [name for name in names if name not in self.token_ids]
        if odd:
            raise MismatchError(
                f"tokens of the n-best lists are not in the token list of {self.where}",
                found=f"{listed(odd)} in {text[:60]!r}",
                expected=f"tokens of the LM such as {' '.join(list(self.token_ids)[2:8])}",
                todo="give --tokens text: words then go through the LM's own tokenizer",
            )
        return names

    def _words(self, names: Sequence[str]) -> Optional[List[int]]:
        """The number of the word of every token and of the sentence end."""
        if self.token_type == "word":
            return list(range(len(names) + 1))
        words, word = [], -1
        if self.token_type == "bpe":
            for name in names:
                word += name.startswith(WORD_START) or word < 0
                words.append(word)
        elif self.token_type == "char":
            starts = True
            for name in names:  # a space ends the word before it
                word += starts
                starts = name == SPACE
                words.append(word)
        else:
            return None
        return [*words, word + 1]


def step_lm(lm: torch.nn.Module):
    """An LM of the host as a StepLm or TreeLm (decode/prefix_tree.py).

    Raises:
        InputError: an LM class that is neither recurrent nor a Transformer of the host.
    """
    packed = getattr(lm, "packed", None)
    if packed is not None:
        return packed
    if hasattr(lm, "rnn") and hasattr(lm, "decoder"):
        return FloatRnnSteps(lm)
    if hasattr(lm, "encoder") and hasattr(lm, "_target_mask"):
        return FloatTransformerTrees(lm)
    raise InputError(
        "rescoring with this LM class", found=type(lm).__name__, expected="seq_rnn or transformer"
    )


class FloatRnnSteps:
    """The host's SequentialRNNLM for batches of prefixes; states (layers, B, nhid) stay stacked."""

    def __init__(self, lm: torch.nn.Module):
        self.lm = lm.eval()

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, state):
        """As StepLm."""
        logits, state = self.lm(tokens[:, None], state)
        return logits[:, 0].log_softmax(-1), state


class FloatTransformerTrees:
    """The host's TransformerLM for prefix trees: a token sees its prefix, whatever lies between."""

    def __init__(self, lm: torch.nn.Module):
        self.lm = lm.eval()

    @torch.no_grad()
    def tree_logits(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """As TreeLm."""
        encoder = self.lm.encoder
        seen, depths = ancestors(parents)
        *layers, positions = encoder.embed
        x = self.lm.embed(tokens)[None]
        for layer in layers:
            x = layer(x)
        if hasattr(positions, "extend_pe"):  # else it has none
            positions.extend_pe(x.new_zeros(1, int(depths.max()) + 1))
            x = x * positions.xscale + positions.pe[0, depths]
        mask = (seen & (tokens != 0)[None])[None]
        x, _ = encoder.encoders(x, mask)
        return self.lm.decoder(encoder.after_norm(x))[0]
