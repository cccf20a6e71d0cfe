"""What was promised of speed and memory, judged on measured rows: ratios inside one run, never
times.

At one token a weight is read once and every byte of it costs, so the goal is the memory's speed; at
many tokens it is the best anybody else reaches with weights of any precision. A whole model is
compared with llama.cpp's fastest, at no more bytes and no larger loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

SHAPES = ((4096, 4096), (14336, 4096), (2048, 8192))
"""[N, K] that the promises about kernels speak of."""
WIDTHS = tuple(range(2, 9))
SPARE_BYTES = 150e6
"""Resident memory that no model's size explains: work space, keys and values, the tokenizer."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One promise about one thing, kept when `value` reaches `least`."""

    where: str
    what: str
    value: float
    least: float

    @property
    def met(self) -> bool:
        return self.value >= self.least

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def of_kernels(rows: Sequence[Row], peer_bits: Mapping[str, int]) -> list[Target]:
    """What the rows of `bench.kernels` tell; a promise whose peers are missing is left out.

    peer_bits: name of a peer -> bits of its weights.
    """
    table = {(row["scheme"], row["N"], row["K"], row["M"]): row for row in rows}
    found: list[Target] = []
    for shape in SHAPES:
        base = table.get(("w4g128", *shape, 1))
        for bits in WIDTHS:
            for tokens in (1, 8, 128, 512):
                row = table.get((f"w{bits}g128", *shape, tokens))
                if row is not None:
                    found += _of_row(row, bits, peer_bits)
                if row is not None and base is not None and tokens == 1 and bits != 4:
                    found.append(_per_byte(row, base["bytes"], bits))
    return found


def _of_row(row: Row, bits: int, peer_bits: Mapping[str, int]) -> Iterator[Target]:
    int4 = [ratio for name, ratio in row["times_as_fast"].items() if peer_bits[name] == 4]
    every = list(row["times_as_fast"].values())
    tokens, where = row["M"], _where(row)
    if tokens == 1 and bits == 4:
        yield Target(where, "share of the read bandwidth", row["roof_ms"] / row["ms"], 0.9)
        if every:
            yield Target(where, "speed against the best peer", min(every), 1.6)
    if tokens == 8 and bits == 4 and int4:
        yield Target(where, "speed against the best int4 peer", min(int4), 3.5)
    if tokens in (128, 512) and every:
        yield Target(where, "speed against the best peer of any precision", min(every), 2.1)


def _per_byte(row: Row, base_bytes: int, bits: int) -> Target:
    """Speed per byte, relative to 4 bits: fewer bits must be faster nearly in proportion, more bits
    slower by no more than their bytes."""
    value = row["speed_of_w4g128"] * row["bytes"] / base_bytes
    return Target(_where(row), "speed per byte against 4 bits", value, 0.85 if bits < 4 else 1.0)


def _where(row: Row) -> str:
    return f"{row['scheme']} {row['N']}x{row['K']} M={row['M']}"


def of_models(rows: Sequence[Row], fastest: str, least: Mapping[str, float]) -> list[Target]:
    """quantlib's rows of `bench.decode` against the engine `fastest` on the same model, where they
    take no more bytes.

    least: name of a model -> the ratio of decoding speed that was promised.
    """
    found: list[Target] = []
    for row in rows:
        peers = [r for r in rows if r["model"] == row["model"] and r["engine"] == fastest]
        if row["model"] not in least or not row["engine"].startswith("quantlib") or not peers:
            continue
        peer = peers[0]
        if row["bytes"] > peer["bytes"]:
            continue
        where = f"{row['model']}, {row['engine']}, {row['bytes'] / 1e6:.1f} MB"
        decode = row["decode_tok_s"] / peer["decode_tok_s"]
        prefill = row["prefill_tok_s"] / peer["prefill_tok_s"]
        found.append(Target(where, f"decoding against {fastest}", decode, least[row["model"]]))
        found.append(Target(where, f"prefill against {fastest}", prefill, 2.5))
        if row.get("kl") is not None and peer.get("kl") is not None:
            found.append(Target(where, f"KL of {fastest} over ours", peer["kl"] / row["kl"], 1.0))
    return found


def of_footprints(rows: Sequence[Row]) -> list[Target]:
    """Resident memory of every loaded checkpoint."""
    found = []
    for row in rows:
        where = f"{row['model']}, {row['bytes'] / 1e6:.1f} MB loaded"
        allowed = 1.1 * row["bytes"] + SPARE_BYTES
        used = max(row["resident_bytes"], 1)  # a small model may fit into what is there already
        found.append(Target(where, "memory allowed over used", allowed / used, 1.0))
    return found


def show_targets(targets: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line for each target, as `Target.to_json` wrote it."""
    for target in targets:
        mark, style = ("met   ", "green") if target["met"] else ("missed", "red")
        text = f"{target['where']}: {target['what']} {target['value']:.2f}"
        console.print(f"{mark} {text}, wanted {target['least']:g}", style=style, markup=False)
