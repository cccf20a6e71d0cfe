"""`quantlib.load`: a packed checkpoint, ready to write text.

A thin layer over the transformers model, which stays in reach as `.model`: loading is transformers'
(with the plug-in), and so is everything a user may want to do with the model besides. What this
adds: the tokenizer, text in and text out, and errors that are sentences.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.reader import read_layout
from quantlib.errors import CheckpointError, UsageError
from quantlib.runtime.generate import Sampling, TextStream
from quantlib.runtime.modules import packed_modules, set_mode

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class QuantizedModel:
    """A packed language model and its tokenizer.

    model:     the transformers model.
    tokenizer: its tokenizer, None when the checkpoint has none.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that follows `prompt`, without the prompt.

        chat:        put the prompt into the tokenizer's chat template, as the user's message;
                     None: if there is a template.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn with `top_p`
                     and `seed`.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return self.stream(prompt, max_new_tokens, chat=chat, **options).finish()

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> TextStream:
        """As `generate`, but the text in pieces, as they come; `.speed` says how fast they came."""
        sampling = Sampling(temperature, top_p, seed)
        ids = self.encode(prompt, chat)
        return TextStream(self.model, self.tokenizer, ids, max_new_tokens, sampling)

    def set_mode(self, mode: str) -> None:
        """Take activations as they are ("exact") or round them to 8 bits per token ("int8")."""
        set_mode(self.model, mode)

    def packed_bytes(self) -> int:
        """Bytes of all packed weights in memory."""
        return sum(module.packed_bytes() for module in packed_modules(self.model).values())

    def encode(self, prompt: str, chat: bool | None = None) -> Tensor:
        """Token ids of a prompt, int64 [1, tokens], on the model's device. chat: see `generate`."""
        if self.tokenizer is None:
            raise UsageError(
                "this checkpoint has no tokenizer: copy the source model's tokenizer files "
                "into it, or give token ids to .model"
            )
        template = getattr(self.tokenizer, "chat_template", None)
        if chat and template is None:
            raise UsageError("this model's tokenizer has no chat template: use chat=False")
        if chat or (chat is None and template is not None):
            messages = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device, torch.int64)


def load(
    path: str | os.PathLike[str],
    mode: str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> QuantizedModel:
    """Open a checkpoint that `quantlib compress` wrote.

    mode:  "exact" or "int8" for all layers; None: int8 where the scheme ends in a8, else exact.
    dtype: of activations and of what was kept in 16 bits.
    Raises CheckpointError when the folder is damaged, incomplete, or of another version.
    """
    path = Path(path)
    read_layout(path)
    model = _load_model(path, dtype)
    loaded = QuantizedModel(model, _load_tokenizer(path))
    if mode is not None:
        loaded.set_mode(mode)
    return loaded


def _load_model(path: Path, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM

    from quantlib.runtime.transformers_plugin import register

    register()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {path}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{path} lacks {absent[0]} ({len(absent)} parameters in all): make the checkpoint again"
        )
    return model


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from error
