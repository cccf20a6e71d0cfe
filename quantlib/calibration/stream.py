"""Running a decoder block by block, with one block's weights in memory.

The transformers model is built on `meta` and its blocks are replaced by stubs. Running the model once with the stubs
in place does three things for any architecture without knowing it: it embeds the tokens, it shows which arguments
(masks, rotary embeddings) each block is called with, and, when the last stub is told to hand out given
hidden states, it applies exactly the model's own final norm, head and soft-capping to them. Between embedding and head,
blocks are loaded by name, run, and released.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import ModelError
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source


class _Stub(nn.Module):
    """Stands where a block was: records how it is called and passes hidden states on (or replaces them)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list: the block is not a submodule of its stub
        self.kwargs: dict[str, Any] = {}
        self.replacement: Tensor | None = None
        self.entered: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise ModelError("this architecture passes its blocks positional arguments: it cannot be streamed")
        self.kwargs = kwargs
        self.entered = hidden_states
        return hidden_states if self.replacement is None else self.replacement


class BlockStream:
    """A source model as embed -> blocks -> head, holding one block at a time.

    Parameters outside the blocks (embeddings, final norm, head) stay in memory.
    """

    def __init__(self, source: Source, model_map: ModelMap, dtype: torch.dtype = torch.float32) -> None:
        self.source = source
        self.block_names = model_map.blocks
        self.dtype = dtype
        self.model = skeleton.build(source, dtype)
        skeleton.materialize(self.model, "", source, dtype, exclude=model_map.blocks)
        self._blocks = [self.model.get_submodule(name) for name in self.block_names]
        self._stubs = [_Stub(block) for block in self._blocks]
        for name, stub in zip(self.block_names, self._stubs, strict=True):
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)[int(leaf)] = stub  # type: ignore[index, operator]

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [1, T, D] that enter the first block for one window `ids` [T]; also learns the blocks' arguments."""
        self._stubs[-1].replacement = None
        self.model.base_model(input_ids=ids[None], use_cache=False)
        entered = self._stubs[0].entered
        if entered is None:
            raise ModelError("the model ran without calling its blocks: it cannot be streamed")
        return entered

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of the model's own final norm and head for hidden states [1, T, D] after the last block."""
        self._stubs[-1].replacement = hidden
        try:
            return self.model(input_ids=ids[None], use_cache=False).logits  # type: ignore[no-any-return]
        finally:
            self._stubs[-1].replacement = None

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block at `index` with its weights, for as long as the context lasts.

        Call it through `run`. Needs one `embed` before, which learns the arguments.
        """
        name, block = self.block_names[index], self._blocks[index]
        parent, _, leaf = name.rpartition(".")
        holder = self.model.get_submodule(parent)
        holder[int(leaf)] = block  # type: ignore[index, operator]
        try:
            skeleton.materialize(self.model, name, self.source, self.dtype)
            yield block
        finally:
            skeleton.release(self.model, name)
            holder[int(leaf)] = self._stubs[index]  # type: ignore[index, operator]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One window's hidden states [1, T, D] through a loaded block."""
        out = block(hidden, **self._stubs[index].kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
