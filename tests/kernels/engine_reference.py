"""The decoder of `engine.h` in plain torch and float64; random decoders with all its options."""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.formats import Scheme, Segment, dequantize, pack, quantize_rtn
from quantlib.kernels.cpu.engine_library import Decoder, Layer, Linear, RowBlocks
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.layouts import TiledWeight, tile
from quantlib.kernels.ops import PackedWeight
from quantlib.transforms import hadamard

SCHEMES = ("w4g64", "w8", "w3g32z", "w5g128zs6", "w2g16z", "fp8g64", "nvfp4", "mxfp4", "w6tz")
DENSE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """Of a random decoder."""

    layers: int = 2
    hidden: int = 80
    intermediate: int = 100
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 150


def random_tiled(
    rows: int, parts: list[tuple[str, int]], generator: torch.Generator, spread: float = 1.0
) -> TiledWeight:
    """A random weight [rows, sum of lengths], rounded to the schemes of its column parts."""
    columns = sum(length for _, length in parts)
    weight = torch.randn(rows, columns, generator=generator) * (spread / math.sqrt(columns))
    segments, start = [], 0
    for scheme, length in parts:
        form = Scheme.parse(scheme).weight
        assert form is not None
        segments.append(Segment(start, length, form))
        start += length
    return tile(_pack(weight, tuple(segments)))


def pack_weight(weight: Tensor, scheme: str) -> PackedWeight:
    """A weight [N, K], rounded to the nearest."""
    return _pack(weight, Scheme.parse(scheme).segments(weight.shape[1]))


def _pack(weight: Tensor, segments: tuple[Segment, ...]) -> PackedWeight:
    return PackedWeight.from_tensors(pack(quantize_rtn(weight, segments)), weight.shape, segments)


