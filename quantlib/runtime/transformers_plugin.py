"""Teaches transformers to load checkpoints whose `config.json` says `quant_method: "quantlib"`.

`register()` adds a configuration class and a quantizer to transformers' tables; `import quantlib`
sees to it that it is called (`autoregister.py`). From then on
`AutoModelForCausalLM.from_pretrained(dir)` builds the model on `meta`, this quantizer swaps in the
packed modules (`prepare.py`), and transformers' own loader fills their buffers from the
memory-mapped files: no dense weight exists at any time. `save_pretrained` writes the state dict,
which is the checkpoint.

This module is imported in the middle of transformers' own import. So it needs only the files of
transformers that are complete by then, and imports the rest of quantlib when a packed checkpoint is
opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlib.errors import CheckpointError

METHOD = "quantlib"


class QuantlibConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (see `checkpoint.writer.quantization_config`).

    Nothing is checked here: `prepare` reads the same entries from the checkpoint's folder, together
    with its files.
    """

    def __init__(self, **entries: Any) -> None:
        self.quant_method = METHOD
        self.update_entries(entries)

    def update_entries(self, entries: Mapping[str, Any], optional: Sequence[str] = ()) -> None:
        """Set these entries; others stay, but for those in `optional`."""
        for key in optional:
            self.__dict__.pop(key, None)
        for key, value in entries.items():
            setattr(self, key, value)


class QuantlibQuantizer(HfQuantizer):
    """Builds packed modules for transformers' loader, and keeps it from casting their buffers."""

    requires_calibration = True  # it loads quantized models; `quantlib compress` makes them

    def __init__(self, quantization_config: QuantlibConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed_names: set[str] = set()

    def update_attn_implementation(self, config: Any) -> Any:
        """The last hook before the model's dtype is chosen: float32 where config.json names none.

        transformers would take that of the file's first float tensor, which may be a scale.
        """
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.float32
        return config

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """None (as stored) for packed tensors: scales are float16 whatever the model's dtype."""
        if converter.target_patterns[0] in self._packed_names:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from quantlib.runtime.modules import packed_modules
        from quantlib.runtime.prepare import prepare

        if not checkpoint_files:
            raise CheckpointError(
                "packed weights come from a folder: give from_pretrained its path and no state_dict"
            )
        prepare(model, os.path.dirname(checkpoint_files[0]))
        self._packed_names = {
            f"{module_name}.{name}"
            for module_name, module in packed_modules(model).items()
            for name in module.packed_names()
        }

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Asked by `save_pretrained` before it writes config.json: describe what is packed now."""
        from quantlib.checkpoint.surroundings import ENTRIES, rotation_tensors
        from quantlib.checkpoint.writer import quantization_config
        from quantlib.runtime.describe import describe
        from quantlib.runtime.modality_hooks import static_tensors
        from quantlib.transforms.online import attached

        described, rotation = describe(model), attached(model)
        self.quantization_config.update_entries(
            quantization_config(
                described.schemes,
                described.shapes,
                described.clips,
                described.orders,
                rotation,
                described.caches,
                described.nonlinear,
                described.kv,
            ),
            optional=ENTRIES,
        )
        more = {**rotation_tensors(rotation), **static_tensors(model)}
        return ({**model.state_dict(), **more} if more else None), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def attach(model: Any) -> None:
    """Let `save_pretrained` save a model that was quantized in memory as if it had been loaded."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    quantizer = QuantlibQuantizer(QuantlibConfig())
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD
    # Packed weights go by the model's own names: nothing is split by expert or renamed on the way.
    model._weight_conversions = []


def register() -> None:
    """Add "quantlib" to transformers' tables of quantization methods, once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QuantlibConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QuantlibQuantizer)
