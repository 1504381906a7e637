"""`mpq pack` and `mpq info` as commands."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from espnet_mpq.bin import info, pack
from espnet_mpq.bin.mpq import main
from espnet_mpq.errors import FormatError, InputError
from espnet_mpq.packed.format import save_packed
from espnet_mpq.plan import ClusterSpec

from packed_models import architecture, mixed, packed_model, uniform  # isort: skip


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folder(tmp_path):
    arch = architecture(vocab_size=30, unit=20)
    packed = packed_model(arch, mixed(arch, 4), source={"command": "mpq pack x"})
    save_packed(tmp_path / "packed.safetensors", packed)
    return tmp_path


def test_info_json_is_right_to_the_byte(folder, capsys):
    run(info, folder, "--json")
    value = json.loads(capsys.readouterr().out)
    size = (folder / "packed.safetensors").stat().st_size
    totals = value["totals"]
    assert totals["n_bytes"] == size
    n_weights = 30 * 20 * 2 + 2 * (4 * 20 * 40) + 2 * 2 * 80 + 30
    assert totals["n_weights"] == n_weights and totals["fp_n_bytes"] == 4 * n_weights
    assert totals["effective_bits"] == pytest.approx(8 * size / n_weights)
    stored = sum(row["n_bytes"] for k in ("clusters", "shared", "rest") for row in value[k])
    assert stored + totals["header_n_bytes"] == size
    names = [row["cluster"] for row in value["clusters"]]
    assert names[:3] == ["embedding", "rnn.l0.i", "rnn.l0.f"] and names[-1] == "output"
    for row in value["clusters"]:
        assert (row["relative_error"] == 0) == (row["bits"] == 32)
    kept = {row["parameter"] for row in value["rest"]}
    assert kept == {"decoder.bias"} | {f"rnn.bias_{i}h_l{k}" for i in "ih" for k in (0, 1)}


def test_info_table(folder, capsys):
    run(info, folder / "packed.safetensors")
    text = capsys.readouterr().out
    for word in ("lstm, 2 x 20", "rnn.l1.o", "effective bits", "kept in float", "mpq pack x"):
        assert word in text


def test_info_names_the_kernel_and_its_threads(kernels, tmp_path, capsys, monkeypatch):
    file, n_threads = tmp_path / "packed.safetensors", torch.get_num_threads()
    threads = f"{n_threads} thread" + "s" * (n_threads > 1)
    for rnn_type, kernel in (("lstm", kernels[-1]), ("gru", "reference (no kernels for gru)")):
        arch = architecture(rnn_type, vocab_size=30, unit=20)
        save_packed(file, packed_model(arch, uniform(arch, ClusterSpec(2))))
        run(info, tmp_path)
        assert f"kernel           {kernel}, {threads}\n" in capsys.readouterr().out
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    run(info, tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["kernel"] == "reference" and found["n_threads"] == n_threads


def test_row_bytes_and_error_of_one_bit(tmp_path, capsys):
    """1 bit, one scale a row: 20 columns are 3 bytes and 2 of scale; MSE of Gaussians 0.3634."""
    arch = architecture(vocab_size=4000, unit=20, nlayers=1)
    save_packed(tmp_path / "packed.safetensors", packed_model(arch, uniform(arch, ClusterSpec(1))))
    run(info, tmp_path, "--json")
    row = json.loads(capsys.readouterr().out)["clusters"][0]
    assert row["n_bytes"] == 4000 * (3 + 2)
    # The best sign code of N weights leaves 1 - 2/pi (1 + (pi/2 - 1)/N) of their energy.
    want = 1 - 2 / math.pi * (1 + (math.pi / 2 - 1) / 20)
    assert row["relative_error"] == pytest.approx(want, rel=0.02)


def test_info_refuses(folder, tmp_path):
    path = folder / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="truncated"):
        run(info, folder)
    path.unlink()
    with pytest.raises(InputError, match="mpq pack"):
        run(info, folder)


def test_pack_command(fp_exp, tmp_path, capsys):
    from espnet_mpq.hosts.espnet.families import architecture_of

    arch = architecture_of("seq_rnn", fp_exp.settings["lm_conf"], len(fp_exp.token_list))
    plan = tmp_path / "plan.json"
    uniform(arch, ClusterSpec(2)).write(plan)
    run(pack, "--lm_exp", fp_exp.path, "--plan", plan, "--output_dir", tmp_path / "o")
    assert "effective bits" in capsys.readouterr().out
    run(info, tmp_path / "o")
    assert "embedding" in capsys.readouterr().out


def test_a_file_that_grew_is_called_larger(fp_exp, tmp_path, capsys):
    from espnet_mpq.packed.receipt import times_smaller

    assert (times_smaller(7.9), times_smaller(1), times_smaller(0.12)) == (
        *("7.90x smaller", "1.00x smaller"),
        "8.33x larger",
    )
    words = ["plan", "--lm_exp", fp_exp.path, "--uniform", 32, "--output_dir", tmp_path / "p"]
    assert main([str(w) for w in words]) == 0
    assert "x larger than fp" in capsys.readouterr().out
