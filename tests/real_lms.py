"""LMs that the host's own lm_train trains on real text, for tests and benchmarks."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import List, Sequence

RECURRENT = {"lm": "seq_rnn", "optim_conf": {"lr": 0.002}}
TRANSFORMER = {
    "lm": "transformer",
    "optim_conf": {"lr": 0.001},
    "scheduler": "warmuplr",
    "scheduler_conf": {"warmup_steps": 400},
}


def read_sentences(path: Path, max_words: int = 0) -> List[str]:
    """The lines of a .txt.gz that are not empty, until ``max_words`` words (0: all)."""
    sentences, n_words = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if words:
                sentences.append(" ".join(words))
                n_words += len(words)
            if max_words and n_words >= max_words:
                break
    return sentences


def word_list(sentences: Sequence[str], n_tokens: int) -> List[str]:
    """A token list of the most frequent words, as the host wants it."""
    counts = Counter(word for s in sentences for word in s.split())
    counts.pop("<unk>", None)
    words = [word for word, _ in counts.most_common(n_tokens - 3)]
    return ["<blank>", "<unk>", *words, "<sos/eos>"]


def train_host_lm(
    folder: Path,
    train: Sequence[str],
    valid: Sequence[str],
    tokens: Sequence[str],
    lm_conf: dict,
    *,
    batch_tokens: int = 1000,
    **settings,
) -> Path:
    """Train a word LM by the host's LMTask in this process; goes on after a kill.

    ``settings`` are options of lm_train (RECURRENT or TRANSFORMER, max_epoch...). Returns the
    experiment folder.
    """
    import yaml
    from espnet2.tasks.lm import LMTask

    folder = Path(folder).resolve()
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    words = ["--token_list", str(data / "tokens.txt"), "--resume", "true", "--ngpu", "0"]
    for name, sentences in (("train", train), ("valid", valid)):
        keys = [f"{name}{i:06d}" for i in range(len(sentences))]
        text = "".join(f"{k} {s}\n" for k, s in zip(keys, sentences))
        shape = "".join(f"{k} {len(s.split())}\n" for k, s in zip(keys, sentences))
        (data / name).write_text(text, encoding="utf-8")
        (data / f"{name}_shape").write_text(shape, encoding="utf-8")
        words += [f"--{name}_data_path_and_name_and_type", f"{data / name},text,text"]
        words += [f"--{name}_shape_file", str(data / f"{name}_shape")]
    values = dict(
        model="lm",
        lm_conf=lm_conf,
        token_type="word",
        optim="adam",
        batch_type="numel",
        batch_bins=batch_tokens,
        grad_clip=1.0,
        num_workers=0,
        seed=0,
        keep_nbest_models=1,
        best_model_criterion=[["valid", "loss", "min"]],
        use_tensorboard=False,
        use_matplotlib=False,
    )
    values.update(settings)
    (folder / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    LMTask.main(
        cmd=["--config", str(folder / "train.yaml"), "--output_dir", str(folder / "exp"), *words]
    )
    return folder / "exp"
