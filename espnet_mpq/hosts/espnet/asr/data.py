"""Reads a Kaldi-style data folder (wav.scp, segments, text) as the host's preprocessor gives it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import soundfile

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.hosts.espnet.kinds import ASR
from espnet_mpq.io import read_lines

READABLE = "a file that libsndfile reads (wav, flac, ogg, sph), or ark:offset"


@dataclass(frozen=True)
class Utterance:
    """What the folder says of one: its name, where the audio is, its span in s, its transcript."""

    name: str
    audio: str
    span: Optional[Tuple[float, float]]
    text: Optional[str]


@dataclass(frozen=True)
class Speech:
    """Utterances as the model takes them.

    Attributes:
        names: of the utterances.
        samples: float32 (n,) each, at the rate of the model's frontend.
        tokens: ids of the transcripts, int64 (L,) each; None where they were not asked for.
        sha256: of names, samples and tokens: what was measured on.
        seconds: of all.
    """

    names: List[str]
    samples: List[np.ndarray]
    tokens: List[Optional[np.ndarray]]
    sha256: str
    seconds: float

    def __len__(self) -> int:
        return len(self.names)


def read_folder(folder: Union[str, Path], needs_text: bool = True) -> List[Utterance]:
    """The utterances of a folder in the order of its segments, or of its wav.scp.

    Args:
        needs_text: refuse a folder without transcripts, and utterances without one.

    Raises:
        InputError: a file is missing or malformed, a command in wav.scp, no utterance.
    """
    folder = Path(folder)
    if not (folder / "wav.scp").is_file():
        raise InputError(
            f"{folder} has no wav.scp",
            expected="a Kaldi-style data folder: wav.scp, text, and segments if it has any "
            "(dump/raw/... of a recipe)",
        )
    audio = _read_table(folder / "wav.scp")
    has_text = (folder / "text").is_file()
    if needs_text and not has_text:
        raise InputError(
            f"{folder} has no text",
            todo="add the transcripts: the decoder is judged on them, token by token",
        )
    texts = _read_table(folder / "text", may_be_empty=True) if has_text else {}
    for name, value in audio.items():
        if value.endswith("|"):
            raise InputError(
                f"{folder}/wav.scp has a command for {name}",
                found=value[:80],
                expected=READABLE,
                todo="give the folder under dump/raw, which the recipe's format_wav_scp.sh made",
            )
    spans = dict.fromkeys(audio)
    sources = {name: name for name in audio}
    if (folder / "segments").is_file():
        sources, spans = _read_segments(folder / "segments", audio)
    missing = [name for name in sources if name not in texts]
    if needs_text and missing:
        raise InputError(
            f"{folder}/text lacks {len(missing)} utterances", found="no " + ", ".join(missing[:4])
        )
    found = [
        Utterance(name, audio[source], spans[name], texts.get(name))
        for name, source in sources.items()
    ]
    if not found:
        raise InputError(f"{folder} has no utterance")
    return found


def read_speech(
    exp: Experiment,
    folder: Union[str, Path],
    *,
    max_seconds: float = 0,
    seed: int = 0,
    needs_text: bool = True,
) -> Speech:
    """A random sample of the utterances of a folder, through the host's preprocessor.

    Args:
        exp: a recogniser, whose frontend and tokenizer count.
        max_seconds: of audio, at least one utterance; 0: all.
        needs_text: as read_folder.

    Raises:
        InputError: as read_folder; audio that cannot be read or has another rate than the model.
    """
    utterances = read_folder(folder, needs_text)
    order = list(range(len(utterances)))
    if max_seconds:
        random.Random(seed).shuffle(order)
    preprocess = _preprocessor(exp)
    rate = _rate(exp)
    kept: Dict[int, Tuple[np.ndarray, Optional[np.ndarray]]] = {}
    seconds = 0.0
    for i in order:
        utterance = utterances[i]
        samples, found = load_audio(utterance)
        if rate is not None and found != rate:
            raise InputError(
                f"{utterance.audio} has another rate than the model's features",
                found=f"{found} Hz",
                expected=f"{rate} Hz (frontend_conf.fs)",
            )
        if max_seconds and kept and seconds + len(samples) / found > max_seconds:
            continue
        data = {"speech": samples}
        if needs_text:
            data["text"] = utterance.text
        data = preprocess(utterance.name, data)
        kept[i] = data["speech"], data.get("text")
        seconds += len(samples) / found
        if max_seconds and seconds >= 0.98 * max_seconds:
            break
    chosen = sorted(kept)
    names = [utterances[i].name for i in chosen]
    samples, tokens = ([kept[i][k] for i in chosen] for k in (0, 1))
    return Speech(names, samples, tokens, _sha256(names, samples, tokens), seconds)


def load_audio(utterance: Utterance) -> Tuple[np.ndarray, int]:
    """(float32 samples of the first channel, rate); raises InputError."""
    path, start, stop = utterance.audio, 0, None
    try:
        if Path(path).is_file():
            with soundfile.SoundFile(path) as file:
                rate = file.samplerate
                if utterance.span is not None:
                    start, stop = (round(t * rate) for t in utterance.span)
                    stop = min(stop, file.frames)
                    file.seek(min(start, file.frames))
                n_frames = -1 if stop is None else max(0, stop - start)
                samples = file.read(n_frames, dtype="float32", always_2d=True)[:, 0]
        else:
            rate, samples = _read_ark(path)
            if utterance.span is not None:
                start, stop = (round(t * rate) for t in utterance.span)
                samples = samples[start:stop]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"the audio of {utterance.name} cannot be read",
            found=f"{path}: {error}",
            expected=READABLE,
            todo="relative paths count from the current folder: run this where the recipe runs",
        ) from error
    if not len(samples):
        raise InputError(f"the audio of {utterance.name} is empty", found=f"{path} {start}:{stop}")
    return np.ascontiguousarray(samples), int(rate)


def _read_ark(path: str) -> Tuple[int, np.ndarray]:
    """Audio in an archive, "data_wav.ark:1234", as the host's recipes keep it."""
    name, _, offset = path.rpartition(":")
    if not offset.isdigit() or not Path(name).is_file():
        raise FileNotFoundError("no such file")
    import kaldiio

    first, second = kaldiio.load_mat(path)
    rate, samples = (first, second) if isinstance(first, int) else (second, first)
    samples = samples if samples.ndim == 1 else samples[:, 0]
    if samples.dtype.kind == "i":
        return rate, samples.astype(np.float32) / 2.0 ** (8 * samples.itemsize - 1)
    return rate, samples.astype(np.float32)


