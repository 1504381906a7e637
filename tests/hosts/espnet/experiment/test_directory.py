"""The output directory: the user's files stay, killed runs can be repeated, all or nothing."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.experiment.directory import check_output, replaced_directory
from espnet_mpq.packed.format import save_packed, to_bytes

from packed_models import architecture, mixed, packed_model  # isort: skip

CONFIG = "token_list:\n- a\nlm: mpq_packed_rnn\nlm_conf: {}\n"


def write(path, content="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def small_lm():
    arch = architecture(vocab_size=10, unit=4)
    return packed_model(arch, mixed(arch, 1))


def everything(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def put(out, packed="new"):
    """What `mpq pack` does with its files."""
    check_output(out, [])
    with replaced_directory(out) as folder:
        write(folder / "packed.safetensors", packed)
        write(folder / "config.yaml", CONFIG)
        write(folder / "receipt.json", "{}")
        write(folder / "images" / "loss.png", "png")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "lm"


@pytest.fixture
def ours(out):
    put(out, "old")
    return out


@pytest.mark.parametrize(
    "name", ["images/cat.jpg", "perplexity_test/ppl", "receipt.json", "packed.safetensors"]
)
def test_files_of_the_user_are_refused_and_stay(out, name):
    write(out / name)
    before = everything(out)
    with pytest.raises(InputError, match="files that mpq did not write.*" + name.split("/")[0]):
        put(out)
    assert everything(out) == before


@pytest.mark.parametrize("config", ["lm: transformer\n", "lm: seq_rnn\n", "", "lm: [\n"])
def test_another_experiment_is_refused(out, config):
    write(out / "config.yaml", config)
    save_packed(out / "packed.safetensors", small_lm())
    with pytest.raises(InputError, match="another experiment.*config.yaml"):
        check_output(out, [])


def test_other_names_do_not_matter(out):
    write(out / "work" / "plan" / "plan.json", "{}")
    write(out / ".lm.backup01" / "packed.safetensors")
    put(out)
    put(out, "newer")
    assert (out / "packed.safetensors").read_text() == "newer"
    assert (out / "work" / "plan" / "plan.json").exists()
    assert (out / ".lm.backup01" / "packed.safetensors").exists()


def test_replacing_keeps_the_users_files_inside(ours):
    write(ours / "images" / "mine.png")
    write(ours / "perplexity_test" / "notes.txt")
    write(ours / "perplexity_test" / "ppl", "7\n")
    put(ours)
    assert (ours / "images" / "mine.png").read_text() == "mine"
    assert (ours / "images" / "loss.png").read_text() == "png"
    assert [p.name for p in (ours / "perplexity_test").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("n_moves", range(5))
@pytest.mark.parametrize("before", ["work only", "packed before"])
def test_a_killed_run_can_be_repeated(out, monkeypatch, before, n_moves):
    """Killed after each of the renames: no config.yaml without its packed file, and no refusal."""
    content = to_bytes(small_lm())

    def put_real():
        check_output(out, [])
        with replaced_directory(out) as folder:
            (folder / "packed.safetensors").write_bytes(content)
            write(folder / "config.yaml", CONFIG)
            write(folder / "receipt.json", "{}")
            write(folder / "images" / "loss.png", "png")

    write(out / "work" / "x")
    if before == "packed before":
        put_real()
    real, count = os.replace, iter(range(100))

    def kill(*paths):
        if next(count) >= n_moves:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", kill)
    # A killed process does not clean up.
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    if n_moves < 4:
        with pytest.raises(KeyboardInterrupt):
            put_real()
        assert any(p.name.startswith(".lm.") for p in out.iterdir())
    monkeypatch.undo()
    if (out / "config.yaml").exists():
        assert (out / "packed.safetensors").exists()
    put_real()
    names = ["config.yaml", "images", "packed.safetensors", "receipt.json", "work"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_our_config_without_packed_file_is_resumed(ours):
    (ours / "packed.safetensors").unlink()
    put(ours)
    assert (ours / "packed.safetensors").read_text() == "new"


@pytest.mark.parametrize(
    "name", ["images", "packed.safetensors", "receipt.json", "images/loss.png"]
)
def test_wrong_kinds_change_nothing(ours, name):
    path = ours / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
        (path / "x").write_text("y")
    before = everything(ours.parent)
    with pytest.raises(InputError, match=f"{name} is in the way"):
        put(ours)
    assert everything(ours.parent) == before


@pytest.mark.parametrize(
    "number, n_moves, end",
    [
        (errno.ENOSPC, 0, "; free disk space or choose another folder; nothing was changed"),
        (errno.ENOSPC, 9, "; free disk space or choose another folder; then run the command again"),
        (errno.EROFS, 0, "; choose another folder"),
        (errno.EIO, 0, ""),
    ],
)
def test_messages_name_the_users_directory(ours, monkeypatch, number, n_moves, end):
    from espnet_mpq.io import atomic_write

    error = OSError(number, os.strerror(number))

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync" if not n_moves else "replace", fail)
    with pytest.raises(InputError) as caught:
        with replaced_directory(ours) as folder:
            if n_moves:
                write(folder / "packed.safetensors", "new")
            else:
                atomic_write(folder / "packed.safetensors", b"new")
    monkeypatch.undo()
    assert str(caught.value) == f"cannot write {ours}: found {os.strerror(number)}{end}"
    assert (ours / "packed.safetensors").read_text() == "old"
    assert not any(p.name.startswith(".") for p in [*ours.iterdir(), *ours.parent.iterdir()])
