"""A packed directory: an ordinary LM experiment for the host, written whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from found import find_clusters, rest_parameters

from espnet_mpq.errors import FormatError, InputError, MismatchError, PlanError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.experiment import pack as module
from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment, read_weights
from espnet_mpq.hosts.espnet.families import architecture_of
from espnet_mpq.io import sha256_file, token_list_sha256
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import load_packed
from espnet_mpq.packed.size import header_n_bytes
from espnet_mpq.plan import ClusterSpec, plan_size

from packed_models import mixed, uniform  # isort: skip


@pytest.fixture(scope="module")
def arch(fp_exp):
    return architecture_of("seq_rnn", fp_exp.settings["lm_conf"], len(fp_exp.token_list))


@pytest.fixture(scope="module")
def plan_file(arch, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    mixed(arch, 1).write(path)
    return path


@pytest.fixture
def packed_dir(fp_exp, plan_file, tmp_path):
    folder = tmp_path / "lm_packed"
    pack_experiment(fp_exp.path, folder, plan=plan_file)
    return folder


@pytest.fixture
def quantized_exp(fp_exp, plan_file, packed_dir, tmp_path):
    """An experiment whose weights lie on the plan's grid, with the plan in lm_conf."""
    folder = tmp_path / "lm_mpq"
    shutil.copytree(fp_exp.path, folder)
    values = float_state(load_packed(packed_dir / "packed.safetensors"))
    state = {"lm." + name: value for name, value in values.items()}
    if "lm.decoder.weight" not in state:
        state["lm.decoder.weight"] = state["lm.encoder.weight"]
    torch.save(state, folder / "valid.loss.best.pth")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["lm"] = "mpq_seq_rnn"
    config["model"] = "mpq_lm"
    config["mpq_gamma"] = 0.1
    config["lm_conf"]["plan"] = json.loads(plan_file.read_text(encoding="utf-8"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "perplexity_test").mkdir()
    (folder / "perplexity_test" / "ppl").write_text("7.5\n")
    return folder


@pytest.mark.parametrize("inline", [False, True], ids=["plan file", "lm_conf"])
def test_source_has_what_the_plan_was_made_from(fp_exp, quantized_exp, arch, tmp_path, inline):
    record = {
        "inputs": {
            "checkpoint": {"path": "x.pth", "sha256": "a" * 64},
            "sensitivity": {"path": "s.json", "sha256": "b" * 64},
        },
        "options": {"seed": None},
        "seed": 1234567,
        "text_sha256": "c" * 64,
        "token_list_sha256": token_list_sha256(fp_exp.token_list),
    }
    plan = dataclasses.replace(mixed(arch, 1), provenance=record)
    if inline:
        config = yaml.safe_load((quantized_exp / "config.yaml").read_text(encoding="utf-8"))
        config["lm_conf"]["plan"] = plan.inline()
        (quantized_exp / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    packed = pack_experiment(
        quantized_exp,
        tmp_path / "out",
        plan=None if inline else plan,
        command="mpq pack --lm_exp " + "long/" * 60,
    )
    source = packed.metadata["source"]
    assert source["seed"] == 1234567 and source["text_sha256"] == "c" * 64
    assert source["sensitivity_sha256"] == "b" * 64
    assert source["fp_checkpoint_sha256"] == "a" * 64
    assert source["checkpoint_sha256"] == sha256_file(quantized_exp / "valid.loss.best.pth")
    assert packed.metadata["token_list"]["sha256"] == record["token_list_sha256"]
    assert source["command"].startswith("mpq pack --lm_exp long/")
    size = plan_size(plan, arch.clusters(), arch.rest(), header_n_bytes(arch, plan))
    path = tmp_path / "out" / "packed.safetensors"
    assert size.n_bytes == path.stat().st_size
    assert load_packed(path).metadata["source"] == source
    # A list other than the packed one is told apart.
    other = dataclasses.replace(plan, provenance={**record, "token_list_sha256": "d" * 64})
    packed = pack_experiment(quantized_exp, tmp_path / "other", plan=other)
    assert packed.metadata["source"]["token_list_sha256"] == "d" * 64


def test_token_list_file_is_read_as_the_host_does_and_inlined(
    fp_exp, plan_file, packed_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "from_file"
    shutil.copytree(fp_exp.path, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["token_list"] = "data/tokens.txt"
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(InputError, match="data/tokens.txt"):
        pack_experiment(folder, tmp_path / "out", plan=plan_file)
    (tmp_path / "data").mkdir()
    text = "".join(f"{token} \n" for token in fp_exp.token_list)  # the host strips the right
    (tmp_path / "data" / "tokens.txt").write_text(text, encoding="utf-8")
    pack_experiment(folder, tmp_path / "out", plan=plan_file)
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text(encoding="utf-8"))
    assert written["token_list"] == fp_exp.token_list
    new, old = (load_packed(d / "packed.safetensors") for d in (tmp_path / "out", packed_dir))
    assert new.metadata["token_list"] == old.metadata["token_list"]


def test_architecture_has_the_parameters_and_clusters_of_the_host_lm(host, tiny_lm, arch):
    shapes = {n: tuple(p.shape) for n, p in tiny_lm.named_parameters()}
    assert arch.state_shapes() == shapes and list(arch.state_shapes()) == list(shapes)
    assert arch.clusters() == find_clusters(tiny_lm)
    assert arch.rest() == rest_parameters(tiny_lm, find_clusters(tiny_lm))


def test_host_loads_the_directory_and_scores_as_the_dequantized_lm(
    host, fp_exp, packed_dir, monkeypatch
):
    monkeypatch.setenv("MPQ_KERNEL", "reference")  # float activations
    packed_file = packed_dir / "packed.safetensors"
    assert sorted(p.name for p in packed_dir.iterdir()) == [
        "config.yaml", "images", "packed.safetensors", "receipt.json",
    ]  # fmt: skip
    model, args = host.LMTask.build_model_from_file(
        str(packed_dir / "config.yaml"), str(packed_file), "cpu"
    )
    assert args.token_list == fp_exp.token_list and args.token_type == "char"
    float_model, _ = host.LMTask.build_model_from_file(str(fp_exp.config), str(fp_exp.checkpoint))
    values = float_state(load_packed(packed_file))
    float_model.lm.load_state_dict({**float_model.lm.state_dict(), **values})
    float_model.eval()
    text = torch.randint(2, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 7, 4])
    with torch.no_grad():
        nll, n_tokens = model.nll(text, lengths)
        want, _ = float_model.nll(text, lengths)
        batchified, _ = model.batchify_nll(text, lengths, batch_size=2)
    assert torch.allclose(nll, want, atol=1e-5) and torch.allclose(batchified, want, atol=1e-5)
    ppl = np.exp(float(nll.sum() / n_tokens.sum()))
    assert ppl == pytest.approx(np.exp(float(want.sum() / n_tokens.sum())), rel=1e-5)


def test_host_perplexity_program(host, packed_dir, kaldi_text_file, tmp_path):
    from espnet2.bin import lm_calc_perplexity

    ppls = []
    for dtype in ("float32", "float64"):
        out = tmp_path / dtype
        lm_calc_perplexity.main(
            cmd=[
                "--train_config", str(packed_dir / "config.yaml"),
                "--model_file", str(packed_dir / "packed.safetensors"),
                "--data_path_and_name_and_type", f"{kaldi_text_file},text,text",
                "--output_dir", str(out), "--dtype", dtype, "--num_workers", "0",
            ]
        )  # fmt: skip
        ppls.append(float((out / "ppl").read_text()))
    assert 1 < ppls[0] < 60 and ppls[0] == pytest.approx(ppls[1], rel=3e-4)


def test_config_keeps_what_the_host_needs(fp_exp, packed_dir, arch):
    old = yaml.safe_load(fp_exp.config.read_text(encoding="utf-8"))
    new = yaml.safe_load((packed_dir / "config.yaml").read_text(encoding="utf-8"))
    assert set(old) - set(new) == {key for key in old if key.startswith("mpq_")}
    changed = {key for key in new if new[key] != old.get(key)}
    assert changed <= {"lm", "lm_conf", "model_conf", "init", "init_param", "model"}
    assert new["lm"] == "mpq_packed_rnn" and new["model"] == "lm"
    assert architecture_of(new["lm"], new["lm_conf"], len(new["token_list"])) == arch
    assert "plan" in new["lm_conf"] and "provenance" not in new["lm_conf"]["plan"]


def test_quantized_experiment_packs_exactly(quantized_exp, fp_exp, tmp_path, caplog):
    out = tmp_path / "out"
    command = "mpq pack " + "x" * 999 + "\udc80"
    packed = pack_experiment(quantized_exp, out, fp_exp=fp_exp.path, command=command)
    assert not caplog.records
    weights = read_weights(quantized_exp / "valid.loss.best.pth")
    for name, value in float_state(packed).items():
        assert torch.allclose(value, weights[name], rtol=1e-6, atol=0)
    assert (out / "perplexity_test" / "ppl").read_text() == "7.5\n"
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["error_reference"] == "fp"
    assert receipt["command"] == "mpq pack " + "x" * 999 + "?"
    assert receipt["source"]["command"].startswith("mpq pack xxx")
    errors = [row["relative_error"] for row in receipt["clusters"] if row["bits"] <= 2]
    assert errors and min(errors) > 1e-3
    assert receipt["totals"]["n_bytes"] == (out / "packed.safetensors").stat().st_size
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert "mpq_gamma" not in config and config["model"] == "lm"
    # Without the fp LM the errors compare with the checkpoint: nothing was lost in packing.
    pack_experiment(quantized_exp, out)
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["error_reference"] == "checkpoint"
    assert max(row["relative_error"] for row in receipt["clusters"]) < 1e-6


def test_weights_off_the_grid_are_rounded_with_a_warning(quantized_exp, fp_exp, tmp_path, caplog):
    shutil.copy(fp_exp.checkpoint, quantized_exp / "valid.loss.best.pth")
    pack_experiment(quantized_exp, tmp_path / "out")
    assert "not on the grid" in caplog.text
    assert not (tmp_path / "out" / "perplexity_test").exists()


def test_packing_again_replaces_and_forgets_stale_results(fp_exp, packed_dir, plan_file, arch):
    (packed_dir / "perplexity_test").mkdir()
    (packed_dir / "notes.txt").write_text("mine")
    pack_experiment(fp_exp.path, packed_dir, plan=plan_file)
    assert (packed_dir / "perplexity_test").exists()  # the same model: the result still holds
    pack_experiment(fp_exp.path, packed_dir, plan=uniform(arch, ClusterSpec(1)))
    assert not (packed_dir / "perplexity_test").exists()
    assert (packed_dir / "notes.txt").read_text() == "mine"
    assert load_packed(packed_dir / "packed.safetensors").plan == uniform(arch, ClusterSpec(1))
    assert [p.name for p in packed_dir.parent.iterdir()] == [packed_dir.name]
    assert not any(p.name.startswith(".") for p in packed_dir.iterdir())


@pytest.mark.parametrize("exists", (False, True))
@pytest.mark.parametrize("n_writes", (0, 1, 2))
def test_full_disk_changes_nothing(
    fp_exp, plan_file, arch, tmp_path, monkeypatch, exists, n_writes
):
    folder = tmp_path / "out"
    if exists:
        pack_experiment(fp_exp.path, folder, plan=plan_file)

    def everything():
        return {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}

    before = everything()
    real, count = os.fsync, iter(range(100))

    def full(handle):
        if next(count) >= n_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        pack_experiment(fp_exp.path, folder, plan=uniform(arch, ClusterSpec(8)))
    monkeypatch.undo()
    assert everything() == before


def test_wrong_inputs(fp_exp, packed_dir, plan_file, quantized_exp, arch, tmp_path):
    out = tmp_path / "out"
    bad_plan = tmp_path / "bad.json"
    bad = json.loads(plan_file.read_text())
    bad["clusters"]["output"]["bits"] = 5
    bad_plan.write_text(json.dumps(bad))
    cases = [
        (dict(exp=fp_exp.path), PlanError, "--plan"),
        (dict(exp=fp_exp.path, plan=bad_plan), PlanError, "bits.*5"),
        (dict(exp=tmp_path / "none", plan=plan_file), InputError, "none"),
        (dict(exp=fp_exp.path, plan=plan_file, file="x.pth"), InputError, "x.pth"),
        (dict(exp=packed_dir), MismatchError, "packed already"),
        (dict(exp=quantized_exp, fp_exp=tmp_path / "none"), InputError, "none"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            pack_experiment(output_dir=out, **options)
    with pytest.raises(InputError, match="is the input"):
        pack_experiment(fp_exp.path, fp_exp.path, plan=plan_file)
    with pytest.raises(InputError, match="another experiment"):
        pack_experiment(fp_exp.path, quantized_exp, plan=plan_file)
    damaged = quantized_exp / "valid.loss.best.pth"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        pack_experiment(quantized_exp, out)
    torch.save({"encoder.weight": torch.ones(2)}, damaged)
    with pytest.raises(MismatchError, match="lm\\."):
        pack_experiment(quantized_exp, out)
    state = torch.load(fp_exp.checkpoint)
    del state["lm.decoder.bias"]
    torch.save(state, damaged)
    with pytest.raises(MismatchError, match="decoder.bias"):
        pack_experiment(quantized_exp, out)
    state = torch.load(fp_exp.checkpoint)
    state["lm.rnn.weight_hh_l0"][0, 0] = float("nan")
    torch.save(state, damaged)
    with pytest.raises(InputError, match="NaN"):
        pack_experiment(quantized_exp, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "value, found",
    [(3, "int"), ([1, 2], "list"), ({"a": 1}, "dict"), (torch.ones(2, dtype=torch.int64), "int64")],
    ids=str,
)
def test_checkpoint_whose_values_are_no_weights(tmp_path, value, found):
    torch.save({"lm.encoder.weight": torch.ones(2, 2), "lm.decoder.bias": value}, tmp_path / "x")
    with pytest.raises(MismatchError, match=f"x: lm.decoder.bias is no weight: found .*{found}"):
        read_weights(tmp_path / "x")


def test_host_refuses_what_does_not_belong_together(host, fp_exp, packed_dir, arch, tmp_path):
    config, packed_file = packed_dir / "config.yaml", packed_dir / "packed.safetensors"
    load = host.LMTask.build_model_from_file

    def edited(change):
        value = yaml.safe_load(config.read_text(encoding="utf-8"))
        change(value)
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return str(path)

    swapped = edited(lambda c: c["token_list"].reverse())
    with pytest.raises(MismatchError, match="another token list"):
        load(swapped, str(packed_file))
    wrong_size = edited(lambda c: c["lm_conf"].update(nhid=17))
    with pytest.raises(MismatchError, match="nhid"):
        load(wrong_size, str(packed_file))
    wrong_plan = edited(lambda c: c["lm_conf"]["plan"]["clusters"].update(output={"bits": 32}))
    with pytest.raises(MismatchError, match="output"):
        load(wrong_plan, str(packed_file))
    no_plan = edited(lambda c: c["lm_conf"].pop("plan"))
    with pytest.raises(InputError, match="edited.yaml: keys of lm_conf are missing: .*no plan"):
        load(no_plan, str(packed_file))
    null = edited(lambda c: c["lm_conf"].update(plan=None))
    with pytest.raises(PlanError, match="not a plan: found None"):
        load(null, str(packed_file))
    other_keys = edited(lambda c: c["lm_conf"].update(att_unit=16))
    with pytest.raises(InputError, match="edited.yaml: unknown key lm_conf.att_unit"):
        load(other_keys, str(packed_file))
    transformer = dict(att_unit=16, head=2, layer=1, embed_unit=8, unit=16)
    plan = uniform(families.architecture_of("transformer", transformer, 31), ClusterSpec(2))
    conf = {**transformer, "plan": plan.to_dict()}
    other_family = edited(lambda c: c.update(lm="mpq_packed_transformer", lm_conf=conf))
    with pytest.raises(MismatchError, match="does not fit config.yaml: class"):
        load(other_family, str(packed_file))
    unquoted = edited(lambda c: c["token_list"].__setitem__(3, False))
    with pytest.raises(InputError, match="token_list, entry 3 is False"):
        load(unquoted, str(packed_file))
    with pytest.raises(MismatchError):  # a float checkpoint for the packed configuration
        load(str(config), str(fp_exp.checkpoint))
    with pytest.raises(MismatchError):  # the packed file for the float configuration
        load(str(fp_exp.config), str(packed_file))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(packed_file.read_bytes()[:-7])
    with pytest.raises(FormatError, match="truncated"):
        load(str(config), str(cut))


def test_the_module_needs_no_host():
    code = (
        f"import sys, {module.__name__}\n"
        "sys.exit(any(name.startswith('espnet2') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tokenizer_files_beside_the_config_go_along(host, fp_exp, plan_file, tmp_path):
    source, out = tmp_path / "lm", tmp_path / "out"
    shutil.copytree(fp_exp.path, source)
    config = yaml.safe_load((source / "config.yaml").read_text())
    config["bpemodel"] = "data/bpe.model"
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    (source / "bpe.model").write_bytes(b"pieces")
    pack_experiment(source, out, plan=plan_file)
    assert (out / "bpe.model").read_bytes() == b"pieces"


def test_a_folder_holds_one_lm(make_lm_exp, fp_exp, plan_file, tmp_path):
    """Replacing a packed LM replaces its tokenizer and forgets what was measured on it."""
    out = tmp_path / "out"
    tokens = [*fp_exp.token_list[:-2], "\u00e9", "<sos/eos>"]
    other = make_lm_exp(tmp_path / "other", token_list=tokens, n_steps=1, bpemodel="b/bpe.model")
    source = tmp_path / "lm"
    shutil.copytree(fp_exp.path, source)
    config = yaml.safe_load((source / "config.yaml").read_text())
    config.update(bpemodel="a/bpe.model", non_linguistic_symbols="a/nls.txt")
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("bpe.model", "nls.txt"):
        (source / name).write_bytes(b"first")
    pack_experiment(source, out, plan=plan_file)
    (out / "perplexity.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    pack_experiment(source, out, plan=plan_file)  # the same: nothing is forgotten
    assert (out / "perplexity.json").exists() and (out / "nls.txt").read_bytes() == b"first"
    pack_experiment(other.path, out, plan=plan_file)  # its tokenizer lies elsewhere
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    assert names == ["config.yaml", "notes.txt", "packed.safetensors", "receipt.json"]
    (other.path / "bpe.model").write_bytes(b"second")
    pack_experiment(other.path, out, plan=plan_file)
    assert (out / "bpe.model").read_bytes() == b"second"
    pack_experiment(source, out, plan=plan_file)
    assert (out / "bpe.model").read_bytes() == b"first"


def test_a_tokenizer_that_belongs_to_no_packed_lm_stays(fp_exp, plan_file, tmp_path):
    source, out = tmp_path / "lm", tmp_path / "out"
    shutil.copytree(fp_exp.path, source)
    config = yaml.safe_load((source / "config.yaml").read_text())
    (source / "config.yaml").write_text(yaml.safe_dump({**config, "bpemodel": "bpe.model"}))
    (source / "bpe.model").write_bytes(b"pieces")
    out.mkdir()
    (out / "bpe.model").write_bytes(b"mine")
    with pytest.raises(InputError, match="bpe.model is in the way.*nothing was changed"):
        pack_experiment(source, out, plan=plan_file)
    assert [path.name for path in out.iterdir()] == ["bpe.model"]
    assert (out / "bpe.model").read_bytes() == b"mine"


def test_a_plan_of_another_checkpoint_is_refused(fp_exp, quantized_exp, arch, tmp_path):
    plan = dataclasses.replace(mixed(arch, 1), provenance={"checkpoint_sha256": "a" * 64})
    with pytest.raises(MismatchError) as caught:
        pack_experiment(fp_exp.path, tmp_path / "out", plan=plan)
    message = str(caught.value)
    assert "another checkpoint" in message and "expected SHA-256 " + "a" * 64 in message
    assert f"found SHA-256 {sha256_file(fp_exp.checkpoint)}" in message
    pack_experiment(quantized_exp, tmp_path / "out", plan=plan)  # trained with it
    right = {"checkpoint_sha256": sha256_file(fp_exp.checkpoint)}
    other = dataclasses.replace(uniform(arch, ClusterSpec(4)), provenance=right)
    pack_experiment(fp_exp.path, tmp_path / "out", plan=other)
    pack_experiment(quantized_exp, tmp_path / "out", plan=other, fp_exp=fp_exp.path)
