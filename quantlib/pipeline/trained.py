"""A model that was trained in low precision, from a source folder to a packed checkpoint.

The searches that train (`search.fliqs`, `search.csq`) work on a module in memory. Here it is read
from a source and written as a checkpoint like any other: plan, packed weights, everything else in
the dtype it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.contents import MAP_FILE, map_bytes
from quantlib.checkpoint.provenance import source_hash
from quantlib.checkpoint.writer import PLAN_FILE, SHARD_BYTES, source_files, write_checkpoint
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.formats.size import kept_bytes
from quantlib.formats.weight import ORDER, QuantizedWeight, pack
from quantlib.models import skeleton
from quantlib.models.headers import TORCH_DTYPES
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.models.source import Source
from quantlib.pipeline.bytecount import fixed_bytes, weight_bytes
from quantlib.search.plan import Plan
from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import TRAINED_KINDS, Choice, Layers
from quantlib.search.trained.outcome import order_of, plan_of

_STORED_AS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Trainable:
    """A source whose module is in memory, float32, its linears and convolutions ready to train.

    model: everything trains but the weights that no search decides about (embeddings and heads tied
           to them, experts).
    """

    source: Source
    model_map: ModelMap
    model: Any

    @staticmethod
    def open(folder: str | Path) -> Trainable:
        """Raises ModelError as `Source.open` and `ModelMap.from_source`."""
        source = Source.open(folder)
        model_map = ModelMap.from_source(source)
        model = skeleton.build(source)
        skeleton.materialize(model, "", source)
        trainable = Trainable(source, model_map, model)
        rests = {w.name for w in trainable.others()} | {
            a for w in trainable.others() for a in w.aliases
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in rests)
        return trainable

    def others(self) -> tuple[Weight, ...]:
        """Weights that no search decides about."""
        return tuple(w for w in self.model_map.weights if w.kind not in TRAINED_KINDS)


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    method: its name. schemes, packed: of the weights it decided about.
    costs, choice, target: what it costs and was allowed to, where that is known.
    """

    method: str
    schemes: Mapping[str, str]
    packed: Mapping[str, QuantizedWeight]
    costs: Costs | None = None
    choice: Choice | None = None
    target: float | None = None


def write_trained(
    out: str | Path,
    trainable: Trainable,
    layers: Layers,
    found: Found,
    rest: str = "bf16",
    identity: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, Plan]:
    """Write the checkpoint of a finished search; its folder and its plan.

    rest:     the scheme of weights that nothing was decided about, rounded to nearest or kept.
    identity: hash of all that the result depends on, as `write_checkpoint` takes it.
    Raises CheckpointError as `write_checkpoint`.
    """
    model_map = trainable.model_map
    schemes = {w.name: found.schemes.get(w.name, rest) for w in model_map.weights}
    plan = plan_of(
        model_map,
        schemes,
        _size,
        fixed_bytes(model_map, SHARD_BYTES),
        found.method,
        found.costs,
        found.choice,
        found.target,
    )
    tensors = _tensors(trainable, layers, found.packed, schemes)
    files: dict[str, bytes | Path] = {
        **source_files(trainable.source.path),
        PLAN_FILE: plan.to_json().encode(),
        MAP_FILE: map_bytes(model_map),
    }
    path = write_checkpoint(
        out,
        tensors,
        trainable.source.config,
        schemes,
        {weight.name: weight.shape for weight in model_map.weights},
        files=files,
        provenance={"source": source_hash(trainable.source), "method": found.method},
        identity=identity,
        overwrite=overwrite,
    )
    return path, plan


def _size(weight: Weight, scheme: Scheme) -> int:
    if scheme.weight is None:
        return kept_bytes(weight.shape, str(scheme.kept))
    return weight_bytes(weight, scheme)


@torch.no_grad()
def _tensors(
    trainable: Trainable,
    layers: Layers,
    packed: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, str],
) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name."""
    state: dict[str, Tensor] = trainable.model.state_dict()
    tensors: dict[str, Tensor] = {}
    for weight in trainable.model_map.weights:
        scheme = schemes[weight.name]
        if scheme in KEPT:
            tensors[weight.name] = state[weight.name].to(_STORED_AS[scheme])
            continue
        whole = packed.get(weight.name)
        if whole is None:
            matrix = weight.matrix(state[weight.name]).reshape(-1, weight.in_features)
            whole = quantize_rtn(matrix, Scheme.parse(scheme).segments(weight.in_features))
        tensors |= {weight.name + suffix: tensor for suffix, tensor in pack(whole).items()}
        order = order_of(layers, weight.name) if weight.name in layers.of else None
        if order is not None:
            tensors[weight.name + ORDER] = order.to(torch.int32)
    for row in trainable.model_map.kept:
        tensors[row.name] = state[row.name].to(TORCH_DTYPES[row.dtype]).contiguous()
    return dict(sorted(tensors.items()))
