"""The native decoder from Python: a model described with tensors, and steps of it.

`Decoder` mirrors the structs of `src/engine.h`, which has the formulas and the rules of a step. Its
tensors are not copied: a NativeEngine keeps the description alive as long as it lives. Several
engines may run over one description (another KV cache, another mode): weights are never written.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, UsageError
from quantlib.kernels.cpu.library import ISAS, Library, row_out_of_range
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.kernels.layouts import TiledWeight

_NO_MEMORY, _NO_SUCH_ISA = 1, 2
_BAD_TOKEN, _BAD_SEQUENCE, _FULL, _BAD_STEP = 17, 18, 19, 20
"""QlEngineStatus; 0 is success. Those of a bad model come with a text of the library's."""
_DENSE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_EXACT, _INT8, _ROUNDED = 0, 1, 2
"""QlInputMode."""
MODES = {"exact": None, "int8": 0, "int8g128": 128}
"""How activations are taken -> how many columns of a token share a scale: 0: all; None: they are
not rounded. Weights without an integer form (fp8, e3m2) stay exact with groups."""
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix [N, K] and a bias, float32 [N].

    weight: tiled, or a contiguous float32, float16 or bfloat16 tensor.
    mode:   what its scheme asks for, a key of MODES; dense ones are always exact.
    """

    weight: TiledWeight | Tensor
    bias: Tensor | None = None
    mode: str = "exact"

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer; norms are float32 vectors, None where the model has none. See QlLayer."""

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


@dataclass(frozen=True, eq=False)
class Decoder:
    """A whole model. `ropes`: inverse frequencies (float32) and scaling of each. See QlModel."""

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

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embedding.shape[0]

    @property
    def hidden(self) -> int:
        """Size of a token's vector."""
        return self.embedding.shape[1]


