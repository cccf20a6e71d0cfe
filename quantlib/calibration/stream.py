"""Running a decoder block by block, with one block's weights in memory.

The transformers model is built on `meta` and its blocks are replaced by stubs. Running the model
with the stubs in place does three things for any architecture without knowing it: it embeds the
tokens, it shows which arguments (masks, rotary embeddings) each block is called with, and, when the
last stub hands out given hidden states, it applies exactly the model's own final norm, head and
soft-capping to them. Between embedding and head, blocks are loaded by name, run, and released.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.heap import return_free_pages
from quantlib.errors import ModelError
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source


class BlockStream:
    """A source model as embed -> blocks -> head, holding one block at a time.

    Parameters outside the blocks (embeddings, final norm, head) stay in memory. Every `embed` tells
    the blocks' arguments for windows of that length, which `run` then uses.
    """

    def __init__(
        self, source: Source, model_map: ModelMap, dtype: torch.dtype = torch.float32
    ) -> None:
        self.source = source
        self.block_names = model_map.blocks
        self.dtype = dtype
        self.model = skeleton.build(source, dtype)
        skeleton.materialize(self.model, "", source, dtype, exclude=model_map.blocks)
        self._blocks = [self.model.get_submodule(name) for name in self.block_names]
        if not self._blocks:
            raise ModelError("this model has no repeated blocks: there is nothing to stream")
        self._stubs = [_Stub(block) for block in self._blocks]
        for index, stub in enumerate(self._stubs):
            self._put(index, stub)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [1, T, D] that enter the first block for one window `ids` [T]."""
        first = self._stubs[0]
        if first.entered is None:
            self._learn_outputs(ids)
        self.model.base_model(input_ids=ids[None], use_cache=False)
        if first.entered is None:
            raise ModelError("the model ran without calling its blocks: it cannot be streamed")
        return first.entered

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of the model's own final norm and head, for the hidden states [1, T, D]
        that leave the last block."""
        self._stubs[-1].replacement = hidden
        try:
            logits: Tensor = self.model(input_ids=ids[None], use_cache=False).logits
        finally:
            self._stubs[-1].replacement = None
        return logits

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block at `index` with its weights, for as long as the context lasts."""
        self._put(index, self._blocks[index])
        try:
            skeleton.materialize(self.model, self.block_names[index], self.source, self.dtype)
            yield self._blocks[index]
        finally:
            skeleton.release(self.model, self.block_names[index])
            self._put(index, self._stubs[index])
            return_free_pages()

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One window's hidden states [1, T, D] through a loaded block; T as in the last `embed`."""
        stub = self._stubs[index]
        if stub.entered is None:
            raise ModelError("a block's arguments are not known yet: embed a window first")
        return _leading(block(hidden, *stub.args, **stub.kwargs))

    def _put(self, index: int, module: nn.Module) -> None:
        parent, _, leaf = self.block_names[index].rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def _learn_outputs(self, ids: Tensor) -> None:
        """Whether blocks return a tensor or a tuple led by it is seen only by running one: the
        first block, once; the model is stopped behind it."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _FirstBlockRan(output)

        with self.block(0) as block, torch.no_grad():
            handle = block.register_forward_hook(stop)
            try:
                self.model.base_model(input_ids=ids[None], use_cache=False)
            except _FirstBlockRan as ran:
                for stub in self._stubs:
                    stub.beside = len(ran.output) - 1 if isinstance(ran.output, tuple) else None
            finally:
                handle.remove()


class _FirstBlockRan(Exception):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Stub(nn.Module):
    """Stands where a block was: notes how it is called, and passes hidden states on or replaces
    them.

    args, kwargs: all arguments but the hidden states.
    entered:      the hidden states of the last call, None before the first.
    replacement:  what to pass on instead of them.
    beside:       how many more outputs the block returns in a tuple; None: it returns a tensor.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list: the block is not a submodule of its stub
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.entered: Tensor | None = None
        self.replacement: Tensor | None = None
        self.beside: int | None = None

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for settings, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            self.entered, self.args = args[0], args[1:]
        elif "hidden_states" in kwargs:
            self.entered = kwargs.pop("hidden_states")
        else:
            raise ModelError(
                "this architecture calls its blocks without hidden states: it cannot be streamed"
            )
        self.kwargs = kwargs
        out = self.entered if self.replacement is None else self.replacement
        return out if self.beside is None else (out, *[None] * self.beside)


def _leading(output: Any) -> Tensor:
    """The hidden states among a block's outputs."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
