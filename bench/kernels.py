"""How fast the packed linear runs: quantlib's CPU kernel beside torch on dense weights, interleaved
in one process.

    quantlib bench kernels [--quick] [--json]

Weights rotate among copies that together exceed the caches, so that M = 1 streams from memory as
decoding does. A row is the median over repeats, with quartiles; peers are timed in the same loop,
so a noisy machine disturbs all of them alike. `roof_ms` is the time plain reads of the packed bytes
take at the bandwidth measured in the same run: no kernel can be faster at M = 1 than that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from quantlib.bench import record
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import pack
from quantlib.kernels.ops import linear
from quantlib.kernels.packed import PackedWeight

SCHEMES = ("w2g32z4s4", "w3g32z4s4", "w4g32zs4", "w4g64z5s5", "w4g128", "w6g64zs6", "w8g64zs6")
SHAPES = ((576, 1536), (4096, 4096))
TOKENS = (1, 8, 128)
CACHE_BYTES = 96 << 20
"""Copies of a weight together take at least this much."""


def measure_shape(
    columns: int, rows: int, schemes: Sequence[str], repeats: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Rows for one shape [N = rows, K = columns]: every scheme and token count."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    found = []
    dense = _copies(lambda: weight.clone(), weight.nbytes)
    half = _copies(lambda: weight.bfloat16(), weight.nbytes // 2)
    for scheme in schemes:
        segments = Scheme.parse(scheme).segments(columns)
        tensors = pack(quantize_rtn(weight, segments))
        nbytes = sum(t.nbytes for t in tensors.values())

        def fresh(tensors: dict[str, Tensor] = tensors, segments: Any = segments) -> PackedWeight:
            return PackedWeight.from_tensors(
                {k: v.clone() for k, v in tensors.items()}, (rows, columns), segments
            )

        packed = _copies(fresh, nbytes)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=generator)
            times = interleaved(
                {
                    "quantlib int8": partial(_packed, x, packed, "int8"),
                    "quantlib exact": partial(_packed, x, packed, "exact"),
                    "torch float32": partial(_dense, x, dense),
                    "torch bfloat16": partial(_dense, x.bfloat16(), half),
                },
                repeats,
            )
            ours = times.pop("quantlib int8")
            found.append(
                {
                    "op": "linear",
                    "scheme": scheme,
                    "N": rows,
                    "K": columns,
                    "M": tokens,
                    "ms": ours[1],
                    "quartiles_ms": [ours[0], ours[2]],
                    "peers": {name: value[1] for name, value in times.items()},
                    "bytes": nbytes,
                    "roof_ms": 1e3 * nbytes / bandwidth,
                }
            )
    return found


def _packed(x: Tensor, copies: list[PackedWeight], mode: str, i: int) -> None:
    linear(x, copies[i % len(copies)], mode=mode)


def _dense(x: Tensor, copies: list[Tensor], i: int) -> None:
    dense_linear(x, copies[i % len(copies)])


def interleaved(
    candidates: dict[str, Callable[[int], Any]], repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Quartiles in milliseconds of each candidate, all run in turn `repeats` times after two
    warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(repeats + 2):
        for name, run in candidates.items():
            started = time.perf_counter()
            run(index)
            if index >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: _quartiles(values) for name, values in times.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes per second of summing a large array with torch's threads: plain reads of memory."""
    data = torch.ones(megabytes << 18, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def _copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    return [make() for _ in range(max(1, min(64, -(-CACHE_BYTES // nbytes))))]


def run(quick: bool = False) -> dict[str, Any]:
    """All rows. `quick`: two schemes and one shape."""
    bandwidth = read_bandwidth()
    shapes, schemes, repeats = (SHAPES[:1], SCHEMES[2:4], 5) if quick else (SHAPES, SCHEMES, 15)
    rows = [
        row
        for columns, n in shapes
        for row in measure_shape(columns, n, schemes, repeats, bandwidth)
    ]
    return {"threads": torch.get_num_threads(), "read_gb_per_s": bandwidth / 1e9, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and (without --quick) keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape and two schemes; nothing is kept"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(arguments)
    found = run(options.quick)
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['threads']} threads, plain reads {found['read_gb_per_s']:.1f} GB/s; "
            "milliseconds, medians"
        )
        for row in found["rows"]:
            peers = "  ".join(f"{name} {value:8.3f}" for name, value in row["peers"].items())
            shape = f"N={row['N']} K={row['K']} M={row['M']}"
            print(
                f"{row['scheme']:10} {shape:24} int8 {row['ms']:8.3f}  {peers}  "
                f"roof {row['roof_ms']:.3f}"
            )
    if not options.quick:
        path = record.write("kernels", found)
        if not options.json:
            print(path)


if __name__ == "__main__":
    main()
