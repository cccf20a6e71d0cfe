"""What re-rounding does with one block: its groups one by one, then everything together.

Weights are rounded in the order in which their columns are packed (`Run.orders`), and run in the
order of the model's inputs; `packed` and `dense` lead from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlib.formats.activation import ActivationSegment, with_clips
from quantlib.formats.composite import StoredWeight, dequantize_stored
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.calibrate import group_statistics
from quantlib.pipeline.planned_block import PlannedBlock
from quantlib.pipeline.row_blocks import stored_weight
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, round_members
from quantlib.rounding.asymmetric import least_squares_targets
from quantlib.rounding.clips import choose_clips
from quantlib.rounding.learned import LearningOptions, learn
from quantlib.rounding.objective import OutputMetric
from quantlib.rounding.rows import block_of_rows

TOKEN_POWER = 0.5
"""Moments and learning weigh tokens by the root of their Fisher weight: by the weight itself a few
tokens decide, and targets fit their noise; all alike, the huge first token of a sequence does."""

CLIP_TOKENS = 2048
"""Inputs of a group that clip factors are chosen by."""


class BlockRounding:
    """The rounding of one block in progress.

    weights: name -> what it is rounded to by now; the bank's entries at first. Rows that are in
             blocks stay in them.
    losses:  mean loss on the windows that judge, with the bank's entries and with `weights`.
    kept:    groups whose re-rounding was better than what the bank has.
    step:    the step of learning that `weights` are from; 0: none.
    """

    def __init__(self, run: Run, block: PlannedBlock, schemes: Mapping[str, str]) -> None:
        self.run, self.block, self.schemes = run, block, schemes
        self.weights = {name: stored_weight(run, name, schemes[name]) for name in block.originals}
        self.targets = {name: self.packed(name, w) for name, w in block.originals.items()}
        block.observe()
        block.metric = self._metric()
        loss = float(block.judge(self.dense(self.weights)).mean())
        self.losses = (loss, loss)
        self.kept: list[str] = []
        self.step = 0

    def finish(self) -> dict[str, StoredWeight]:
        """Choose clips, re-round every group, learn; returns the block's weights."""
        for group in self.block.groups:
            self._clip(group)
            self._reround_group(group)
        self._learn()
        return self.weights

    def dense(self, weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
        """Dequantized, with columns in the order of the model's inputs."""
        values = {name: dequantize_stored(weight) for name, weight in weights.items()}
        return {name: self.unpacked(name, value) for name, value in values.items()}

    def unpacked(self, name: str, value: Tensor) -> Tensor:
        """Columns [N, K] from the order of packing to that of the model's inputs."""
        order = self.run.orders.get(name)
        return value if order is None else value[:, torch.argsort(order)]

    def packed(self, name: str, value: Tensor) -> Tensor:
        """Columns [N, K] from the order of the model's inputs to that of packing."""
        order = self.run.orders.get(name)
        return value if order is None else value[:, order]

    def _metric(self) -> OutputMetric:
        """By the gradients at the last linear that writes to the stream, which are the block's own;
        relative squared error where there are none."""
        outputs, writer = self.block.outputs, self.block.last_writer
        if writer is not None:
            (matrix,) = group_statistics(self.run, writer.name).matrices
            if matrix.has_gradients:
                shape = (outputs.shape[0], outputs.shape[1])
                return OutputMetric.fisher(
                    matrix.token_weight, matrix.fisher[writer.members[0]], shape
                )
        return OutputMetric.relative(outputs)

    def _token_weight(self, group: LinearGroup) -> Tensor:
        """Weights of all tokens for a group's moments, [W, T], of mean 1."""
        shape = self.block.outputs.shape[:2]
        (matrix,) = group_statistics(self.run, group.name).matrices
        if not matrix.has_gradients:
            return torch.ones(shape)
        weight = matrix.token_weight.clamp(min=0).pow(TOKEN_POWER).reshape(shape)
        return weight / weight.mean().clamp(min=1e-30)

    def clips(self, name: str) -> tuple[float, ...]:
        """The clip factors of a weight's activation segments; none where nothing is rounded."""
        return tuple(segment.format.clip for segment in self.block.inputs[name][0])

    def _clip(self, group: LinearGroup) -> None:
        """Choose how much of their range the group's inputs keep, if the block loses less so.

        Members that round their inputs alike share the choice: engines round them once.
        """
        block, before = self.block, dict(self.block.inputs)
        alike: dict[tuple[ActivationSegment, ...], list[str]] = {}
        for name in group.members:
            if block.inputs[name][0]:
                alike.setdefault(block.inputs[name][0], []).append(name)
        if not alike:
            return
        inputs, places = block.sample(group, self.dense(self.weights), CLIP_TOKENS)
        token_weight = self._token_weight(group).reshape(-1)[places]
        for segments, names in alike.items():
            order = self.run.orders.get(names[0])
            matrix = torch.cat([block.originals[name] * self._row_weight(name) for name in names])
            if order is not None:
                matrix = matrix[:, order]
            x = inputs if order is None else inputs[:, order]
            clips = choose_clips(x, segments, matrix.T @ matrix, token_weight)
            block.inputs |= {name: (with_clips(segments, clips), order) for name in names}
        loss = float(block.judge(self.dense(self.weights)).mean())
        if loss < self.losses[1]:
            self.losses = (self.losses[0], loss)
        else:
            block.inputs = before

    def _row_weight(self, name: str) -> Tensor:
        """Root mean squared gradients of a weight's outputs, [N, 1]; ones without gradients."""
        group = self.run.model_map.weight(name).group
        (matrix,) = group_statistics(self.run, group).matrices
        if not matrix.has_gradients:
            return torch.ones(len(self.block.originals[name]), 1)
        return matrix.fisher[name].sqrt()[:, None]

    def _reround_group(self, group: LinearGroup) -> None:
        """Round one group again, and keep it if the block loses less."""
        recipe, block = self.run.recipe, self.block
        fit, held = block.moments(group, self.dense(self.weights), self._token_weight(group))
        originals = {name: block.originals[name] for name in group.members}
        targets = least_squares_targets(originals, fit, held, recipe.strength)
        hessian = fit.together(held).hessian
        options = RoundingOptions(self.run.damping, recipe.passes)
        order = self.run.orders.get(group.members[0])
        own = hessian if order is None else hessian[order][:, order]
        moved = {name: self.packed(name, target.weight) for name, target in targets.items()}
        schemes = {name: Scheme.parse(self.schemes[name]) for name in moved}
        blocks = {name: block_of_rows(self.weights[name]) for name in moved}
        rounded = round_members(moved, own, schemes, blocks, options)
        loss = float(block.judge(self.dense({**self.weights, **rounded})).mean())
        if loss < self.losses[1]:
            self.weights |= rounded
            self.targets |= moved
            self.losses = (self.losses[0], loss)
            self.kept.append(group.name)

    def _learn(self) -> None:
        """Learn all codes and scales together from where they are."""
        recipe = self.run.recipe
        if recipe.learning == 0:
            return
        options = LearningOptions(recipe.learning, seed=recipe.seed)
        single = {n: w for n, w in self.weights.items() if isinstance(w, QuantizedWeight)}
        found = learn(single, self.targets, _Learning(self), options)
        self.weights, self.step = dict(found.weights), found.step
        self.losses = (self.losses[0], float(found.losses.mean()))


class _Learning:
    """The block as `rounding.learned` sees it: weights in packed order, windows that are fitted
    counted from 0."""

    def __init__(self, work: BlockRounding) -> None:
        self.work, self.block = work, work.block
        self.metric = work.block.metric.tempered(TOKEN_POWER)

    @property
    def windows(self) -> int:
        return len(self.block.windows.fit)

    def gradients(self, weights: Mapping[str, Tensor], windows: Tensor) -> dict[str, Tensor]:
        chosen = [self.block.windows.fit[i] for i in windows.tolist()]
        found = self.block.gradients(self._in_model_order(weights), chosen, self.metric)
        return {name: self.work.packed(name, value) for name, value in found.items()}

    def held_out(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.block.judge(self._in_model_order(weights))

    def _in_model_order(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.work.unpacked(name, value) for name, value in weights.items()}
