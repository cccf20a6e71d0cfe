"""A synthetic model: weights with names, and a sensitivity table that behaves like a real one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantlib.models.rows import LinearGroup, Weight
from quantlib.search.build import build_problem
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Entry, Sensitivity

SCHEMES = tuple(
    f"w{bits}g{group}{z}" for bits in range(2, 9) for group in (32, 64) for z in ("", "z")
)
LINEARS = {
    "self_attn.q_proj": (64, 64, "attn_in"),
    "self_attn.k_proj": (32, 64, "attn_in"),
    "self_attn.v_proj": (32, 64, "attn_in"),
    "self_attn.o_proj": (64, 64, "attn_out"),
    "mlp.gate_proj": (192, 64, "mlp_in"),
    "mlp.up_proj": (192, 64, "mlp_in"),
    "mlp.down_proj": (64, 192, "mlp_out"),
}


def packed_bytes(shape: tuple[int, ...], scheme: str) -> int:
    bits, group, asymmetric = int(scheme[1]), int(scheme[3:5]), scheme.endswith("z")
    rows, columns = shape
    groups = -(-columns // group)
    return rows * (columns * bits // 8 + 2 * groups) + (
        rows * groups * bits // 8 if asymmetric else 0
    )


def make_weights(layers: int) -> list[Weight]:
    """A tied embedding and `layers` blocks, in model order."""
    weights = [
        Weight(
            name="model.embed_tokens.weight",
            module="model.embed_tokens",
            shape=(512, 64),
            kind="embedding",
            component="embeddings",
            block=None,
            group="model.embed_tokens",
            dtype="BF16",
            nbytes=2 * 512 * 64,
            aliases=("lm_head.weight",),
            head="lm_head",
        )
    ]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, (rows, columns, group) in LINEARS.items():
            weights.append(
                Weight(
                    name=f"{block}.{name}.weight",
                    module=f"{block}.{name}",
                    shape=(rows, columns),
                    kind="linear",
                    component="language_model",
                    block=block,
                    group=f"{block}.{group}",
                    dtype="BF16",
                    nbytes=2 * rows * columns,
                )
            )
    return weights


def make_table(weights: list[Weight], seed: int = 0, noise: float = 0.05) -> Sensitivity:
    """Losses fall by four per bit, vary by weight over two decades, and are a little noisy."""
    generator = np.random.default_rng(seed)
    rows = {}
    for weight in weights:
        importance = 10 ** generator.uniform(-3, -1)
        row = {}
        for scheme in SCHEMES:
            bits, group, asymmetric = int(scheme[1]), int(scheme[3:5]), scheme.endswith("z")
            loss = importance * 4.0 ** (2 - bits) * (1.2 if group == 64 else 1.0)
            loss *= (0.9 if asymmetric else 1.0) * float(np.exp(noise * generator.normal()))
            row[scheme] = Entry(
                packed_bytes(weight.shape, scheme), {"kl": loss}, {"kl": 0.05 * loss}
            )
        rows[weight.name] = row
    return Sensitivity("f" * 64, ("kl",), rows, {"bank": "b" * 64})


@pytest.fixture
def weights() -> list[Weight]:
    return make_weights(4)


@pytest.fixture
def table(weights: list[Weight]) -> Sensitivity:
    return make_table(weights)


@pytest.fixture
def problem(table: Sensitivity, weights: list[Weight]) -> Problem:
    return build_problem(table, weights, fixed_bytes=10_000)


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """make_problem(layers=4, seed=0): a problem of that many layers."""

    def make(layers: int = 4, seed: int = 0) -> Problem:
        weights = make_weights(layers)
        return build_problem(make_table(weights, seed), weights, fixed_bytes=10_000)

    return make


@pytest.fixture
def groups(weights: list[Weight]) -> list[LinearGroup]:
    """The linear groups, with those of several members marked as fused."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.group, []).append(weight)
    return [
        LinearGroup(
            name=name,
            component=members[0].component,
            block=members[0].block,
            members=tuple(member.name for member in members),
            kind=members[0].kind,
            fused=len(members) > 1,
            input_module=members[0].module,
        )
        for name, members in found.items()
    ]
