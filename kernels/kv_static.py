"""Scales of keys and values that are known beforehand, one for every place in an image.

An image's tokens always stand in the same order behind the token that begins it, and what a
place means for keys and values changes little from image to image. So a scale and a zero per
place, head and group can be calibrated once and kept beside the weights, and a cached token has
codes only: 4 bytes less per group.

Meta words are those of the cache (`kv_reference.round_to_codes`): a bfloat16 scale above an int16
zero. Values outside a calibrated range are clipped to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.kernels.kv_format import SideFormat, padded_columns
from quantlib.kernels.kv_reference import rotate, round_to_codes


@dataclass(frozen=True)
class Ranges:
    """low, high: float32 [places, kv_heads, groups], in the basis a side is kept in."""

    low: Tensor
    high: Tensor

    @staticmethod
    def of(x: Tensor, places: Tensor, count: int, form: SideFormat) -> Ranges:
        """Of tokens x [n, kv_heads, head_dim] that stand at places int64 [n], of `count` in all.
        Where no token stands, low is inf and high is -inf.

        Raises FormatError for float32, which has no scales, and for numbers that are not finite.
        """
        if form.bits == 32:
            raise FormatError("a KV cache of f32 has no scales to keep: name int8 or int4")
        if not bool(torch.isfinite(x).all()):
            raise FormatError("keys or values of calibration are not finite: no range holds them")
        kept = rotate(x.float()) if form.rotate else x.float()
        parts = [kept[..., group.columns_slice] for group in form.groups(x.shape[-1])]
        lows = torch.stack([part.amin(-1) for part in parts], -1)
        highs = torch.stack([part.amax(-1) for part in parts], -1)
        empty = lows.new_full((count, *lows.shape[1:]), torch.inf)
        at = (places % count)[:, None, None].expand_as(lows)
        return Ranges(
            empty.scatter_reduce(0, at, lows, "amin"),
            (-empty).scatter_reduce(0, at, highs, "amax"),
        )

    def joined(self, other: Ranges) -> Ranges:
        """What holds both."""
        return Ranges(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def filled(self) -> Ranges:
        """With a last place that no token stood at like the one before it: the last token of an
        image that is written is not read again, unless something follows the image."""
        if len(self.low) < 2 or bool((self.low[-1] <= self.high[-1]).all()):
            return self
        return Ranges(
            torch.cat((self.low[:-1], self.low[-2:-1])),
            torch.cat((self.high[:-1], self.high[-2:-1])),
        )

    def meta(self, form: SideFormat, head_dim: int) -> Tensor:
        """Meta words int32 [places, kv_heads, groups]: those that a token gets whose groups reach
        from low to high. Raises FormatError when a place has seen no token."""
        if not bool((self.low <= self.high).all()):
            missing = int((self.low > self.high).flatten(1).any(1).nonzero()[0])
            raise FormatError(f"no token of calibration stood at place {missing} of an image")
        token = torch.empty(*self.low.shape[:-1], padded_columns(head_dim))
        for index, group in enumerate(form.groups(head_dim)):
            token[..., group.columns_slice] = self.high[..., index, None]
            token[..., group.start] = self.low[..., index]
        return round_to_codes(token, replace(form, rotate=False))[1]


def static_codes(x: Tensor, meta: Tensor, form: SideFormat) -> Tensor:
    """Codes uint8 [..., padded columns] of x [..., head_dim] with meta words [..., groups] that are
    given; what is outside their range is clipped, and NaN becomes the low end."""
    head_dim = x.shape[-1]
    x = rotate(x.float()) if form.rotate else x.float()
    x = torch.nn.functional.pad(x, (0, padded_columns(head_dim) - head_dim))
    scale = (meta & -0x10000).view(torch.float32)
    zero = (meta << 16 >> 16).float()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for index, group in enumerate(form.groups(head_dim)):
        step, at = scale[..., index, None], zero[..., index, None]
        whole = (x[..., group.columns_slice] / torch.where(step > 0, step, 1.0)).round() + at
        limited = whole.nan_to_num(0.0).clamp(0, float((1 << group.bits) - 1))
        codes[..., group.columns_slice] = torch.where(step > 0, limited, 0.0).to(torch.uint8)
    return codes


def check_meta(meta: Tensor, form: SideFormat, head_dim: int, kv_heads: int) -> None:
    """Raise FormatError unless meta words [places, kv_heads, groups] fit heads of a format."""
    wanted = (kv_heads, len(form.groups(head_dim)))
    fits = meta.dtype == torch.int32 and meta.ndim == 3 and tuple(meta.shape[1:]) == wanted
    if not fits or not len(meta):
        raise FormatError(
            f"static scales of a KV cache are {meta.dtype} {list(meta.shape)}, and {form} with "
            f"{kv_heads} heads of {head_dim} columns takes int32 [places, {wanted[0]}, {wanted[1]}]"
        )
