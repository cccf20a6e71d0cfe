"""Calibration passes over a streamed model: forward, then (for gradients) backward, one block in
memory at a time.

Gradients of the whole model do not need the whole model. The forward pass leaves the hidden states
that enter every block in a store on disk; the head turns the last ones into the gradient of a loss
on labels *sampled from the model itself* (so the second moment of gradients is the Fisher
information, not an error of the data); and the backward pass loads blocks from last to first, runs
each again from its stored input, and sends the gradient through. Memory holds one block, the
activations of one window inside it, and the hidden states of all windows at one or two depths,
however many blocks there are; the price is a second forward.

Every step's result is in the store before the next begins, so a pass that was killed goes on at its
block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from quantlib.calibration.observe import BlockObserver, observed
from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError, ModelError
from quantlib.models.memory import empty
from quantlib.models.modelmap import ModelMap

SAMPLED_HEAD_TOKENS = 32
"""Head inputs of each window that are kept for the head's sensitivity."""


class HiddenStore(Protocol):
    """Hidden states or gradients [windows, T, D] by name; `save` is atomic."""

    def has(self, name: str) -> bool: ...

    def load(self, name: str) -> Tensor: ...

    def save(self, name: str, value: Tensor) -> None: ...

    def drop(self, name: str) -> None: ...


Tick = Callable[[str], None]
"""Called after every block with a line for the progress bar."""


@torch.no_grad()
def forward(stream: BlockStream, windows: Tensor, store: HiddenStore, tick: Tick) -> None:
    """Store the hidden states that enter each block and the head: `hidden.0` .. `hidden.{blocks}`.

    windows: int64 [W, T]. Needed before every other pass, also when all is stored: it shows the
    stream how blocks are called.
    """
    first = stream.embed(windows[0])
    if not store.has("hidden.0"):
        entered = empty((len(windows), *first.shape[1:]), first.dtype)
        for window, ids in enumerate(windows):
            entered[window] = stream.embed(ids)[0]
        store.save("hidden.0", entered)
    for index, name in enumerate(stream.block_names):
        if not store.has(f"hidden.{index + 1}"):
            states = store.load(f"hidden.{index}")
            out = empty(states.shape, states.dtype)
            with stream.block(index) as block:
                for window, hidden in enumerate(states):
                    out[window] = stream.run(index, block, hidden[None])[0]
            store.save(f"hidden.{index + 1}", out)
        tick(f"forward {name}")


