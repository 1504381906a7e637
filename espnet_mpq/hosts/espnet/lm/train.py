"""Runs the host's lm_train on text that belongs to no recipe; resumes, logs into one folder."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Collection, Dict, List, Optional, Sequence, Union

from espnet_mpq.errors import InputError, MpqError
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.hosts.espnet.lm.tokenizer import find_tokenizer_files, tokenize
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.io import FULL, atomic_write, sha256_bytes, sha256_file, write_error
from espnet_mpq.text import Sentences, with_host_names, write_text

LOG = logging.getLogger("espnet_mpq")
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "file write failed")
BATCH_TOKENS = 1600  # predicted tokens of one update


def train_lm(
    exp: Experiment,
    config: Union[str, Path],
    train: Sentences,
    valid: Sentences,
    folder: Union[str, Path],
    *,
    init: Optional[Path] = None,
    keep: Collection[str] = (),
    max_epoch: Optional[int] = None,
    epoch_tokens: Optional[int] = None,
    ngpu: int = 0,
    seed: int = 0,
) -> Path:
    """Train with a ready --config from the checkpoint of ``exp``; goes on after a kill.

    Args:
        exp: the fp LM; its token list and tokenizer are used.
        config: a training config of the host (train_lm_mpq.yaml of `mpq plan`). Its batches,
            accumulation and seed are replaced: they were made for the fp LM's data.
        train, valid: (utt, text) pairs.
        folder: gets data/, exp/ (an LM experiment of the host) and train.log. A finished or
            interrupted run on the same inputs is taken up; one on others is set aside.
        init: the checkpoint to start from; default: that of ``exp``.
        keep: options of ``config`` that the user chose, not to be replaced.
        epoch_tokens: tokens per epoch; None or more than there are: the whole text.

    Returns:
        The experiment folder.

    Raises:
        InputError: a sentence file cannot be made, or the host stopped with an error.
    """
    check_paths(folder, exp.checkpoint if init is None else init)
    register()
    from espnet2.tasks.lm import LMTask

    folder = Path(folder).resolve()
    data, output = folder / "data", folder / "exp"
    _write_token_list(exp.vocabulary.tokens, data / "tokens.txt")
    tokenizer = find_tokenizer_files(exp.args, str(exp.config))
    tokenizer = {option: os.path.abspath(path) for option, path in tokenizer.items()}
    words = ["--token_list", str(data / "tokens.txt"), *_tokenizer_options(exp, tokenizer)]
    n_tokens = {}
    for name, sentences in (("train", train), ("valid", valid)):
        n_tokens[name] = _write_set(exp, sentences, data / name)
        words += [f"--{name}_data_path_and_name_and_type", f"{data / name / 'text'},text,text"]
        words += [f"--{name}_shape_file", str(data / name / "shape")]
    settings = _settings(n_tokens["train"], keep, max_epoch, epoch_tokens, seed)
    init = exp.checkpoint if init is None else Path(init)
    files = [init, *tokenizer.values(), *sorted(data.rglob("*"))]
    _set_aside_other_run(folder, output, config, settings, files)
    words += [w for name, value in settings.items() for w in (f"--{name}", str(value))]
    words += ["--config", str(config), "--output_dir", str(output), "--resume", "true"]
    words += ["--init_param", str(init.resolve()), "--ngpu", str(ngpu)]
    try:
        with _log_file(folder / "train.log"):
            LMTask.main(cmd=words)
    except MpqError:
        raise
    except (Exception, SystemExit) as error:  # whatever the host, torch or the disk say
        raise _stopped(error, folder) from error
    return output


def check_paths(folder: Union[str, Path], checkpoint: Union[str, Path]) -> None:
    """Raise InputError for paths with a character that an option of the host splits at.

    Args:
        folder: that `train_lm` will train in.
        checkpoint: that it will start from.
    """
    for path, mark, name, form in (
        (folder, ",", "comma", "--train_data_path_and_name_and_type PATH,NAME,TYPE"),
        (checkpoint, ":", "colon", "--init_param FILE:SRC:DST:EXCLUDE"),
    ):
        if mark in str(Path(path).resolve()):
            raise InputError(
                f"ESPnet cannot train with the path {path}",
                found=f"a {name}, at which {form} is split",
                expected=f"a path without {name}",
                todo="give another one, or a link without it",
            )


def _stopped(error: BaseException, folder: Path) -> InputError:
    """The error for a training that the host broke off; says plainly that a disk is full."""
    again = "the same command goes on from the last checkpoint"
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    full = [c for c in causes if isinstance(c, OSError) and c.errno in FULL]
    # torch tells no more of a failed write than where in its own code that was.
    if not full and any(word in str(error) for word in TORCH_WRITE_ERRORS):
        full = _full_disk(folder)
    if full:
        made = write_error(f"the training's files in {folder}", full[0])
        return made.advising(f"free disk space; {again}")
    first = " ".join(str(error).split())[:200]
    return InputError(
        "the training stopped",
        found=f"{type(error).__name__}: {first}",
        todo=f"see the end of {folder / 'train.log'}; {again}",
    )


def _full_disk(folder: Path) -> List[OSError]:
    """[the error of a write of 1 MiB into ``folder``], or [] if that succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [error]
    return []


