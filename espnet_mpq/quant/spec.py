"""ClusterSpec: how one cluster is stored, and the values that it may take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Optional, Tuple

from espnet_mpq.errors import PlanError

QUANTIZED_BITS = (1, 2, 3, 4, 8)
BITS = QUANTIZED_BITS + (16, 32)  # 16 and 32 are float16 and float32, no codes
GRIDS = ("paper", "uniform")
TYINGS = ("model", "cluster", "row", "group")
MOST_COLS = 2**31 - 1  # of a group; one wider than its matrix means all columns
SCALE_N_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class ClusterSpec:
    """How one cluster is stored; ``group_size`` (columns) belongs to tying "group" alone."""

    bits: int
    grid: str = "uniform"
    tying: str = "row"
    group_size: Optional[int] = None

    def check(self, name: str) -> None:
        """Raise PlanError if a value is not one of the supported ones."""
        if type(self.bits) is not int or self.bits not in BITS:  # 2.0 and True equal an int
            raise PlanError(
                f"plan, cluster {name}: unsupported bits",
                found=repr(self.bits),
                expected="one of " + ", ".join(map(str, BITS)),
            )
        for key, value, known in (("grid", self.grid, GRIDS), ("tying", self.tying, TYINGS)):
            if not isinstance(value, str) or value not in known:
                raise PlanError(
                    f"plan, cluster {name}: unknown {key}",
                    found=repr(value),
                    expected="one of " + ", ".join(known),
                )
        group = self.group_size
        if (self.tying == "group") != (group is not None):
            raise PlanError(
                f"plan, cluster {name}: group_size goes with tying 'group' and with no other",
                found=f"tying {self.tying!r}, group_size {group!r}",
            )
        is_count = type(group) is int and 1 <= group <= MOST_COLS
        if group is not None and not is_count:
            raise PlanError(
                f"plan, cluster {name}: bad group_size",
                found=repr(group),
                expected=f"a number of columns from 1 to {MOST_COLS}",
            )

    @property
    def is_coded(self) -> bool:
        """Whether there are codes and scales (1 to 8 bits), not float16 or float32 weights."""
        return self.bits < 16

    @property
    def shared_key(self) -> Optional[Tuple[int, str]]:
        """(bits, grid) of the one scale that clusters of tying "model" share, None for others."""
        return (self.bits, self.grid) if self.is_coded and self.tying == "model" else None

    def to_dict(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v is not None}
