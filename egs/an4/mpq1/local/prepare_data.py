"""Prepare AN4 (or ESPnet's mini_an4): wav files and Kaldi-style data/{train,dev,test} folders.

The archive comes from a local folder (``--data_root``) or from the public address; both lead to the
same prepared folder. The checksum is over the samples, so that it holds for any container.
Speech: CMU AN4, http://www.speech.cs.cmu.edu/databases/an4/ (BSD-like licence).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import soundfile


@dataclass(frozen=True)
class Corpus:
    """Where one corpus comes from and what it must contain."""

    local_archive: str  # below data_root
    archive_sha256: str | None  # of the local archive
    local_etc: str | None  # transcriptions below data_root where they are not in the archive
    urls: tuple[str, ...]  # of the original archive
    n_train: int
    n_test: int
    audio_sha256: str  # over the samples, see audio_hash


CORPORA = {
    "an4": Corpus(
        local_archive="an4/an4_flac.tar",
        archive_sha256="997926a339a172f55cbd983f280eace61b3a97ccea7809998459353e78a7492f",
        local_etc="an4/etc",
        urls=(
            "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz",
            "https://huggingface.co/datasets/espnet/an4/resolve/main/an4_sphere.tar.gz",
        ),
        n_train=948,
        n_test=130,
        audio_sha256="c1a9b4e8afef4b3f667f2ac3be785d975edb9f42822385877c6634b32c68b2c3",
    ),
    "mini_an4": Corpus(
        local_archive="mini_an4/downloads.tar.gz",
        archive_sha256="42314268903a35709fff2029ee0fbac27c886eae37de308733e0f1b465f4eb5e",
        local_etc=None,
        urls=(
            "https://github.com/espnet/espnet/raw/master/egs2/mini_an4/asr1/downloads.tar.gz",
            "https://github.com/espnet/espnet/raw/v.202402/egs/mini_an4/asr1/downloads.tar.gz",
        ),
        n_train=5,
        n_test=2,
        audio_sha256="fca05933f767a330141c5f3da0b5ab46fdd8deb3c1e2eb2d83e137e7598966b5",
    ),
}


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(corpus: Corpus, data_root: str, downloads: Path) -> tuple[Path, Path | None]:
    """Return (archive, folder of transcriptions or None when they are inside the archive)."""
    if data_root:
        archive = Path(data_root) / corpus.local_archive
        if archive.is_file():
            found = sha256_of(archive)
            if found != corpus.archive_sha256:
                sys.exit(
                    f"{archive}: sha256 {found}, expected {corpus.archive_sha256}; "
                    "copy the archive again, or unset MPQ_DATA_ROOT to download the original"
                )
            return archive, Path(data_root) / corpus.local_etc if corpus.local_etc else None
        print(f"{archive} does not exist: downloading the original", file=sys.stderr)
    reasons = []
    for url in corpus.urls:
        archive = downloads / url.rsplit("/", 1)[-1]
        if archive.is_file():
            return archive, None
        part = archive.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.rename(archive)
            return archive, None
        except OSError as error:
            reasons.append(f"{url}: {error}")
    sys.exit(
        "no AN4 archive found; set MPQ_DATA_ROOT (or --data_root) to a folder that holds "
        f"{corpus.local_archive}, or download it by hand into {downloads}:\n  "
        + "\n  ".join(reasons)
    )


def unpack(archive: Path, target: Path) -> None:
    """Extract regular files of a tar archive that stay below target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and ".." not in Path(member.name).parts and member.name[0] != "/":
                path = target / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)


def read_transcripts(etc: Path, part: str) -> dict[str, tuple[str, str]]:
    """Map utterance id to (path of the audio without extension, words)."""
    stems = (etc / f"an4_{part}.fileids").read_text().split()
    lines = (etc / f"an4_{part}.transcription").read_text().splitlines()
    words = {}
    for line in filter(str.strip, lines):
        match = re.fullmatch(r"\s*(?:<s>)?(.*?)(?:</s>)?\s*\(([^()]+)\)\s*", line)
        if match is None:
            sys.exit(f"{etc}/an4_{part}.transcription: cannot read the line {line!r}")
        words[match.group(2)] = " ".join(match.group(1).split())
    utterances = {}
    for stem in stems:
        speaker, name = stem.split("/")[-2:]
        if name not in words:
            sys.exit(f"{etc}/an4_{part}.transcription: no line for {stem}")
        utterances[f"{speaker}-{name}"] = (stem, words[name])
    return dict(sorted(utterances.items()))


