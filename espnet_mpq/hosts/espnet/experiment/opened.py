"""Opens an experiment directory of the host (config.yaml + checkpoint), strictly checked."""

from __future__ import annotations

import argparse
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Dict, Mapping, Optional, Union

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import CheckpointError, InputError, MismatchError, MpqError
from espnet_mpq.file_kind import absence
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.config_file import (
    check_classes,
    find_config,
    listing,
    read_config,
)
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.hosts.espnet.kinds import KINDS, LM, Kind, kind_of
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.io import sha256_file
from espnet_mpq.packed.format import PACKED_FILE
from espnet_mpq.vocabulary import Vocabulary

PACKED_SUFFIX = Path(PACKED_FILE).suffix


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An opened experiment.

    Attributes:
        kind: what it is, a name of kinds.KINDS.
        model: the host's model (ESPnetLanguageModel, ESPnetASRModel) in eval mode, on the CPU.
        prefix: of the names of ``module``'s weights in a checkpoint.
        args: the training options of config.yaml.
        config, checkpoint: the files read.
        vocabulary: tokens by id.
    """

    kind: str
    model: torch.nn.Module
    prefix: str
    args: argparse.Namespace
    config: Path
    checkpoint: Path
    vocabulary: Vocabulary

    @property
    def module(self) -> torch.nn.Module:
        """The part of ``model`` that has the weights."""
        return self.model.get_submodule(self.prefix.rstrip("."))

    @cached_property
    def architecture(self) -> Architecture:
        """The shape of ``module``; raises InputError for one that no packed file can hold."""
        return KINDS[self.kind].architecture(vars(self.args), self.model)

    @property
    def weights(self) -> ClusterWeights:
        """The weights of ``module``, cluster by cluster; raises InputError as `architecture`."""
        return ClusterWeights(self.module, self.architecture.clusters())

    @property
    def identity(self) -> Dict[str, str]:
        """SHA-256 of token list and checkpoint, as provenances name them."""
        return {
            "token_list_sha256": self.vocabulary.sha256,
            "checkpoint_sha256": sha256_file(self.checkpoint),
        }

    def use_gpu(self, ngpu: int) -> None:
        """Move the model to the GPU if ``ngpu`` is 1; raises InputError where there is none."""
        if ngpu:
            if not torch.cuda.is_available():
                raise InputError("--ngpu 1", found="no usable GPU", expected="--ngpu 0")
            self.model.to("cuda")

    @property
    def is_packed(self) -> bool:
        return self.checkpoint.suffix == PACKED_SUFFIX


def load_fp(folder: Union[str, Path], file: Optional[str] = None) -> Experiment:
    """Open an experiment of any kind with float weights (fp or quantized).

    Raises:
        InputError: the folder, config.yaml or checkpoint is missing or unreadable.
        MismatchError: the checkpoint is not of this model, or the directory holds a packed one.
        HostError: no suitable ESPnet.
    """
    exp = load(folder, file)
    if exp.is_packed:
        noun = KINDS[exp.kind].noun
        raise MismatchError(
            f"{folder} holds a packed {noun}",
            found=exp.checkpoint.name,
            expected=f"one with float weights (config.yaml + {KINDS[exp.kind].checkpoints[0]})",
            todo="give the experiment it was packed from",
        )
    return exp


def load(folder: Union[str, Path], file: Optional[str] = None) -> Experiment:
    """Open an fp, quantized or packed experiment of any kind; errors as `load_fp`.

    ``file`` is a name inside ``folder`` or a path; default: the packed file if there is one,
    else the first of the kind's checkpoints that is there, or the only other one.
    """
    folder = Path(folder)
    config = find_config(folder)
    settings = read_config(config)
    kind = kind_of(settings)
    checkpoint = find_checkpoint(folder, file, kind)
    register(kind.name)
    check_classes(config, kind, settings)
    if checkpoint.suffix == PACKED_SUFFIX:
        task = kind.host_task()
        model, args = task.build_model_from_file(str(config), str(checkpoint), "cpu")
    else:
        model, args = build(kind, config, settings)
        load_strictly(model, checkpoint, kind)
    model.eval()
    vocabulary = families.vocabulary(args.token_list)
    return Experiment(kind.name, model, kind.prefix, args, config, checkpoint, vocabulary)


def load_fp_lm(lm_exp: Union[str, Path], lm_file: Optional[str] = None) -> Experiment:
    """As `load_fp`, for language models alone."""
    return _check_lm(load_fp(lm_exp, lm_file))


def load_lm(lm_exp: Union[str, Path], lm_file: Optional[str] = None) -> Experiment:
    """As `load`, for language models alone."""
    return _check_lm(load(lm_exp, lm_file))


def _check_lm(exp: Experiment) -> Experiment:
    if exp.kind != LM.name:
        raise MismatchError(
            f"{exp.config} describes a {KINDS[exp.kind].noun}", expected="an LM experiment"
        )
    return exp


def build(kind: Kind, config: Path, settings: Mapping):
    """(model, args) as the host builds them, with random weights.

    Raises:
        InputError: the host cannot.
    """
    args = argparse.Namespace(**settings)
    try:
        return kind.host_task().build_model(args), args
    except MpqError:  # the plugin's own model, a bad plan for example
        raise
    except Exception as error:  # whatever the host raises for odd values, assert included
        raise InputError(
            f"the {kind.noun} of {config} cannot be built",
            found=f"{type(error).__name__}: {error}",
            expected=f"a configuration of the host (config.yaml that {kind.train} wrote), and the "
            "files that it names",
        ) from error


def find_checkpoint(folder: Path, file: Optional[str] = None, kind: Kind = LM) -> Path:
    """Return the checkpoint of an experiment or raise InputError that lists what is there."""
    if file is not None:
        places = (folder / file, Path(file))
        for path in places:
            if path.is_file():
                return path
        for path in places:
            _refuse_absent(path)
        raise InputError(f"there is no {folder / file}", found=listing(folder))
    for name in (PACKED_FILE, *kind.checkpoints):
        if (folder / name).is_file():
            return folder / name
        _refuse_absent(folder / name)
    others = sorted(p for p in folder.glob("*.pth") if p.name != "checkpoint.pth")
    if len(others) == 1:
        return others[0]
    raise InputError(
        f"{folder} has no {kind.checkpoints[0]}",
        found=listing(folder),
        todo=f"name the checkpoint with {kind.file_option}",
    )


def _refuse_absent(path: Path) -> None:
    """Raise CheckpointError for a link to nothing, a folder or a device under a file's name."""
    found = absence(path)
    if found:
        raise CheckpointError(f"{path} cannot be read", found=found[0], todo=found[1])


