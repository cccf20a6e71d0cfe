"""The weights of the native engine, straight from a packed checkpoint's files.

`plan` names, from headers alone, every tensor the engine needs and checks its shape; `read_decoder`
then reads one matrix after the other: its packed tensors on a memory map, rearranged into tiles,
and the map's pages given back at once. So the memory of a loaded model is its tiles, which are as
large as the file, and never the file and the tiles together.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from quantlib.checkpoint.reader import PackedCheckpoint
from quantlib.errors import CheckpointError, FormatError
from quantlib.formats.composite import BLOCK, Part, parts_of, rows_of_blocks, unpack_block
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import packed_layout
from quantlib.kernels.cpu.engine_library import Decoder, Layer, Linear, RowBlocks
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.layouts import TiledWeight, tile
from quantlib.kernels.packed import PackedWeight
from quantlib.models.headers import TORCH_DTYPES, TensorHeader
from quantlib.runtime.engine_changes import NO_CHANGES, Changes, block_name, read_changes
from quantlib.runtime.engine_spec import QKV, EngineSpec

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_DENSE = (torch.float32, torch.float16, torch.bfloat16)
"""What the engine multiplies as it is stored."""
_EXACT_CACHE = KvFormat.parse("f32")
_READ_AHEAD = 8 << 20
"""Bytes that are asked for at once."""


@dataclass(frozen=True)
class Plan:
    """What the engine needs of a checkpoint: name -> shape of matrices and of vectors."""

    matrices: dict[str, tuple[int, int]]
    vectors: dict[str, int]
    head: str

    @property
    def names(self) -> list[str]:
        """Everything, by the checkpoint's names."""
        return [*self.matrices, *self.vectors]


def make_plan(checkpoint: PackedCheckpoint, spec: EngineSpec) -> Plan | None:
    """What the engine needs, all of it found; None if the checkpoint uses names of another kind.

    Raises CheckpointError when one is missing, or has another shape than config.json calls for.
    """
    if not _has(checkpoint, EMBEDDING):
        return None
    # As in transformers, a head of its own is used even if the configuration calls heads tied.
    plan = plan_of(spec, own_head=not spec.tied or _has(checkpoint, HEAD))
    _check(checkpoint, plan)
    return plan


def plan_of(spec: EngineSpec, own_head: bool) -> Plan:
    """What the engine needs of a model of these sizes, whose head is the embedding's weight or its
    own."""
    head = HEAD if own_head else EMBEDDING
    matrices = dict.fromkeys((EMBEDDING, head), (spec.vocabulary, spec.hidden))
    vectors = {FINAL_NORM: spec.hidden}
    for index in range(len(spec.layers)):
        prefix = layer_prefix(index)
        shapes = _linear_shapes(spec)
        matrices |= {f"{prefix}{module}.weight": shape for module, shape in shapes.items()}
        vectors |= {
            f"{prefix}{module}.bias": shape[0]
            for module, shape in shapes.items()
            if module.rpartition(".")[2] in spec.biased
        }
        vectors |= {f"{prefix}{norm}.weight": size for norm, size in _norm_sizes(spec).items()}
    return Plan(matrices, vectors, head)


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"{block_name(index)}."


