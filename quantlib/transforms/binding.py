"""A family's table and one model make a `Wiring`: which of the named things exist, and their sizes.

`wire(model)` needs the module alone (on meta is enough), and checks that every parameter of every
block is named by the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantlib.errors import ModelError
from quantlib.models.listing import some
from quantlib.transforms.tables import AttentionRule, BlockRule, find
from quantlib.transforms.wiring import LAYER, Attention, Hidden, Matrix, Norm, Stream, Wiring


def wire(model: nn.Module) -> Wiring:
    """The wiring of a transformers model, as its `config.model_type` names the family.

    Raises ModelError when there is no table for it, or the table does not fit its parameters.
    """
    config: Any = model.config
    model_type = str(config.model_type)
    family = find(model_type)
    if family is None:
        raise ModelError(
            f"quantlib does not know what reads and writes what in a model of type {model_type}, "
            "so its basis cannot be changed: use schemes without rotation, or add its wiring to "
            "quantlib/transforms/tables.py."
        )
    parts = [_bind_blocks(_Names.of(model), config, rule) for rule in family.rules]
    names = parts[0].names
    streams = tuple(_bind_stream(part, parts) for part in parts)
    return Wiring(
        model_type=model_type,
        blocks=tuple(block for part in parts for block in part.blocks),
        streams=streams,
        attentions=tuple(attention for part in parts for attention in part.attentions),
        hiddens=tuple(hidden for part in parts for hidden in part.hiddens),
        tied=any(_tied(part.rule, names) for part in parts),
        shapes=names.shapes,
    )


@dataclass(frozen=True)
class _Names:
    """Parameters of the model by each of their names: shape, and identity (the same when tied)."""

    shapes: dict[str, tuple[int, ...]]
    identities: dict[str, int]

    @staticmethod
    def of(model: nn.Module) -> _Names:
        named = list(model.named_parameters(remove_duplicate=False))
        return _Names(
            {name: tuple(tensor.shape) for name, tensor in named},
            {name: id(tensor) for name, tensor in named},
        )

    def matrix(self, name: str, drops_shift: bool = False) -> Matrix | None:
        """The linear module or the parameter `name`, None when there is none."""
        if name in self.shapes:
            return Matrix(name, None, drops_shift)
        if f"{name}.weight" not in self.shapes:
            return None
        bias = f"{name}.bias"
        return Matrix(f"{name}.weight", bias if bias in self.shapes else None, drops_shift)


@dataclass
class _Part:
    """What is found for one rule. cross: (stream, matrix) of readers of another stream."""

    rule: BlockRule
    names: _Names
    blocks: list[str]
    norms: list[Norm] = field(default_factory=list)
    writers: list[Matrix] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    hiddens: list[Hidden] = field(default_factory=list)
    cross: list[tuple[str, Matrix]] = field(default_factory=list)


def _bind_blocks(names: _Names, config: Any, rule: BlockRule) -> _Part:
    pattern = re.compile(re.escape(rule.blocks) + r"\.(\d+)\.")
    numbers = sorted({int(found[1]) for name in names.shapes if (found := pattern.match(name))})
    if not numbers:
        raise ModelError(f"the model has no blocks: no parameter is named {rule.blocks}.<number>.")
    part = _Part(rule, names, [f"{rule.blocks}.{number}" for number in numbers])
    for block in part.blocks:
        before = len(part.norms), len(part.writers), len(part.cross)
        for attention_rule in rule.attentions:
            _bind_attention(part, config, block, attention_rule)
        _bind_mlp(part, block)
        _bind_norms(part, block)
        claimed = {name for norm in part.norms[before[0] :] for name in _of_norm(norm)}
        matrices = part.writers[before[1] :] + [matrix for _, matrix in part.cross[before[2] :]]
        claimed |= {name for matrix in matrices for name in (matrix.weight, matrix.bias) if name}
        claimed |= _untouched(rule, block)
        _refuse_unclaimed(names.shapes, block, claimed)
    for name in rule.writers:
        writer = names.matrix(name)
        if writer is not None:
            part.writers.append(writer)
    return part


def _bind_attention(part: _Part, config: Any, block: str, rule: AttentionRule) -> None:
    module = f"{block}.{rule.module}"
    values = _need(part.names, f"{module}.{rule.inputs[-1]}")
    output = _need(part.names, f"{module}.{rule.output}")
    heads, kv_heads = (_setting(config, key) for key in (part.rule.heads, part.rule.kv_heads))
    first = not any(attention.block == block for attention in part.attentions)
    part.attentions.append(
        Attention(
            name=block if first else module,
            module=module,
            block=block,
            values=values,
            output=output,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=part.names.shapes[output.weight][1] // heads,
        )
    )
    part.writers.append(output)
    if rule.source is not None:
        part.cross += [
            (rule.source, _reader(part, block, f"{rule.module}.{name}")) for name in rule.inputs[1:]
        ]


def _bind_mlp(part: _Part, block: str) -> None:
    found = [(name, part.names.matrix(f"{block}.{name}")) for name in part.rule.down]
    present = [(f"{block}.{name}", matrix) for name, matrix in found if matrix is not None]
    if len(present) != 1:
        raise ModelError(
            f"{block} has {len(present)} of the down projections {some(part.rule.down)}: one was "
            "expected."
        )
    name, down = present[0]
    shape = part.names.shapes[down.weight]
    inner = len(shape) == 3
    module = name.rpartition(".")[0] if inner else name
    writers, stacked = _hidden_writers(part, block, shape[-1])
    part.hiddens.append(Hidden(block, down, module, shape[-1], inner, writers, stacked))
    part.writers.append(down)


def _hidden_writers(part: _Part, block: str, width: int) -> tuple[tuple[Matrix, ...], int]:
    """What writes a hidden layer of this width, and how many of it each has below one another."""
    found = (part.names.matrix(f"{block}.{name}") for name in part.rule.hidden)
    writers = tuple(matrix for matrix in found if matrix is not None)
    rows = {part.names.shapes[matrix.weight][-2] for matrix in writers}
    if len(rows) != 1 or min(rows) % width:
        raise ModelError(
            f"{block} has a hidden layer of {width} channels, and {some(part.rule.hidden)} write "
            f"{some([str(count) for count in sorted(rows)])}: its family's table is of another "
            "model."
        )
    return writers, min(rows) // width


def _bind_norms(part: _Part, block: str) -> None:
    for name, readers in part.rule.norms:
        present = [
            _reader(part, block, reader)
            for reader in readers
            if part.names.matrix(f"{block}.{reader}") is not None
        ]
        if not present:
            raise ModelError(f"{block} has none of {some(readers)}, which {name} is read by.")
        part.norms.append(_norm(part, f"{block}.{name}", tuple(present)))


def _bind_stream(part: _Part, parts: Iterable[_Part]) -> Stream:
    """The stream of one rule, with the readers that other rules' blocks have of it."""
    rule, names = part.rule, part.names
    tied = _tied(rule, names)
    tables = [_need(names, name).weight for name in rule.tables]
    if rule.embedding is None:
        enters: tuple[tuple[str, str], ...] = ((part.blocks[0], "input"),)
    elif tied:
        enters = ((rule.embedding, "output"),)
    else:
        enters = ()
        tables.append(_need(names, rule.embedding).weight)
    if rule.head is not None:
        readers = [] if tied else [_need(names, rule.head)]
    else:
        readers = [m for other in parts for stream, m in other.cross if stream == rule.stream]
    foldable = bool(readers) and _takes_shift(rule, readers)
    final = [_norm(part, rule.final_norm, tuple(readers))] if foldable else []
    return Stream(
        name=rule.stream,
        width=names.shapes[f"{rule.final_norm}.weight"][0],
        norms=(*part.norms, *final),
        writers=tuple(part.writers),
        tables=tuple(tables),
        enters=enters,
        leaves=None if foldable else rule.final_norm,
        obstacle=_obstacle(part),
    )


