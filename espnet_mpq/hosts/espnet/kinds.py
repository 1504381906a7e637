"""Kinds of experiments that go the road, language models and recognisers: what tells them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Tuple

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.plan import Plan

NULL = type(None)
_CONF = ((dict,), "keys and values")
_NAME = ((str,), "the name of a class")
# Key of config.yaml -> (types, in words), of every kind; a key may be absent.
FORM = {
    **dict.fromkeys(("optim_conf", "scheduler_conf"), ((dict, NULL), "keys and values")),
    **dict.fromkeys(("token_type", "bpemodel", "g2p", "init"), ((str, NULL), "text or null")),
    **dict.fromkeys(("cleaner", "non_linguistic_symbols"), ((str, list, NULL), "text or a list")),
    "max_epoch": ((int, NULL), "a whole number"),
    "model": _NAME,
    "model_conf": _CONF,
}


class Kind(ABC):
    """One kind of experiment of the host.

    Attributes:
        name, article, noun: "lm" or "asr"; what people call it.
        module, task: of the host: the module of its task and the class in it.
        needed: keys of config.yaml by which the kind is known.
        class_options: keys of config.yaml that name classes of the host.
        has_plain_keys: whether these classes name all their keys, so that others are misspelt.
        form: more keys as FORM.
        classes: name of a model class of ours -> (module in hosts/espnet, class).
        plan_conf: the key of config.yaml under which a plan stands.
        prefix: of the names of the weights in a checkpoint, where they are the part of a model.
        checkpoints: names tried in this order when no file is named.
        train, file_option: the host's program, our option for the name of a checkpoint.
    """

    name: ClassVar[str]
    article: ClassVar[str]
    noun: ClassVar[str]
    module: ClassVar[str]
    task: ClassVar[str]
    needed: ClassVar[Tuple[str, ...]]
    class_options: ClassVar[Tuple[str, ...]]
    has_plain_keys: ClassVar[bool]
    form: ClassVar[Mapping[str, tuple]]
    classes: ClassVar[Mapping[str, Tuple[str, str]]]
    plan_conf: ClassVar[str]
    prefix: ClassVar[str]
    checkpoints: ClassVar[Tuple[str, ...]]
    train: ClassVar[str]
    file_option: ClassVar[str]

    def choices(self) -> Dict[str, Any]:
        """Option of config.yaml that names a class -> the host's list of these classes."""
        module = importlib.import_module(self.module)
        return {option: getattr(module, f"{option}_choices") for option in self.class_options}

    def host_task(self) -> Any:
        """The host's task class."""
        return getattr(importlib.import_module(self.module), self.task)

    @abstractmethod
    def check(self, settings: Mapping) -> None:
        """Raise InputError for settings of which no model can be made."""

    @abstractmethod
    def described(self, settings: Mapping) -> str:
        """The class of the model in the words of config.yaml, "lm: seq_rnn"."""

    @abstractmethod
    def is_packed(self, settings: Mapping) -> bool:
        """Whether the settings describe a packed model."""

    @property
    @abstractmethod
    def packed_names(self) -> Tuple[str, ...]:
        """What `described` says of packed models."""

    @abstractmethod
    def check_float(self, settings: Mapping) -> None:
        """Raise MismatchError unless a packed file can be made of this model."""

    @abstractmethod
    def architecture(self, settings: Mapping, model: Any = None) -> Architecture:
        """The shape of the model; raises InputError for one that no packed file can hold.

        Args:
            model: the host's model, built from the settings; only ``needs_model`` kinds ask it.
        """

    needs_model: ClassVar[bool] = False

    @abstractmethod
    def packed_settings(
        self, settings: Mapping, architecture: Architecture, plan: Plan
    ) -> Dict[str, Any]:
        """config.yaml of the packed model, but for what all kinds have in common."""


class LmKind(Kind):
    """Language models; families.py knows their classes and sizes."""

    name, article, noun = "lm", "an", "LM"
    module, task = "espnet2.tasks.lm", "LMTask"
    needed = (families.OPTION, families.CONF, "token_list")
    form = {families.OPTION: _NAME, families.CONF: _CONF}
    class_options = (families.OPTION, "model")
    has_plain_keys = True
    classes = families.CLASSES
    plan_conf = families.CONF
    prefix = families.PREFIX
    checkpoints = ("valid.loss.best.pth", "valid.loss.ave.pth", "valid.acc.best.pth")
    train, file_option = "lm_train", "--lm_file"

    def check(self, settings: Mapping) -> None:
        conf = settings[families.CONF]
        if settings.get("model") == "lm_multitask":
            raise InputError(
                "multitask LMs are not supported",
                found="model: lm_multitask, whose sentences begin with the name of a task",
                expected="model: lm, whose sentences begin with <sos/eos>",
            )
        for key, value in conf.items():
            if key.endswith("dropout_rate") and not isinstance(value, (int, float)):
                what = f"{families.CONF}.{key}"
                raise InputError(what, found=repr(value), expected="a number")
        if families.find_family(settings[families.OPTION]) is not None:
            self.architecture(settings)

    def described(self, settings: Mapping) -> str:
        return f"{families.OPTION}: {settings.get(families.OPTION)}"

    def is_packed(self, settings: Mapping) -> bool:
        return families.is_packed(settings.get(families.OPTION))

    @property
    def packed_names(self) -> Tuple[str, ...]:
        return tuple(f"{families.OPTION}: {name}" for name in families.PACKED)

    def check_float(self, settings: Mapping) -> None:
        if settings[families.OPTION] not in families.FLOATS:
            raise MismatchError(
                "this is an LM that cannot be packed",
                found=self.described(settings),
                expected="one of " + ", ".join(families.FLOATS),
            )

    def architecture(self, settings: Mapping, model: Any = None) -> Architecture:
        name, conf = settings[families.OPTION], settings[families.CONF]
        return families.architecture_of(name, conf, len(settings["token_list"]))

    def packed_settings(
        self, settings: Mapping, architecture: Architecture, plan: Plan
    ) -> Dict[str, Any]:
        sizes = families.conf_of(architecture)
        conf = settings.get("model_conf") or {}
        return {
            families.OPTION: families.family_of(architecture).packed,
            families.CONF: {**sizes, "plan": plan.to_dict(provenance=False)},
            "model": "lm",
            "model_conf": {k: v for k, v in conf.items() if k in ("ignore_id",)},
        }


