"""Writes train_lm_nas*.yaml: the fp LM's training options, changed for a search of bits."""

from __future__ import annotations

from typing import Mapping, Optional

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.hosts.espnet.lm.option_values import check_values
from espnet_mpq.hosts.espnet.lm.train_config import train_settings
from espnet_mpq.plan import uniform_plan
from espnet_mpq.search.nas_options import NasOptions


def nas_settings(
    exp: Experiment, options: NasOptions, max_epoch: int, user: Optional[Mapping] = None
) -> dict:
    """Training options of the host for one phase of a search of ``exp``'s bits.

    Weights train as with a plan (optimizer of the fp LM, half its peak rate). In the phase
    "architecture" the host's optimizer is idle (the logits have their own), dropout is off, as
    it will be when the LM is used, and the best epoch is the one of the least nas_loss.

    Args:
        user: options of the host that win over ours; lm_conf only for dropout.

    Raises:
        InputError: an LM whose bits cannot be searched, or unknown options.
    """
    user = check_values(user or {})
    for key in user.get("lm_conf") or {}:
        if key == "nas" or key == "plan":
            raise InputError(f"--train_config: lm_conf.{key}", todo="use the options of mpq nas")
    # Its checks, its inherited options and its learning rate; no plan is trained.
    placeholder = uniform_plan(exp.architecture.clusters(), 32)
    settings = train_settings(exp, placeholder, {**user, "max_epoch": max_epoch})
    settings = {k: v for k, v in settings.items() if not k.startswith("mpq_") or k in user}
    family = families.find_family(settings["lm"])
    settings["lm"] = family.nas
    lm_conf = {k: v for k, v in settings["lm_conf"].items() if k != "plan"}
    lm_conf["nas"] = {**options.to_dict(), "phase": options.phase}
    settings["lm_conf"] = lm_conf
    settings["model"] = user.get("model", "lm")
    settings.setdefault("num_workers", 0)
    if options.phase == "architecture":
        for key in family.dropouts:
            lm_conf[key] = 0.0
        settings.update(optim="sgd", optim_conf={"lr": 0.0}, scheduler=None)
    if options.phase != "weights":
        settings["best_model_criterion"] = [["valid", "nas_loss", "min"]]
    return settings
