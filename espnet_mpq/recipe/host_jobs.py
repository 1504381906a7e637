"""Run commands of the host and of mpq for a run.sh, with one import of the host in all.

Importing the host takes longer than most jobs of a small recipe. run.sh starts this program once;
every line on its standard input, ``N_PARALLEL N_THREADS JOB_FILE``, is answered on standard output
by the exit status 0 or 1. Each line of a job file is

    LOG MODULE ARGUMENTS...

and does the same as ``python3 -m espnet_mpq -m MODULE ARGUMENTS... >> LOG``: a process of its own
(own random seeds, own state of the host's classes), forked after the import. After a failure no
more jobs start, and the end of the log is shown. When standard input closes, running jobs are
stopped: a killed run.sh leaves nothing behind.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One line of a job file."""

    log: Path
    module: str
    args: list[str]


def read_jobs(path: str) -> list[Job]:
    """Parse a job file; empty lines and comments are skipped."""
    jobs = []
    for line in Path(path).read_text().splitlines():
        words = shlex.split(line, comments=True)
        if words:
            jobs.append(Job(Path(words[0]), words[1], words[2:]))
    return jobs


def prepare(jobs: list[Job]) -> None:
    """Register the plugin with the host and import what the jobs need."""
    import espnet_mpq

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own deprecations
        espnet_mpq.register(watch_recognisers=True)
        for job in jobs:
            importlib.import_module(job.module)


def run_job(job: Job, n_threads: int) -> None:
    """Body of a forked process: send all output to the log and call the module's main()."""
    import torch

    job.log.parent.mkdir(parents=True, exist_ok=True)
    handle = job.log.open("a")  # a resumed training keeps its past
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    print(f"# python3 -m espnet_mpq -m {job.module} {shlex.join(job.args)}", flush=True)
    torch.set_num_threads(n_threads)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)  # the host's basicConfig would do nothing otherwise
    module = sys.modules[job.module]
    sys.argv = [module.__file__, *job.args]
    begin = time.perf_counter()
    status = module.main()
    print(f"# done in {time.perf_counter() - begin:.1f} s", flush=True)
    sys.exit(status if isinstance(status, int) else 0)


def report_failure(job: Job, exitcode: int, n_lines: int = 25) -> None:
    """Show the end of a failed job's log."""
    print(f"{job.module} failed with status {exitcode}; log: {job.log}", file=sys.stderr)
    if job.log.is_file():
        for line in job.log.read_text(errors="replace").splitlines()[-n_lines:]:
            print(f"    {line}", file=sys.stderr)


def run_jobs(jobs: list[Job], n_parallel: int, n_threads: int) -> int:
    """Run the jobs in order, at most n_parallel at a time; return 0 when all succeeded, else 1."""
    context = multiprocessing.get_context("fork")
    waiting, running, failed = list(jobs), {}, False
    if multiprocessing.connection.wait([0], timeout=0):
        sys.exit(1)  # nobody writes here now: run.sh has gone while the host was imported
    while running or (waiting and not failed):
        while waiting and len(running) < n_parallel and not failed:
            job = waiting.pop(0)
            process = context.Process(target=run_job, args=(job, n_threads))
            process.start()
            running[process] = job
        ready = multiprocessing.connection.wait([0, *(process.sentinel for process in running)])
        if 0 in ready:  # nobody writes here while jobs run: run.sh is gone
            for process in running:
                process.terminate()
            sys.exit(1)
        for process in [process for process in running if process.sentinel in ready]:
            process.join()
            job = running.pop(process)
            if process.exitcode != 0:
                report_failure(job, process.exitcode)
                failed = True
    return int(failed)


def main() -> None:
    # before torch is imported: no thread pool may exist when the jobs are forked, and threads that
    # wait must sleep, or another busy program on the machine slows a training down tenfold
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    # unbuffered, so that a wait on the descriptor sees what has not been read
    for line in iter(os.fdopen(0, "rb", buffering=0).readline, b""):
        n_parallel, n_threads, path = line.decode().split(maxsplit=2)
        jobs = read_jobs(path.strip())
        prepare(jobs)
        print(run_jobs(jobs, int(n_parallel), int(n_threads)), file=answers, flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a training worker that the host spawned
    prepare([])