class AsrKind(Kind):
    """Recognisers: the host's ESPnetASRModel with CTC, an attention decoder, or both.

    A packed one is built by the host itself from its whole config.yaml; only the class of the
    model is ours. Plain ESPnet refuses that class by its name.
    """

    name, article, noun = "asr", "a", "recogniser"
    module, task = "espnet2.tasks.asr", "ASRTask"
    needed = ("encoder", "encoder_conf", "ctc_conf", "token_list")
    form = {
        "encoder": _NAME,
        "decoder": ((str, NULL), "the name of a class"),
        "encoder_conf": _CONF,
    }
    class_options = ("model", "encoder", "decoder")
    has_plain_keys = False
    classes = {"mpq_packed_asr": ("asr.packed", "MpqPackedASRModel")}
    plan_conf = "model_conf"
    prefix = ""
    checkpoints = (
        "valid.acc.ave.pth",
        "valid.cer_ctc.ave.pth",
        "valid.loss.ave.pth",
        "valid.acc.best.pth",
        "valid.cer_ctc.best.pth",
        "valid.loss.best.pth",
    )
    train, file_option = "asr_train", "--asr_model_file"
    needs_model = True
    PACKED = "mpq_packed_asr"
    # Keys that tell other tasks of the host, which have encoders and CTC as well.
    OTHERS = {
        "src_token_list": "speech translation",
        "enh_encoder": "speech enhancement",
        "deliberationencoder": "language understanding",
        "text_prev_name": "s2t",
    }

    def check(self, settings: Mapping) -> None:
        for key, task in self.OTHERS.items():
            if settings.get(key) is not None:
                raise InputError(
                    f"an experiment of {task} is not supported",
                    found=f"{key}: {str(settings[key])[:40]}",
                    expected="one of speech recognition (asr_train)",
                )
        model, decoder = self._model(settings), settings.get("decoder")
        if model not in ("espnet", self.PACKED):
            raise InputError(
                "this recogniser is not supported",
                found=f"model: {model}",
                expected="model: espnet",
            )
        if decoder in ("transducer", "linear_decoder"):
            raise InputError(
                "this recogniser is not supported",
                found=f"decoder: {decoder}",
                expected="CTC, or a decoder with attention (transformer, rnn, ...)",
            )
        if model == self.PACKED and "plan" not in (settings.get("model_conf") or {}):
            raise InputError("keys of model_conf are missing", found="no plan")
        if settings.get("use_adapter"):
            raise InputError(
                "a recogniser with adapters is not supported",
                found=f"use_adapter: true, adapter: {settings.get('adapter')}",
                todo="merge the adapters into its weights",
            )

    @staticmethod
    def _model(settings: Mapping) -> str:
        return str(settings.get("model", "espnet")).lower()

    def described(self, settings: Mapping) -> str:
        return f"model: {self._model(settings)}"

    def is_packed(self, settings: Mapping) -> bool:
        return self._model(settings) == self.PACKED

    @property
    def packed_names(self) -> Tuple[str, ...]:
        return (f"model: {self.PACKED}",)

    def check_float(self, settings: Mapping) -> None:
        """All that `check` lets pass can be packed; the architecture says what cannot."""

    def architecture(self, settings: Mapping, model: Any = None) -> Architecture:
        if self.is_packed(settings):  # its layers are no longer those that clusters are found in
            return model.architecture
        return load_class("asr.clusters", "architecture_of")(model)

    def packed_settings(
        self, settings: Mapping, architecture: Architecture, plan: Plan
    ) -> Dict[str, Any]:
        conf = settings.get("model_conf") or {}
        return {
            "model": self.PACKED,
            "model_conf": {**conf, "plan": plan.to_dict(provenance=False)},
        }


LM, ASR = LmKind(), AsrKind()
KINDS: Dict[str, Kind] = {kind.name: kind for kind in (LM, ASR)}


def load_class(module: str, name: str) -> Any:
    """Something of a room above, by the place that a table names."""
    return getattr(importlib.import_module(f"espnet_mpq.hosts.espnet.{module}"), name)


def find_kind(settings: object) -> Optional[Kind]:
    """The kind that the keys of config.yaml tell; None for another one."""
    if isinstance(settings, Mapping):
        for kind in KINDS.values():
            if all(key in settings for key in kind.needed):
                return kind
    return None


def kind_of(settings: object) -> Kind:
    """As `find_kind`.

    Raises:
        InputError: not the configuration of any kind; says what is missing of the nearest one.
    """
    found = find_kind(settings)
    if found is not None:
        return found
    keys = settings if isinstance(settings, Mapping) else {}

    def absent(kind: Kind) -> List[str]:
        return [key for key in kind.needed if key not in keys]

    nearest = min(KINDS.values(), key=lambda kind: len(absent(kind)) / len(kind.needed))
    raise InputError(
        f"not the configuration of {nearest.article} {nearest.noun}",
        found=f"no {', '.join(absent(nearest))}",
        expected=f"the config.yaml that {nearest.train} wrote",
    )