def _obstacle(part: _Part) -> str:
    if not part.rule.output_norms:
        return ""
    norm = part.rule.output_norms[0]
    return (
        f"{part.blocks[0]}.{norm} multiplies what is written to the residual stream by a gain per "
        "channel, which no rotation commutes with and no later linear can take over: this model's "
        "residual basis cannot be changed (values, keys and hidden layers can)."
    )


def _norm(part: _Part, name: str, readers: tuple[Matrix, ...]) -> Norm:
    norm = Norm(name, part.rule.kind, readers)
    for parameter in _of_norm(norm):
        if parameter not in part.names.shapes and not (readers and parameter in _readers(norm)):
            raise ModelError(f"the model has no {parameter}, which its family must have.")
    if not _takes_shift(part.rule, readers):
        raise ModelError(
            f"{name} has a bias that one of its readers ({some([r.weight for r in readers])}) "
            "cannot take over, as it has none: this model's norms cannot be folded."
        )
    return norm


def _takes_shift(rule: BlockRule, readers: Iterable[Matrix]) -> bool:
    """Whether a norm's bias can move into these."""
    return rule.kind != LAYER or all(r.bias is not None or r.drops_shift for r in readers)


def _readers(norm: Norm) -> Iterator[str]:
    for reader in norm.readers:
        yield reader.weight
        if reader.bias is not None:
            yield reader.bias


def _of_norm(norm: Norm) -> set[str]:
    """All parameters that a norm and its readers have."""
    own = {norm.weight} | ({norm.bias} if norm.bias is not None else set())
    return own | set(_readers(norm))


def _untouched(rule: BlockRule, block: str) -> set[str]:
    names = (*rule.output_norms, *rule.head_norms)
    return {f"{block}.{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


def _refuse_unclaimed(shapes: Mapping[str, tuple[int, ...]], block: str, claimed: set[str]) -> None:
    left = [name for name in shapes if name.startswith(f"{block}.") and name not in claimed]
    if left:
        raise ModelError(
            f"the wiring of this family does not say what {some(left)} reads or writes: its basis "
            "cannot be changed. Use schemes without rotation, or add it to "
            "quantlib/transforms/tables.py."
        )


def _reader(part: _Part, block: str, name: str) -> Matrix:
    matrix = part.names.matrix(f"{block}.{name}", name in part.rule.drops_shift)
    if matrix is None:
        raise ModelError(f"the model has no {block}.{name}, which its family must have.")
    return matrix


def _need(names: _Names, name: str) -> Matrix:
    matrix = names.matrix(name)
    if matrix is None:
        raise ModelError(f"the model has no {name}, which its family must have.")
    return matrix


def _tied(rule: BlockRule, names: _Names) -> bool:
    if rule.head is None or rule.embedding is None:
        return False
    table, head = f"{rule.embedding}.weight", f"{rule.head}.weight"
    return names.identities.get(table, 0) == names.identities.get(head, 1)


def _setting(config: Any, key: str) -> int:
    holder = config if hasattr(config, key) else config.get_text_config()
    return int(getattr(holder, key))