def _settings(n_tokens: int, keep, max_epoch, epoch_tokens, seed: int) -> Dict[str, object]:
    """Options of the host that fit these texts, but for those in ``keep``."""
    settings = {"batch_type": "numel", "batch_bins": BATCH_TOKENS}
    if any(name.startswith("batch_") for name in keep):
        settings = {}
    if not any(name.startswith("valid_batch_") for name in keep):
        settings.update(valid_batch_type="numel", valid_batch_bins=4 * BATCH_TOKENS)
    n_iters = "none"
    if epoch_tokens is not None and epoch_tokens < n_tokens:
        n_iters = max(1, epoch_tokens // BATCH_TOKENS)
    ours = {"accum_grad": 1, "num_iters_per_epoch": n_iters, "seed": seed}
    settings.update({name: value for name, value in ours.items() if name not in keep})
    if max_epoch is not None:
        settings["max_epoch"] = max_epoch
    return settings


def _tokenizer_options(exp: Experiment, files: Dict[str, str]) -> List[str]:
    """The text options of the fp LM, as command line words."""
    options = {
        name: getattr(exp.args, name, None)
        for name in ("token_type", "bpemodel", "cleaner", "g2p", "non_linguistic_symbols")
    }
    options.update(files)
    # "none" is the host's word. Left out, a cleaner of the training config would change the text.
    words = {name: "none" if value is None else str(value) for name, value in options.items()}
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def _write_token_list(tokens: Sequence[str], path: Path) -> None:
    for number, token in enumerate(tokens):
        # As the host reads them: white space at the end, but of the first character, is cut.
        if not token or "\n" in token or "\r" in token or token[:1] + token[1:].rstrip() != token:
            raise InputError(
                f"token {number} of the LM cannot be a line of a token list", found=repr(token)
            )
    atomic_write(path, "".join(f"{token}\n" for token in tokens))


def _write_set(exp: Experiment, sentences: Sentences, folder: Path) -> int:
    """`utt text` lines and the shape file that the host's batch sampler reads; total tokens."""
    sentences = with_host_names(sentences)
    text = tokenize(exp, sentences)
    kept = [(s, len(ids)) for s, ids in zip(sentences, text.ids) if len(ids)]
    if not kept:
        raise InputError(f"{folder.name} text: no sentence has a token")
    write_text(folder / "text", [sentence for sentence, _ in kept])
    atomic_write(folder / "shape", "".join(f"{utt} {n}\n" for (utt, _), n in kept))
    return sum(n + 1 for _, n in kept)


def _set_aside_other_run(folder: Path, output: Path, config, settings: dict, files) -> None:
    """Move a run that had other inputs aside, and back when its inputs are given again.

    Nothing is deleted; a run is set aside under the first digits of the hash of its inputs.
    """
    import yaml

    options = yaml.safe_load(Path(config).read_text(encoding="utf-8"))  # comments do not count
    hashes = [sha256_file(f) for f in files if Path(f).is_file()]
    key = sha256_bytes(json.dumps([options, settings, hashes], sort_keys=True).encode())
    mark = folder / "inputs.sha256"
    if output.exists() and (not mark.is_file() or mark.read_text().strip() != key):
        old = folder / f"exp.{mark.read_text().strip()[:12] if mark.is_file() else 'old'}"
        while old.exists():
            old = old.with_name(old.name + "+")
        output.rename(old)
        LOG.warning("%s was trained on other inputs or options: moved to %s", output, old.name)
        mark.unlink(missing_ok=True)
    mine = folder / f"exp.{key[:12]}"
    if mine.is_dir() and not output.exists():
        mine.rename(output)
        LOG.warning("%s, trained on these inputs before, is taken up again", mine)
    atomic_write(mark, key + "\n")


@contextmanager
def _log_file(path: Path):
    """The host's log goes to a file; the result line of every epoch also to the terminal."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s (%(module)s:%(lineno)d) %(message)s"))
    terminal = logging.StreamHandler()
    terminal.addFilter(lambda record: "epoch results" in record.getMessage())
    terminal.setFormatter(_EpochLine())
    # With handlers on the root logger the host's logging.basicConfig does nothing.
    root.handlers = [file, terminal]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = before
        root.setLevel(level)
        file.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record) -> None:
        """Say nothing of a full disk here: the next checkpoint stops the run."""


class _EpochLine(logging.Formatter):
    """"3epoch results: [train] ... [valid] loss=4.1, ppl=60.2, ..." -> a short line."""

    KEYS = ("loss", "ppl", "admm_primal", "admm_gamma", "nas_n_bytes", "nas_temperature", "time")

    def format(self, record) -> str:
        message = record.getMessage()
        epoch = message.split("epoch results", 1)[0].split()[-1]
        valid = message.split("[valid]", 1)[-1].split("[", 1)[0]
        values = [v.strip() for v in valid.split(",")]
        shown = [v for v in values if v.split("=")[0] in self.KEYS]
        return f"mpq: epoch {epoch}, quantized LM on the valid text: " + ", ".join(shown)
