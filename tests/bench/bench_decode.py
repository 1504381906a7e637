"""Decoding time of a test set without LM and with every given LM, by ESPnet's own Speech2Text.

For any experiment of a recipe, one thread; the row joins those of bench_kernels.py:

    python tests/bench/bench_decode.py --set "AN4 test" --wav_scp data/test/wav.scp \\
        --asr exp/full_char/asr/valid.cer_ctc.ave.pth --config conf/decode.yaml --lm_weight 0.3 \\
        --lm "fp LM=exp/full_char/rnn/fp" --lm "packed=exp/full_char/rnn/kl/packed"

Imports, loading and reading of files are not counted. Systems take turns utterance by utterance.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import document  # noqa: E402
from bench.load import FP_FILE, PACKED_FILE  # noqa: E402
from bench.results import CPU_TIME, Results  # noqa: E402
from bench.search import Stopwatch  # noqa: E402

NO_LM = "no LM"


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", required=True, help="name of the test set in the table")
    parser.add_argument("--wav_scp", type=Path, required=True, help="lines: utterance, audio file")
    parser.add_argument("--asr", type=Path, required=True, help="checkpoint, config.yaml beside it")
    parser.add_argument(
        "--lm",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="LM experiment or checkpoint; may be repeated",
    )
    parser.add_argument(
        "--lm_int8",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="float LM with the host's --quantize_lm: torch dynamic int8 of its Linear layers "
        "(of an LSTM the host cannot take it: its batch_score fails)",
    )
    parser.add_argument("--config", type=Path, help="decoding options: arguments of Speech2Text")
    parser.add_argument("--lm_weight", type=float, help="instead of that of --config")
    parser.add_argument("--utterances", type=int, help="the first so many only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="seconds of this thread alone, for a machine that does other work too",
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--results", type=Path, help="JSON to add to (default: WORK/results.json)")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument("--replace", action="store_true", help="even if rows there are lost")
    parser.add_argument("--note", help="a sentence for this row")
    return parser.parse_args(arguments)


def lm_options(path: Path) -> dict:
    """Speech2Text's arguments for an LM experiment or one of its checkpoints."""
    files = [path] if path.is_file() else [path / name for name in (PACKED_FILE, FP_FILE)]
    found = [file for file in files if file.is_file()]
    if not found:
        raise SystemExit(f"no LM: {' and '.join(map(str, files))} do not exist")
    return {"lm_file": str(found[0]), "lm_train_config": str(found[0].parent / "config.yaml")}


def systems(args) -> Dict[str, dict]:
    """System -> Speech2Text's arguments."""
    options = {} if args.config is None else yaml.safe_load(args.config.read_text("utf-8")) or {}
    if args.lm_weight is not None:
        options["lm_weight"] = args.lm_weight
    options["asr_model_file"] = str(args.asr)
    options["asr_train_config"] = str(args.asr.parent / "config.yaml")
    found = {NO_LM: options}
    for given, more in ((args.lm, {}), (args.lm_int8, {"quantize_lm": True})):
        for word in given:
            name, _, path = word.partition("=")
            found[name] = {**options, **lm_options(Path(path)), **more}
    return found


class Decoder:
    """One system; seconds of everything and of the LM."""

    def __init__(self, options: dict, clock: Callable[[], float]):
        from espnet2.bin.asr_inference import Speech2Text

        self.decode, self.clock = Speech2Text(**options), clock
        search = self.decode.beam_search
        if search is None:
            raise SystemExit("bench_decode.py times beam searches with full scorers, no transducer")
        batched = type(search).__name__.startswith("Batch")
        calls = ("batch_score", "batch_init_state") if batched else ("score", "init_state")
        lm = search.full_scorers.get("lm")
        self.in_lm = None if lm is None else Stopwatch(lm, (*calls, "select_state"), clock)

    def seconds(self, speech) -> List[float]:
        """Of one utterance: all, LM."""
        before_s, start_s = self.in_lm.seconds if self.in_lm else 0.0, self.clock()
        self.decode(speech)
        all_s = self.clock() - start_s
        return [all_s, self.in_lm.seconds - before_s if self.in_lm else 0.0]


def read_audio(wav_scp: Path, n_utterances=None) -> list:
    """(samples, seconds) of every utterance; plain audio files only."""
    import soundfile

    lines = wav_scp.read_text(encoding="utf-8").splitlines()[:n_utterances]
    found = []
    for line in lines:
        speech, rate = soundfile.read(line.split(maxsplit=1)[1], dtype="float32")
        found.append((speech, len(speech) / rate))
    return found


def measure(decoders: Dict[str, Callable], audio: list, n_rounds: int) -> Dict[str, dict]:
    """System -> medians over rounds of the seconds of all utterances.

    Args:
        decoders: system -> seconds of one utterance: [all, LM].
        audio: as read_audio.
    """
    for seconds in decoders.values():
        seconds(audio[0][0])  # warm up: weights are repacked at the first step
    rounds: Dict[str, list] = {name: [] for name in decoders}
    for _ in range(n_rounds):
        found: Dict[str, list] = {name: [] for name in decoders}
        for speech, _ in audio:
            for name, seconds in decoders.items():
                found[name].append(seconds(speech))
        for name, rows in found.items():
            rounds[name].append([sum(column) for column in zip(*rows)])
    medians = {name: [statistics.median(x) for x in zip(*rows)] for name, rows in rounds.items()}
    return {name: dict(zip(("all_s", "lm_s"), values)) for name, values in medians.items()}


def main(arguments=None) -> dict:
    """Measure, print the tables, return the new row."""
    args = parse(arguments)
    import espnet_mpq

    espnet_mpq.register()
    logging.disable(logging.WARNING)  # the host warns of hypotheses that hit the length limit
    torch.set_num_threads(1)
    try:
        clock = time.thread_time if args.cpu_time else time.perf_counter
        decoders = {name: Decoder(given, clock).seconds for name, given in systems(args).items()}
        audio = read_audio(args.wav_scp, args.utterances)
        found = measure(decoders, audio, args.rounds)
    finally:
        logging.disable(logging.NOTSET)
    results = Results(args.results or args.work / "results.json")
    if args.note:
        results.note(args.note)
    if args.cpu_time:
        results.note(CPU_TIME)
    audio_s = sum(seconds for _, seconds in audio)
    row = {"set": f"{args.set}, {len(audio)} utterances", "audio_s": audio_s, "systems": found}
    results.put("decode", row["set"], row)
    print(document.render(results.data))
    if args.markdown:
        document.write(results.data, args.markdown, args.work / "RESULTS.md", args.replace)
    return row


if __name__ == "__main__":
    main()
