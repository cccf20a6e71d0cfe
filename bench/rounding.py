"""What each part of rounding is worth: Fisher-weighted output error of a few real matrices,
relative to their output energy.

    python -P -m quantlib.bench.rounding --work DIR

One geometric mean per row over one matrix of each kind, in different depths of SmolLM2-135M
(permuted). `DIR` is the work directory of `quantlib compress` (or of `bench.quality --work DIR`);
statistics are taken there if it has none.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch import Tensor

from quantlib.bench import assets, record
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.pipeline.calibrate import calibrate, group_statistics
from quantlib.pipeline.compress import open_run
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe
from quantlib.rounding import RoundingOptions, quantize_rtn, round_group

MATRICES = (
    "model.layers.3.self_attn.o_proj.weight",
    "model.layers.5.self_attn.q_proj.weight",
    "model.layers.12.mlp.gate_proj.weight",
    "model.layers.20.mlp.down_proj.weight",
)
SCHEMES = (
    "w2g64s6", "w2g64zs6", "w2g64z4s6", "w2g64z4s4", "w2g32z4s4", "w2g128z4s4",
    "w3g64s6", "w3g64zs6", "w3g64z4s4", "w3g32z4s4", "w3g128z4s4",
    "w4g64s6", "w4g64zs6", "w4g64z", "w4g64z5s5", "w4g32zs4", "w4g128zs6",
    "fp4g32", "mxfp4", "nvfp4",
    "w5g64zs5", "w5g32zs5", "w6g64zs6", "w8g64zs6",
)  # fmt: skip


def main() -> None:
    """Measure every scheme with plain rounding, GPTQ, and GPTQ with 1, 3 and 6 passes of coordinate
    descent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    recipe = Recipe.create(data=str(assets.wikipedia_text("calibration")))
    with open_run(assets.fetch_smollm2(), options.work, recipe) as run:
        calibrate(run)
        cases = {name: (run.source.read(name).float(), _statistics(run, name)) for name in MATRICES}
    rows = []
    for scheme in SCHEMES:
        row: dict[str, object] = {"scheme": scheme, "bits": _bits(scheme)}
        row["rtn"] = _mean(
            cases, lambda w, h, s=scheme: quantize_rtn(w, Scheme.parse(s).segments(w.shape[1]))
        )
        for passes in (0, 1, 3, 6):
            row[f"gptq_{passes}"] = _mean(cases, lambda w, h, s=scheme, p=passes: _gptq(w, h, s, p))
        rows.append(row)
        print(
            "  ".join(f"{k} {v:.3e}" if isinstance(v, float) else f"{v:10}" for k, v in row.items())
        )
    print(record.write("rounding", {"matrices": MATRICES, "rows": rows}))


def _statistics(run: Run, name: str) -> Tensor:
    (matrix,) = group_statistics(run, run.model_map.weight(name).group).matrices
    return matrix.hessian


def _gptq(weight: Tensor, hessian: Tensor, scheme: str, passes: int) -> QuantizedWeight:
    layout = Scheme.parse(scheme).segments(weight.shape[1])
    (rounded,) = round_group(
        {"w": weight}, hessian, [layout], RoundingOptions(passes=passes)
    ).values()
    return rounded


def _mean(cases: dict[str, tuple[Tensor, Tensor]], rounding) -> float:  # type: ignore[no-untyped-def]
    """Geometric mean over the matrices of tr(E H E^T) / tr(W H W^T)."""
    logs = []
    for weight, hessian in cases.values():
        error = dequantize(rounding(weight, hessian)) - weight
        logs.append(
            math.log(float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()))
        )
    return math.exp(sum(logs) / len(logs))


def _bits(scheme: str) -> float:
    """True bits per weight of a 576 x 576 matrix."""
    from quantlib.formats.size import bits_per_weight

    return bits_per_weight((576, 576), Scheme.parse(scheme).segments(576))


if __name__ == "__main__":
    main()
