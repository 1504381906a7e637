"""The measured rows of all benchmarks in one JSON file; runs in pieces add to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Optional

from bench.timing import machine, revision, same_machine, today

from espnet_mpq.io import read_json, write_json

SECTIONS = ("latency", "mixed", "transformer", "search", "decode", "load")
CPU_TIME = "Seconds of the thread (--cpu_time), not of the wall."


class Results:
    """Rows by section and key; a row measured again replaces the old one.

    Every row keeps the date, the revision and the notes of the run that measured it.

    Args:
        file: read when it is there and comes from this machine with these versions and this
            kernel, else put aside and begun anew; None keeps the rows in memory.
    """

    def __init__(self, file: Optional[Path]):
        self.file = file
        self.stamp = {"date": today(), "revision": revision()}
        self.notes: List[str] = []
        self.data = {"machine": machine(), **{section: {} for section in SECTIONS}}
        if file is not None and file.is_file():
            found, here = read_json(file), self.data["machine"]
            if same_machine(here, found.get("machine", {})):
                packages = {**found["machine"]["packages"], **here["packages"]}
                self.data.update({s: found[s] for s in SECTIONS if s in found})
                self.data["machine"] = {**here, "packages": packages}
            else:
                kept = file.with_suffix(".old.json")
                file.replace(kept)
                print(f"{file} is of another machine or version: now {kept}", file=sys.stderr)

    def put(self, section: str, key: str, row: dict) -> None:
        """Add a row, stamped, and write the file."""
        self.data[section][key] = {**row, **self.stamp, "notes": list(self.notes)}
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.data)

    def note(self, text: str) -> None:
        """A sentence for the rows of this run that are still to come."""
        if text not in self.notes:
            self.notes.append(text)