def _read_table(path: Path, may_be_empty: bool = False) -> Dict[str, str]:
    """First word -> rest of the line; raises InputError for repeated or empty ones."""
    table: Dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        name, *rest = line.split(maxsplit=1)[:2] or [""]
        value = rest[0].strip() if rest else ""
        if not name or name in table or not (value or may_be_empty):
            raise InputError(
                f"{path}, line {number}",
                found=repr(line[:60]) + (", a name that was there before" if name in table else ""),
                expected="a name and a value",
            )
        table[name] = value
    return table


def _read_segments(path: Path, audio: Dict[str, str]):
    """(utterance -> recording, utterance -> (start, end) in seconds)."""
    sources, spans = {}, {}
    for name, value in _read_table(path).items():
        words = value.split()
        try:
            start, stop = float(words[1]), float(words[2])
            is_right = words[0] in audio and 0 <= start < stop and len(words) == 3
        except (IndexError, ValueError):
            is_right = False
        if not is_right:
            raise InputError(
                f"{path}, utterance {name}",
                found=repr(value[:60]),
                expected="a recording of wav.scp, its start and end in seconds",
            )
        sources[name], spans[name] = words[0], (start, stop)
    return sources, spans


def _preprocessor(exp: Experiment):
    try:
        made = ASR.host_task().build_preprocess_fn(exp.args, False)
    except Exception as error:  # the host's, for a tokenizer file that is not there
        raise InputError(
            f"the preprocessor of {exp.config} cannot be built",
            found=f"{type(error).__name__}: {error}",
            todo="run this in the recipe folder, where the model was trained",
        ) from error
    if made is None or exp.model.frontend is None:
        raise InputError(
            f"{exp.config} describes a recogniser that takes features",
            found="use_preprocessor: false" if made is None else "input_size, no frontend",
            expected="one that takes audio",
        )
    return made


def _rate(exp: Experiment) -> Optional[int]:
    """The rate that the frontend was made for; None where the host does not say."""
    if getattr(exp.args, "frontend", None) != "default":
        return None
    import humanfriendly

    rate = (exp.args.frontend_conf or {}).get("fs", 16000)
    return humanfriendly.parse_size(rate) if isinstance(rate, str) else int(rate)


def _sha256(
    names: Sequence[str], samples: Sequence[np.ndarray], tokens: Sequence[Optional[np.ndarray]]
) -> str:
    digest = hashlib.sha256()
    for name, audio, ids in zip(names, samples, tokens):
        words = "" if ids is None else " ".join(map(str, ids.tolist()))
        digest.update(f"{name} {len(audio)} {words}\n".encode("utf-8"))
        digest.update(np.ascontiguousarray(audio, dtype="<f4").tobytes())
    return digest.hexdigest()
