"""Stops the downloads that nltk data cause when the host is imported."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import List, Optional

# A named logger: the root functions of logging would configure it before the host does.
LOG = logging.getLogger("espnet_mpq")
# What g2p_en downloads while it is imported (by the host, for phonemes).
NLTK_RESOURCES = ("taggers/averaged_perceptron_tagger_eng.zip", "corpora/cmudict.zip")


def offer_nltk_placeholders() -> Optional[Path]:
    """Stop the downloads that the host's g2p_en starts at import, also in child processes.

    Placeholder files go to a private folder that becomes the LAST of nltk's search path:
    NLTK_DATA is searched before nltk's default folders, so these are repeated in front of
    ours and real data always wins. Returns the folder, or None when none could be written.
    """
    try:
        folder = _placeholder_folder()
    except OSError as error:
        LOG.warning("no folder for nltk placeholders (%s): imports may try to download", error)
        return None
    before = [p for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    if str(folder) not in before:
        paths = [*before, *_nltk_default_paths(), str(folder)]
        os.environ["NLTK_DATA"] = os.pathsep.join(dict.fromkeys(paths))
    data = sys.modules.get("nltk.data")
    if data is not None and str(folder) not in data.path:
        data.path.append(str(folder))
    return folder


def _nltk_default_paths() -> List[str]:
    """The folders that nltk searches by itself, in its order (nltk.data)."""
    prefix = sys.prefix
    paths = [os.path.expanduser("~/nltk_data")]
    paths += [os.path.join(prefix, *parts, "nltk_data") for parts in ((), ("share",), ("lib",))]
    if sys.platform.startswith("win"):
        return paths + [os.path.join(os.environ.get("APPDATA", "C:\\"), "nltk_data")]
    shared = ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")
    return paths + [os.path.join(p, "nltk_data") for p in shared]


def _placeholder_folder() -> Path:
    """The folder with one empty archive per resource, made when needed.

    Private to the user (0700, files 0600): nltk refuses data that others could change.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    bases = [Path(cache) / "espnet_mpq", Path(tempfile.gettempdir()) / f"espnet_mpq-{user}"]
    problem: Optional[OSError] = None
    for base in bases:
        folder = base / "nltk_placeholders"
        try:
            for resource in NLTK_RESOURCES:
                _write_placeholder(folder, resource)
            return folder
        except OSError as error:
            problem = error
    raise problem


def _write_placeholder(folder: Path, resource: str) -> None:
    target = folder / resource
    if target.is_file() and zipfile.is_zipfile(target):
        return
    for place in (folder, target.parent):
        place.mkdir(parents=True, exist_ok=True)
        os.chmod(place, 0o700)
    # Many jobs of a recipe may start at once: write aside, then rename.
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("README", "Placeholder of espnet_mpq; the real data was not downloaded.")
    os.replace(temporary, target)
