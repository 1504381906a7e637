"""Load time and resident memory of an LM experiment in a fresh process, fp32 against packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.lm_systems import float_weights  # noqa: E402
from bench.timing import alternate  # noqa: E402
from packed_models import tokens, uniform  # noqa: E402

# Architecture  # noqa: E402
from espnet_mpq.architecture.base import Architecture  # noqa: E402
from espnet_mpq.plan import ClusterSpec  # noqa: E402

PACKED_FILE, FP_FILE = "packed.safetensors", "valid.loss.best.pth"


def prepare(arch: Architecture, work: Path) -> Dict[str, Path]:
    """Experiments "fp32" and "2 bit" (packed by `mpq pack`) of random weights, made once."""
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment

    folder = work / f"lm_{arch.nlayers}x{arch.nhid}_{arch.vocab_size}"
    fp, packed = folder / "fp32", folder / "packed2"
    if not (packed / "config.yaml").is_file():
        fp.mkdir(parents=True, exist_ok=True)
        conf = dict(unit=arch.unit, nhid=arch.nhid, nlayers=arch.nlayers, rnn_type="lstm")
        settings = {k: v for k, v in _task().get_default_config().items() if _is_plain(v)}
        settings.update(lm="seq_rnn", lm_conf=conf, model="lm", model_conf={}, init=None)
        settings.update(token_list=tokens(arch.vocab_size), token_type="bpe")
        (fp / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        state = {f"lm.{name}": value for name, value in float_weights(arch).items()}
        torch.save(state, fp / FP_FILE)
        plan = uniform(arch, ClusterSpec(2))
        pack_experiment(fp, packed, plan=plan, file=FP_FILE)
    return {"fp32": fp, "2 bit": packed}


def _task():
    """The host's LM task, with the plugin registered."""
    import espnet_mpq

    espnet_mpq.register()  # also mends what keeps the host from being imported
    from espnet2.tasks.lm import LMTask

    return LMTask


def _is_plain(value) -> bool:
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        return False
    return True


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most that were resident since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load_here(folder: Path) -> dict:
    """What one load costs: seconds to the first scores, and bytes beyond the imports."""
    torch.set_num_threads(1)
    task = _task()
    file = next(folder / name for name in (FP_FILE, PACKED_FILE) if (folder / name).is_file())
    before, start_s = resident_bytes(), time.perf_counter()
    model, _ = task.build_model_from_file(str(folder / "config.yaml"), str(file))
    model.eval().lm.score(torch.tensor([1]), None, None)
    return {
        "load_s": time.perf_counter() - start_s,
        "resident_bytes": resident_bytes() - before,
        "peak_bytes": peak_bytes() - before,
        "file_bytes": file.stat().st_size,
    }


def load_in_process(folder: Path) -> dict:
    """load_here in a fresh process."""
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading {folder} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folders: Dict[str, Path], n_rounds: int, fresh: bool = True) -> Dict[str, dict]:
    """System -> medians of load_here over ``n_rounds`` fresh processes each, in turn.

    ``fresh`` False stays in this process, for tests: memory that is there already counts less.
    """
    load = load_in_process if fresh else load_here
    latest: Dict[str, dict] = {}

    def value(name: str, key: str) -> float:
        if key == "load_s":
            latest[name] = load(folders[name])
        return latest[name][key]

    keys = ("load_s", "resident_bytes", "peak_bytes", "file_bytes")
    measures = {
        (name, key): lambda name=name, key=key: value(name, key) for name in folders for key in keys
    }
    found = alternate(measures, n_rounds)
    return {name: {key: found[name, key] for key in keys} for name in folders}


if __name__ == "__main__":
    print(json.dumps(load_here(Path(sys.argv[1]))))
