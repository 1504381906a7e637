"""Shared configurations: every LM builds by the host's dry run, every option file is understood."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
LM_CONFIGS = sorted((CONF / "lm").glob("*.yaml"))
RECIPE_LM_CONFIGS = sorted((ROOT / "egs").glob("*/*/conf/**/train_lm*.yaml"))
ADMM_CONFIGS = sorted((CONF / "quantization").glob("admm*.yaml"))
# Options of mpq: the part of the name before the first "_" is the subcommand.
MPQ_CONFIGS = sorted(set((CONF / "quantization").glob("*.yaml")) - set(ADMM_CONFIGS))
MPQ_CONFIGS += sorted((ROOT / "egs").glob("*/*/conf/**/nas.yaml"))
DECODING = sorted((CONF / "decoding").glob("*.yaml"))
DECODING += sorted((ROOT / "egs").glob("*/*/conf/**/decode*.yaml"))
NAMES = [path.stem[len("train_lm_") :] for path in LM_CONFIGS]
FP = [n for n in NAMES if not n.startswith(("mpq_", "nas_"))]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_three_variants_of_every_lm_with_the_same_sizes():
    assert len(FP) == 6
    for name in FP:
        fp, mpq, nas = (
            yaml.safe_load((CONF / "lm" / f"train_lm_{kind}{name}.yaml").read_text())
            for kind in ("", "mpq_", "nas_")
        )
        assert (mpq["lm"], nas["lm"]) == (f"mpq_{fp['lm']}", f"mpq_nas_{fp['lm']}")
        assert {k: v for k, v in mpq["lm_conf"].items() if k != "plan"} == fp["lm_conf"]
        assert {k: v for k, v in nas["lm_conf"].items() if k != "nas"} == fp["lm_conf"]
    assert len(NAMES) == 3 * len(FP)


@pytest.fixture(scope="module")
def dry_run(host, tmp_path_factory):
    """dry_run(config) -> the LM that the host builds, with 20 tokens."""
    folder = tmp_path_factory.mktemp("dry")
    tokens = folder / "tokens.txt"
    tokens.write_text("\n".join(["<blank>", "<unk>", *"abcdefghijklmnopq", "<sos/eos>"]) + "\n")
    built = []
    original = host.LMTask.build_model.__func__

    class Task(host.LMTask):
        @classmethod
        def build_model(cls, args):
            built.append(original(cls, args))
            return built[-1]

    def run(config: Path):
        built.clear()
        words = ["--config", str(config), "--iterator_type", "none", "--dry_run", "true"]
        Task.main(cmd=[*words, "--output_dir", str(folder / "out"), "--token_list", str(tokens)])
        (model,) = built
        return model.lm

    return run


# Weights of a block or layer, biases and norms left out, by hand.
EXPECTED = {
    "lstm_2x1024": {"rnn.l1.o": 2 * 1024 * 1024},
    "transformer_6x512": {
        "blocks.5.attention": 4 * 512 * 512,
        "blocks.5.feed_forward": 2 * 512 * 960,
    },
    "librispeech_transformer_16x512": {
        "embedding": 20 * 128 + 512 * 128,  # the host projects it to the width of the blocks
        "blocks.15.attention": 4 * 512 * 512,
        "blocks.15.feed_forward": 2 * 512 * 2048,
    },
    "ami_transformer_16x512": {"blocks.15.feed_forward": 2 * 512 * 2048},
    "ami_lstm_1x1000": {"rnn.l0.i": 2 * 1000 * 1000},
    "swbd_transformer_12x256": {"blocks.11.attention": 4 * 256 * 256, "output": 20 * 256},
}


@pytest.mark.parametrize("path", LM_CONFIGS, ids=lambda path: path.stem)
def test_the_host_builds_it(dry_run, path):
    from found import find_clusters

    kind, name = re.fullmatch(r"train_lm_(mpq_|nas_|)(.*)", path.stem).groups()
    lm = dry_run(path)
    sizes = {cluster.name: cluster.n_weights for cluster in find_clusters(lm)}
    assert EXPECTED[name].items() <= sizes.items()
    if kind == "mpq_":
        assert {spec.bits for spec in lm.plan.clusters.values()} == {2}
        assert lm.plan.clusters.keys() == sizes.keys()
    if kind == "nas_":
        assert lm.nas.options.budget == 2.0


@pytest.mark.parametrize("path", RECIPE_LM_CONFIGS, ids=short)
def test_the_host_builds_lms_of_recipes(dry_run, path):
    lm = dry_run(path)  # without a plan a train_lm_mpq.yaml is the host's default LM
    assert type(lm).__module__.startswith("espnet2.lm.")


def test_the_papers_transformer_has_its_published_size():
    """106 MiB at 30,456 words and 138 MiB at 47,096, one vocabulary matrix counted."""
    conf = yaml.safe_load((CONF / "lm" / "train_lm_transformer_6x512.yaml").read_text())["lm_conf"]
    width, ffn = conf["att_unit"], conf["unit"]
    attention = 4 * (width * width + width)
    block = attention + 2 * width * ffn + ffn + width + 4 * width
    for n_words, mebibytes in ((30456, 106), (47096, 138)):
        weights = conf["layer"] * block + n_words * width
        assert 4 * weights / 2**20 == pytest.approx(mebibytes, abs=0.8)


@pytest.mark.parametrize("path", MPQ_CONFIGS, ids=short)
def test_mpq_knows_the_options(path):
    from espnet_mpq.bin.options import read_config_options

    name = path.stem.split("_")[0]
    module = importlib.import_module(f"espnet_mpq.bin.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    words = read_config_options(parser, str(path))
    required = {
        "sensitivity": ["--output", "s.json"],
        "nas": ["--lm_exp", "exp", "--text", "text", "--output_dir", "nas"],
        "plan": ["--lm_exp", "exp", "--output_dir", "plan"],
        "quantize": ["exp", "--text", "text", "--output", "out"],
    }
    args = vars(parser.parse_args([*words, *required[name]]))
    for key, value in yaml.safe_load(path.read_text()).items():
        assert args[key] == value


@pytest.mark.parametrize("path", ADMM_CONFIGS, ids=lambda path: path.stem)
def test_the_trainer_knows_the_options(host, path):
    from espnet_mpq.training.options import AdmmOptions

    values = yaml.safe_load(path.read_text())
    assert values.keys() <= host.LMTask.get_default_config().keys()
    names = {k[len("mpq_") :]: v for k, v in values.items() if k.startswith("mpq_")}
    names["dual_period"] = names.pop("dual_period")
    options = AdmmOptions(**names)
    if path.stem == "admm":  # it says that these are the defaults
        assert options == AdmmOptions()


@pytest.mark.parametrize("path", DECODING, ids=short)
def test_the_decoder_knows_the_options(host, path):
    from espnet2.bin.asr_inference import get_parser

    known = {action.dest for action in get_parser()._actions}
    assert yaml.safe_load(path.read_text()).keys() <= known


@pytest.mark.parametrize(
    "path", sorted({*CONF.glob("*/*.yaml"), *RECIPE_LM_CONFIGS, *MPQ_CONFIGS}), ids=short
)
def test_it_opens_with_what_it_reproduces(path):
    """A result, or that it has not been run: the first lines are a comment with one of them."""
    text = path.read_text()
    head = text[: re.search(r"^[^#]", text, re.M).start()].replace("\n# ", " ")
    known = r"[Nn]ot yet run|RESULTS\.md|perplexity [\w. ]*\d|proves that the stages work"
    assert re.search(known, head), head
