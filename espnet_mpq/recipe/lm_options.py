"""The options of mpq.sh together: models and texts that its stages read, a budget that can be."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from espnet_mpq.bin.options import check_ngpu, read_yaml
from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.recipe.option_values import (
    SENSITIVITIES,
    Options,
    choice,
    names_in,
    need_file,
    text_path,
)

# lm: of the host's config.yaml -> --lm_type; as hosts/espnet/families.py, without importing torch
LM_TYPES = {
    "seq_rnn": "rnn",
    "mpq_seq_rnn": "rnn",
    "transformer": "transformer",
    "mpq_transformer": "transformer",
}
UNFINISHED = ".mpq/unfinished"  # in lm_exp, while the recipe trains it
CHANGED = ("lm_exp", "asr_exp", "expdir", "data_feats", "test_sets", "bits", "tag", "missing_lm")
TEXTS = ("lm_train_text", "lm_dev_text", "lm_test_text")


class MpqOptions:
    """The options of mpq.sh together, and what its stages will read.

    Args:
        options: name -> value, as given, each right for itself.
        cuda_cmd: what the recipe's cmd.sh runs GPU jobs by; jobs of run.pl run on this machine.
    """

    def __init__(self, options: Options, cuda_cmd: str = ""):
        self.options = dict(options)
        for key in ("lm_exp", "asr_exp", "expdir", "data_feats"):
            self.options[key] = _without_slashes(options[key])
        sets = [_without_slashes(word) for word in options["test_sets"].split()]
        self.options["test_sets"] = " ".join(sets)
        self.test_sets = sets
        self.cuda_cmd = cuda_cmd
        self.lm_exp = Path(self.options["lm_exp"])
        self.fp_lm = self.lm_exp / options["inference_lm"]
        self.first, self.last = int(options["stage"]), int(options["stop_stage"])
        self.trains = options["no_train"] != "true"

    def runs(self, *stages: int) -> bool:
        """Whether one of the stages is selected."""
        return any(self.first <= stage <= self.last for stage in stages)

    def check(self) -> Options:
        """Options to set anew.

        Raises:
            InputError: the first thing that would stop a stage.
        """
        if not self.options["lm_exp"]:
            raise InputError("--lm_exp is needed", expected="the folder of the trained LM")
        if not self.runs(*range(1, 10)):
            raise InputError(
                "no stage is selected",
                found=f"--stage {self.first} --stop_stage {self.last}",
                expected="stages from 1 to 9",
            )
        self._check_quantization()
        self._check_asr()
        missing_lm = self._check_lm()
        settings = {} if missing_lm else read_yaml(self.lm_exp / "config.yaml")
        if settings:
            self._check_lm_type(settings)
        self._check_programs(missing_lm)
        self._find_texts(settings, missing_lm)
        if settings and self.runs(2, 3):
            self._check_plan(settings)
        self.options["missing_lm"] = str(missing_lm).lower()
        self.options["tag"] = self.options["tag"] or self._tag()
        return {key: self.options[key] for key in (*CHANGED, *TEXTS)}

    def _check_quantization(self) -> None:
        options = self.options
        choice(*SENSITIVITIES)("--sensitivity", options["sensitivity"])
        if options["sensitivity"] == "uniform":
            options["bits"] = options["bits"] or "2"
            if len(options["bits"].split()) != 1:
                what = "--sensitivity uniform gives the same --bits to all"
                raise InputError(what, found=options["bits"], expected="one of them")
        if (options["tying"] == "group") != bool(options["group_size"]):
            raise InputError(
                "--tying group and --group_size (columns per scale) belong together",
                found=f"--tying '{options['tying']}' --group_size '{options['group_size']}'",
            )

    def _check_asr(self) -> None:
        feats = Path(self.options["data_feats"])
        for word in self.test_sets:
            text_path("--test_sets", word)
            if self.test_sets.count(word) > 1:
                raise InputError(f"--test_sets names {word} twice")
            if not (feats / word / self.options["ref_text"]).is_file():
                is_set = lambda p: (p / self.options["ref_text"]).is_file()  # noqa: E731
                there = [str(Path(p).name) for p in names_in(feats, is_set)]
                hint = near_matches(word, there) if there else f"there is no test set in {feats}"
                text = feats / word / self.options["ref_text"]
                raise InputError(f"no {text}; give --test_sets or --data_feats", todo=hint)
        if not self.runs(7, 8):
            return
        for key in ("asr_exp", "test_sets"):
            if not self.options[key]:
                raise InputError(
                    f"--{key} is needed from stage 7 on", todo="or give --stop_stage 6"
                )
        folder = Path(self.options["asr_exp"])
        if not (folder / "config.yaml").is_file():
            self._refuse_folder("--asr_exp", folder, "there is no trained recogniser")
        if self.options["inference_asr_model"]:
            need_file(folder / self.options["inference_asr_model"], "--inference_asr_model")
        if self.options["fp_inference_tag"]:
            for word in self.test_sets:
                text = folder / self.options["fp_inference_tag"] / word / "text"
                if not text.is_file():
                    there = [
                        Path(p).name for p in names_in(folder, lambda p: any(p.glob("*/text")))
                    ]
                    hint = near_matches(self.options["fp_inference_tag"], there) if there else ""
                    raise InputError(f"no {text}; give --fp_inference_tag", todo=hint)

    def _refuse_folder(self, option: str, folder: Path, what: str, todo: str = "") -> None:
        """Raise InputError for a folder without config.yaml, with the like ones beside it."""
        if folder.is_file():
            raise InputError(
                f"{option} {folder} is a file", todo=f"give its folder {folder.parent}"
            )

        def is_like(path: Path) -> bool:
            config = path / "config.yaml"
            return config.is_file() and _is_lm(config) == (option == "--lm_exp")

        there = names_in(folder.parent, is_like)
        hint = near_matches(str(folder), there) if there else ""
        found = "no config.yaml in it" if folder.is_dir() else "no such folder"
        todo = "; ".join(filter(None, (hint, todo)))
        raise InputError(f"{what} {folder}", found=found, todo=todo)

    def _check_lm(self) -> bool:
        """Whether the LM has still to be trained; raises InputError for one that is not there."""
        config = self.lm_exp / "config.yaml"
        unfinished = (self.lm_exp / UNFINISHED).exists()
        if config.is_file() and self.fp_lm.is_file() and not unfinished:
            return False
        if unfinished or not config.is_file():
            if self.options["train_lm"] == "true" and self.first <= 1:
                return True
            todo = "with --stage 1 --train_lm true the recipe trains one there"
            if unfinished:
                raise InputError(f"the training of {self.lm_exp} did not finish", todo=todo)
            self._refuse_folder("--lm_exp", self.lm_exp, "there is no trained LM", todo)
        there = [Path(p).name for p in names_in(self.lm_exp, lambda p: p.suffix == ".pth")]
        there = [name for name in there if name != "checkpoint.pth"]
        hint = near_matches(self.options["inference_lm"], there) if there else "there is none"
        raise InputError(f"no {self.fp_lm}; give --inference_lm", todo=hint)

    def _check_lm_type(self, settings: dict) -> None:
        lm = str(settings.get("lm", "seq_rnn"))
        where = self.lm_exp / "config.yaml"
        if lm.lower() not in LM_TYPES:
            known = "seq_rnn, transformer"
            raise InputError(f"{where}: lm: {lm} cannot be made low-bit", expected=known)
        if self.options["lm_type"] not in ("", LM_TYPES[lm.lower()]):
            raise InputError(
                f"--lm_type {self.options['lm_type']}, but {where} says lm: {lm}",
                todo="give the right --lm_exp",
            )

    def _check_programs(self, missing_lm: bool) -> None:
        """The recipe's script and the GPUs, where they are used."""
        if missing_lm or (self.trains and self.runs(4)) or self.runs(7):
            script = self.options["run"].split()[0]
            if shutil.which(script) is None:
                there = [p for p in names_in(Path(), Path.is_file) if os.access(p, os.X_OK)]
                hint = near_matches(script, [f"./{p}" for p in there])
                raise InputError(f"--run: there is no program {script}", todo=hint)
        uses_gpu = missing_lm or self.runs(6) or (self.trains and self.runs(4))
        uses_gpu = uses_gpu or (self.runs(2) and self.options["sensitivity"] == "nas")
        is_here = Path((self.cuda_cmd.split() or [""])[0]).name in ("run.pl", "local.pl")
        if uses_gpu and is_here and int(self.options["ngpu"]) > 0:
            try:
                check_ngpu(int(self.options["ngpu"]))
            except InputError as error:
                todo = "give --ngpu 0 to run on the CPU"
                if "0 .. 0" not in str(error.expected):
                    todo = "give fewer"
                raise InputError(
                    error.what, found=error.found, expected=error.expected, todo=todo
                ) from error

    def _find_texts(self, settings: dict, missing_lm: bool) -> None:
        """The texts as given, as the recipe leaves them, or as the LM's config.yaml names them."""
        options = self.options
        for key in TEXTS:
            if options[key] and not missing_lm:
                need_file(Path(options[key]), f"--{key}")
        if not options["lm_train_text"]:
            usual = f"{options['data_feats']}/lm_train.txt"
            trained = _first_path(settings.get("train_data_path_and_name_and_type"))
            # a folder of split texts if the LM was trained with --num_splits_lm
            use = trained if not Path(usual).is_file() and Path(trained).is_file() else usual
            options["lm_train_text"] = use
        if not options["lm_dev_text"]:
            valid = _first_path(settings.get("valid_data_path_and_name_and_type"))
            options["lm_dev_text"] = valid if Path(valid).is_file() else options["lm_train_text"]
        if not options["lm_test_text"]:
            options["lm_test_text"] = options["lm_dev_text"]
            if self.test_sets:
                test_set = f"{options['data_feats']}/{self.test_sets[0]}"
                options["lm_test_text"] = f"{test_set}/{options['ref_text']}"
        if missing_lm:
            return
        needed = {"lm_train_text": self.runs(2) and options["sensitivity"] != "uniform"}
        needed.update(lm_dev_text=self.runs(3), lm_test_text=self.runs(6))
        for key, is_needed in needed.items():
            if is_needed and not Path(options[key]).is_file():
                what = {"lm_train_text": "training text", "lm_dev_text": "development text"}
                raise InputError(f"no {what.get(key, 'text')} '{options[key]}'; give --{key}")

    def _check_plan(self, settings: dict) -> None:
        """What mpq plan would refuse after the sensitivity; raises InputError."""
        if not settings.get("lm_conf") or "token_list" not in settings:
            return  # the first stage that opens the LM says what is wrong with it
        from espnet_mpq.hosts.espnet import families
        from espnet_mpq.hosts.espnet.config_file import read_config
        from espnet_mpq.packed.size import packed_size
        from espnet_mpq.plan import budget_n_bytes, uniform_plan

        config = self.lm_exp / "config.yaml"
        settings = read_config(config)
        lm = families.architecture_of(
            settings["lm"], settings["lm_conf"], len(settings["token_list"])
        )
        storage = {key: self.options[key] for key in ("grid", "tying") if self.options[key]}
        if self.options["group_size"]:
            storage["group_size"] = int(self.options["group_size"])
        bits = min(int(word) for word in (self.options["bits"] or "1").split())
        plan = uniform_plan(lm.clusters(), bits, **storage)
        least = packed_size(lm, plan)
        budget = budget_n_bytes(least.n_weights, float(self.options["budget"]))
        if self.options["sensitivity"] != "uniform" and budget < least.n_bytes:
            raise InputError(
                "the budget is too small for any plan (header, scales and biases count)",
                found=f"--budget {self.options['budget']}",
                expected=f"at least {least.effective_bits:.4f}, which is {least.n_bytes} bytes",
            )
        if self.options["train_config"] and self.trains:
            from espnet_mpq.hosts.espnet.lm.train_config import train_settings

            exp = SimpleNamespace(args=SimpleNamespace(**settings), config=config)
            train_settings(exp, plan, read_yaml(self.options["train_config"]))

    def _tag(self) -> str:
        options = self.options
        if options["sensitivity"] == "uniform":
            tag = f"{self.lm_exp.name}_uniform{options['bits']}bit"
        else:
            tag = f"{self.lm_exp.name}_{options['budget']}bit"
            tag += "" if options["sensitivity"] == "kl" else f"_{options['sensitivity']}"
        return tag if self.trains else f"{tag}_no_train"


def _without_slashes(value: str) -> str:
    return value.rstrip("/") or value[:1]


def _is_lm(config: Path) -> bool:
    return re.search("^lm:", config.read_text(encoding="utf-8", errors="replace"), re.M) is not None


def _first_path(value: object) -> str:
    """The first path of the host's list of (path, name, type), or an empty text."""
    try:
        return str(value[0][0])
    except (TypeError, IndexError, KeyError):
        return ""
