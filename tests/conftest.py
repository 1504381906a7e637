"""Shared fixtures: staged data, the host imported once, tiny experiments and text."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

CHAR_TOKENS = ["<blank>", "<unk>", "<space>", *"abcdefghijklmnopqrstuvwxyz", "'", "<sos/eos>"]


@dataclasses.dataclass(frozen=True)
class TinyExp:
    """A host experiment directory: paths of its parts, token list, and its settings as a dict."""

    path: Path
    config: Path
    checkpoint: Path
    token_list: list
    settings: dict


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the staged real data, from $MPQ_DATA_ROOT."""
    root = os.environ.get("MPQ_DATA_ROOT")
    if not root:
        pytest.skip("MPQ_DATA_ROOT is not set: tests on real data are skipped")
    if not Path(root).is_dir():
        pytest.skip(f"MPQ_DATA_ROOT={root} is not a folder")
    return Path(root).resolve()


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory) -> Path:
    """The kernel library of these sources, or $MPQ_KERNEL_LIBRARY; skips without a compiler."""
    from espnet_mpq.kernels import build

    given = os.environ.get("MPQ_KERNEL_LIBRARY")
    if given:
        return Path(given)
    try:
        return build.compile_library(tmp_path_factory.mktemp("kernels") / "libmpq_kernels.so.1")
    except build.BuildError as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture
def kernels(kernel_library, monkeypatch) -> tuple:
    """The paths this machine can run, slowest first; no path is forced."""
    from espnet_mpq.kernels import dispatch

    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(kernel_library))
    monkeypatch.delenv("MPQ_KERNEL", raising=False)
    return dispatch.available_paths()


@pytest.fixture
def float_activations(monkeypatch):
    """Packed LMs run on the reference, so that they compare with float LMs to the last digits."""
    monkeypatch.setenv("MPQ_KERNEL", "reference")


@pytest.fixture(scope="session")
def host() -> SimpleNamespace:
    """The host with the plugin registered: .LMTask, .lm_choices, .model_choices, .version."""
    if importlib.util.find_spec("espnet2") is None:
        pytest.skip("ESPnet is not installed")
    import espnet_mpq

    espnet_mpq.register()
    import espnet
    from espnet2.tasks import lm as task

    return SimpleNamespace(
        version=espnet.__version__,
        LMTask=task.LMTask,
        lm_choices=task.lm_choices,
        model_choices=task.model_choices,
    )


