"""Packs an experiment of the host into a directory that is an experiment of its kind again."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Dict, Mapping, Optional, Sequence, Tuple, Union

import torch

from espnet_mpq import __version__
from espnet_mpq.architecture.base import Architecture
from espnet_mpq.architecture.listed import COUNTERS
from espnet_mpq.clusters import as_matrix
from espnet_mpq.errors import MismatchError, PlanError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.config_file import find_config, read_config
from espnet_mpq.hosts.espnet.experiment.directory import (
    TARGETS,
    check_output,
    replaced_directory,
    tokenizer_names,
)
from espnet_mpq.hosts.espnet.experiment.opened import PACKED_SUFFIX, build, find_checkpoint
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.hosts.espnet.kinds import LM, Kind, kind_of
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.io import sha256_bytes, sha256_file, token_list_sha256, write_json
from espnet_mpq.packed.format import PACKED_FILE, PackedModel, save_packed
from espnet_mpq.packed.pack import pack, rounded_clusters
from espnet_mpq.packed.receipt import receipt
from espnet_mpq.plan import Plan

LOG = logging.getLogger("espnet_mpq")


def pack_experiment(
    exp: Union[str, Path],
    output_dir: Union[str, Path],
    *,
    file: Optional[str] = None,
    plan: Union[str, Path, Plan, None] = None,
    fp_exp: Union[str, Path, None] = None,
    fp_file: Optional[str] = None,
    command: str = "",
    rounded=None,
) -> PackedModel:
    """Write packed.safetensors, config.yaml, images/ and receipt.json.

    Needs no ESPnet for a language model; a recogniser is built by the host, to learn its layers.

    Args:
        exp: a quantized model (its plan stands in lm_conf) or, with ``plan``, an fp one.
        file: its checkpoint, a name inside ``exp`` or a path.
        plan: a plan file or Plan, in place of the one in config.yaml.
        fp_exp: the fp model that the receipt's relative errors compare with.
        command: the command line, recorded in the file.
        rounded: weights on the plan's grid and biases to pack in place of those of the fp LM
            (rounding.model.Rounded); None: rounded here to the nearest levels.

    Raises:
        InputError: a file is missing or unreadable, or the output cannot be written; then the
            output directory is as it was before.
        PlanError: no plan, or one that does not fit the model.
        MismatchError: config, checkpoint and fp model do not belong together.
    """
    output_dir = Path(output_dir).resolve()
    # File names on the command line need not be UTF-8.
    command = command.encode("utf-8", "replace").decode("utf-8")
    config_path, checkpoint, config = _open(exp, file)
    kind = kind_of(config)
    check_output(output_dir, [Path(exp)] + ([Path(fp_exp)] if fp_exp else []))
    token_list = config["token_list"]
    architecture = _architecture(kind, config_path, config)
    chosen = _choose_plan(plan, config, config_path)
    chosen.check(architecture.clusters())
    fp_checkpoint = None if fp_exp is None else _open(fp_exp, fp_file)[1]
    if plan is not None:
        _check_plan_source(chosen, config, checkpoint, fp_checkpoint)
    weights = read_weights(checkpoint, kind)
    source = {
        "tool_version": __version__,
        "command": command,
        "config_sha256": sha256_file(config_path),
        "checkpoint_sha256": sha256_file(checkpoint),
        **_plan_source(chosen, token_list),
    }
    fp_weights = None
    if fp_checkpoint is not None:
        fp_weights = read_weights(fp_checkpoint, kind)
        source["fp_checkpoint_sha256"] = sha256_file(fp_checkpoint)
    stored = weights
    if rounded is not None:
        fp_weights = weights if fp_weights is None else fp_weights
        stored = _replace(weights, architecture, rounded)
    packed = pack(
        stored,
        architecture,
        chosen,
        families.vocabulary(token_list),
        source=source,
        fp_weights=fp_weights,
    )
    moved = rounded_clusters(packed, weights)
    if plan is None and moved:
        worst = max(moved, key=moved.get)
        LOG.warning(
            "%d clusters of %s are not on the grid of its plan and were rounded; worst: %s, "
            "squared relative error %.2g",
            len(moved),
            checkpoint,
            worst,
            moved[worst],
        )
    with replaced_directory(output_dir) as folder:
        save_packed(folder / PACKED_FILE, packed)
        _write_config(folder / "config.yaml", config, kind, architecture, chosen)
        value = {**receipt(packed), "command": command}
        if rounded is not None:
            value["rounding"] = _rounding_record(rounded)
        write_json(folder / "receipt.json", value)
        _copy_folder(Path(exp) / "images", folder / "images")
        (folder / "images").mkdir(exist_ok=True)  # the host's pack stage wants it
        perplexity = Path(exp) / "perplexity_test"
        if not moved and (perplexity / "ppl").is_file():  # measured on the very same weights
            _copy_folder(perplexity, folder / "perplexity_test")
        _copy_tokenizer(config, Path(exp), folder)
    return packed


def _replace(weights: Mapping, architecture: Architecture, rounded) -> Dict[str, torch.Tensor]:
    """The weights with what was rounded in place of what was float."""
    stored = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
    for cluster in architecture.clusters():
        for part, mat in zip(cluster.parts, rounded.mats[cluster.name]):
            as_matrix(stored[part.parameter])[part.start : part.stop] = mat.cpu()
    for name, bias in rounded.biases.items():
        stored[name].copy_(bias)
    for name, kept in architecture.ties().items():
        if name in stored:
            stored[name] = stored[kept]
    return stored


def _rounding_record(rounded) -> dict:
    """Output errors by cluster, ours and those of the nearest levels, in the inputs' units."""
    return {
        "method": "second_order",
        "clusters": {
            name: {"output_error": ours, "nearest_output_error": plain}
            for name, (ours, plain) in rounded.errors.items()
        },
    }


