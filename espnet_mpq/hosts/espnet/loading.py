"""Loads a packed model where the host would load a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.config_file import check_classes, read_config
from espnet_mpq.hosts.espnet.kinds import Kind
from espnet_mpq.packed.load import load_into


def build_packed(cls, kind: Kind, config_file, model_file, device: str):
    """Build the packed model that config.yaml describes and load it strictly.

    Raises:
        InputError: a file is missing or cannot be read, the configuration lacks the plan or has
            keys of another family; MismatchError: the configuration is of another model;
        FormatError: the packed file is damaged.
    """
    model_file = Path(model_file)
    config_file = model_file.parent / "config.yaml" if config_file is None else Path(config_file)
    for path in (config_file, model_file):
        if not path.is_file():
            raise InputError(
                f"there is no file {path}",
                expected="a directory written by `mpq pack`: config.yaml and packed.safetensors",
            )
    settings = read_config(config_file)
    if not kind.is_packed(settings):
        raise MismatchError(
            f"{model_file} is a packed {kind.noun}, but {config_file} describes another",
            found=kind.described(settings),
            expected=" or ".join(kind.packed_names),
            todo=f"use {model_file.parent / 'config.yaml'}, which `mpq pack` wrote with it",
        )
    check_classes(config_file, kind, settings)
    args = argparse.Namespace(**settings)
    model = cls.build_model(args)
    runtime = model.get_submodule(kind.prefix.rstrip("."))
    load_into(runtime, model_file, families.vocabulary(args.token_list))
    model.to(device)
    return model, args
