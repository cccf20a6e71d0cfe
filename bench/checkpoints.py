"""Models that a benchmark of speed builds for itself: Llama's shapes with random weights, as a
source folder and as packed checkpoints, and a real model rounded to nearest, uncalibrated.

How fast a checkpoint runs depends on its shapes and schemes and not on its numbers, so none of
these says anything of quality.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.random_weights import random_tensors
from quantlib.checkpoint.disk import atomic_write, json_bytes
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.checkpoint.tensorfile import LazyTensor, atomic_save_tensors
from quantlib.checkpoint.writer import CONFIG_FILE, METADATA, source_files, write_checkpoint
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import ORDER, pack, packed_layout
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.headers import TORCH_DTYPES
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import SINGLE_FILE, Source
from quantlib.transforms.rotation import Rotation

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SPREAD = 0.02
"""Standard deviation of random weights, as Llama models are initialized."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama decoder."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def weights(self) -> dict[str, tuple[int, int]]:
        """Name -> [N, K] of every matrix."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        found = {EMBEDDING: (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}.weight": form for name, form in inner.items()}
        return found if self.tied else found | {HEAD: (self.vocabulary, self.hidden)}

    def norms(self) -> list[str]:
        """Names of the vectors [hidden]."""
        kinds = ("input_layernorm", "post_attention_layernorm")
        inner = [f"model.layers.{i}.{kind}.weight" for i in range(self.layers) for kind in kinds]
        return [*inner, "model.norm.weight"]

    def config(self) -> dict[str, Any]:
        """config.json of transformers."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SMOLLM2 = LlamaShape("SmolLM2-135M shape", 30, 576, 1536, 9, 3, 64, 49152, tied=True)
LLAMA_1B = LlamaShape("Llama-3.2-1B shape", 16, 2048, 8192, 32, 8, 64, 128256, tied=True)
LLAMA_8B = LlamaShape("Llama-3.1-8B shape", 32, 4096, 14336, 32, 8, 128, 128256, tied=False)


@dataclass(frozen=True)
class Schemes:
    """One scheme for all linears, one for embedding and head."""

    linear: str
    embedding: str

    def of(self, name: str) -> str:
        return self.embedding if name in (EMBEDDING, HEAD) else self.linear


@dataclass(frozen=True)
class PlannedSchemes:
    """The schemes of another model's plan: every layer takes those of the layer at its own depth.

    name: of the plan. planned: weight -> scheme. layers: of the planned model, and of the one that
    takes its schemes.
    """

    name: str
    planned: Mapping[str, str]
    layers: tuple[int, int]

    @staticmethod
    def load(name: str, layers: int) -> PlannedSchemes:
        """The plan `name` of the folder `plans`, for a model of so many layers."""
        path = Path(__file__).with_name("plans") / f"{name}.json"
        planned: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["schemes"]
        theirs = 1 + max(int(found[1]) for found in map(_LAYER.search, planned) if found)
        return PlannedSchemes(name, planned, (theirs, layers))

    def of(self, name: str) -> str:
        theirs, ours = self.layers

        def same_depth(found: re.Match[str]) -> str:
            return f".layers.{(2 * int(found[1]) + 1) * theirs // (2 * ours)}."

        return self.planned[_LAYER.sub(same_depth, name)]


AnySchemes = Schemes | PlannedSchemes


def write_source(shape: LlamaShape, folder: Path, tokenizer: Path) -> Path:
    """A folder of random bfloat16 weights; the tokenizer files are those of the folder `tokenizer`,
    whose vocabulary may be smaller."""
    generator = torch.Generator().manual_seed(0)

    def matrix(form: tuple[int, int]) -> Tensor:
        return (torch.randn(form, generator=generator) * _SPREAD).bfloat16()

    folder.mkdir(parents=True)
    tensors = {
        name: LazyTensor(torch.bfloat16, form, partial(matrix, form))
        for name, form in shape.weights().items()
    }
    tensors |= {name: _ones(shape.hidden) for name in shape.norms()}
    atomic_save_tensors(folder / SINGLE_FILE, tensors, METADATA)
    atomic_write(folder / CONFIG_FILE, json_bytes(shape.config()))
    for name, path in source_files(tokenizer).items():
        if name.startswith(("tokenizer", "special_tokens", "chat_template")):
            atomic_write(folder / name, path.read_bytes())
    return folder


def pack_rounded(source: Path, out: Path, schemes: AnySchemes) -> Path:
    """A packed checkpoint of a source folder, every weight rounded to nearest. All of it is in
    memory at once."""
    opened = Source.open(source)
    model_map = ModelMap.from_source(opened)
    tensors: dict[str, Tensor | LazyTensor] = {}
    chosen = {weight.name: schemes.of(weight.name) for weight in model_map.weights}
    for name, scheme in chosen.items():
        weight = opened.read(name).float()
        packed = pack(quantize_rtn(weight, Scheme.parse(scheme).segments(weight.shape[1])))
        tensors |= {name + suffix: tensor for suffix, tensor in packed.items()}
    for row in model_map.kept:
        read = partial(opened.read, row.name)
        tensors[row.name] = LazyTensor(TORCH_DTYPES[row.dtype], row.shape, read)
    shapes = {weight.name: weight.shape for weight in model_map.weights}
    files = source_files(source)
    return write_checkpoint(
        out, tensors, opened.config, chosen, shapes, files=files, overwrite=True
    )


@dataclass(frozen=True)
class Around:
    """What a packed checkpoint asks for besides its weights.

    orders: weight -> the order int32 [K] of its inputs. kv: the format of its KV cache.
    """

    rotation: Rotation | None = None
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    kv: KvFormat | None = None

    def caches(self, layers: int) -> dict[str, CacheSettings]:
        """Attention module -> its cache."""
        names = [f"model.layers.{layer}.self_attn" for layer in range(layers)]
        return {} if self.kv is None else dict.fromkeys(names, CacheSettings(self.kv))


PLAIN = Around()


def pack_random(shape: LlamaShape, out: Path, schemes: AnySchemes, around: Around = PLAIN) -> Path:
    """A packed checkpoint of random codes, written one tensor at a time; it has no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor | LazyTensor] = {}
    chosen = {name: schemes.of(name) for name in shape.weights()}
    for name, form in shape.weights().items():
        segments = Scheme.parse(chosen[name]).segments(form[1])
        for suffix, (dtype, stored) in packed_layout(form, segments).items():
            make = partial(_one_of, suffix, partial(random_tensors, form, segments, generator))
            tensors[name + suffix] = LazyTensor(dtype, stored, make)
    tensors |= {name: _ones(shape.hidden) for name in shape.norms()}
    tensors |= {name + ORDER: order for name, order in around.orders.items()}
    return write_checkpoint(
        out,
        tensors,
        shape.config(),
        chosen,
        shape.weights(),
        rotation=around.rotation,
        caches=around.caches(shape.layers),
        overwrite=True,
    )


def _one_of(suffix: str, make: Callable[[], dict[str, Tensor]]) -> Tensor:
    return make()[suffix]


def _ones(size: int) -> LazyTensor:
    return LazyTensor(torch.bfloat16, (size,), lambda: torch.ones(size, dtype=torch.bfloat16))
