"""The output directory of a packed LM: whose it is, and how new files get into it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterable, Iterator, List, Mapping, Optional

from espnet_mpq.errors import InputError
from espnet_mpq.io import write_error
from espnet_mpq.lock import locked
from espnet_mpq.packed.format import PACKED_FILE, is_packed

FOLDERS = ("images", "perplexity_test")
# In the order in which they are put in place: config.yaml makes the directory an experiment.
TARGETS = (PACKED_FILE, "receipt.json", *FOLDERS, "config.yaml")
TOKENIZER_OPTIONS = ("bpemodel", "non_linguistic_symbols")  # of config.yaml: names of files
# What was measured on the LM: by `mpq quantize` and by the host's lm_calc_perplexity.
PERPLEXITY_JSON = "perplexity.json"
PERPLEXITY_FILES = ("ppl", "base", "utt2nll", "utt2ntokens", "utt2ppl")
_OURS = re.compile(
    r"^(lm|model):\s*['\"]?mpq_packed_\w+['\"]?\s*(#.*)?$", re.IGNORECASE | re.MULTILINE
)
_MARK = ".mpq-"  # tells our temporary folders from the user's hidden ones


def check_output(output_dir: Path, sources: Iterable[Path]) -> None:
    """Refuse a directory in which `mpq pack` would write over what it did not write.

    Fine are: a new directory, one with other names only, and a packed LM, whole or left half
    written by a run that was killed.

    Raises:
        InputError: ``output_dir`` is one of ``sources``, no directory, or has one of our names
            but is no packed LM, or one of our names is a file instead of a folder or vice versa.
    """
    if any(output_dir.resolve() == source.resolve() for source in sources):
        raise InputError(
            f"the output directory {output_dir} is the input", todo="give another --output_dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file", expected="a directory for --output_dir")
    present = [name for name in TARGETS if os.path.lexists(output_dir / name)]
    if present and not _is_packed_lm(output_dir):
        raise InputError(
            f"{output_dir} holds another experiment"
            if "config.yaml" in present
            else f"{output_dir} holds files that mpq did not write",
            found=", ".join(present),
            expected="a new directory, or a packed LM to replace",
            todo="give another output directory",
        )
    for name in present:
        _check_kind(output_dir / name, is_folder=name in FOLDERS)


@contextlib.contextmanager
def replaced_directory(output_dir: Path) -> Iterator[Path]:
    """A new folder on the disk of ``output_dir`` whose content moves there if all goes well.

    A folder holds one LM: tokenizer files and perplexities of the one that is replaced go with
    it. Files of ``output_dir`` that have other names stay.

    Raises:
        InputError: something cannot be written; no temporary file stays behind.
        BusyError: another process is writing there.
    """
    with locked(output_dir):
        yield from _replaced(output_dir)


def _replaced(output_dir: Path) -> Iterator[Path]:
    temporary, moving = None, False
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(output_dir)
        # Inside an existing directory: it may be a file system of its own.
        place = output_dir if output_dir.exists() else output_dir.parent
        temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}{_MARK}", dir=place))
        yield temporary
        _check_kinds(temporary, output_dir)
        _check_tokenizer(temporary, output_dir)
        moving = True
        _move_into(temporary, output_dir)
    except (OSError, InputError) as error:
        # An error of a file writer names the temporary file: say the user's directory instead.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise write_error(_user_path(cause, temporary, output_dir), cause, not moving) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_names(config: Mapping) -> List[str]:
    """Names, beside config.yaml, of the files that its tokenizer options name."""
    values = [config.get(option) for option in TOKENIZER_OPTIONS]
    return [Path(value).name for value in values if isinstance(value, str) and Path(value).name]


def _old_config(output_dir: Path) -> dict:
    """config.yaml of the packed LM in a folder; {} if there is none that can be read."""
    import yaml

    try:
        config = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_tokenizer(folder: Path, output_dir: Path) -> None:
    """Refuse to write over a tokenizer file that belongs to no packed LM."""
    own = tokenizer_names(_old_config(output_dir))
    for path in sorted(folder.iterdir()):
        target = output_dir / path.name
        if path.name in (*TARGETS, *own) or not target.is_file():
            continue
        if target.read_bytes() != path.read_bytes():
            raise InputError(
                f"{target} is in the way",
                found="another file than the one of this LM",
                todo="move it away or give another output directory; nothing was changed",
            )


def _is_packed_lm(folder: Path) -> bool:
    """Whether a config.yaml or, before there is one, a packed file of ours is in the folder."""
    config = folder / "config.yaml"
    try:
        if os.path.lexists(config):
            return bool(_OURS.search(config.read_text(encoding="utf-8", errors="replace")))
        return is_packed(folder / PACKED_FILE)
    except OSError:
        return False


def _check_kind(path: Path, is_folder: bool) -> None:
    if os.path.lexists(path) and path.is_dir() != is_folder:
        raise InputError(
            f"{path} is in the way",
            found="a folder" if path.is_dir() else "a file",
            expected="a folder" if is_folder else "a file",
            todo="move it away or give another output directory; nothing was changed",
        )


def _check_kinds(folder: Path, output_dir: Path) -> None:
    """Refuse before the first rename what a later one would stumble over."""
    for path in sorted(folder.rglob("*")):
        _check_kind(output_dir / path.relative_to(folder), path.is_dir())


def _user_path(error: OSError, temporary: Optional[Path], output_dir: Path) -> Path:
    """The file that the error names, unless it is a temporary one."""
    name = error.filename
    if not isinstance(name, str) or temporary is None or str(temporary) in name:
        return output_dir
    return Path(name)


def _remove_stale(output_dir: Path) -> None:
    """Temporary folders that killed runs left, in the directory or beside it."""
    for place in (output_dir, output_dir.parent):
        for path in place.iterdir() if place.is_dir() else ():
            if path.name.startswith(f".{output_dir.name}{_MARK}") and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _move_into(folder: Path, output_dir: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(folder, 0o777 & ~mask)  # mkdtemp makes private folders
    if not output_dir.exists():
        os.replace(folder, output_dir)
        return
    old, new = output_dir / PACKED_FILE, folder / PACKED_FILE
    if not old.is_file() or old.read_bytes() != new.read_bytes():
        _forget_perplexity(output_dir / "perplexity_test")
        (output_dir / PERPLEXITY_JSON).unlink(missing_ok=True)
    stale = _stale_tokenizer(folder, output_dir)
    others = [path.name for path in sorted(folder.iterdir()) if path.name not in TARGETS]
    # The packed file first: from then on the old config.yaml is refused. The new one last.
    for name in (PACKED_FILE, *others, *TARGETS[1:]):
        path, target = folder / name, output_dir / name
        if path.is_dir():
            target.mkdir(exist_ok=True)
            for inner in sorted(path.iterdir()):
                os.replace(inner, target / inner.name)
        elif path.exists():
            os.replace(path, target)
        if name == PACKED_FILE:
            for old in stale:
                old.unlink(missing_ok=True)


def _stale_tokenizer(folder: Path, output_dir: Path) -> List[Path]:
    """Tokenizer files of the LM that is replaced by one with other tokens."""
    old, new = _old_config(output_dir), _old_config(folder)
    if old.get("token_list") == new.get("token_list"):
        return []
    names = set(tokenizer_names(old)) - {path.name for path in folder.iterdir()} - set(TARGETS)
    return [output_dir / name for name in sorted(names)]


def _forget_perplexity(folder: Path) -> None:
    """Remove what was measured on the model that is being replaced, and nothing else."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name in PERPLEXITY_FILES and path.is_file():
            path.unlink()
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
