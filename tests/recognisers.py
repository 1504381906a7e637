"""Small random recognisers built by the host, and folders of speech for them."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

RATE = 16000
TOKENS = ["<blank>", "<unk>", "<space>", *"abcdefghijklmnopqrstuvwxyz", "'", "<sos/eos>"]
ENCODERS = {
    "conformer": dict(macaron_style=True, rel_pos_type="latest", cnn_module_kernel=7),
    "e_branchformer": dict(
        cgmlp_linear_units=24,
        cgmlp_conv_kernel=7,
        merge_conv_kernel=7,
        use_ffn=True,
        macaron_ffn=True,
        ffn_activation_type="swish",
        linear_units=20,
    ),
    "transformer": {},
}
SHAPE = dict(output_size=16, attention_heads=2, linear_units=24, num_blocks=2)
SENTENCES = ("ab cd", "the cat", "a", "go on", "stop it now", "no")


@dataclass(frozen=True)
class Recogniser:
    """An experiment of the host: its folder, config.yaml, checkpoint, and its settings."""

    path: Path
    config: Path
    checkpoint: Path
    settings: dict


def make_recogniser(
    folder,
    encoder="conformer",
    *,
    ctc_weight=0.3,
    decoder="transformer",
    encoder_conf=None,
    plain=False,
    seed=0,
    **more,
) -> Recogniser:
    """An untrained recogniser with lively outputs; the host must be importable.

    ``plain``: encoder_conf as given, without our small sizes. ``more``: other settings.
    """
    from espnet2.tasks.asr import ASRTask

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {} if plain else {**SHAPE, **ENCODERS[encoder]}
    small = dict(attention_heads=2, linear_units=20, num_blocks=2)
    settings = dict(
        ASRTask.get_default_config(),
        token_list=list(TOKENS),
        token_type="char",
        frontend="default",
        frontend_conf=dict(fs=RATE, n_fft=256, hop_length=160, n_mels=12),
        specaug=None,
        normalize="utterance_mvn",
        normalize_conf={},
        model="espnet",
        model_conf=dict(ctc_weight=ctc_weight),
        encoder=encoder,
        encoder_conf={**sizes, **(encoder_conf or {})},
        decoder=decoder,
        decoder_conf=small if decoder == "transformer" else {},
        output_dir=str(folder),
        **more,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = ASRTask.build_model(argparse.Namespace(**copy.deepcopy(settings)))
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "melmat" not in name:
            if "running_var" in name:
                value.uniform_(0.5, 2.0)
            elif value.dim() == 1:
                value.add_(0.1 * torch.randn(value.shape))
            elif "ctc_lo" in name or "output_layer" in name:
                value.mul_(4)  # posteriors that are not flat
    torch.random.set_rng_state(state)
    config, checkpoint = folder / "config.yaml", folder / "valid.acc.ave.pth"
    config.write_text(yaml.safe_dump(_plain(settings)), encoding="utf-8")
    torch.save(model.state_dict(), checkpoint)
    return Recogniser(folder, config, checkpoint, settings)


def _plain(value):
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def noise(seconds: float, seed: int) -> np.ndarray:
    """float32 samples that move the features: noise with a slow envelope and a tone."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (200 + 90 * seed) * t * (1 + 0.3 * np.sin(9 * t)))
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * t + seed)
    return (0.2 * envelope * (tone + rng.standard_normal(len(t)))).astype(np.float32)


def make_speech(folder) -> Path:
    """A Kaldi-style folder: six utterances of 0.4 to 0.9 s as wav and flac, with text."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scp, text = [], []
    for k, sentence in enumerate(SENTENCES):
        path = folder / f"u{k}.{'flac' if k % 2 else 'wav'}"
        soundfile.write(path, noise(0.4 + 0.1 * k, k), RATE, subtype="PCM_16")
        scp.append(f"utt-{k} {path}\n")
        text.append(f"utt-{k} {sentence}\n")
    (folder / "wav.scp").write_text("".join(scp), encoding="utf-8")
    (folder / "text").write_text("".join(text), encoding="utf-8")
    return folder
