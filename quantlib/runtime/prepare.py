"""Getting an empty transformers model ready for a packed checkpoint.

The model comes from `from_pretrained` on `meta`; it leaves with packed modules whose buffers have
the names, dtypes and shapes that transformers' loader will find in the files. The checkpoint is
checked before a byte of it is loaded: transformers only warns of a missing tensor, and leaves
uninitialized memory in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from quantlib.checkpoint.reader import read_layout
from quantlib.errors import CheckpointError
from quantlib.runtime.assemble import replace_modules


def prepare(model: Any, folder: str | os.PathLike[str]) -> None:
    """Swap the packed modules of the checkpoint in `folder` into `model` (on `meta`).

    A model of another class than the checkpoint's (`AutoModel`: the decoder without its head) takes
    the weights it has. Raises CheckpointError when the folder is damaged, and CheckpointError or
    ModelError when config.json describes another model than the weights.
    """
    checkpoint = read_layout(folder)
    rename = _renaming(model)
    quantized = {
        name: rename(name)
        for name, scheme in checkpoint.schemes.items()
        if scheme.weight is not None
    }
    present = set(model.state_dict())
    absent = [name for name, new in quantized.items() if new not in present]
    if absent and type(model).__name__ in (model.config.architectures or ()):
        raise CheckpointError(
            f"{type(model).__name__} has no weight {absent[0]} (nor {len(absent) - 1} others of "
            f"the checkpoint): its config.json is not the one it was written with"
        )
    mine = {name: new for name, new in quantized.items() if new in present}
    replace_modules(
        model,
        {new: str(checkpoint.schemes[name]) for name, new in mine.items()},
        {new: checkpoint.shapes[name] for name, new in mine.items()},
    )


def _renaming(model: Any) -> Callable[[str], str]:
    """Checkpoint name -> name in this model, by transformers' own rules.

    They cover families whose modules were renamed over time, and base models without their prefix.
    """
    rules = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    state = model.state_dict()

    def rename(name: str) -> str:
        return (
            name
            if name in state
            else rename_source_key(name, rules, [], model.base_model_prefix, state)[0]
        )

    return rename