def _linear_shapes(spec: EngineSpec) -> dict[str, tuple[int, int]]:
    """Module of a layer -> [N, K]."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.family.fused:
        inputs = {
            "self_attn.qkv_proj": queries + 2 * keys,
            "mlp.gate_up_proj": 2 * spec.intermediate,
        }
    else:
        inputs = {f"self_attn.{name}": size for name, size in zip(QKV, (queries, keys, keys))}
        inputs |= {f"mlp.{name}": spec.intermediate for name in ("gate_proj", "up_proj")}
    return {name: (size, spec.hidden) for name, size in inputs.items()} | {
        "self_attn.o_proj": (spec.hidden, queries),
        "mlp.down_proj": (spec.hidden, spec.intermediate),
    }


def _norm_sizes(spec: EngineSpec) -> dict[str, int]:
    """Norm of a layer -> its size."""
    names = ["input_layernorm", "post_attention_layernorm"]
    if spec.family.output_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    heads = ("self_attn.q_norm", "self_attn.k_norm") if spec.family.head_norms else ()
    return dict.fromkeys(names, spec.hidden) | dict.fromkeys(heads, spec.head_dim)


def _has(checkpoint: PackedCheckpoint, name: str) -> bool:
    return name in checkpoint.schemes or name in checkpoint.headers


def _shape(checkpoint: PackedCheckpoint, name: str) -> tuple[int, ...]:
    return checkpoint.shapes[name] if name in checkpoint.shapes else checkpoint.headers[name].shape


def _check(checkpoint: PackedCheckpoint, plan: Plan) -> None:
    absent = [name for name in plan.names if not _has(checkpoint, name)]
    if absent:
        raise CheckpointError(
            f"{checkpoint.path} lacks {absent[0]} ({len(absent)} parameters in all): make the "
            "checkpoint again"
        )
    shapes: dict[str, tuple[int, ...]] = dict(plan.matrices)
    shapes |= {name: (size,) for name, size in plan.vectors.items()}
    for name, shape in shapes.items():
        if _shape(checkpoint, name) != shape:
            raise CheckpointError(
                f"{name} is {list(_shape(checkpoint, name))} in {checkpoint.path} and "
                f"{list(shape)} by its config.json: they do not belong together"
            )


def read_decoder(checkpoint: PackedCheckpoint, spec: EngineSpec, plan: Plan) -> Decoder:
    """Read and rearrange all weights; nothing of the files stays mapped.

    Raises CheckpointError when what is around the weights belongs to another model.
    """
    changes = read_changes(checkpoint, spec)
    return assemble(_Reader(checkpoint, spec.family.unit_norms), spec, plan, changes)


class Parts(Protocol):
    """Where a decoder's matrices and norms come from, by the checkpoint's names."""

    def linear(self, name: str, bias: str | None = None) -> Linear: ...

    def norm(self, name: str) -> Tensor: ...


def assemble(reader: Parts, spec: EngineSpec, plan: Plan, changes: Changes = NO_CHANGES) -> Decoder:
    """The decoder of `plan`, from parts that `reader` gives."""
    embedding = reader.linear(EMBEDDING)
    return Decoder(
        layers=tuple(
            _read_layer(reader, spec, plan, changes, index) for index in range(len(spec.layers))
        ),
        ropes=tuple((rope.inverse_frequencies, rope.scaling) for rope in spec.ropes),
        final_norm=reader.norm(FINAL_NORM),
        embedding=embedding,
        head=embedding if plan.head == EMBEDDING else reader.linear(plan.head),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        norm_epsilon=spec.norm_epsilon,
        embedding_scale=spec.embedding_scale,
        logit_softcap=spec.logit_softcap,
        activation=spec.activation,
        residual=changes.residual,
    )


def _read_layer(reader: Parts, spec: EngineSpec, plan: Plan, changes: Changes, index: int) -> Layer:
    prefix, family, layer = layer_prefix(index), spec.family, spec.layers[index]

    def linear(module: str) -> Linear:
        bias = f"{prefix}{module}.bias"
        return reader.linear(f"{prefix}{module}.weight", bias if bias in plan.vectors else None)

    def norm(module: str) -> Tensor:
        return reader.norm(f"{prefix}{module}.weight")

    after_attention = norm("post_attention_layernorm")
    qkv = ("qkv_proj",) if family.fused else QKV
    gate_up = ("gate_up_proj",) if family.fused else ("gate_proj", "up_proj")
    return Layer(
        qkv=tuple(linear(f"self_attn.{name}") for name in qkv),
        o=linear("self_attn.o_proj"),
        gate_up=tuple(linear(f"mlp.{name}") for name in gate_up),
        down=replace(linear("mlp.down_proj"), rotation=changes.hidden.get(index)),
        intermediate=spec.intermediate,
        attention_scale=spec.attention_scale,
        input_norm=norm("input_layernorm"),
        attention_out_norm=after_attention if family.output_norms else None,
        ffn_norm=norm("pre_feedforward_layernorm") if family.output_norms else after_attention,
        ffn_out_norm=norm("post_feedforward_layernorm") if family.output_norms else None,
        q_norm=norm("self_attn.q_norm") if family.head_norms else None,
        k_norm=norm("self_attn.k_norm") if family.head_norms else None,
        window=layer.window,
        attention_softcap=spec.attention_softcap,
        rope=layer.rope,
        key_basis=changes.key_bases.get(index),
        query_bits=changes.query_bits.get(index, 0),
        cache=changes.caches.get(index, _EXACT_CACHE),
    )


class _Reader:
    """Tensors of a checkpoint in the engine's form. Every file is mapped once, while this lives."""

    def __init__(self, checkpoint: PackedCheckpoint, unit_norms: bool) -> None:
        self._checkpoint, self._unit_norms = checkpoint, unit_norms
        self._files: dict[str, _MappedFile] = {}

    def norm(self, name: str) -> Tensor:
        """What a norm multiplies by: float32 [size]."""
        weight = self._vector(name)
        return 1.0 + weight if self._unit_norms else weight

    def linear(self, name: str, bias: str | None = None) -> Linear:
        """A matrix and its bias: tiled if it is packed, else in its stored type."""
        vector = None if bias is None else self._vector(bias)
        scheme = self._checkpoint.schemes.get(name)
        if scheme is None or scheme.weight is None:
            dense = self._take(name)
            return Linear(dense if dense.dtype in _DENSE else dense.to(torch.float32), vector)
        order = self._checkpoint.order(name)
        return Linear(
            self._packed(name, scheme),
            vector,
            activations=self._checkpoint.activations(name),
            order=None if order is None else order.clone(),
        )

    def _packed(self, name: str, scheme: Scheme) -> TiledWeight | RowBlocks:
        """A weight of one matrix, or of blocks of rows. Raises CheckpointError where the blocks of
        its rows are damaged."""
        rows, columns = self._checkpoint.shapes[name]
        parts = parts_of(scheme, (rows, columns))
        tiled = [self._tiled(name + suffix, part) for suffix, part in parts.items()]
        if not scheme.rows:
            return tiled[0]
        try:
            block = unpack_block(self._take(name + BLOCK), scheme, rows)
        except FormatError as error:
            raise CheckpointError(f"{name} in {self._checkpoint.path}: {error}") from error
        return RowBlocks(tuple(tiled), tuple(rows_of_blocks(block, rows)))

    def _tiled(self, name: str, part: Part) -> TiledWeight:
        """One packed matrix."""
        suffixes = packed_layout(part.shape, part.segments)
        tensors = {suffix: self._mapped(name + suffix) for suffix in suffixes}
        tiled = tile(PackedWeight.from_tensors(tensors, part.shape, part.segments))
        for suffix in suffixes:
            self._release(name + suffix)
        return tiled

    def _vector(self, name: str) -> Tensor:
        return self._take(name).to(torch.float32)

    def _take(self, name: str) -> Tensor:
        """A copy in memory of our own: a file that is later cut off must not end the process."""
        tensor = self._mapped(name).clone()
        self._release(name)
        return tensor

    def _mapped(self, name: str) -> Tensor:
        return self._file(name).tensor(self._checkpoint.headers[name])

    def _release(self, name: str) -> None:
        self._file(name).release(self._checkpoint.headers[name])

    def _file(self, name: str) -> _MappedFile:
        file = self._checkpoint.headers[name].file
        if file not in self._files:
            self._files[file] = _MappedFile(self._checkpoint.path / file)
        return self._files[file]


def _read_ahead(path: Path) -> None:
    """Have the system bring a file into memory, as far as it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        for start in range(0, os.fstat(file.fileno()).st_size, _READ_AHEAD):
            os.posix_fadvise(file.fileno(), start, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


class _MappedFile:
    """A file on a private memory map, whose pages can be given back one tensor at a time.

    A thread has the system read the file while weights are rearranged: page faults alone would wait
    for the disk and the processors in turn.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be mapped into memory: {error}") from error
        Thread(target=_read_ahead, args=(path,), daemon=True).start()

    def tensor(self, header: TensorHeader) -> Tensor:
        """The tensor on the map; it keeps the map alive and is not to be written."""
        dtype = TORCH_DTYPES[header.dtype]
        if not header.nbytes:
            return torch.empty(header.shape, dtype=dtype)
        count = header.nbytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=header.start).view(
            header.shape
        )

    def release(self, header: TensorHeader) -> None:
        """Give the pages of a tensor back. They were only read: a use after this reads the file."""
        start = header.start - header.start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, header.start + header.nbytes - start)