class _KvFormat(ctypes.Structure):
    """ql::KvFormat of src/kv_cache.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rotate", ctypes.c_int32),
    )


class _Linear(ctypes.Structure):
    """QlLinear of src/engine.h."""

    _fields_ = (
        ("tiled", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("act_group", ctypes.c_int64),
        ("dense_type", ctypes.c_int32),
        ("mode", ctypes.c_int32),
    )


class _Rope(ctypes.Structure):
    """QlRope."""

    _fields_ = (
        ("inverse_frequencies", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    """QlLayer."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("attention_out_norm", ctypes.c_void_p),
        ("ffn_norm", ctypes.c_void_p),
        ("ffn_out_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", ctypes.POINTER(_Linear)),
        ("gate_up", ctypes.POINTER(_Linear)),
        ("qkv_count", ctypes.c_int64),
        ("gate_up_count", ctypes.c_int64),
        ("o", _Linear),
        ("down", _Linear),
        ("intermediate", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("attention_scale", ctypes.c_float),
        ("attention_softcap", ctypes.c_float),
        ("rope", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    """QlModel."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("ropes", ctypes.POINTER(_Rope)),
        ("final_norm", ctypes.c_void_p),
        ("embedding", _Linear),
        ("head", _Linear),
        ("layer_count", ctypes.c_int64),
        ("rope_count", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("embedding_scale", ctypes.c_float),
        ("norm_epsilon", ctypes.c_float),
        ("logit_scale", ctypes.c_float),
        ("logit_softcap", ctypes.c_float),
        ("key", _KvFormat),
        ("value", _KvFormat),
        ("activation", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """QlStep."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("hidden_states", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("wanted_count", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


_STRUCTS = (_Linear, _Rope, _Layer, _Model, _Step)


class NativeEngine:
    """A decoder with the KV caches of `sequences` texts of at most `capacity` tokens each."""

    def __init__(
        self,
        library: Library,
        decoder: Decoder,
        sequences: int,
        capacity: int,
        kv: KvFormat,
        mode: str | None = None,
        isa: str = "best",
    ) -> None:
        """`mode`: a key of MODES for all tiled weights; None: each weight's own.

        Raises QuantlibError when the library refuses the model (its text says why) or has no memory
        for the caches, and UsageError when the processor has no such instruction set.
        """
        self._c = _declared(library)
        self._decoder = decoder
        self.vocabulary = decoder.vocabulary
        self.sequences, self.capacity = sequences, capacity
        self._model = model = _model(decoder, sequences, capacity, mode, kv)
        handle = ctypes.c_void_p()
        status = self._c.ql_engine_create(
            ctypes.byref(model), ISAS.index(isa), ctypes.byref(handle)
        )
        if status == _NO_SUCH_ISA:
            raise UsageError(f"this processor has no {isa}: leave the instruction set to 'best'")
        if status == _NO_MEMORY:
            raise QuantlibError(
                f"no memory for the keys and values of {sequences} x {capacity} tokens: ask for "
                "fewer tokens, or a smaller cache (kv='int8')"
            )
        if status:
            reason = self._c.ql_engine_problem().decode()
            raise QuantlibError(
                f"the native engine refuses this model ({reason}): use engine='plain', and please "
                "report it"
            )
        self._handle = handle
        # The interpreter may be gone when an engine dies with it; a finalizer runs before that.
        self._finalizer = weakref.finalize(self, self._c.ql_engine_destroy, handle)

    def step(
        self,
        tokens: Tensor,
        sequences: Tensor,
        wanted: Tensor,
        threads: int,
        logits: Tensor | None = None,
        best: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> None:
        """Append tokens: int32 [count] each, those of a sequence side by side; see QlStep.

        wanted: int64 [w], rows whose `logits` (float32 [w, vocabulary]) or `best` token (int32 [w])
        are written. hidden_states: float32 [layers + 1, count, hidden], or None. All are contiguous
        and in main memory: callers see to that.
        Raises DataError for a token outside the vocabulary and UsageError for a text that is too
        long; nothing is appended then.
        """
        step = _Step(
            tokens=tokens.data_ptr(),
            sequences=sequences.data_ptr(),
            wanted=wanted.data_ptr(),
            logits=_pointer(logits),
            best=_pointer(best),
            hidden_states=_pointer(hidden_states),
            count=len(tokens),
            wanted_count=len(wanted),
            threads=threads,
        )
        self._check(self._c.ql_engine_step(self._handle, ctypes.byref(step)))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence so far."""
        length: int = self._c.ql_engine_length(self._handle, sequence)
        self._check(_BAD_SEQUENCE if length < 0 else 0)
        return length

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from position `length` on."""
        self._check(self._c.ql_engine_truncate(self._handle, sequence, length))

    def copy(self, source: int, target: int) -> None:
        """Give the sequence `target` the tokens of `source`."""
        self._check(self._c.ql_engine_copy(self._handle, source, target))

    @property
    def memory(self) -> int:
        """Bytes of the caches and of the work space."""
        size: int = self._c.ql_engine_memory(self._handle)
        return size

    def _check(self, status: int) -> None:
        """Raise the sentence that belongs to a QlEngineStatus."""
        if status == _BAD_TOKEN:
            raise row_out_of_range(self.vocabulary)
        if status == _FULL:
            raise UsageError(
                f"a text would be longer than the {self.capacity} tokens that the engine was made "
                "for: make it with a larger capacity"
            )
        if status == _BAD_SEQUENCE:
            raise UsageError(
                f"the engine has sequences 0..{self.sequences - 1}, each as long as it was made, "
                "and takes the tokens of one side by side"
            )
        if status == _BAD_STEP:
            raise UsageError("a step needs tokens, and wants rows of its own")
        if status == _NO_MEMORY:
            raise QuantlibError("not enough memory for the engine's work space: use shorter steps")
        if status:
            raise QuantlibError(f"the native engine failed with status {status}: please report it")


def _declared(library: Library) -> Any:
    """The library's engine functions with their types. Raises OSError when its structs differ."""
    c = library.functions
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    sizes = (int64 * len(_STRUCTS))()
    c.ql_engine_struct_bytes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in _STRUCTS]:
        raise OSError("the compiled kernels have another interface than this version of quantlib")
    c.ql_engine_create.argtypes = [ctypes.POINTER(_Model), int32, ctypes.POINTER(pointer)]
    c.ql_engine_destroy.argtypes, c.ql_engine_destroy.restype = [pointer], None
    c.ql_engine_problem.argtypes, c.ql_engine_problem.restype = [], ctypes.c_char_p
    c.ql_engine_step.argtypes = [pointer, ctypes.POINTER(_Step)]
    c.ql_engine_length.argtypes, c.ql_engine_length.restype = [pointer, int32], int64
    c.ql_engine_truncate.argtypes = [pointer, int32, int64]
    c.ql_engine_copy.argtypes = [pointer, int32, int32]
    c.ql_engine_memory.argtypes, c.ql_engine_memory.restype = [pointer], int64
    return c


def _model(
    decoder: Decoder,
    sequences: int,
    capacity: int,
    mode: str | None,
    kv: KvFormat,
) -> _Model:
    layers = (_Layer * len(decoder.layers))(*(_layer(layer, mode) for layer in decoder.layers))
    ropes = (_Rope * len(decoder.ropes))(
        *(
            _Rope(frequencies.data_ptr(), len(frequencies), scaling)
            for frequencies, scaling in decoder.ropes
        )
    )
    return _Model(
        layers=layers,
        ropes=ropes,
        final_norm=_pointer(decoder.final_norm),
        embedding=_linear(decoder.embedding, "exact"),
        head=_linear(decoder.head, mode),
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
        key=_kv_side(kv.key),
        value=_kv_side(kv.value),
        activation=_ACTIVATIONS[decoder.activation],
    )


def _layer(layer: Layer, mode: str | None) -> _Layer:
    return _Layer(
        input_norm=_pointer(layer.input_norm),
        attention_out_norm=_pointer(layer.attention_out_norm),
        ffn_norm=_pointer(layer.ffn_norm),
        ffn_out_norm=_pointer(layer.ffn_out_norm),
        q_norm=_pointer(layer.q_norm),
        k_norm=_pointer(layer.k_norm),
        qkv=_linears(layer.qkv, mode),
        gate_up=_linears(layer.gate_up, mode),
        qkv_count=len(layer.qkv),
        gate_up_count=len(layer.gate_up),
        o=_linear(layer.o, mode),
        down=_linear(layer.down, mode),
        intermediate=layer.intermediate,
        window=layer.window,
        attention_scale=layer.attention_scale,
        attention_softcap=layer.attention_softcap,
        rope=layer.rope,
    )


def _linears(linears: Sequence[Linear], mode: str | None) -> ctypes.Array[_Linear]:
    return (_Linear * len(linears))(*(_linear(linear, mode) for linear in linears))


def _linear(linear: Linear, mode: str | None) -> _Linear:
    rows, columns = linear.shape
    described = _Linear(bias=_pointer(linear.bias), rows=rows, columns=columns, mode=_EXACT)
    if isinstance(linear.weight, Tensor):
        described.dense = linear.weight.data_ptr()
        described.dense_type = _DENSE_TYPES[linear.weight.dtype]
        return described
    described.tiled = linear.weight.address
    act_group = MODES[mode or linear.mode]
    if act_group is not None and linear.weight.all_integer:
        described.mode, described.act_group = _INT8, act_group
    elif act_group == 0:  # rounding inputs that are multiplied as floats saves no time
        described.mode = _ROUNDED
    return described


def _kv_side(side: SideFormat) -> _KvFormat:
    return _KvFormat(side.bits, side.wide, side.group, side.rotate)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
