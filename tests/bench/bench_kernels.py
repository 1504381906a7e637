"""Speed of packed LMs: step latency, roofs, load time and memory, share of the beam search.

Against the host's own fp32 LM, PyTorch's dynamic int8 and, when `pip install onnx onnxruntime` was
run, ONNX Runtime fp32 and int8; what is not installed is left out, with the reason. The tables of
one machine: RESULTS.md beside this file, made by `make bench`. Pieces can be measured one by one:

    python tests/bench/bench_kernels.py --parts latency --sizes 2x650 --threads 1
    python tests/bench/bench_kernels.py --parts search --sizes 4x2048 --markdown RESULTS.md
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import latency, load, onnx_lm, search, tables  # noqa: E402
from bench.lm_systems import has_host  # noqa: E402
from bench.results import Results  # noqa: E402
from packed_models import architecture  # noqa: E402

PARTS = ("latency", "search", "load")
SIZES = ("2x650", "2x1024", "4x2048")


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="layers x units")
    parser.add_argument("--vocab", type=int, nargs="+", default=[5000, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 10, 20, 60])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="of the latency part"
    )
    parser.add_argument("--rounds", type=int, default=9, help="at most 3 for search and load")
    parser.add_argument("--least_s", type=float, default=0.05, help="seconds a measurement")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="latency in the time of this thread alone, for a machine that does other work too; "
        "no roofs. It means nothing for more than one thread, which is refused",
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="models made once")
    parser.add_argument("--results", type=Path, help="JSON to add to (default: WORK/results.json)")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument("--note", help="a sentence for the head of the tables")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--smoke", action="store_true", help="seconds, tiny LMs, nothing is kept")
    args = parser.parse_args(arguments)
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu_time is the time of one thread: give --threads 1")
    if args.smoke:
        args.sizes, args.vocab, args.batch = ["2x24"], [50], [1, 3, 10]
        args.rounds, args.least_s = 1, 0.0
    return args


def sized(name: str, vocab_size: int):
    """ "2x650" -> the architecture of an LSTM LM."""
    n_layers, n_units = map(int, name.split("x"))
    return architecture("lstm", vocab_size, n_units, n_units, n_layers)


def facts(arch, **more) -> dict:
    return {"layers": arch.nlayers, "units": arch.nhid, "vocab": arch.vocab_size, **more}


def run_latency(args, results: Results, with_host: bool) -> None:
    clock = time.thread_time if args.cpu_time else time.perf_counter
    onnx_work = None if onnx_lm.why_not() else args.work
    for size in args.sizes:
        for n_threads in args.threads:
            for vocab_size in args.vocab:
                arch = sized(size, vocab_size)
                if args.prepare:
                    if onnx_work:
                        onnx_lm.onnx_steps(arch, n_threads, onnx_work)
                    continue
                steps = latency.all_steps(arch, args.bits, n_threads, with_host, onnx_work)
                for batch in args.batch:
                    found = latency.measure(
                        *(arch, steps, args.bits, batch, n_threads, args.rounds, args.least_s),
                        clock,
                        with_roofs=not args.cpu_time,
                    )
                    key = f"{size} {vocab_size} tokens batch {batch} threads {n_threads}"
                    results.put(
                        "latency", key, facts(arch, batch=batch, threads=n_threads, **found)
                    )
                    shown = (f"{n} {1e3 * s:.3f}" for n, s in found["seconds"].items())
                    print(f"{key}, ms: {', '.join(shown)}", flush=True)


def run_search(args, results: Results, with_host: bool) -> None:
    for size in args.sizes if with_host and not args.prepare else ():
        arch = sized(size, max(args.vocab))
        found = search.shares(arch, min(args.rounds, 3), args.smoke)
        results.put("search", size, facts(arch, systems=found))
        print(f"{size} search: {found}", flush=True)


def run_load(args, results: Results, with_host: bool) -> None:
    for size in args.sizes if with_host else ():
        arch = sized(size, max(args.vocab))
        folders = load.prepare(arch, args.work)
        if not args.prepare:
            found = load.measure(folders, min(args.rounds, 3), fresh=not args.smoke)
            results.put("load", size, facts(arch, systems=found))
            print(f"{size} load: {found}", flush=True)


def main(arguments=None) -> dict:
    """Measure, print the tables, return everything as Results.data."""
    args = parse(arguments)
    results = Results(None if args.smoke else args.results or args.work / "results.json")
    with_host = has_host()
    if args.note:
        results.note(args.note)
    if not with_host:
        results.note("ESPnet is not installed: its columns, search and load times are left out.")
    if onnx_lm.why_not():
        results.note(f"No column of ONNX Runtime: {onnx_lm.why_not()}.")
    if args.cpu_time:
        results.note("Latencies are seconds of the thread (--cpu_time), not of the wall.")
    runs = {"latency": run_latency, "search": run_search, "load": run_load}
    for part in args.parts:
        runs[part](args, results, with_host)
    text = tables.render(results.data)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return results.data


if __name__ == "__main__":
    main()
