"""Runs the host's lm_train on text that belongs to no recipe; resumes, logs into one folder."""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.experiment import Experiment
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.hosts.espnet.text import tokenize
from espnet_mpq.io import atomic_write, sha256_bytes, sha256_file

Sentences = Sequence[Tuple[str, str]]
BATCH_TOKENS = 1600  # predicted tokens of one update
VALID_FRACTION, VALID_MAX_SENTENCES = 0.05, 1000


def split_valid(sentences: Sentences, seed: int) -> Tuple[list, list]:
    """(train, valid): 5 % of the sentences, at most 1,000, at least one, are held out."""
    if len(sentences) < 2:
        raise InputError(
            "the text has one sentence", expected="more, or a text of its own with --valid_text"
        )
    order = list(range(len(sentences)))
    random.Random(seed).shuffle(order)
    n_valid = min(max(1, int(VALID_FRACTION * len(order))), VALID_MAX_SENTENCES)
    held = set(order[:n_valid])
    train = [s for i, s in enumerate(sentences) if i not in held]
    return train, [s for i, s in enumerate(sentences) if i in held]


def train_lm(
    exp: Experiment,
    config: Union[str, Path],
    train: Sentences,
    valid: Sentences,
    folder: Union[str, Path],
    *,
    max_epoch: Optional[int] = None,
    epoch_tokens: Optional[int] = None,
    ngpu: int = 0,
    seed: int = 0,
) -> Path:
    """Train with a ready --config from the checkpoint of ``exp``; goes on after a kill.

    Args:
        exp: the fp LM; its token list and tokenizer are used.
        config: a training config of the host (train_lm_mpq.yaml of `mpq plan`).
        train, valid: (utt, text) pairs.
        folder: gets data/, exp/ (an LM experiment of the host) and train.log. A finished or
            interrupted run on the same inputs is taken up, one on others is started anew.
        epoch_tokens: tokens per epoch; None or more than there are: the whole text.

    Returns:
        The experiment folder.

    Raises:
        InputError: a sentence file cannot be made, or the host stopped with an error.
    """
    register()
    from espnet2.tasks.lm import LMTask

    folder = Path(folder).resolve()
    data, output = folder / "data", folder / "exp"
    words = ["--config", str(config), "--output_dir", str(output), "--resume", "true"]
    words += ["--init_param", str(exp.checkpoint.resolve()), "--ngpu", str(ngpu)]
    words += ["--seed", str(seed), "--token_list", str(data / "tokens.txt")]
    words += _tokenizer_options(exp)
    n_tokens = 0
    atomic_write(data / "tokens.txt", "".join(f"{token}\n" for token in exp.token_list))
    for name, sentences in (("train", train), ("valid", valid)):
        n_tokens_here = _write_set(exp, sentences, data / name)
        n_tokens = n_tokens or n_tokens_here
        words += [f"--{name}_data_path_and_name_and_type", f"{data / name / 'text'},text,text"]
        words += [f"--{name}_shape_file", str(data / name / "shape")]
    words += ["--batch_type", "numel", "--batch_bins", str(BATCH_TOKENS)]
    words += ["--valid_batch_bins", str(4 * BATCH_TOKENS)]
    if epoch_tokens is not None and epoch_tokens < n_tokens:
        words += ["--num_iters_per_epoch", str(max(1, epoch_tokens // BATCH_TOKENS))]
    if max_epoch is not None:
        words += ["--max_epoch", str(max_epoch)]
    _drop_other_run(folder, output, [config, *sorted(data.rglob("*"))], words)
    with _log_file(folder / "train.log"):
        try:
            LMTask.main(cmd=words)
        except SystemExit as stop:  # argparse of the host
            raise InputError(
                "the host refused the training options", found=f"exit status {stop.code}",
                todo=f"see the message above and {config}",
            ) from stop
    return output


def _tokenizer_options(exp: Experiment) -> List[str]:
    """The text options of the fp LM, as command line words."""
    from espnet_mpq.hosts.espnet.text import find_tokenizer_files

    options = {
        name: getattr(exp.args, name, None)
        for name in ("token_type", "bpemodel", "cleaner", "g2p", "non_linguistic_symbols")
    }
    options.update(find_tokenizer_files(exp.args, str(exp.config)))
    return [w for name, v in options.items() if v is not None for w in (f"--{name}", str(v))]


def _write_set(exp: Experiment, sentences: Sentences, folder: Path) -> int:
    """`utt text` lines and the shape file that the host's batch sampler reads; total tokens."""
    text = tokenize(exp, sentences)
    kept = [(s, len(ids)) for s, ids in zip(sentences, text.ids) if len(ids)]
    if not kept:
        raise InputError(f"{folder.name} text: no sentence has a token")
    atomic_write(folder / "text", "".join(f"{utt} {line}\n" for (utt, line), _ in kept))
    atomic_write(folder / "shape", "".join(f"{utt} {n}\n" for (utt, _), n in kept))
    return sum(n + 1 for _, n in kept)


def _drop_other_run(folder: Path, output: Path, files, words: List[str]) -> None:
    """Remove the traces of a run that had other inputs; a run with these goes on."""
    hashes = [sha256_file(f) for f in files if Path(f).is_file()]
    key = sha256_bytes("\n".join([*words, *hashes]).encode())
    mark = folder / "inputs.sha256"
    if output.exists() and (not mark.is_file() or mark.read_text().strip() != key):
        import shutil

        shutil.rmtree(output)
        (folder / "train.log").unlink(missing_ok=True)
    atomic_write(mark, key + "\n")


@contextmanager
def _log_file(path: Path):
    """The host's log goes to a file; the result line of every epoch also to the terminal."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    file = logging.FileHandler(path, encoding="utf-8")
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


class _EpochLine(logging.Formatter):
    """"3epoch results: [train] ... [valid] loss=4.1, ppl=60.2, ..." -> a short line."""

    KEYS = ("loss", "ppl", "admm_primal", "admm_gamma", "time")

    def format(self, record) -> str:
        message = record.getMessage()
        epoch = message.split("epoch results", 1)[0].split()[-1]
        valid = message.split("[valid]", 1)[-1].split("[", 1)[0]
        values = [v.strip() for v in valid.split(",")]
        shown = [v for v in values if v.split("=")[0] in self.KEYS]
        return f"mpq: epoch {epoch}, quantized LM on the valid text: " + ", ".join(shown)
