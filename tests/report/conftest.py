"""Report data of a made-up model, shaped like a small Llama. The numbers are invented."""

import math
import random

import pytest

from quantlib.evaluation.language import LanguageResult
from quantlib.formats.scheme import Scheme
from quantlib.report.data import (
    ComponentRow,
    FrontPoint,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    WeightRow,
)

HIDDEN, FFN, KV, VOCABULARY = 576, 1536, 192, 49152
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
NEED = dict(zip(SHAPES, (0.5, 0.8, 3.0, 1.2, 1.0, 1.5, 3.0), strict=True))


def weight_row(name, component, block, kind, shape, need):
    """A weight whose bits follow its need, as a solver's would."""
    wanted = min(8, max(2, round(3.4 + 0.75 * math.log2(need))))
    scheme = f"w{wanted}g64z" if wanted < 8 else "w8"
    form = Scheme.parse(scheme).weight
    bits = form.bits + (
        (16 + form.bits) / form.group_size if form.group_size > 0 else 16 / shape[-1]
    )
    numbers = math.prod(shape)
    loss = 1e-3 * need * 4.0 ** (3 - wanted)
    return WeightRow(
        name,
        component,
        block,
        kind,
        shape,
        scheme,
        bits,
        2 * numbers,
        int(numbers * bits / 8),
        loss,
        0.08 * loss,
    )


def make_weights(layers):
    generator = random.Random(0)
    embedding = "model.embed_tokens.weight"
    rows = [weight_row(embedding, "embeddings", None, "embedding", (VOCABULARY, HIDDEN), 6.0)]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        ends = 1 + 5 * math.exp(-layer / 1.5) + 2 * math.exp((layer - layers + 1) / 1.5)
        for name, shape in SHAPES.items():
            need = NEED[name] * ends * math.exp(generator.gauss(0, 0.5))
            rows.append(
                weight_row(f"{block}.{name}.weight", "language_model", block, "linear", shape, need)
            )
    return tuple(rows)


def make_evaluation():
    generator = random.Random(1)
    reference = [2.6 + generator.gauss(0, 0.25) for _ in range(12)]
    kl = [0.062 + generator.gauss(0, 0.008) for _ in range(12)]
    return {
        "windows": 12,
        "tokens_per_window": 255,
        "windows_sha256": "ab" * 32,
        "per_window": {
            "nll": [r + k + generator.gauss(0, 0.01) for r, k in zip(reference, kl, strict=True)],
            "reference_nll": reference,
            "kl": kl,
            "same_top": [0.86 + generator.gauss(0, 0.02) for _ in range(12)],
        },
    }


def make_data(layers=30):
    """A report with every part present."""
    generator = random.Random(2)
    weights = make_weights(layers)
    norms = 2 * HIDDEN * 2 * layers
    before, after = (
        sum(r.bytes_before for r in weights) + norms,
        sum(r.bytes_after for r in weights) + norms,
    )
    language = [row for row in weights if row.component == "language_model"]
    evaluation = make_evaluation()
    own = LanguageResult.from_json(evaluation).kl
    kl = 0.062
    front = []
    for step in range(17):
        size = after * (0.72 + 0.04 * step)
        loss = kl * math.exp(-5.2 * (size / after - 1))
        front.append(FrontPoint(int(size), loss, loss * 0.86, loss * 1.16))
    probes = []
    for _ in range(24):
        predicted = math.exp(generator.uniform(math.log(0.015), math.log(1.1)))
        measured = 1.06 * predicted**1.08 * math.exp(generator.gauss(0, 0.06))
        probes.append(ProbePoint(predicted, measured, 0.05 * measured))
    return ReportData(
        title="Invented-135M",
        created="2026-11-21",
        bytes_before=before,
        bytes_after=after,
        parameters=sum(row.parameters for row in weights) + norms // 2,
        budget=f"{after * 1.002 / 1e6:.1f} MB",
        budget_bytes=int(after * 1.002),
        predicted=(0.0631, 0.0545, 0.0731),
        predicted_sum=0.0705,
        evaluation=evaluation,
        components=(
            ComponentRow(
                "language_model",
                sum(r.bytes_before for r in language) + norms,
                sum(r.bytes_after for r in language) + norms,
            ),
            ComponentRow("embeddings", weights[0].bytes_before, weights[0].bytes_after),
        ),
        weights=weights,
        sensitivity=SensitivityMap(
            "w3g64z", {row.name: row.loss * 4.0 ** (row.bits // 1 - 3) for row in weights}
        ),
        front=tuple(front),
        measured=(
            MeasuredPoint("this model", after, own.value, own.standard_error, chosen=True),
            MeasuredPoint("90 %", front[4].bytes, front[4].loss * 1.05, front[4].loss * 0.04),
            MeasuredPoint("120 %", front[12].bytes, front[12].loss * 0.96, front[12].loss * 0.05),
        ),
        others=(
            MeasuredPoint("uniform 3 bits", int(after * 0.86), 0.31, 0.011),
            MeasuredPoint("uniform 4 bits", int(after * 1.08), 0.093, 0.004),
        ),
        probes=tuple(probes),
        timings=(
            ("inspect", 0.8),
            ("calibrate", 96.0),
            ("measure", 241.5),
            ("search", 1.4),
            ("apply", 2.2),
        ),
        facts=(("architecture", "LlamaForCausalLM"), ("blocks", str(layers))),
        provenance=(("source", "3f" * 32), ("plan", "a1" * 32), ("quantlib", "0.1.0")),
    )


@pytest.fixture(scope="session")
def data():
    return make_data(layers=2)
