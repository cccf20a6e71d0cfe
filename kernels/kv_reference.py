"""What a KV cache keeps and what attention makes of it, in torch: what every kernel must equal.

Packing, unpacking and the numbers that codes stand for agree with the kernels to the last bit
(cpu/src/kv_cache.h is the definition); attention agrees within the rounding of float32, because the
kernels sum in another order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.kernels.kv_format import BLOCK, LANES, SideFormat, padded_columns

_NOT_A_NUMBER = 0x7FC0 << 16
"""Meta word of a group with an infinity or a NaN."""


def rotate(x: Tensor) -> Tensor:
    """x [..., head_dim] times the Walsh-Hadamard matrix over sqrt(n), in every n columns, n being
    the largest power of two that divides head_dim, at least 16. Its own inverse.

    Sums run in the order of the kernels: 16 columns one after the other, then halves.
    """
    head_dim = x.shape[-1]
    size = head_dim & -head_dim
    parts = x.reshape(*x.shape[:-1], -1, LANES)
    signs = _hadamard(LANES).to(x.device)
    sums = torch.zeros_like(parts)
    for column in range(LANES):
        sums = sums + parts[..., column : column + 1] * signs[column]
    # 1 / sqrt(n) rounded to float32, as the kernels have it.
    rotated = (sums * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)).reshape(x.shape)
    distance = LANES
    while distance < size:
        halves = rotated.reshape(*x.shape[:-1], -1, 2, distance)
        a, b = halves.unbind(-2)
        rotated = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        distance *= 2
    return rotated


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def round_to_codes(x: Tensor, form: SideFormat) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] float32 -> uint8 codes [..., padded columns], int32 meta [..., groups].

    A meta word is the scale as bfloat16 above the zero as int16. With `rotate`, x is rotated first.
    """
    head_dim = x.shape[-1]
    x = rotate(x) if form.rotate else x
    pad = padded_columns(head_dim) - head_dim
    x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], pad)), dim=-1)
    codes, meta = torch.zeros_like(x, dtype=torch.uint8), []
    for group in form.groups(head_dim):
        part = x[..., group.columns_slice]
        codes[..., group.columns_slice], words = _round_group(part, float((1 << group.bits) - 1))
        meta.append(words)
    return codes, torch.stack(meta, dim=-1)


