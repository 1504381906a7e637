"""Prepare the AMI transcripts as LM text: data/{train,dev,eval}/text, lines 'utt words...'.

The text comes from one of
  --data_root DIR     DIR/ami_lm/{train,valid,test}.txt.gz, transcripts in the Kaldi partition
  --annotations DIR   the corpus' own annotations (folder or zip), read by lhotse's AMI recipe
  the public address  without either: the annotations are downloaded (22 MB), then as above
AMI meeting corpus, https://groups.inf.ed.ac.uk/ami/corpus/, licence CC BY 4.0 (Carletta et al.).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path

URL = "https://groups.inf.ed.ac.uk/ami/AMICorpusAnnotations/ami_public_manual_1.6.2.zip"
# set -> file below data_root/ami_lm, its sha256
LOCAL = {
    "train": (
        "train.txt.gz",
        "449740b36487c90ff1ebd3ddd9cedd9e4036c03fe71dbced132d35b5b595bf29",
    ),
    "dev": ("valid.txt.gz", "ffdeecf22b367885a0d8e491e363d1e990362587318ed3e1c7759c7fc4609db8"),
    "eval": ("test.txt.gz", "2f12973a15ddeba1be046d4f06d9ec6d4fd7c6b9a27fdcfdc994f0c0354fc1d7"),
}
LHOTSE_SETS = {"train": "train", "dev": "dev", "eval": "test"}

Sets = dict[str, list[tuple[str, str]]]


def read_local(folder: Path) -> Sets:
    """The transcripts of data_root/ami_lm, numbered."""
    sets = {}
    for name, (file, sha256) in LOCAL.items():
        path = folder / file
        if not path.is_file():
            sys.exit(
                f"{path} does not exist; give --annotations DIR with the corpus' annotations, "
                "or unset MPQ_DATA_ROOT to download them"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            sys.exit(f"{path}: sha256 {found}, expected {sha256}; copy the file again")
        lines = gzip.decompress(content).decode("utf-8").splitlines()
        sets[name] = [(f"ami-{name}-{i:06d}", line) for i, line in enumerate(lines, 1)]
    return sets


def read_annotations(path: Path, unpacked: Path) -> Sets:
    """Transcripts of all speakers' segments, from the corpus' annotations by way of lhotse."""
    if not path.exists():
        sys.exit(f"{path} does not exist; expected the AMI annotations, a folder or a zip file")
    try:
        from lhotse.recipes.ami import PARTITIONS, parse_ami_annotations
    except ImportError as error:
        sys.exit(f"the corpus' annotations are read with lhotse: pip install lhotse ({error})")
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unpacked)
        except (zipfile.BadZipFile, zlib.error) as error:
            sys.exit(f"{path}: damaged archive ({error}); delete it and run this stage again")
        path = unpacked
    if not (path / "corpusResources" / "meetings.xml").is_file():
        sys.exit(f"{path} has no corpusResources/meetings.xml; expected the AMI annotations")
    annotations = parse_ami_annotations(path, normalize="kaldi")
    meetings = PARTITIONS["full-corpus-asr"]
    sets: Sets = {name: [] for name in LHOTSE_SETS}
    for (meeting, speaker, channel), segments in sorted(annotations.items()):
        names = [name for name, part in LHOTSE_SETS.items() if meeting in meetings[part]]
        for i, segment in enumerate(segments):
            for name in names:
                sets[name].append((f"{meeting}-{speaker}-{channel}-{i:05d}", segment.text.lower()))
    return sets


def download(folder: Path) -> Path:
    """The annotations from the public address, once."""
    archive = folder / URL.rsplit("/", 1)[-1]
    if not archive.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = archive.with_suffix(".part")
        try:
            with urllib.request.urlopen(URL, timeout=60) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            sys.exit(
                f"{URL}: {error}; download it by hand to {archive}, or give --annotations, or set "
                "MPQ_DATA_ROOT to a folder with ami_lm/"
            )
        part.rename(archive)
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Example: local/prepare_data.py --annotations /corpora/ami/ami_public_manual_1.6.2",
    )
    parser.add_argument("--data_root", default="", help="folder holding ami_lm/")
    parser.add_argument("--annotations", default="", help="AMI annotations: folder or zip")
    parser.add_argument("--downloads", type=Path, default=Path("downloads"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--n_sentences", type=int, default=0, help="of train, a tenth of the rest")
    args = parser.parse_args()
    if args.data_root and not args.annotations:
        sets = read_local(Path(args.data_root) / "ami_lm")
    else:
        path = Path(args.annotations) if args.annotations else download(args.downloads)
        sets = read_annotations(path, args.downloads / "annotations")
    for name, sentences in sets.items():
        sentences = [(utt, " ".join(text.split())) for utt, text in sentences if text.strip()]
        if args.n_sentences:
            sentences = sentences[: args.n_sentences if name == "train" else args.n_sentences // 10]
        if not sentences:
            sys.exit(f"no sentence for {name}")
        folder = args.data / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text").write_text("".join(f"{utt} {text}\n" for utt, text in sentences))
        n_words = sum(len(text.split()) for _, text in sentences)
        print(f"{folder}: {len(sentences)} sentences, {n_words} words")


if __name__ == "__main__":
    main()