def head(
    stream: BlockStream, windows: Tensor, store: HiddenStore, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample labels at the head.

    Returns the gradient of the summed loss with respect to the last hidden states, float32
    [W, T, D] (the caller stores it as `gradient.{blocks}`), and the head's own statistics:
    `head_input` [D, D], `variance` [V], `sample_h` [S, D], `sample_window` [S] (see
    `EmbeddingStatistics`). Raises ModelError when the model has no head or its logits overflow.
    """
    module = stream.model.get_output_embeddings()
    if module is None:
        raise ModelError("this model has no output head: there are no labels to sample")
    generator = torch.Generator().manual_seed(seed)
    states = store.load(f"hidden.{len(stream.block_names)}")
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    gradients = empty(states.shape, torch.float32)
    head_input, variance = torch.zeros(()), torch.zeros(())
    samples, sample_window = [], []
    try:
        for window, (hidden, ids) in enumerate(zip(states, windows, strict=True)):
            leaf = hidden[None].detach().requires_grad_(True)
            logits = stream.logits(leaf, ids)[0].float()
            probability = logits.detach().softmax(-1)
            if not bool(torch.isfinite(probability).all()):
                raise ModelError(
                    f"the model's logits are inf or nan on calibration window {window}"
                )
            variance = variance + (probability * (1 - probability)).sum(0)
            labels = torch.multinomial(probability, 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            gradients[window] = torch.autograd.grad(loss, leaf)[0][0]
            h = seen.pop().reshape(len(ids), -1).float()
            head_input = head_input + h.T @ h
            chosen = torch.randperm(len(h), generator=generator)[:SAMPLED_HEAD_TOKENS]
            samples.append(h[chosen])
            sample_window.append(torch.full((len(chosen),), window))
    finally:
        handle.remove()
    statistics = {
        "head_input": head_input / windows.numel(),
        "variance": variance / windows.numel(),
        "sample_h": torch.cat(samples),
        "sample_window": torch.cat(sample_window),
    }
    return gradients, statistics


def backward(
    stream: BlockStream,
    model_map: ModelMap,
    windows: Tensor,
    store: HiddenStore,
    seed: int,
    tick: Tick,
    turned: Container[str] = (),
) -> Iterator[tuple[str, list[GroupStatistics]]]:
    """Walk from the last block to the first, yielding each block's gradient-weighted statistics.

    turned: weights whose outputs will be turned (`MatrixStatistics.outputs`).
    Needs a `gradient.{i}` of these windows in the store, the one of the last block at first; leaves
    `gradient.0`. The gradient of a block is stored only after the consumer has taken (and kept) its
    statistics, and replaces the one above it, so a pass that was killed repeats at most one block.
    """
    blocks = len(stream.block_names)
    reached = next((i for i in range(blocks + 1) if store.has(f"gradient.{i}")), None)
    if reached is None:
        raise DataError("there is no gradient at the head to send back: run the head first")
    if store.load(f"gradient.{reached}").shape[:2] != windows.shape:
        raise DataError("the stored gradients are of other windows: begin again without them")
    for index in reversed(range(blocks)):
        name = stream.block_names[index]
        if index < reached:
            observer = BlockObserver(model_map, name, True, seed + 104729 * index, turned)
            gradients = _backward_block(stream, model_map, store, index, observer)
            yield name, observer.statistics()
            store.save(f"gradient.{index}", gradients)
        store.drop(f"gradient.{index + 1}")
        tick(f"backward {name}")


def _backward_block(
    stream: BlockStream,
    model_map: ModelMap,
    store: HiddenStore,
    index: int,
    observer: BlockObserver,
) -> Tensor:
    """Run one block forward and backward under `observer`; the gradient at its input [W, T, D]."""
    states, upstream = store.load(f"hidden.{index}"), store.load(f"gradient.{index + 1}")
    gradients = empty(upstream.shape, torch.float32)
    name = stream.block_names[index]
    with stream.block(index) as block, observed(stream.model, model_map, name, observer):
        for window, (hidden, gradient) in enumerate(zip(states, upstream, strict=True)):
            observer.window = window
            leaf = hidden[None].detach().requires_grad_(True)
            out = stream.run(index, block, leaf)
            gradients[window] = torch.autograd.grad(out, leaf, gradient[None].to(out.dtype))[0][0]
    return gradients


def local(
    stream: BlockStream,
    model_map: ModelMap,
    store: HiddenStore,
    seed: int,
    tick: Tick,
    done: Container[str] = (),
) -> Iterator[tuple[str, list[GroupStatistics]]]:
    """Block-local statistics: second moments of inputs only, no gradients (every token counts the
    same).

    done: names of blocks whose statistics are kept already; they are skipped.
    """
    for index, name in enumerate(stream.block_names):
        if name in done:
            tick(f"observe {name}")
            continue
        observer = BlockObserver(model_map, name, False, seed + 104729 * index)
        with (
            torch.no_grad(),
            stream.block(index) as block,
            observed(stream.model, model_map, name, observer),
        ):
            for window, hidden in enumerate(store.load(f"hidden.{index}")):
                observer.window = window
                stream.run(index, block, hidden[None])
        yield name, observer.statistics()
        tick(f"observe {name}")


def embedding(
    windows: Tensor, gradient: Tensor, vocabulary: int, head_statistics: Mapping[str, Tensor]
) -> EmbeddingStatistics:
    """Statistics of the embedding: how often each token occurs, and the mean squared gradient at
    its output.

    gradient: float32 [W, T, D] at the hidden states that enter the first block (for an embedding
    with a scale factor, of the scaled embedding: a constant factor that the sensitivity's
    calibration absorbs).
    """
    frequency = torch.bincount(windows.reshape(-1), minlength=vocabulary).float()
    return EmbeddingStatistics(
        frequency=frequency,
        gradient=gradient.float().square().mean(dim=(0, 1)),
        head_input=head_statistics["head_input"],
        variance=head_statistics["variance"],
        sample_h=head_statistics["sample_h"],
        sample_window=head_statistics["sample_window"],
        tokens=windows.numel(),
    )
