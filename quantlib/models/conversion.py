"""DiskRules for model types without a table, from the data transformers itself loads by.

transformers keeps, per model type, the renames and merges it applies when it loads a checkpoint
(GPT-NeoX's `embed_out` is now `lm_head`; per-expert tensors become 3-D parameters). We read that
data and apply it ourselves, because its loader fills a whole model at once. A conversion that is
more than a rename or a stack of experts is left out: its tensors then fit no parameter, which is an
error that names them.
"""

from __future__ import annotations

import re

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantlib.models.families import DiskRules, ExpertParts

_COMPUTED = (r"rotary_emb\.inv_freq$", r"\.(attention|attn)\.(masked_)?bias$")
"""What old checkpoints store and modules compute: rotary frequencies and causal masks."""


def derive_disk_rules(model_type: str) -> DiskRules:
    """DiskRules of a model type; no renames and stacks where transformers converts nothing."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    transforms = get_checkpoint_conversion_mapping(architecture)
    if transforms is None:
        transforms = get_checkpoint_conversion_mapping(model_type) or []
    renames = [_rename(transform) for transform in transforms if type(transform) is WeightRenaming]
    stacks = [_expert_parts(transform) for transform in transforms if _stacks_experts(transform)]
    return DiskRules(tuple(renames), tuple(stacks), _COMPUTED)


def _rename(transform: WeightTransform) -> tuple[str, str]:
    pattern, replacement = transform.source_patterns[0], transform.target_patterns[0]
    if re.search(r"\w$", pattern):
        pattern += r"(?!\w)"  # names match whole: `weight` is not the start of `weight_scale`
    return pattern, replacement


def _stacks_experts(transform: WeightTransform) -> bool:
    """One parameter from a list over experts, each of one matrix or several joined along N."""
    if not isinstance(transform, WeightConverter) or len(transform.target_patterns) != 1:
        return False
    steps = [(type(step), step.dim) for step in transform.operations if hasattr(step, "dim")]
    if len(steps) != len(transform.operations):
        return False
    joined = [(MergeModulelist, 0), (Concatenate, 1)]
    return steps == joined[: 1 if len(transform.source_patterns) == 1 else 2]


def _expert_parts(transform: WeightTransform) -> ExpertParts:
    parts = (source.strip(".").replace("*", "{expert}") for source in transform.source_patterns)
    return ExpertParts(transform.target_patterns[0].strip("."), tuple(parts))
