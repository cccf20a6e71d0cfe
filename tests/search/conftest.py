"""A synthetic model: weights with names, and a sensitivity table that behaves like a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from quantlib.search.problem import Problem, build_problem
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


@dataclass(frozen=True)
class Weight:
    """The attributes of `quantlib.models.rows.Weight` that the search reads."""

    name: str
    module: str
    kind: str
    component: str
    block: str | None
    group: str | None
    shape: tuple[int, int]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    name: str
    fused: bool


def packed_bytes(shape: tuple[int, int], scheme: str) -> int:
    bits, group, asymmetric = int(scheme[1]), int(scheme[3:5]), scheme.endswith("z")
    rows, columns = shape
    groups = -(-columns // group)
    return rows * (columns * bits // 8 + 2 * groups) + (
        rows * groups * bits // 8 if asymmetric else 0
    )


def make_weights(layers: int) -> list[Weight]:
    weights = [
        Weight(
            "model.embed_tokens.weight",
            "model.embed_tokens",
            "embedding",
            "embeddings",
            None,
            "model.embed_tokens",
            (512, 64),
            ("lm_head.weight",),
        )
    ]
    for layer in range(layers):
        for name, (rows, columns, group) in LINEARS.items():
            block = f"model.layers.{layer}"
            module = f"{block}.{name}"
            weights.append(
                Weight(
                    f"{module}.weight",
                    module,
                    "linear",
                    "language_model",
                    block,
                    f"{block}.{group}",
                    (rows, columns),
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
def groups(weights: list[Weight]) -> list[Group]:
    """The linear groups, with those of several members marked as fused."""
    names = [weight.group for weight in weights]
    return [Group(name, names.count(name) > 1) for name in dict.fromkeys(names) if name]