def convert(root: Path, utterances: dict, wav_dir: Path) -> list[str]:
    """Write <wav_dir>/<utt>.wav (16 bit PCM) and return one sha256 of the samples per utterance."""
    wav_dir.mkdir(parents=True, exist_ok=True)
    digests = []
    for utt, (stem, _) in utterances.items():
        sources = sorted((root / "wav").glob(f"{stem}.*"))
        if not sources:
            sys.exit(f"{root}/wav/{stem}.*: no audio file for utterance {utt}")
        samples, rate_hz = soundfile.read(sources[0], dtype="int16")
        if rate_hz != 16000 or samples.ndim != 1:
            sys.exit(f"{sources[0]}: {rate_hz} Hz, shape {samples.shape}; expected 16000 Hz mono")
        soundfile.write(wav_dir / f"{utt}.wav", samples, rate_hz, subtype="PCM_16")
        digests.append(f"{utt} {hashlib.sha256(samples.astype('<i2').tobytes()).hexdigest()}")
    return digests


def write_kaldi(folder: Path, utterances: dict, wav_dir: Path) -> None:
    """Write wav.scp, text, utt2spk and spk2utt, sorted by utterance id."""
    folder.mkdir(parents=True, exist_ok=True)
    speakers: dict[str, list[str]] = {}
    for utt in utterances:
        speakers.setdefault(utt.split("-")[0], []).append(utt)
    tables = {
        "wav.scp": [f"{utt} {wav_dir / utt}.wav" for utt in utterances],
        "text": [f"{utt} {words}" for utt, (_, words) in utterances.items()],
        "utt2spk": [f"{utt} {utt.split('-')[0]}" for utt in utterances],
        "spk2utt": [f"{speaker} {' '.join(utts)}" for speaker, utts in sorted(speakers.items())],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: local/prepare_data.py --corpus an4 --data_root /data --dev_utts 100",
    )
    parser.add_argument("--corpus", choices=sorted(CORPORA), default="an4")
    parser.add_argument(
        "--data_root", default="", help="folder holding an4/ and mini_an4/; empty: download"
    )
    parser.add_argument("--downloads", type=Path, default=Path("downloads"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--dev_utts", type=int, default=100, help="training utterances cut off as dev set"
    )
    args = parser.parse_args()
    corpus = CORPORA[args.corpus]

    args.downloads.mkdir(parents=True, exist_ok=True)
    archive, etc = fetch(corpus, args.data_root, args.downloads)
    unpacked = args.downloads / f"{args.corpus}_unpacked"
    try:
        unpack(archive, unpacked)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        sys.exit(f"{archive}: damaged archive ({error}); delete it and run this stage again")
    root = next((path.parent for path in sorted(unpacked.rglob("wav")) if path.is_dir()), None)
    if root is None:
        sys.exit(f"{archive}: holds no folder named wav; expected the AN4 layout")
    etc = etc or root / "etc"

    wav_dir = args.downloads / "wav16k"
    train, test = read_transcripts(etc, "train"), read_transcripts(etc, "test")
    if (len(train), len(test)) != (corpus.n_train, corpus.n_test):
        sys.exit(
            f"{etc}: {len(train)} training and {len(test)} test utterances, "
            f"expected {corpus.n_train} and {corpus.n_test}"
        )
    digests = convert(root, {**train, **test}, wav_dir)
    found = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    if found != corpus.audio_sha256:
        sys.exit(f"{archive}: sha256 of the samples {found}, expected {corpus.audio_sha256}")
    shutil.rmtree(unpacked)

    ids = list(train)
    dev = {utt: train[utt] for utt in ids[: args.dev_utts]}
    train = {utt: train[utt] for utt in ids[args.dev_utts :]}
    for name, part in (("train", train), ("dev", dev), ("test", test)):
        write_kaldi(args.data / name, part, wav_dir)
        print(f"{args.data / name}: {len(part)} utterances")


if __name__ == "__main__":
    main()
