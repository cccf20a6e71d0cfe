"""Sizes of blocks, warps and stages of the products: tables in JSON, one for each kind of GPU.

A table has rows (shape, configuration). A shape that is not in it takes the configuration of the
nearest one: the same kind of product, and the least distance of the logarithms of its sizes. A
table that was measured (`tune.py`) lies in the user's cache, under the GPU's name. Those in
`tables/` were not measured: `untuned.json` has what follows from the sizes of tensor cores and
shared memory alone; the others have, for the GPUs whose names are in theirs, how many splits of
which of these configurations a model of speed prefers (`bench/triton_tables.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantlib.errors import FormatError
from quantlib.kernels.cpu.build import cache_folder

TABLES = Path(__file__).with_name("tables")
UNTUNED = "untuned"
KINDS = ("numbers", "integers")
"""Of products: inputs as numbers, or as int8 codes."""
_WAVES = 2
"""Programs for each multiprocessor that a product is split into, where its tiles allow."""
_MOST_SPLITS, _LEAST_TILES = 16, 4
"""Tiles of 128 columns that are worth a program of their own."""


@dataclass(frozen=True)
class Shape:
    """A product: tokens [M, K] of `kind` by a weight [N, K] of `bits`."""

    kind: str
    bits: int
    tokens: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        sizes = (self.bits, self.tokens, self.rows, self.columns)
        if self.kind not in KINDS or min(sizes) < 1:
            raise FormatError(f"{self} is no product: kinds are {', '.join(KINDS)}, sizes positive")

    def distance(self, other: Shape) -> float:
        """How unlike two products of one kind are. Tokens decide the blocks, so they count most."""
        pairs = (
            (4.0, self.tokens, other.tokens),
            (1.0, self.rows, other.rows),
            (1.0, self.columns, other.columns),
            (2.0, self.bits, other.bits),
        )
        return sum(weight * math.log2(mine / theirs) ** 2 for weight, mine, theirs in pairs)


@dataclass(frozen=True)
class Configuration:
    """How a product is compiled and divided.

    splits: along K; 0: as many as give every multiprocessor two programs.
    """

    block_rows: int
    block_tokens: int
    warps: int
    stages: int
    splits: int = 0

    def __post_init__(self) -> None:
        sizes = (self.block_rows, self.block_tokens, self.warps)
        if any(size < 1 or size & (size - 1) for size in sizes) or self.stages < 1:
            raise FormatError(f"{self}: blocks and warps are powers of two, stages at least 1")
        if self.splits < 0:
            raise FormatError(f"{self}: 0 splits or more")


Table = tuple[tuple[Shape, Configuration], ...]


def choose(shape: Shape, table: Table) -> Configuration:
    """The configuration of the nearest shape of the same kind; of equals, the first.

    Raises FormatError when the table has none.
    """
    rows = [row for row in table if row[0].kind == shape.kind]
    if not rows:
        raise FormatError(f"the table has no products of {shape.kind}: tune or delete it")
    return min(rows, key=lambda row: row[0].distance(shape))[1]


def splits(configuration: Configuration, shape: Shape, tiles: int, processors: int) -> int:
    """Splits along K of a segment of so many tiles, on so many multiprocessors."""
    most = max(1, min(_MOST_SPLITS, tiles // _LEAST_TILES))
    if configuration.splits:
        return min(configuration.splits, max(1, tiles))
    programs = -(-shape.rows // configuration.block_rows)
    programs *= -(-shape.tokens // configuration.block_tokens)
    return max(1, min(most, _WAVES * processors // programs))


@lru_cache(maxsize=16)
def table_for(gpu: str) -> Table:
    """The table of a GPU by its name: one that was tuned here, else the predicted one whose name's
    words are among its words ("a100" for "NVIDIA A100-SXM4-80GB"), else the untuned one."""
    tuned = user_tables() / f"{slug(gpu)}.json"
    if tuned.is_file():
        return read(tuned)
    words = set(slug(gpu).split("-"))
    known = (path for path in sorted(TABLES.glob("*.json")) if set(path.stem.split("-")) <= words)
    return read(next(known, TABLES / f"{UNTUNED}.json"))


def user_tables() -> Path:
    """Where tuned tables are kept."""
    return cache_folder() / "triton"


def slug(gpu: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 PCIe" -> "nvidia-h100-pcie"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read(path: Path) -> Table:
    """A table from its file. Raises FormatError when it is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return tuple((Shape(**row["shape"]), Configuration(**row["configuration"])) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is no table of configurations ({error}): delete it, or tune again"
        ) from error


def to_json(rows: Sequence[tuple[Shape, Configuration, float | None]]) -> dict[str, Any]:
    """What `read` takes, with the microseconds that were measured, if they were."""
    return {
        "rows": [
            {
                "shape": asdict(shape),
                "configuration": asdict(configuration),
                "microseconds": microseconds,
            }
            for shape, configuration, microseconds in rows
        ]
    }
