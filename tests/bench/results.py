"""The measured rows of all benchmarks in one JSON file; runs in pieces add to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from bench.timing import machine, today

from espnet_mpq.io import read_json, write_json

SECTIONS = ("latency", "load", "search")


class Results:
    """Rows by section and key; a row measured again replaces the old one.

    Args:
        file: read when it is there and comes from this machine with these versions and this
            kernel, else put aside and begun anew; None keeps the rows in memory.
    """

    def __init__(self, file: Optional[Path]):
        self.file = file
        self.data = {"machine": machine(), "notes": [], **{s: {} for s in SECTIONS}}
        if file is not None and file.is_file():
            found = read_json(file)
            if found.get("machine") == self.data["machine"]:
                self.data = found
            else:
                kept = file.with_suffix(".old.json")
                file.replace(kept)
                print(f"{file} is of another machine or version: now {kept}", file=sys.stderr)

    def put(self, section: str, key: str, row: dict) -> None:
        """Add a row, with today's date, and write the file."""
        self.data[section][key] = {**row, "date": today()}
        self.write()

    def note(self, text: str) -> None:
        """A line for the head of the tables."""
        if text not in self.data["notes"]:
            self.data["notes"].append(text)
        self.write()

    def write(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.data)
