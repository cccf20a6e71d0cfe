"""A decoder described with tensors, and the same in the C structs of `src/engine.h`, which has the
formulas.

Tensors are not copied: `Description` keeps alive what the structs point to. Weights are never
written, so several engines may run over one decoder, each in a mode and with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.formats.weight_format import CHANNEL, Segment, WeightFormat
from quantlib.kernels.cpu import engine_structs as c
from quantlib.kernels.cpu.forms import BlockRotation, Form, form
from quantlib.kernels.kv_format import KvFormat, SideFormat, padded_columns
from quantlib.kernels.layouts import TiledWeight

_DENSE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_EXACT, _INT8, _ROUNDED = 0, 1, 2
"""QlInputMode."""
FAST = "fast"
"""As the schemes say where they round activations, else int8g128."""
MODES = {"exact": None, "int8": 0, "int8g128": 128, FAST: 128}
"""How activations are taken -> how many columns of a token share a scale: 0: all; None: they are
not rounded. Weights without an integer form (fp8, e3m2) stay exact with groups."""
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_EXACT_CACHE = KvFormat.parse("f32")


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """A matrix [N, K] whose rows are in several: those of `parts[i]`, [n, K], are its rows
    `rows[i]`, integers [n], ascending. Every row is in one of them."""

    parts: tuple[TiledWeight, ...]
    rows: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return sum(map(len, self.rows)), self.parts[0].shape[1]


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix [N, K], a bias, float32 [N], and what is done to its input x.

    weight:      tiled, in blocks of rows that are tiled, or a contiguous float32, float16 or
                 bfloat16 tensor.
    mode:        what its scheme asks for, a key of MODES, where `activations` says nothing; dense
                 ones are always exact.
    activations: how its scheme rounds x; none: as `mode` says.
    rotation:    of x, in every mode; before the order.
    order:       int32 [K]: column k of the weight meets x[order[k]], in every mode.
    """

    weight: TiledWeight | RowBlocks | Tensor
    bias: Tensor | None = None
    mode: str = "exact"
    activations: tuple[ActivationSegment, ...] = ()
    rotation: BlockRotation | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.weight.shape
        return rows, columns

    def blocks(self) -> Iterator[tuple[Linear, Tensor]]:
        """Of a weight in blocks of rows: each block as a linear, and its rows."""
        assert isinstance(self.weight, RowBlocks)
        for part, rows in zip(self.weight.parts, self.weight.rows, strict=True):
            bias = None if self.bias is None else self.bias[rows.long()]
            yield replace(self, weight=part, bias=bias), rows

    def rounds_itself(self, mode: str | None) -> bool:
        """Whether an engine's mode leaves x to the weight's scheme, and that rounds it."""
        return mode in (None, FAST) and bool(self.activations)

    def activations_in(self, mode: str | None) -> tuple[ActivationSegment, ...]:
        """How x is rounded in an engine's mode; None: as the weight's scheme says. Blocks of rows
        have each their own answer."""
        if not isinstance(self.weight, TiledWeight):
            return ()
        if self.rounds_itself(mode):
            return self.activations
        group = MODES[mode or self.mode]
        if group is None or (group and not self.weight.all_integer):
            return ()
        how = ActivationFormat(8, group=group)
        if not group:
            return (ActivationSegment(0, self.shape[1], how),)
        parts = self.weight.segments  # groups begin anew with each
        return tuple(ActivationSegment(part.start, part.length, how) for part in parts)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer; norms are float32 vectors, None where the model has none. See QlLayer.

    key_basis:  float32 [kv_heads, d, d]: q and k of a KV head are multiplied by it after the rope.
    query_bits: q is rounded to so many bits, in every mode; 0: it is not.
    cache:      how keys and values are kept unless an engine is told otherwise.
    """

    qkv: tuple[Linear, ...]
    o: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    intermediate: int
    attention_scale: float
    input_norm: Tensor | None = None
    attention_out_norm: Tensor | None = None
    ffn_norm: Tensor | None = None
    ffn_out_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0
    attention_softcap: float = 0.0
    rope: int = 0
    key_basis: Tensor | None = None
    query_bits: int = 0
    cache: KvFormat = _EXACT_CACHE


@dataclass(frozen=True, eq=False)
class Decoder:
    """A whole model. See QlModel.

    ropes:    inverse frequencies (float32) and scaling of each.
    residual: float32 [hidden, hidden]: what the embedding gives is multiplied by it, and what goes
              to the final norm by its transpose: the residual stream's basis.
    """

    layers: tuple[Layer, ...]
    ropes: tuple[tuple[Tensor, float], ...]
    final_norm: Tensor | None
    embedding: Linear
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    activation: str = "silu"
    residual: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embedding.shape[0]

    @property
    def hidden(self) -> int:
        """Size of a token's vector."""
        return self.embedding.shape[1]


