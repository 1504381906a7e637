"""Opens an LM experiment directory of the host (config.yaml + checkpoint), strictly checked."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Dict, Optional, Union

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import CheckpointError, InputError, MismatchError, MpqError, near_matches
from espnet_mpq.file_kind import absence
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.config_file import (
    check_keys,
    check_sizes,
    find_config,
    listing,
    read_config,
)
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.io import sha256_file
from espnet_mpq.packed.format import PACKED_FILE
from espnet_mpq.vocabulary import Vocabulary

# Tried in this order when no file is named; the host's recipes use the first two.
CHECKPOINTS = (PACKED_FILE, "valid.loss.best.pth", "valid.loss.ave.pth", "valid.acc.best.pth")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An opened experiment.

    Attributes:
        kind: what it is: "lm".
        model: the host's model (ESPnetLanguageModel) in eval mode, on the CPU.
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

    @property
    def architecture(self) -> Architecture:
        """The shape of ``module``; raises InputError for one that no packed file can hold."""
        name, conf = (getattr(self.args, key) for key in (families.OPTION, families.CONF))
        return families.architecture_of(name, conf, len(self.vocabulary))

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
        return self.checkpoint.suffix == ".safetensors"


def load_fp_lm(lm_exp: Union[str, Path], lm_file: Optional[str] = None) -> Experiment:
    """Open an experiment with float weights (fp or quantized LM).

    Raises:
        InputError: the folder, config.yaml or checkpoint is missing or unreadable.
        MismatchError: the checkpoint is not of this LM, or the directory holds a packed LM.
        HostError: no suitable ESPnet.
    """
    exp = load_lm(lm_exp, lm_file)
    if exp.is_packed:
        raise MismatchError(
            f"{lm_exp} holds a packed LM",
            found=exp.checkpoint.name,
            expected="an LM with float weights (config.yaml + valid.loss.best.pth)",
            todo="give the experiment it was packed from",
        )
    return exp


def load_lm(lm_exp: Union[str, Path], lm_file: Optional[str] = None) -> Experiment:
    """Open an fp, quantized or packed experiment; errors as `load_fp_lm`.

    ``lm_file`` is a name inside ``lm_exp`` or a path; default: the packed file if there is
    one, else valid.loss.best.pth, valid.loss.ave.pth or the only other checkpoint.
    """
    folder = Path(lm_exp)
    config = find_config(folder)
    checkpoint = find_checkpoint(folder, lm_file)
    register()
    from espnet2.tasks.lm import LMTask, lm_choices, model_choices

    settings = read_config(config)
    for option, choices in (("lm", lm_choices), ("model", model_choices)):
        choice = settings.get(option, "lm")
        if choice.lower() not in choices.classes:
            raise InputError(
                f"{config} names an unknown {option} class",
                found=f"{option}: {choice}",
                todo=near_matches(choice, choices.classes),
            )
        conf = settings.get(f"{option}_conf", {})
        check_keys(config, f"{option}_conf", conf, choices.classes[choice.lower()])
    check_sizes(config, settings)
    if checkpoint.suffix == ".safetensors":
        model, args = LMTask.build_model_from_file(str(config), str(checkpoint), "cpu")
    else:
        args = argparse.Namespace(**settings)
        try:
            model = LMTask.build_model(args)
        except MpqError:  # the plugin's own LM, a bad plan for example
            raise
        except Exception as error:  # whatever the host raises for odd values, assert included
            raise InputError(
                f"the LM of {config} cannot be built",
                found=f"{type(error).__name__}: {error}",
                expected="an LM configuration of the host (config.yaml in an LM's exp folder)",
            ) from error
        load_strictly(model, checkpoint)
    model.eval()
    vocabulary = families.vocabulary(args.token_list)
    return Experiment("lm", model, families.PREFIX, args, config, checkpoint, vocabulary)


def find_checkpoint(folder: Path, lm_file: Optional[str] = None) -> Path:
    """Return the checkpoint of an experiment or raise InputError that lists what is there."""
    if lm_file is not None:
        places = (folder / lm_file, Path(lm_file))
        for path in places:
            if path.is_file():
                return path
        for path in places:
            _refuse_absent(path)
        raise InputError(f"there is no {folder / lm_file}", found=listing(folder))
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            return folder / name
        _refuse_absent(folder / name)
    others = sorted(p for p in folder.glob("*.pth") if p.name != "checkpoint.pth")
    if len(others) == 1:
        return others[0]
    raise InputError(
        f"{folder} has no {CHECKPOINTS[1]}",
        found=listing(folder),
        todo="name the checkpoint with --lm_file",
    )


def _refuse_absent(path: Path) -> None:
    """Raise CheckpointError for a link to nothing, a folder or a device under a file's name."""
    found = absence(path)
    if found:
        raise CheckpointError(f"{path} cannot be read", found=found[0], todo=found[1])


def load_strictly(model, checkpoint: Path) -> None:
    """Load a state dict and refuse missing, unknown or misshapen tensors (the host does not).

    Raises:
        InputError: the file is damaged; MismatchError: it is not of this model.
    """
    state = read_state(checkpoint)
    wanted = model.state_dict()
    if not any(k in wanted for k in state):
        raise MismatchError(
            f"{checkpoint} holds no weight of this LM",
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
