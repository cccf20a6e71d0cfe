"""How fast the packed linear runs: quantlib's CPU kernels beside those of others, interleaved in
one process.

    quantlib bench kernels [--quick] [--json]

Weights rotate among copies that together exceed the caches, so that M = 1 streams from memory as
decoding does. All schemes and peers of a shape take turns, with the machine's roofs between them: a
row is the median over rounds, with quartiles. `roof_ms` is the time that reading the packed bytes,
or multiplying in registers, takes at the speeds measured in those very rounds, whichever is longer.
Peers that are not there (`make peers` installs them) are named with the reason. Activations are
rounded to int8 (`mode="int8"`); random weights are made directly in packed form.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from quantlib.bench import record
from quantlib.bench.peers.linear import Bind, PeerMissing, copies, peers
from quantlib.bench.random_weights import random_weight
from quantlib.bench.roofs import Measured, Roofs
from quantlib.bench.targets import of_kernels, show_targets
from quantlib.bench.timing import Candidate, interleaved, quartiles, times_as_fast
from quantlib.cli.console import answers, notes, print_json, table
from quantlib.kernels.layouts import tile
from quantlib.kernels.ops import linear
from quantlib.recipe import NATIVE_SCHEMES

WIDTH_SCHEMES = tuple(f"w{bits}g128" for bits in range(2, 9))
SHAPES = ((4096, 4096), (14336, 4096), (2048, 8192), (1536, 576), (576, 1536), (49152, 576))
"""[N, K]: those of the targets, then SmolLM2-135M's up, down and head."""
TOKENS = (1, 8, 128, 512)
BASE = "w4g128"
"""What other widths are compared with."""
OURS = "quantlib "
"""Before a scheme's name: what tells our candidates from peers."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: Sequence[tuple[int, int]] = SHAPES
    schemes: Sequence[str] = WIDTH_SCHEMES + NATIVE_SCHEMES
    tokens: Sequence[int] = TOKENS
    rounds: int = 15


QUICK = Plan(SHAPES[:1], ("w3g128", "w4g128", "w4g64z5s5"), (1, 8, 128), 5)


@dataclass
class Contestants:
    """Everything that multiplies with one shape: name -> bind; and who cannot, and why."""

    ours: dict[str, Bind] = field(default_factory=dict)
    peers: dict[str, Bind] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)


def run(plan: Plan) -> dict[str, Any]:
    """All rows, with the roofs, the peers that are missing and the targets."""
    roofs = Roofs()
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for shape in plan.shapes:
        notes().print(f"{shape[0]} x {shape[1]}: preparing weights", style="dim")
        contestants = prepare(*shape, plan.schemes)
        missing |= contestants.missing
        for tokens in plan.tokens:
            rows += measure(shape, tokens, contestants, roofs, plan.rounds)
    bits = {peer.name: peer.bits for peer in peers()}
    return {
        "threads": torch.get_num_threads(),
        "roofs": roofs.best.to_json(),
        "peers_missing": missing,
        "targets": [target.to_json() for target in of_kernels(rows, bits)],
        "rows": rows,
    }


def prepare(rows: int, columns: int, schemes: Sequence[str]) -> Contestants:
    """Weights of every scheme and peer for one shape [N, K]."""
    found = Contestants()
    generator = torch.Generator().manual_seed(0)
    for scheme in schemes:
        weight = random_weight(rows, columns, scheme, generator)
        found.nbytes[scheme] = weight.nbytes
        tiles = copies(lambda weight=weight: tile(weight), weight.nbytes)  # type: ignore[misc]
        found.ours[scheme] = _bind_ours(tiles, columns)
    for peer in peers():
        try:
            found.peers[peer.name] = peer.prepare(rows, columns)
        except PeerMissing as error:
            found.missing[f"{peer.name}, {rows}x{columns}"] = str(error)
    return found


def _bind_ours(tiles: Sequence[Any], columns: int) -> Bind:
    def bind(tokens: int) -> Candidate:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
        return lambda index: linear(x, tiles[index % len(tiles)], mode="int8")

    return bind


def measure(
    shape: tuple[int, int], tokens: int, contestants: Contestants, roofs: Roofs, rounds: int
) -> list[dict[str, Any]]:
    """The rows of one shape [N, K] and number of tokens M, one for each scheme."""
    candidates: dict[str, Candidate] = {"roofs": roofs}
    candidates |= {OURS + scheme: bind(tokens) for scheme, bind in contestants.ours.items()}
    candidates |= {name: bind(tokens) for name, bind in contestants.peers.items()}
    times = interleaved(candidates, rounds)
    measured = roofs.take()
    others = {name: times[name] for name in contestants.peers}
    base = times.get(OURS + BASE)
    return [
        _row(scheme, shape, tokens, times[OURS + scheme], others, base, nbytes, measured)
        for scheme, nbytes in contestants.nbytes.items()
    ]


def _row(
    scheme: str,
    shape: tuple[int, int],
    tokens: int,
    ours: Sequence[float],
    peers: Mapping[str, Sequence[float]],
    base: Sequence[float] | None,
    nbytes: int,
    roofs: Measured,
) -> dict[str, Any]:
    rows, columns = shape
    roof_ms = 1e3 * roofs.seconds(nbytes, 2.0 * tokens * rows * columns)
    own = quartiles(ours)
    theirs = {name: quartiles(times) for name, times in peers.items()}
    ratios = {name: times_as_fast(ours, times) for name, times in peers.items()}
    best = min(ratios, key=lambda name: ratios[name], default=None)
    return {
        "op": "linear",
        "scheme": scheme,
        "N": rows,
        "K": columns,
        "M": tokens,
        "ms": own.median,
        "quartiles_ms": [own.low, own.high],
        "peers": {name: value.median for name, value in theirs.items()},
        "peer_quartiles_ms": {name: [value.low, value.high] for name, value in theirs.items()},
        "bytes": nbytes,
        "roof_ms": roof_ms,
        "roof_share": roof_ms / own.median,
        "times_as_fast": ratios,
        "best_peer": best,
        "ratio": ratios[best] if best else None,
        "speed_of_w4g128": times_as_fast(ours, base) if base is not None else None,
        "roofs": roofs.to_json(),
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """Tables for a person: every row, then the targets, then who is missing."""
    rows = found["rows"]
    roofs = found["roofs"]
    console.print(
        f"{found['threads']} threads; reads up to {roofs['read_gb_per_s']:.1f} GB/s, multiplies up "
        f"to {roofs['multiply_gop_per_s'] or 0:.0f} GOP/s; milliseconds are medians"
    )
    titles = ("N x K", "M", "scheme", "ms", "quartiles", "roof ms", "of roof", "best peer", "ratio")
    console.print(table(*titles, rows=map(_cells, rows), numbers_from=3))
    show_targets(found["targets"], console)
    for name, reason in found["peers_missing"].items():
        console.print(f"not measured: {name}: {reason}", style="yellow", markup=False)


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["quartiles_ms"]
    best = row["best_peer"]
    return [
        f"{row['N']} x {row['K']}",
        str(row["M"]),
        row["scheme"],
        f"{row['ms']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['roof_ms']:.3f}",
        f"{row['roof_share']:.0%}",
        f"{best} {row['peers'][best]:.3f}" if best else "none",
        f"{row['ratio']:.2f}" if best else "",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and (without --quick) keep the result."""
    parser = argparse.ArgumentParser(
        prog="quantlib bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape and three schemes; nothing is kept"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(arguments)
    found = run(QUICK if options.quick else Plan())
    if options.json:
        print_json(found)
    else:
        show(found, answers())
    if not options.quick:
        notes().print(str(record.write(record.of_kernels("kernels"), found)))


if __name__ == "__main__":
    main()