def load_strictly(model, checkpoint: Path, kind: Kind) -> None:
    """Load a state dict and refuse missing, unknown or misshapen tensors (the host does not).

    Raises:
        InputError: the file is damaged; MismatchError: it is not of this model.
    """
    state = read_state(checkpoint)
    wanted = model.state_dict()
    if not any(k in wanted for k in state):
        raise MismatchError(
            f"{checkpoint} holds no weight of this {kind.noun}",
            found=", ".join(map(str, list(state)[:4])) or "an empty dict",
            expected=", ".join(list(wanted)[:4]),
            todo="give the checkpoint of this experiment",
        )
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and _shape(state[k]) != tuple(wanted[k].shape)]
    if shapes:
        name = shapes[0]
        raise MismatchError(
            f"{checkpoint} does not fit its config.yaml: {name}",
            found=_shape(state[name]),
            expected=tuple(wanted[name].shape),
            todo="use the config.yaml and checkpoint of one experiment",
        )
    if missing or unknown:
        raise MismatchError(
            f"{checkpoint} does not fit its config.yaml",
            found=f"missing {missing[:4] or 'nothing'}, unknown {unknown[:4] or 'nothing'}",
            todo="use the config.yaml and checkpoint of one experiment",
        )
    model.load_state_dict(state)


def _shape(value: object) -> object:
    """The shape of a tensor; of anything else its type."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else tuple(shape)