@pytest.fixture(scope="session")
def tiny_text() -> list[str]:
    """60 short lower-case sentences with enough structure for a tiny LM to learn something."""
    rng = random.Random(7)
    subjects = ["the cat", "a dog", "my friend", "the old man", "she", "he", "that bird"]
    verbs = ["sees", "likes", "follows", "can't find", "takes", "has"]
    objects = ["the house", "a tree", "some water", "the road", "an apple", "it"]
    return [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)}" for _ in range(60)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, tiny_text) -> Path:
    """`tiny_text` as a plain file, one sentence a line."""
    path = tmp_path_factory.mktemp("text") / "plain.txt"
    path.write_text("\n".join(tiny_text) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def kaldi_text_file(tmp_path_factory, tiny_text) -> Path:
    """`tiny_text` as `utt text` lines."""
    path = tmp_path_factory.mktemp("text") / "text"
    lines = [f"utt-{i:03d} {line}" for i, line in enumerate(tiny_text)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_lm_exp(host, tiny_text):
    """Factory make_lm_exp(folder, *, lm="seq_rnn", lm_conf=None, token_list=None, n_steps=60,
    seed=0, **settings) -> TinyExp: a trained-like character LM (default: LSTM, 2 layers of 16)."""
    import torch
    import yaml

    default_config = host.LMTask.get_default_config()

    def ids(sentence: str, tokens: list) -> list[int]:
        chars = ["<space>" if c == " " else c for c in sentence]
        return [tokens.index(c) if c in tokens else tokens.index("<unk>") for c in chars]

    def make(folder, *, lm="seq_rnn", lm_conf=None, token_list=None, n_steps=60, seed=0, **more):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = list(token_list or CHAR_TOKENS)
        settings = dict(default_config)
        settings.update(
            lm=lm,
            lm_conf=dict(unit=16, nlayers=2) if lm_conf is None else dict(lm_conf),
            model="lm",
            token_list=tokens,
            token_type="char",
            output_dir=str(folder),
            use_tensorboard=False,
            use_matplotlib=False,
            num_workers=0,
            **more,
        )
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = host.LMTask.build_model(as_namespace(settings))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        sentences = [torch.tensor(ids(s, tokens)) for s in tiny_text]
        lengths = torch.tensor([len(s) for s in sentences])
        batch = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True)
        for step in range(n_steps):
            pick = torch.arange(8) + 8 * (step % (len(sentences) // 8))
            loss, _, _ = model(batch[pick], lengths[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.random.set_rng_state(state)
        config, checkpoint = folder / "config.yaml", folder / "valid.loss.best.pth"
        config.write_text(yaml.safe_dump(to_plain(settings)), encoding="utf-8")
        torch.save(model.state_dict(), checkpoint)
        (folder / "images").mkdir(exist_ok=True)
        return TinyExp(folder, config, checkpoint, tokens, settings)

    return make


@pytest.fixture(scope="session")
def fp_exp(make_lm_exp, tmp_path_factory) -> TinyExp:
    """One shared fp LM experiment (read only: copy it before changing anything)."""
    return make_lm_exp(tmp_path_factory.mktemp("fp") / "lm_fp")


@pytest.fixture(scope="session")
def tiny_lm(host, fp_exp):
    """The float LM of `fp_exp` (SequentialRNNLM, eval mode); deepcopy it before changing it."""
    model, _ = host.LMTask.build_model_from_file(str(fp_exp.config), str(fp_exp.checkpoint))
    return model.eval().lm


@pytest.fixture(scope="session")
def packed_exp(fp_exp, tmp_path_factory) -> TinyExp:
    """`fp_exp` packed without training: 1, 2, 4 and 8 bits, float16 and row/cluster scales."""
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.hosts.espnet.families import architecture_of
    from espnet_mpq.plan import ClusterSpec, Plan

    clusters = architecture_of("seq_rnn", fp_exp.settings["lm_conf"], 31).clusters()
    specs = [
        ClusterSpec(4),
        ClusterSpec(2),
        ClusterSpec(8, grid="paper", tying="cluster"),
        ClusterSpec(1),
        ClusterSpec(16),
    ]
    plan = Plan({c.name: specs[i % len(specs)] for i, c in enumerate(clusters)})
    folder = tmp_path_factory.mktemp("packed") / "lm_packed"
    pack_experiment(fp_exp.path, folder, plan=plan)
    config = folder / "config.yaml"
    return TinyExp(folder, config, folder / "packed.safetensors", fp_exp.token_list, {})


@pytest.fixture(scope="session")
def quantized_exp(fp_exp, packed_exp, tmp_path_factory) -> TinyExp:
    """The host's own seq_rnn with the float values that `packed_exp` stands for."""
    import shutil

    import torch

    from espnet_mpq.packed.dequantize import float_state
    from espnet_mpq.packed.format import load_packed

    folder = tmp_path_factory.mktemp("quantized") / "lm_quantized"
    shutil.copytree(fp_exp.path, folder)
    values = float_state(load_packed(packed_exp.checkpoint))
    checkpoint = folder / fp_exp.checkpoint.name
    torch.save({f"lm.{name}": value for name, value in values.items()}, checkpoint)
    return TinyExp(folder, folder / "config.yaml", checkpoint, fp_exp.token_list, fp_exp.settings)


@pytest.fixture(scope="session")
def asr_exp(host, tmp_path_factory) -> TinyExp:
    """A random-weight character CTC/attention ASR experiment that decodes 16 kHz audio."""
    import torch
    import yaml
    from espnet2.tasks.asr import ASRTask

    folder = tmp_path_factory.mktemp("asr") / "asr_tiny"
    folder.mkdir()
    settings = dict(ASRTask.get_default_config())
    settings.update(
        token_list=list(CHAR_TOKENS),
        token_type="char",
        normalize=None,
        normalize_conf={},
        specaug=None,
        frontend_conf=dict(n_fft=256, hop_length=128, n_mels=20, fs=16000),
        encoder="rnn",
        encoder_conf=dict(num_layers=1, hidden_size=16, output_size=16),
        decoder="transformer",
        decoder_conf=dict(attention_heads=2, linear_units=16, num_blocks=1),
        model_conf=dict(ctc_weight=0.5),
        output_dir=str(folder),
        use_tensorboard=False,
        use_matplotlib=False,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = ASRTask.build_model(as_namespace(settings))
    torch.random.set_rng_state(state)
    config, checkpoint = folder / "config.yaml", folder / "valid.acc.best.pth"
    config.write_text(yaml.safe_dump(to_plain(settings)), encoding="utf-8")
    torch.save(model.state_dict(), checkpoint)
    return TinyExp(folder, config, checkpoint, list(CHAR_TOKENS), settings)


def as_namespace(settings: dict):
    """The argparse.Namespace that the host's build_model checks for, from a settings dict."""
    import argparse
    import copy

    return argparse.Namespace(**copy.deepcopy(settings))


def to_plain(value):
    """Tuples become lists, recursively, so that yaml.safe_dump writes and safe_load reads them."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value
