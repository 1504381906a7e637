"""Speed of packed LMs: step latency, roofs, mixed bits, Transformers, beam search, load and memory.

Against the host's own fp32 LM, PyTorch's dynamic int8 and, when `pip install onnx onnxruntime` was
run, ONNX Runtime fp32 and int8; what is not installed is left out, with the reason. The tables of
one machine: RESULTS.md beside this file, made by `make bench`. Pieces can be measured one by one:

    python tests/bench/bench_kernels.py --parts latency --sizes 2x650 --threads 1
    python tests/bench/bench_kernels.py --parts search --sizes 4x2048 --markdown RESULTS.md

The rows of all runs are kept in --results; --markdown is written from all of them. A file with rows
that are not there is left as it is, and the new tables are put beside the JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import document, latency, load, mixed, onnx_lm, search, transformer  # noqa: E402
from bench.lm_systems import has_host  # noqa: E402
from bench.results import CPU_TIME, Results  # noqa: E402
from packed_models import architecture  # noqa: E402

# With the batches that a part measures; one thread but for latency.
PARTS = {
    "latency": [1, 10, 20, 60],
    "mixed": [1, 10],
    "transformer": [1, 10, 20],
    "search": [],
    "load": [],
}
SIZES = ["2x650", "2x1024", "4x2048"]
MIXED_SIZES = SIZES[:2]


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=list(PARTS),
        default=list(PARTS),
        help="none: only write the tables of what was measured before",
    )
    parser.add_argument("--sizes", nargs="+", help="layers x units; default: as the tables")
    parser.add_argument(
        "--transformers", nargs="+", default=["6x512"], help="layers x attention units"
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[5000, 16])
    parser.add_argument("--batch", type=int, nargs="+", help="default: as the tables")
    parser.add_argument(
        "--prefix", type=int, nargs="+", default=[20, 100], help="tokens, of the transformer part"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="of the latency part"
    )
    parser.add_argument("--rounds", type=int, default=9, help="at most 3 for search and load")
    parser.add_argument("--least_s", type=float, default=0.05, help="seconds a measurement")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="latencies in the time of this thread, for a machine that does other work too; "
        "no roofs. It means nothing for more than one thread, which is refused",
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="models made once")
    parser.add_argument("--results", type=Path, help="JSON to add to (default: WORK/results.json)")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument(
        "--replace", action="store_true", help="write them although rows are lost that are there"
    )
    parser.add_argument("--note", help="a sentence for the rows of this run")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--smoke", action="store_true", help="seconds, tiny LMs, nothing is kept")
    args = parser.parse_args(arguments)
    if args.cpu_time and "latency" in args.parts and args.threads != [1]:
        parser.error("--cpu_time is the time of one thread: give --threads 1")
    if min(args.prefix) < 2:
        parser.error("--prefix: at least 2 tokens")
    if args.cpu_time and {"search", "load"} & set(args.parts):
        parser.error("search and load have no --cpu_time: name the other --parts")
    if args.smoke:
        args.sizes, args.vocab, args.batch = ["2x24"], [50], [1, 3, 10]
        args.rounds, args.least_s, args.transformers, args.prefix = 1, 0.0, ["1x16"], [2, 7]
    return args


def sizes(args, part: str) -> list:
    return args.sizes or (MIXED_SIZES if part == "mixed" else SIZES)


def batches(args, part: str) -> list:
    return args.batch or PARTS[part]


def clock(args):
    return time.thread_time if args.cpu_time else time.perf_counter


def sized(name: str, vocab_size: int):
    """ "2x650" -> the architecture of an LSTM LM."""
    n_layers, n_units = map(int, name.split("x"))
    return architecture("lstm", vocab_size, n_units, n_units, n_layers)


def facts(arch, **more) -> dict:
    return {"layers": arch.nlayers, "units": arch.nhid, "vocab": arch.vocab_size, **more}


def run_latency(args, results: Results, with_host: bool) -> None:
    onnx_work = None if onnx_lm.why_not() else args.work
    for size in sizes(args, "latency"):
        for n_threads in args.threads:
            for vocab_size in args.vocab:
                arch = sized(size, vocab_size)
                if args.prepare:
                    if onnx_work:
                        onnx_lm.onnx_steps(arch, n_threads, onnx_work)
                    continue
                steps = latency.all_steps(arch, args.bits, n_threads, with_host, onnx_work)
                for batch in batches(args, "latency"):
                    found = latency.measure(
                        *(arch, steps, args.bits, batch, n_threads, args.rounds, args.least_s),
                        clock(args),
                        with_roofs=not args.cpu_time,
                    )
                    key = f"{size} {vocab_size} tokens batch {batch} threads {n_threads}"
                    results.put(
                        "latency", key, facts(arch, batch=batch, threads=n_threads, **found)
                    )
                    show(key, found["seconds"])


def show(key: str, seconds: dict) -> None:
    shown = (f"{name} {1e3 * s:.3f}" for name, s in seconds.items())
    print(f"{key}, ms: {', '.join(shown)}", flush=True)


def run_mixed(args, results: Results, with_host: bool) -> None:
    for size in sizes(args, "mixed") if not args.prepare else ():
        arch = sized(size, min(args.vocab))
        steps = mixed.stack_steps(arch)
        for batch in batches(args, "mixed"):
            key = f"{size} batch {batch}"
            seconds = mixed.measure(
                *(steps, arch.vocab_size, batch, args.rounds, args.least_s, clock(args))
            )
            results.put("mixed", key, facts(arch, batch=batch, threads=1, seconds=seconds))
            show(f"{key} mixed", seconds)


def run_transformer(args, results: Results, with_host: bool) -> None:
    for size in args.transformers if with_host and not args.prepare else ():
        arch = transformer.sized(size, max(args.vocab))
        lms = transformer.systems(arch, args.bits)
        for length in args.prefix:
            for batch in batches(args, "transformer"):
                # A single hypothesis shares nothing.
                for shared in (True, False) if batch > 1 else (False,):
                    beam = transformer.typical_beam(batch, length, arch.vocab_size, shared)
                    seconds = transformer.measure(
                        *(lms, beam, args.rounds, args.least_s, clock(args))
                    )
                    key = f"{size} prefix {length} batch {batch} {'shared' if shared else 'apart'}"
                    row = dict(layers=arch.layer, units=arch.att_unit, vocab=arch.vocab_size)
                    row.update(batch=batch, length=length, shared=shared, threads=1)
                    row.update(n_distinct=beam.n_distinct, seconds=seconds)
                    results.put("transformer", key, row)
                    show(f"{key} transformer", seconds)


def run_search(args, results: Results, with_host: bool) -> None:
    for size in sizes(args, "search") if with_host and not args.prepare else ():
        arch = sized(size, max(args.vocab))
        found = search.shares(arch, min(args.rounds, 3), args.smoke)
        results.put("search", size, facts(arch, systems=found))
        print(f"{size} search: {found}", flush=True)


def run_load(args, results: Results, with_host: bool) -> None:
    for size in sizes(args, "load") if with_host else ():
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
        results.note("ESPnet is not installed: its columns and parts are left out.")
    if args.cpu_time:
        results.note(CPU_TIME)
    runs = {
        "latency": run_latency,
        "mixed": run_mixed,
        "transformer": run_transformer,
        "search": run_search,
        "load": run_load,
    }
    for part in args.parts:
        runs[part](args, results, with_host)
    text = document.render(results.data)
    print(text)
    if "latency" in args.parts and onnx_lm.why_not():
        print(f"No column of ONNX Runtime: {onnx_lm.why_not()}.")
    if args.markdown:
        document.write(results.data, args.markdown, args.work / "RESULTS.md", args.replace)
    return results.data


if __name__ == "__main__":
    main()