def random_blocks(count: int, blocks: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Which of `count` rows are in which of some blocks: of sizes and places by lot, none empty."""
    order = torch.randperm(count, generator=generator)
    cuts = 1 + torch.randperm(count - 1, generator=generator)[: blocks - 1]
    parts = order.tensor_split(cuts.sort().values.tolist())
    return tuple(part.sort().values for part in parts)


def in_blocks(linear: Linear, blocks: int, generator: torch.Generator) -> Linear:
    """The same linear with its rows in several matrices of one format; dense ones as they are."""
    if not isinstance(linear.weight, TiledWeight):
        return linear
    packed = linear.weight.to_packed()
    rows = random_blocks(packed.shape[0], blocks, generator)
    parts = tuple(tile(packed.select_rows(own)) for own in rows)
    return replace(linear, weight=RowBlocks(parts, rows))


def all_in_blocks(model: Decoder, seed: int = 0) -> Decoder:
    """The same decoder with the rows of all linears in up to four blocks, of one format each."""
    generator, lot = torch.Generator().manual_seed(seed), random.Random(seed)

    def divided(linear: Linear) -> Linear:
        return in_blocks(linear, lot.randint(1, 4), generator)

    layers = [
        replace(
            layer,
            qkv=tuple(map(divided, layer.qkv)),
            o=divided(layer.o),
            gate_up=tuple(map(divided, layer.gate_up)),
            down=divided(layer.down),
        )
        for layer in model.layers
    ]
    embedding, head = divided(model.embedding), divided(model.head)
    return replace(model, layers=tuple(layers), embedding=embedding, head=head)


class _Drawer:
    """Draws the parts of a decoder."""

    def __init__(self, seed: int, mode: str, dense: bool, changed: bool, blocks: bool) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mode, self.dense, self.changed, self.blocks = mode, dense, changed, blocks

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def maybe(self, value: Tensor) -> Tensor | None:
        return value if self.pick.random() < 0.5 else None

    def norm(self, size: int) -> Tensor:
        return 1 + 0.2 * self.normal(size)

    def linear(self, rows: int, columns: int) -> Linear:
        bias = self.maybe(0.3 * self.normal(rows))
        if self.dense and self.pick.random() < 0.3:
            weight = (self.normal(rows, columns) / math.sqrt(columns)).to(self.pick.choice(DENSE))
            return Linear(weight, bias)
        schemes = SCHEMES if self.mode == "exact" else SCHEMES[:5]
        if self.blocks and self.pick.random() < 0.8:
            found = random_blocks(rows, self.pick.randint(2, 4), self.generator)
            weights = tuple(
                random_tiled(len(own), [(self.pick.choice(schemes), columns)], self.generator)
                for own in found
            )
            return Linear(RowBlocks(weights, found), bias, self.mode)
        parts = [(self.pick.choice(schemes), columns)]
        if columns > 40 and self.pick.random() < 0.3:
            parts = [("w8", 40), (self.pick.choice(schemes), columns - 40)]
        return Linear(random_tiled(rows, parts, self.generator), bias, self.mode)

    def changed_input(self, linear: Linear) -> Linear:
        """With a rotation, an order, or both, if decoders have any."""
        if not self.changed:
            return linear
        columns = linear.shape[1]
        size, order = (
            hadamard.block_size(columns),
            torch.randperm(columns, generator=self.generator),
        )
        dense, _ = hadamard.split(size)
        rotation = BlockRotation(size, hadamard.signs(dense) if dense > 1 else None)
        chosen = self.pick.choice(((rotation, None), (None, order.int()), (rotation, order.int())))
        return replace(linear, rotation=chosen[0], order=chosen[1])

    def basis(self, *shape: int) -> Tensor | None:
        """Orthogonal matrices, if decoders have any."""
        return torch.linalg.qr(self.normal(*shape))[0].contiguous() if self.changed else None

    def split(self, sizes: list[int], columns: int) -> tuple[Linear, ...]:
        """One linear for each size, or one for all."""
        if self.pick.random() < 0.4:
            sizes = [sum(sizes)]
        return tuple(self.linear(size, columns) for size in sizes)

    def layer(self, sizes: Sizes, ropes: int) -> Layer:
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return Layer(
            qkv=self.split([q, kv, kv], sizes.hidden),
            o=self.changed_input(self.linear(sizes.hidden, q)),
            gate_up=self.split([sizes.intermediate] * 2, sizes.hidden),
            down=self.changed_input(self.linear(sizes.hidden, sizes.intermediate)),
            intermediate=sizes.intermediate,
            attention_scale=self.pick.choice([0.2, 0.35]),
            input_norm=self.maybe(self.norm(sizes.hidden)),
            attention_out_norm=self.maybe(self.norm(sizes.hidden)),
            ffn_norm=self.norm(sizes.hidden),
            ffn_out_norm=self.maybe(self.norm(sizes.hidden)),
            q_norm=self.maybe(self.norm(sizes.head_dim)),
            k_norm=self.maybe(self.norm(sizes.head_dim)),
            window=self.pick.choice([0, 0, 5, 70]),
            attention_softcap=self.pick.choice([0.0, 0.0, 3.0]),
            rope=self.pick.randrange(-1, ropes),
            key_basis=self.basis(sizes.kv_heads, sizes.head_dim, sizes.head_dim),
        )


def random_decoder(
    seed: int,
    mode: str = "exact",
    dense: bool = True,
    sizes: Sizes | None = None,
    changed: bool = False,
    blocks: bool = False,
) -> Decoder:
    """A decoder with any combination of options. In mode "int8" all tiled weights are integers.

    changed: with bases of the residual stream and of keys, rotated and reordered inputs.
    blocks:  most weights have rows in several formats.
    """
    sizes = sizes or Sizes()
    draw = _Drawer(seed, mode, dense, changed, blocks)
    pairs = [sizes.head_dim // 2, sizes.head_dim // 4 + 1]
    ropes = tuple(
        (1000.0 ** (-torch.arange(count) / count), draw.pick.choice([1.0, 1.2])) for count in pairs
    )
    embedding = draw.linear(sizes.vocabulary, sizes.hidden)
    tied = draw.pick.random() < 0.5
    head = Linear(embedding.weight, mode=mode) if tied else None
    return Decoder(
        layers=tuple(draw.layer(sizes, len(ropes)) for _ in range(sizes.layers)),
        ropes=ropes,
        final_norm=draw.norm(sizes.hidden),
        embedding=embedding,
        head=head or draw.linear(sizes.vocabulary, sizes.hidden),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        norm_epsilon=1e-5,
        embedding_scale=draw.pick.choice([1.0, 3.0]),
        logit_scale=draw.pick.choice([1.0, 0.5]),
        logit_softcap=draw.pick.choice([0.0, 4.0]),
        activation=draw.pick.choice(["silu", "gelu_tanh"]),
        residual=draw.basis(sizes.hidden, sizes.hidden),
    )


def dense_weight(linear: Linear) -> Tensor:
    """float64 [N, K]."""
    if isinstance(linear.weight, Tensor):
        return linear.weight.double()
    if isinstance(linear.weight, TiledWeight):
        return dequantize(linear.weight.to_packed().to_quantized()).double()
    out = torch.full(linear.shape, math.nan, dtype=torch.float64)
    for block, rows in linear.blocks():
        out[rows] = dense_weight(block)
    return out


def as_read(linear: Linear, x: Tensor) -> Tensor:
    """The input of a linear, rotated and put in order."""
    if linear.rotation is not None:
        x = hadamard.rotate(x, linear.rotation.size)
    return x if linear.order is None else x[..., linear.order.long()]


def apply(linears: tuple[Linear, ...], x: Tensor) -> Tensor:
    """The outputs of all linears of one input, side by side."""
    outputs = []
    for linear in linears:
        y = as_read(linear, x) @ dense_weight(linear).T
        outputs.append(y if linear.bias is None else y + linear.bias)
    return torch.cat(outputs, dim=-1)


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """RMS norm; none without a weight."""
    if weight is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap); x when cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def rotate(x: Tensor, rope: tuple[Tensor, float]) -> Tensor:
    """Rotary embedding of [T, heads, head_dim] at positions 0..T-1; angles are float32 products."""
    frequencies, scaling = rope
    count = len(frequencies)
    angles = (torch.arange(len(x), dtype=torch.float32)[:, None] * frequencies).double()[:, None]
    cosine, sine = angles.cos() * scaling, angles.sin() * scaling
    a, b, rest = x[..., :count], x[..., count : 2 * count], x[..., 2 * count :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], dim=-1)


def attention(model: Decoder, layer: Layer, qkv: Tensor) -> Tensor:
    """[T, heads * head_dim] from the rows q, k, v of one sequence."""
    tokens, dim = len(qkv), model.head_dim
    heads = qkv.view(tokens, -1, dim)
    q, k, v = heads.split([model.heads, model.kv_heads, model.kv_heads], dim=1)
    q, k = norm(q, layer.q_norm, model.norm_epsilon), norm(k, layer.k_norm, model.norm_epsilon)
    if layer.rope >= 0:
        q, k = rotate(q, model.ropes[layer.rope]), rotate(k, model.ropes[layer.rope])
    share = model.heads // model.kv_heads
    if layer.key_basis is not None:
        basis = layer.key_basis.double()
        k = torch.einsum("tkd,kde->tke", k, basis)
        q = torch.einsum("thd,hde->the", q, basis.repeat_interleave(share, dim=0))
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.attention_scale
    scores = softcap(scores, layer.attention_softcap)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & ((distance < layer.window) if layer.window else True)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)


def forward(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, vocabulary] and hidden states [layers + 1, T, hidden] of one sequence, float64."""
    epsilon = model.norm_epsilon
    x = dense_weight(model.embedding)[tokens] * model.embedding_scale
    basis = torch.eye(model.hidden) if model.residual is None else model.residual
    x = x @ basis.double()
    states = [x]
    for layer in model.layers:
        mixed = attention(model, layer, apply(layer.qkv, norm(x, layer.input_norm, epsilon)))
        x = x + norm(apply((layer.o,), mixed), layer.attention_out_norm, epsilon)
        gate, up = apply(layer.gate_up, norm(x, layer.ffn_norm, epsilon)).chunk(2, dim=-1)
        if model.activation == "silu":
            gate = torch.nn.functional.silu(gate)
        else:
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
        x = x + norm(apply((layer.down,), gate * up), layer.ffn_out_norm, epsilon)
        states.append(x)
    x = norm(x @ basis.double().T, model.final_norm, epsilon)
    logits = apply((model.head,), x) * model.logit_scale
    return softcap(logits, model.logit_softcap), torch.stack(states)
