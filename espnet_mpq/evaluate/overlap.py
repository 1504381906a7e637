"""How much of a test set occurs in a text that a model was trained on: sentences and n-grams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy

from espnet_mpq.errors import InputError

N = 8  # words of an n-gram
MIN_WORDS = 5  # of a sentence whose occurrence is hardly an accident
CHUNK_N_WORDS = 1_000_000
_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it vanishes modulo 2**64

Place = Tuple[str, int]  # file and line
Line = Tuple[Place, Sequence[str]]


@dataclass(frozen=True)
class LeakedSentence:
    """A sentence of the test set that shares words with the text.

    Attributes:
        utt: its name.
        whole: the place of the first line of the text that is this sentence, None without any.
        words: its longest run of words that are covered by n-grams of the text (all, if whole).
        place: the first line with the first n-gram of this run (``whole``, if there is one).
        n_ngrams: n-grams of the sentence that the text has.
        n_words: words of the sentence.
    """

    utt: str
    whole: Optional[Place]
    words: List[str]
    place: Place
    n_ngrams: int
    n_words: int


@dataclass(frozen=True)
class Overlap:
    """Exact counts of a test set against a text.

    Attributes:
        n, min_words: words of an n-gram, and of a sentence that is not short.
        n_sentences, n_short_sentences: of the test set; short ones have fewer than ``min_words``
            words and are counted apart, since "yes" is no leak. Empty ones are in neither.
        n_found_sentences, n_found_short_sentences: of these, those that are a line of the text.
        n_ngrams, n_found_ngrams: n-grams of the test set (every occurrence counts), and those of
            them that occur in a line of the text.
        n_touched_sentences: sentences with such an n-gram.
        n_words, n_covered_words: words of the test set, and those inside such an n-gram.
        sentences: what was found in the long sentences, most n-grams first.
    """

    n: int
    min_words: int
    n_sentences: int
    n_short_sentences: int
    n_found_sentences: int
    n_found_short_sentences: int
    n_ngrams: int
    n_found_ngrams: int
    n_touched_sentences: int
    n_words: int
    n_covered_words: int
    sentences: List[LeakedSentence]

    @property
    def sentence_percent(self) -> float:
        """Sentences that are a line of the text, of those that are not short."""
        return _percent(self.n_found_sentences, self.n_sentences)

    @property
    def ngram_percent(self) -> float:
        """n-grams that occur in the text, of those of the test set."""
        return _percent(self.n_found_ngrams, self.n_ngrams)


@dataclass
class Searched:
    """What a pass over the text saw: lines and words, and where every sought thing came first."""

    n_lines: int = 0
    n_words: int = 0
    ngrams: Dict[tuple, Place] = field(default_factory=dict)
    sentences: Dict[tuple, Place] = field(default_factory=dict)


def overlap(
    test: Dict[str, Sequence[str]],
    text: Iterable[Line],
    *,
    n: int = N,
    min_words: int = MIN_WORDS,
) -> Tuple[Overlap, Searched]:
    """`overlaps` of one test set."""
    found, searched = overlaps({"": test}, text, n=n, min_words=min_words)
    return found[""], searched


def overlaps(
    tests: Dict[str, Dict[str, Sequence[str]]],
    text: Iterable[Line],
    *,
    n: int = N,
    min_words: int = MIN_WORDS,
) -> Tuple[Dict[str, Overlap], Searched]:
    """Look for the sentences and n-grams of test sets in one pass over a text.

    Counts are exact: hashes of the text's n-grams only choose those that are compared word by
    word. n-grams do not cross lines. Memory grows with the test sets, not with the text: beside
    them, about 40 MB for `CHUNK_N_WORDS` words of it.

    Args:
        tests: name -> (utterance -> words).
        text: (place, words) of every line, normalised as the words of the tests.

    Raises:
        InputError: no test set with a word, an ``n`` below 1; and what reading the text raises.
    """
    if n < 1 or min_words < 1:
        raise InputError("overlap", found=f"n {n}, min_words {min_words}", expected="at least 1")
    sought: Set[tuple] = set()
    sentences: Set[tuple] = set()
    for name, test in tests.items():
        if not any(test.values()):
            raise InputError(" ".join(f"the test set {name} has no word".split()))
        for words in test.values():
            sentences.add(tuple(words))
            sought.update(_ngrams(words, n))
    sentences.discard(())
    searched = _search(sought, sentences, text, n)
    found = {name: _count(test, searched, n, min_words) for name, test in tests.items()}
    return found, searched


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple]:
    return zip(*(words[k:] for k in range(n))) if len(words) >= n else iter(())


def _search(sought: Set[tuple], sentences: Set[tuple], text: Iterable[Line], n: int) -> Searched:
    """One pass over the text, a chunk of lines at a time."""
    # Words that no sought n-gram has, and line ends, are 0: windows with a 0 cannot match.
    numbers = {w: k for k, w in enumerate(sorted({w for ngram in sought for w in ngram}), 1)}
    ids = numpy.array([[numbers[w] for w in ngram] for ngram in sought], dtype=numpy.uint64)
    powers = numpy.array([pow(_BASE, k, 2**64) for k in range(n)], dtype=numpy.uint64)
    hashes = numpy.unique((ids.reshape(-1, n) * powers).sum(axis=1, dtype=numpy.uint64))
    firsts = {sentence[0] for sentence in sentences}
    searched = Searched()

    def look(row: List[int], words: List[str], places: List[Place], starts: List[int]) -> None:
        """The n-grams of a chunk."""
        if len(row) < n or not len(hashes):
            return
        line_of = numpy.array(starts)
        x = numpy.array(row, dtype=numpy.uint64)
        n_windows = len(x) - n + 1
        keys = numpy.zeros(n_windows, dtype=numpy.uint64)
        full = numpy.ones(n_windows, dtype=bool)
        for k in range(n):
            piece = x[k : k + n_windows]
            keys += piece * powers[k]
            full &= piece != 0
        windows = numpy.flatnonzero(full)
        at = numpy.searchsorted(hashes, keys[windows])
        at[at == len(hashes)] = 0
        for start in windows[hashes[at] == keys[windows]].tolist():
            ngram = tuple(words[start : start + n])
            if ngram in sought and ngram not in searched.ngrams:
                line = int(numpy.searchsorted(line_of, start, side="right")) - 1
                searched.ngrams[ngram] = places[line]

    row: List[int] = []
    chunk_words: List[str] = []
    places: List[Place] = []
    starts: List[int] = []
    get = numbers.get
    for place, words in text:
        searched.n_lines += 1
        searched.n_words += len(words)
        if words and words[0] in firsts:
            sentence = tuple(words)
            if sentence in sentences:
                searched.sentences.setdefault(sentence, place)
        if len(words) >= n:
            starts.append(len(row))
            places.append(place)
            row.extend([get(word, 0) for word in words])
            row.append(0)
            chunk_words.extend(words)
            chunk_words.append("")
            if len(row) > CHUNK_N_WORDS:
                look(row, chunk_words, places, starts)
                row, chunk_words, places, starts = [], [], [], []
    look(row, chunk_words, places, starts)
    return searched


def _count(test: Dict[str, Sequence[str]], searched: Searched, n: int, min_words: int) -> Overlap:
    n_long = n_short = n_found_long = n_found_short = 0
    n_ngrams = n_found = n_touched = n_words = n_covered = 0
    leaked = []
    for utt, words in test.items():
        if not words:
            continue
        whole = searched.sentences.get(tuple(words))
        is_long = len(words) >= min_words
        n_long += is_long
        n_short += not is_long
        n_found_long += is_long and whole is not None
        n_found_short += not is_long and whole is not None
        ngrams = list(_ngrams(words, n))
        hits = [k for k, ngram in enumerate(ngrams) if ngram in searched.ngrams]
        runs = _runs(hits, n)
        n_ngrams += len(ngrams)
        n_found += len(hits)
        n_touched += bool(hits)
        n_words += len(words)
        n_covered += sum(end - start for start, end in runs)
        if whole is not None and is_long:
            leaked.append(LeakedSentence(utt, whole, list(words), whole, len(hits), len(words)))
        elif hits:
            start, end = max(runs, key=lambda run: run[1] - run[0])
            place = searched.ngrams[ngrams[start]]
            run = list(words[start:end])
            leaked.append(LeakedSentence(utt, whole, run, place, len(hits), len(words)))
    leaked.sort(key=lambda one: (one.whole is None, -one.n_ngrams, one.utt))
    return Overlap(
        n=n,
        min_words=min_words,
        n_sentences=n_long,
        n_short_sentences=n_short,
        n_found_sentences=n_found_long,
        n_found_short_sentences=n_found_short,
        n_ngrams=n_ngrams,
        n_found_ngrams=n_found,
        n_touched_sentences=n_touched,
        n_words=n_words,
        n_covered_words=n_covered,
        sentences=leaked,
    )


def _runs(starts: Sequence[int], n: int) -> List[Tuple[int, int]]:
    """[start, end) of the words that n-grams beginning at ``starts`` (rising) cover."""
    runs: List[Tuple[int, int]] = []
    for start in starts:
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], start + n)
        else:
            runs.append((start, start + n))
    return runs


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0