def _round_group(x: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """x [..., columns] -> codes, and meta words [...]."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    finite = (x - x).sum(-1, keepdim=True) == 0
    step = torch.maximum(high / levels - low / levels, torch.maximum(-low, high) / 32767)
    step = torch.where(finite, step, 0.0)
    scale_bits = (step.view(torch.int32) + 0xFFFF) & -0x10000  # up to the next bfloat16
    scale = scale_bits.view(torch.float32)
    usable = torch.where(scale > 0, scale, 1.0)
    zero = torch.where(scale > 0, (-low / usable).round(), 0.0)
    codes = torch.where(scale > 0, ((x / usable).round() + zero).clamp(0, levels), 0.0)
    words = torch.where(finite, scale_bits | (zero.nan_to_num().int() & 0xFFFF), _NOT_A_NUMBER)
    return codes.to(torch.uint8), words[..., 0].int()


def numbers(codes: Tensor, meta: Tensor, form: SideFormat, head_dim: int) -> Tensor:
    """What codes stand for: float32 [..., head_dim], in the basis they are kept in."""
    scale = (meta & -0x10000).view(torch.float32)
    zero = meta << 16 >> 16
    parts = []
    for index, group in enumerate(form.groups(head_dim)):
        whole = codes[..., group.columns_slice].int() - zero[..., index, None]
        parts.append(whole.float() * scale[..., index, None])
    return torch.cat(parts, dim=-1)[..., :head_dim]


def pack_blocks(codes: Tensor, meta: Tensor, form: SideFormat, keys: bool) -> Tensor:
    """Codes [..., 64, padded], meta [..., 64, groups] -> uint8 [..., bytes of a block]."""
    parts = []
    for index, group in enumerate(form.groups(codes.shape[-1])):
        words = meta[..., index].contiguous().view(torch.uint8)
        chunks = _chunks(codes[..., group.columns_slice], group.bits, keys)
        low = chunks[..., 0, :, :, :]
        parts += [
            words,
            (low if group.bits == 8 else low | chunks[..., 1, :, :, :] << 4).flatten(-4),
        ]
    return torch.cat(parts, dim=-1)


def _chunks(codes: Tensor, bits: int, keys: bool) -> Tensor:
    """Codes [..., 64, columns] in the order they are stored in: [..., steps, nibbles, vectors, 16,
    4], where a step is 4 columns of keys or positions of values per nibble."""
    lead, nibbles = codes.shape[:-2], 8 // bits
    along = codes.mT if keys else codes
    steps, lanes = along.shape[-2] // (4 * nibbles), along.shape[-1] // LANES
    return along.reshape(*lead, steps, nibbles, 4, lanes, LANES).movedim(-3, -1)


def unpack_blocks(
    blocks: Tensor, form: SideFormat, keys: bool, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The inverse of pack_blocks."""
    lead, at = blocks.shape[:-1], 0
    codes, meta = [], []
    for group in form.groups(head_dim):
        words = blocks[..., at : at + 4 * BLOCK].contiguous().view(torch.int32)
        meta.append(words)
        end = at + BLOCK * group.bytes_per_position
        stored = blocks[..., at + 4 * BLOCK : end]
        nibbles = 8 // group.bits
        steps = (group.columns if keys else BLOCK) // (4 * nibbles)
        chunks = stored.reshape(*lead, steps, 1, -1, LANES, 4)
        if nibbles == 2:
            chunks = torch.cat((chunks & 15, chunks >> 4), dim=-4)
        along = chunks.movedim(-1, -3).reshape(*lead, steps * nibbles * 4, -1)
        codes.append(along.mT if keys else along)
        at = end
    return torch.cat(codes, dim=-1), torch.stack(meta, dim=-1)


def store(stored: Tensor, form: SideFormat, keys: bool, first: int, new: Tensor) -> None:
    """Write new [T, kv_heads, head_dim] to positions `first` and on of blocks stored [kv_heads,
    blocks, bytes of a block]."""
    head_dim = new.shape[-1]
    begin, end = first // BLOCK, -(-(first + len(new)) // BLOCK)
    at = slice(first - begin * BLOCK, first - begin * BLOCK + len(new))
    blocks, by_head = stored[:, begin:end], new.transpose(0, 1)
    if form.bits == 32:
        floats = _float_blocks(blocks, keys)
        floats.flatten(1, 2)[:, at, :head_dim] = by_head
        packed = (floats.mT if keys else floats).contiguous().view(torch.uint8)
        stored[:, begin:end] = packed.reshape(blocks.shape)
        return
    codes, meta = (x.contiguous() for x in unpack_blocks(blocks, form, keys, head_dim))
    fresh_codes, fresh_meta = round_to_codes(by_head, form)
    codes.flatten(1, 2)[:, at] = fresh_codes
    meta.flatten(1, 2)[:, at] = fresh_meta
    stored[:, begin:end] = pack_blocks(codes, meta, form, keys)


def dequantize(blocks: Tensor, form: SideFormat, keys: bool, head_dim: int) -> Tensor:
    """Blocks [kv_heads, blocks, bytes of a block] -> float32 [positions, kv_heads, head_dim],
    rotated back."""
    if form.bits == 32:
        x = _float_blocks(blocks, keys)[..., :head_dim]
    else:
        x = numbers(*unpack_blocks(blocks, form, keys, head_dim), form, head_dim)
        x = rotate(x) if form.rotate else x
    return x.flatten(1, 2).transpose(0, 1).contiguous()


def _float_blocks(blocks: Tensor, keys: bool) -> Tensor:
    """float32 [kv_heads, blocks, 64, padded columns] of float32 blocks; a copy."""
    floats = blocks.contiguous().view(torch.float32)
    shape = (*blocks.shape[:2], -1, BLOCK) if keys else (*blocks.shape[:2], BLOCK, -1)
    return (floats.reshape(shape).mT if keys else floats.reshape(shape)).contiguous().clone()


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of the last tokens of one sequence.

    query [T, heads, head_dim] belongs to the last T of the positions of keys and values
    [length, kv_heads, head_dim]; query heads share KV heads in order. A token sees itself and those
    before it, `window` positions at most (0: all). Scores are softcap * tanh(score / softcap) when
    softcap is not 0. Returns [T, heads, head_dim] in query's dtype.
    """
    tokens, heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(length, device=query.device)
    last = at[length - tokens :, None]
    seen = (at <= last) & (
        (at > last - window) if window else torch.ones_like(at, dtype=torch.bool)
    )
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("kgtl,lkd->tkgd", weights, values).flatten(1, 2)
