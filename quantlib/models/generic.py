"""A family derived from the module itself, for decoders without a table.

The walk finds the repeated blocks (the ModuleList with most parameters), the nn.Linear modules and
the 3-D expert parameters in them, the input embedding and the head, and writes what it found as a
`Family`; from there on a model without a table is treated as one with. Linears are put in one group
only where their names say that they read one input (q/k/v of one self-attention, gate/up of one
MLP); every other linear is its own group. What the walk does not recognise stays unclaimed and is
reported, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models.conversion import derive_disk_rules
from quantlib.models.families import Family, GroupRule, KeptRule

SHARED_INPUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("query", "key", "value")),
    ("qkv", ("wq", "wk", "wv")),
    ("gate_up", ("gate_proj", "up_proj")),
    ("gate_up", ("w1", "w3")),
)
"""Siblings of these names read one input."""

_CROSS_ATTENTION = re.compile(r"cross|encoder_attn|enc_dec", re.IGNORECASE)
"""Attention whose keys and values read another sequence than its queries."""

_EXPERT_PARAMETERS = {
    "gate_up_proj": False,
    "gate_proj": False,
    "up_proj": False,
    "down_proj": True,
}
"""3-D parameters of an experts module -> whether their input exists only inside its forward."""

_ROUTERS = ("gate", "router", "shared_expert_gate")


def derive_family(model: PreTrainedModel) -> Family:
    """The table this model would have.

    Raises ModelError when it has no repeated blocks or no token embedding.
    """
    prefix, blocks = _block_list(model)
    rules = {rule.name: rule for block in blocks for rule in _group_rules(block)}
    claimed = {f"{prefix}.*.{member}" for rule in rules.values() for member in rule.members}
    embedding = _name_of(model, model.get_input_embeddings())
    head = _name_of(model, model.get_output_embeddings())
    if embedding is None:
        raise ModelError(
            f"{type(model).__name__} has no token embedding: it is not a text decoder."
        )
    return Family(
        model_types=(model.config.model_type,),
        groups=tuple(rules.values()),
        kept=tuple(_kept_rules(model, prefix, claimed | {embedding, head or embedding})),
        blocks=prefix,
        embeddings=(embedding,),
        head=head,
        disk=derive_disk_rules(model.config.model_type),
    )


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no repeated blocks: it cannot be walked.")
    # a list inside a block has fewer parameters than the list of blocks; of equals, max keeps the
    # first, which is the outermost
    return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    name = next((name for name, other in model.named_modules() if other is module), None)
    return f"{name}.weight" if name is not None and module is not None else None


def _group_rules(block: nn.Module) -> Iterable[GroupRule]:
    grouped: set[str] = set()
    for parent_name, parent in block.named_modules():
        for name, siblings in SHARED_INPUT:
            if _read_one_input(parent_name, parent, siblings):
                members = tuple(_join(parent_name, sibling) for sibling in siblings)
                grouped.update(members)
                weights = tuple(f"{member}.weight" for member in members)
                yield GroupRule(_join(parent_name, name), weights, fused=True)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name not in grouped and not _is_router(block, name):
            yield GroupRule(name, (f"{name}.weight",))
        yield from _expert_rules(name, module)


def _read_one_input(parent_name: str, parent: nn.Module, siblings: tuple[str, ...]) -> bool:
    modules = [getattr(parent, sibling, None) for sibling in siblings]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    widths = {linear.in_features for linear in linears}
    return (
        len(linears) == len(siblings)
        and len(widths) == 1
        and not _CROSS_ATTENTION.search(parent_name)
    )


def _expert_rules(name: str, module: nn.Module) -> Iterable[GroupRule]:
    """Stacks `[E, N, K]`; those that a module says it stores transposed stay unclaimed."""
    if getattr(module, "is_transposed", False):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and leaf in _EXPERT_PARAMETERS:
            full = _join(name, leaf)
            yield GroupRule(full, (full,), kind="experts", inner=_EXPERT_PARAMETERS[leaf])


def _is_router(root: nn.Module, name: str) -> bool:
    """A projection to experts: it is called so and stands beside them (or its class says so)."""
    parent_name, _, leaf = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    beside_experts = any("expert" in child for child, _ in parent.named_children())
    is_router_class = "Router" in type(root.get_submodule(name)).__name__
    return (leaf in _ROUTERS and beside_experts) or is_router_class


def _kept_rules(model: nn.Module, prefix: str, claimed: set[str]) -> Iterable[KeptRule]:
    """Exact patterns for vectors, routers and auxiliary embeddings; block numbers become `*`."""
    number = re.compile(re.escape(prefix) + r"\.\d+\.")
    patterns: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        pattern = number.sub(f"{prefix}.*.", name)
        if pattern in claimed:
            continue
        owner_name = name.rpartition(".")[0]
        owner = model.get_submodule(owner_name)
        if sum(size > 1 for size in parameter.shape) <= 1:
            patterns[pattern] = "bias" if name.endswith("bias") else "normalisation or scale"
        elif _is_router(model, owner_name):
            patterns[pattern] = "router: a rounding error here sends tokens to other experts"
        elif isinstance(owner, nn.Embedding):
            patterns[pattern] = "auxiliary embedding (positions or types)"
    return [KeptRule(pattern, reason) for pattern, reason in patterns.items()]


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
