"""Scores of all hypotheses by one LM, kept in a journal so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Protocol, Sequence, Tuple

import numpy

from espnet_mpq.decode.nbest import NbestList
from espnet_mpq.decode.prefix_tree import score_sequences
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.io import sha256_bytes, write_error

FORMAT_NAME, VERSION = "espnet_mpq.part_scores", 1
# Hypotheses that are scored and written together. Groups are cut in the order of the lists, so
# that a run that goes on computes the same batches as one that was not killed.
GROUP = 2048


@dataclasses.dataclass(frozen=True)
class HypothesisScore:
    """What an LM says of one hypothesis: natural logarithm, sentence end included.

    Attributes:
        total: of the whole sentence.
        words: of every word and of the sentence end; None where they were not asked for.
    """

    total: float
    words: Optional[List[float]] = None


class Scorer(Protocol):
    """An LM as rescoring sees it.

    Attributes:
        name: of the part of the total score.
    """

    name: str

    def identity(self) -> Dict[str, object]:
        """What the scores depend on, as JSON: files by their SHA-256, options."""

    def score(self, hyps: Sequence[Tuple[str, Optional[str]]]) -> List[HypothesisScore]:
        """Score (text, tokens of the first pass or None) of hypotheses."""


class TokenScorer:
    """A Scorer of an LM over tokens.

    Args:
        name: of the part.
        lm: a StepLm or TreeLm (prefix_tree.py).
        tokenizer: .encode(text, tokens) -> (ids, with the sentence end; the word of each, its
            number, or None where the tokens do not spell words; that of the sentence end is
            the number of words); .sos.
        identity: what the scores depend on.
        backward: the LM reads sentences from their last word to their first.
        per_word: also keep scores of words.
    """

    def __init__(
        self, name, lm, tokenizer, identity: Mapping, backward: bool = False, per_word: bool = False
    ):
        self.name, self.lm, self.tokenizer = name, lm, tokenizer
        self.backward, self.per_word = backward, per_word
        self._identity = dict(identity, backward=backward)

    def identity(self) -> Dict[str, object]:
        """What the scores depend on."""
        return dict(self._identity)

    def check(self, hyps: Sequence[Tuple[str, Optional[str]]]) -> None:
        """Raises MismatchError when the LM knows no token of some hypotheses."""
        if hasattr(self.tokenizer, "check"):
            self.tokenizer.check(hyps)

    def unknown(self) -> str:
        """What share of the tokens so far the LM does not know, in words; "" for none."""
        n_unknown = getattr(self.tokenizer, "n_unknown", 0)
        if not n_unknown:
            return ""
        return f"{n_unknown} of {self.tokenizer.n_tokens} tokens are unknown to {self.name}"

    def score(self, hyps: Sequence[Tuple[str, Optional[str]]]) -> List[HypothesisScore]:
        """Score hypotheses, every shared prefix once.

        Raises:
            InputError: scores of words of a tokenizer that does not tell words apart.
        """
        sequences, words = [], []
        for text, tokens in hyps:
            if self.backward:
                text = " ".join(reversed(text.split()))
            ids, word_of = self.tokenizer.encode(text, tokens)
            if self.per_word:
                words.append(self._starts(text, word_of))
            sequences.append(numpy.array(ids, dtype=numpy.int32))
        found: List[Optional[HypothesisScore]] = [None] * len(sequences)
        for numbers, log_probs in score_sequences(self.lm, sequences, self.tokenizer.sos):
            total = float(log_probs.sum())
            for i in numbers:
                per_word = numpy.add.reduceat(log_probs, words[i]).tolist() if words else None
                found[i] = HypothesisScore(total, per_word)
        return found

    def _starts(self, text: str, word_of: Optional[Sequence[int]]) -> numpy.ndarray:
        """The first token of every word and of the sentence end."""
        n_words = len(text.split())
        starts = (
            []
            if word_of is None
            else [i for i in range(len(word_of)) if i == 0 or word_of[i] > word_of[i - 1]]
        )
        if word_of is None or [word_of[i] for i in starts] != list(range(n_words + 1)):
            raise InputError(
                f"the tokens of {self.name} do not tell the words of a hypothesis apart",
                found=repr(text[:80]),
                expected="a word, character or sentencepiece LM for interpolation word by word",
            )
        return numpy.array(starts)


class NgramScorer:
    """A Scorer of an n-gram LM (arpa.py) over words."""

    def __init__(self, name: str, ngram, per_word: bool = False):
        self.name, self.ngram, self.per_word = name, ngram, per_word

    def identity(self) -> Dict[str, object]:
        """What the scores depend on."""
        return self.ngram.identity()

    def score(self, hyps: Sequence[Tuple[str, Optional[str]]]) -> List[HypothesisScore]:
        """Score hypotheses, equal ones once."""
        known: Dict[str, HypothesisScore] = {}
        for text, _ in hyps:
            if text not in known:
                words = self.ngram.word_log_probs(text.split())
                known[text] = HypothesisScore(float(sum(words)), words if self.per_word else None)
        return [known[text] for text, _ in hyps]


def groups_of(lists: Sequence[NbestList], size: int = GROUP) -> List[Tuple[int, int]]:
    """Lists first .. last - 1 of every group: as many as have ``size`` hypotheses, at least one."""
    groups, first, n = [], 0, 0
    for i, one in enumerate(lists):
        if i > first and n + len(one) > size:
            groups.append((first, i))
            first, n = i, 0
        n += len(one)
    return groups + ([(first, len(lists))] if lists else [])


def score_lists(
    scorer: Scorer, lists: Sequence[NbestList], journal: Path
) -> Iterator[Tuple[int, int, List[List[HypothesisScore]]]]:
    """Score all lists, group by group, and write every group to the journal.

    Groups that an earlier run of the same scorer wrote are read instead. A line that was being
    written when the run was killed is dropped.

    Yields:
        (first, last + 1, scores of every hypothesis of every list) of each group.

    Raises:
        MismatchError: the journal is of another LM or other options.
        InputError: it cannot be written, or the LM gives scores that are no finite numbers.
    """
    done = _read_journal(journal, scorer)
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as file:
            if not file.tell():
                head = {"format": FORMAT_NAME, "version": VERSION, "part": scorer.name}
                file.write(json.dumps({**head, "identity": scorer.identity()}) + "\n")
            for first, last in groups_of(lists):
                group = lists[first:last]
                key = _group_key(group)
                if key not in done:
                    values = _score_group(scorer, group)
                    line = {"group": key, "scores": [[s.total for s in one] for one in values]}
                    if any(s.words is not None for one in values for s in one):
                        line["words"] = [[s.words for s in one] for one in values]
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                else:
                    values = done.pop(key)
                yield first, last, values
    except OSError as error:
        raise write_error(journal, error, unchanged=False) from error


def _score_group(scorer: Scorer, group: Sequence[NbestList]) -> List[List[HypothesisScore]]:
    hyps = [
        (text, None if one.tokens is None else one.tokens[i])
        for one in group
        for i, text in enumerate(one.texts)
    ]
    flat = iter(scorer.score(hyps))
    values = [[next(flat) for _ in one.texts] for one in group]
    for one, scores in zip(group, values):
        for rank, score in enumerate(scores, 1):
            if not numpy.isfinite(score.total):
                raise InputError(
                    f"{scorer.name} gives a score that is no finite number",
                    found=f"{score.total} for {one.utt}, hypothesis {rank}: {one.texts[rank - 1]}",
                    todo="check the checkpoint",
                )
    return values


def _group_key(group: Sequence[NbestList]) -> str:
    hyps = [[one.utt, one.texts, one.tokens] for one in group]
    return sha256_bytes(json.dumps(hyps).encode("utf-8"))[:32]


def _read_journal(path: Path, scorer: Scorer) -> Dict[str, List[List[HypothesisScore]]]:
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    if not whole:
        return {}
    todo = f"choose another folder, or remove {path}"
    try:
        head, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        found = {"part": head["part"], **head["identity"]}
        expected = {"part": scorer.name, **scorer.identity()}
        is_ours = head["format"] == FORMAT_NAME and head["version"] == VERSION
        done = {line["group"]: _from_line(line) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged", found=error, todo=f"remove {path}") from error
    if not is_ours or found != expected:
        odd = [k for k in {**found, **expected} if found.get(k) != expected.get(k)]
        raise MismatchError(
            f"{path} holds scores of another LM or other options",
            found=", ".join(f"{k} {found.get(k)}" for k in odd) or head["version"],
            expected=", ".join(f"{k} {expected.get(k)}" for k in odd) or VERSION,
            todo=todo,
        )
    return done


def _from_line(line: dict) -> List[List[HypothesisScore]]:
    words = line.get("words", [[None] * len(one) for one in line["scores"]])
    return [
        [HypothesisScore(total, w) for total, w in zip(totals, per_word)]
        for totals, per_word in zip(line["scores"], words)
    ]