def _copy_tokenizer(config: Mapping, source: Path, folder: Path) -> None:
    """Tokenizer files that lie beside config.yaml, where perplexity looks for them, go along."""
    for name in tokenizer_names(config):
        if (source / name).is_file() and name not in TARGETS:
            shutil.copyfile(source / name, folder / name)


def _architecture(kind: Kind, config_path: Path, config: dict) -> Architecture:
    model = None
    if kind.needs_model:
        register(kind.name)
        model, _ = build(kind, config_path, config)
    return kind.architecture(config, model)


def read_weights(checkpoint: Path, kind: Kind = LM) -> Dict[str, torch.Tensor]:
    """The tensors of a host checkpoint, without the prefix of the kind and without counters.

    Raises:
        InputError: the file is damaged; MismatchError: it is not the state dict of a model.
    """
    state = read_state(checkpoint)
    names, todo = list(state), f"give a checkpoint that {kind.train} wrote, {kind.checkpoints[0]}"
    if not names or not all(str(name).startswith(kind.prefix) for name in names):
        raise MismatchError(
            f"{checkpoint} is not the state of {kind.article} {kind.noun}",
            found=", ".join(map(str, names[:4])) or "an empty dict",
            expected=f"names that start with {kind.prefix}" if kind.prefix else "its weights",
            todo=todo,
        )
    weights = {}
    for name, value in state.items():
        if name.rsplit(".", 1)[-1] in COUNTERS:
            continue
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise MismatchError(
                f"{checkpoint}: {name} is no weight",
                found=value.dtype if isinstance(value, torch.Tensor) else type(value).__name__,
                expected="a tensor of floating-point numbers",
                todo=todo,
            )
        weights[name[len(kind.prefix) :]] = value
    return weights


def _open(exp, file: Optional[str]) -> Tuple[Path, Path, dict]:
    folder = Path(exp)
    config_path = find_config(folder)
    config = read_config(config_path)
    kind = kind_of(config)
    checkpoint = find_checkpoint(folder, file, kind)
    if kind.is_packed(config) or checkpoint.suffix == PACKED_SUFFIX:
        raise MismatchError(
            f"{folder} is packed already",
            found=f"{kind.described(config)}, {checkpoint.name}",
            expected=f"{kind.article} {kind.noun} with float weights",
            todo="give the experiment it was packed from",
        )
    try:
        kind.check_float(config)
    except MismatchError as error:
        raise error.at(config_path) from error
    return config_path, checkpoint, config


def _choose_plan(plan, config: dict, config_path: Path) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if plan is not None:
        return Plan.read(plan)
    kind = kind_of(config)
    inline = _inline_plan(config)
    if inline is None:
        raise PlanError(
            f"{config_path} has no plan in {kind.plan_conf}: this is an fp {kind.noun}",
            todo="give a plan with --plan plan.json (made by `mpq plan`), or pack the "
            f"{kind.noun} that was trained with one",
        )
    return Plan.from_dict(inline)


def _inline_plan(config: Mapping) -> Optional[dict]:
    return (config.get(kind_of(config).plan_conf) or {}).get("plan")


def _check_plan_source(
    plan: Plan, config: Mapping, checkpoint: Path, fp_checkpoint: Optional[Path]
) -> None:
    """Refuse a plan that was made for other weights; of the same shape nothing else would tell.

    Fine are: the weights that the plan records, or weights trained with this very plan.
    """
    expected = plan.source().get("checkpoint_sha256")
    inline = _inline_plan(config)
    if expected is None or (inline is not None and Plan.from_dict(inline) == plan):
        return
    found = sha256_file(checkpoint)
    known = [found] if fp_checkpoint is None else [found, sha256_file(fp_checkpoint)]
    if expected not in known:
        raise MismatchError(
            f"the plan was made for another checkpoint than {checkpoint}",
            found=f"SHA-256 {found}",
            expected=f"SHA-256 {expected}",
            todo="make the plan of this checkpoint with `mpq plan`, or give the one it was made "
            f"for with {kind_of(config).file_option}",
        )


def _plan_source(plan: Plan, token_list: Sequence[str]) -> Dict[str, Union[str, int]]:
    """What the plan was made from (Plan.source), with names that tell it from the packed LM."""
    from espnet_mpq.packed.container import canonical_json

    facts = plan.source()
    if "checkpoint_sha256" in facts:
        facts["fp_checkpoint_sha256"] = facts.pop("checkpoint_sha256")
    # The metadata has it already, and the room that is reserved in the header is limited.
    if facts.get("token_list_sha256") == token_list_sha256(token_list):
        del facts["token_list_sha256"]
    digest = sha256_bytes(canonical_json(plan.to_dict(provenance=False)).encode("utf-8"))
    return {**facts, "plan_sha256": digest}


def _write_config(
    path: Path, config: Mapping, kind: Kind, architecture: Architecture, plan: Plan
) -> None:
    """The source's config.yaml with the packed model in place of the float one."""
    import yaml

    from espnet_mpq.io import atomic_write

    new = {key: value for key, value in config.items() if not key.startswith("mpq_")}
    new.update(kind.packed_settings(config, architecture, plan))
    new["init"] = None  # would overwrite weights
    new["init_param"] = []
    atomic_write(path, yaml.safe_dump(new, sort_keys=False, allow_unicode=True))


def _copy_folder(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(source.iterdir()):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
