"""N-gram LMs in ARPA files: log-probabilities of words, by kenlm where it is installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import InputError
from espnet_mpq.io import read_lines, sha256_file

LN10 = math.log(10.0)
SOS, EOS, UNK = "<s>", "</s>", "<unk>"
# log10 of an unknown word where the file has no <unk>, as in kenlm.
UNKNOWN_LOG10 = -100.0


class Ngram:
    """An n-gram LM with backing off.

    Args:
        path: an ARPA file (.gz too), or one of kenlm's binaries where kenlm is installed.
        use_kenlm: None: where it is installed.

    Raises:
        InputError: the file is missing or no ARPA file.
    """

    def __init__(self, path: Union[str, Path], use_kenlm: Optional[bool] = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"there is no n-gram LM {path}")
        if use_kenlm is None:
            use_kenlm = importlib.util.find_spec("kenlm") is not None
        self._kenlm = self._entries = None
        if use_kenlm:
            import kenlm

            try:
                self._kenlm = kenlm.Model(str(self.path))
            except OSError as error:
                raise InputError(f"kenlm cannot read {path}", found=error) from error
        else:
            self.order, self._entries = read_arpa(self.path)

    @property
    def reader(self) -> str:
        """What computes: kenlm or own."""
        return "own" if self._kenlm is None else "kenlm"

    def identity(self) -> Dict[str, object]:
        """What the scores depend on."""
        return {"ngram_sha256": sha256_file(self.path)}

    def knows(self, word: str) -> bool:
        """Whether a word is in the vocabulary."""
        return word in (self._kenlm if self._kenlm is not None else self._entries)

    def word_log_probs(self, words: Sequence[str]) -> List[float]:
        """Natural log-probability of every word and of the sentence end: len(words) + 1 values."""
        if self._kenlm is not None:
            scores = self._kenlm.full_scores(" ".join(words), bos=True, eos=True)
            return [LN10 * log10 for log10, _, _ in scores]
        known = [SOS] + [w if w in self._entries else UNK for w in [*words, EOS]]
        return [LN10 * self._log10(known[:i], known[i]) for i in range(1, len(known))]

    def _log10(self, history: Sequence[str], word: str) -> float:
        """Katz' backing off: the longest n-gram listed, and the weights of longer contexts."""
        weight = 0.0
        for n in range(min(len(history), self.order - 1), -1, -1):
            context = " ".join(history[len(history) - n :])
            entry = self._entries.get(f"{context} {word}" if n else word)
            if entry is not None:
                return weight + entry[0]
            weight += self._entries[context][1] if context in self._entries else 0.0
        return weight + UNKNOWN_LOG10


def read_arpa(path: Path) -> Tuple[int, Dict[str, Tuple[float, float]]]:
    """(order, "w1 w2 ..." -> (log10 probability, log10 back-off weight)) of an ARPA file.

    Raises:
        InputError: the file does not have the form, or not as many n-grams as it says.
    """
    entries: Dict[str, Tuple[float, float]] = {}
    promised: Dict[int, int] = {}
    found: Dict[int, int] = {}
    order, ended = None, False
    for number, line in enumerate(read_lines(path), 1):
        line = line.strip()
        if line.startswith("\\"):
            section = line.strip("\\:")
            order = 0 if section == "data" else None
            ended = ended or section == "end"
            if section.endswith("-grams") and section[:-6].isdecimal():
                order = int(section[:-6])
                found[order] = 0
        elif order == 0 and line.startswith("ngram "):
            n, _, count = line[6:].partition("=")
            promised[int(n)] = int(count)
        elif order and line:
            fields = line.split()
            try:
                words = " ".join(fields[1 : order + 1])
                backoff = float(fields[order + 1]) if len(fields) == order + 2 else 0.0
                if not order + 1 <= len(fields) <= order + 2:
                    raise ValueError("words")
                entries[words] = float(fields[0]), backoff
            except ValueError:
                raise InputError(
                    f"{path}, line {number} is no {order}-gram", found=repr(line[:80])
                ) from None
            found[order] += 1
    if not promised or found != promised or not ended:
        raise InputError(
            f"{path} is no whole ARPA file",
            found=f"n-grams {found}" + ("" if ended else ", no \\end\\"),
            expected=f"{promised}" if promised else "\\data\\, \\1-grams:, ..., \\end\\",
        )
    return max(promised), entries