class Description:
    """A decoder as C structs: `model`, and what it points to.

    mode:              a key of MODES for all tiled weights; None: each weight's own.
    kv:                how all layers keep keys and values; None: each layer's own way.
    integer_attention: see src/attention.h.
    Raises FormatError when the kernels cannot do to an input what a linear asks for.
    """

    def __init__(
        self,
        decoder: Decoder,
        sequences: int,
        capacity: int,
        mode: str | None,
        kv: KvFormat | None,
        integer_attention: bool,
    ) -> None:
        self._mode, self._kv = mode, kv
        self._forms: dict[tuple[object, ...], Form] = {}
        self._held: list[object] = [decoder]
        layers = (c.Layer * len(decoder.layers))(*map(self._layer, decoder.layers))
        ropes = (c.Rope * len(decoder.ropes))(
            *(
                c.Rope(frequencies.data_ptr(), len(frequencies), scaling)
                for frequencies, scaling in decoder.ropes
            )
        )
        self.model = c.Model(
            layers=layers,
            ropes=ropes,
            final_norm=_pointer(decoder.final_norm),
            embedding=self._linears([decoder.embedding], _weight),
            head=self._linears([decoder.head]),
            layer_count=len(layers),
            rope_count=len(ropes),
            vocabulary=decoder.vocabulary,
            hidden=decoder.hidden,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            sequences=sequences,
            capacity=capacity,
            embedding_scale=decoder.embedding_scale,
            norm_epsilon=decoder.norm_epsilon,
            logit_scale=decoder.logit_scale,
            logit_softcap=decoder.logit_softcap,
            activation=_ACTIVATIONS[decoder.activation],
            integer_attention=integer_attention,
        )
        if decoder.residual is not None:  # y = x @ U is a linear with the weight U^T
            self.model.enter = self._linears([Linear(decoder.residual.T.contiguous())])
            self.model.leave = self._linears([Linear(decoder.residual.contiguous())])

    def _layer(self, layer: Layer) -> c.Layer:
        cache = layer.cache if self._kv is None else self._kv
        return c.Layer(
            input_norm=_pointer(layer.input_norm),
            attention_out_norm=_pointer(layer.attention_out_norm),
            ffn_norm=_pointer(layer.ffn_norm),
            ffn_out_norm=_pointer(layer.ffn_out_norm),
            q_norm=_pointer(layer.q_norm),
            k_norm=_pointer(layer.k_norm),
            key_basis=self._basis(layer.key_basis),
            qkv=self._linears(layer.qkv),
            o=self._linears([layer.o]),
            gate_up=self._linears(layer.gate_up),
            down=self._linears([layer.down]),
            intermediate=layer.intermediate,
            window=layer.window,
            attention_scale=layer.attention_scale,
            attention_softcap=layer.attention_softcap,
            rope=layer.rope,
            query_bits=layer.query_bits,
            key=_kv_side(cache.key),
            value=_kv_side(cache.value),
            sinks=cache.sinks,
        )

    def _basis(self, basis: Tensor | None) -> int | None:
        """[kv_heads, d, d] with columns padded to whole vectors."""
        if basis is None:
            return None
        size = basis.shape[-1]
        padded = torch.nn.functional.pad(basis.float(), (0, padded_columns(size) - size))
        self._held.append(padded := padded.contiguous())
        return padded.data_ptr()

    def _linears(
        self, linears: Sequence[Linear], describe: Callable[[Linear], c.Linear] | None = None
    ) -> c.Linears:
        """Linears that read one input; of a weight in blocks of rows, each block is one."""
        describe = describe or self._linear
        described: list[c.Linear] = []
        first_row = 0
        for linear in linears:
            if isinstance(linear.weight, RowBlocks):
                for block, rows in linear.blocks():
                    places = (rows + first_row).to(torch.int32).contiguous()
                    described.append(describe(block))
                    described[-1].places = places.data_ptr()
                    self._held += [block, places]
            else:
                described.append(describe(linear))
            first_row += linear.shape[0]
        array = (c.Linear * len(described))(*described)
        self._held.append(array)
        return c.Linears(array, len(array))

    def _linear(self, linear: Linear) -> c.Linear:
        described = _weight(linear)
        self._held.append(linear)
        activations = linear.activations_in(self._mode)
        if activations and isinstance(linear.weight, TiledWeight):
            described.mode = _INT8 if linear.weight.all_integer else _ROUNDED
        own = linear.rounds_itself(self._mode)
        if not own and linear.rotation is None and linear.order is None:
            described.act_group = activations[0].format.group if activations else 0
        else:
            described.form = self._form(linear, activations).address
        return described

    def _form(self, linear: Linear, activations: tuple[ActivationSegment, ...]) -> Form:
        """Linears with the same form share it, and with it the engine's work on their input."""
        if isinstance(linear.weight, TiledWeight):
            segments = linear.weight.segments
        else:
            segments = (Segment(0, linear.shape[1], WeightFormat("int8", CHANNEL)),)
        spans = tuple((part.start, part.length) for part in segments)
        order = None if linear.order is None else linear.order.numpy().tobytes()
        key = (spans, activations, id(linear.rotation), order)
        if key not in self._forms:
            self._forms[key] = form(segments, activations, linear.rotation, linear.order)
        return self._forms[key]


def _weight(linear: Linear) -> c.Linear:
    """A linear of one matrix, without anything done to its input."""
    rows, columns = linear.shape
    described = c.Linear(bias=_pointer(linear.bias), rows=rows, columns=columns, mode=_EXACT)
    if isinstance(linear.weight, Tensor):
        described.dense = linear.weight.data_ptr()
        described.dense_type = _DENSE_TYPES[linear.weight.dtype]
    elif isinstance(linear.weight, TiledWeight):
        described.tiled = linear.weight.address
    return described


def _kv_side(side: SideFormat) -> c.KvFormat:
    return c.KvFormat(side.bits, side.wide, side.group, side.rotate)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
