"""What reads and writes what in a model: all that a change of basis has to know.

The residual stream of a decoder is written by the embedding and by the last linear of every
attention and MLP, and read, through a norm, by their first linears and by the head. Who rotates the
stream rotates all writers and counter-rotates all readers, after the norms' gains have moved into
the readers. `Wiring` is that list for one model, with parameter names; the families' tables it is
made from are in `tables.py`. It also lists the values that reach an output projection head by head,
the attentions whose keys and queries can be turned, and the inputs of down projections with what
writes them.

Nothing is guessed: a block's parameter that no rule names is an error, since a reader that is left
out would silently read another basis than its input has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DECODER = "decoder"
ENCODER = "encoder"

RMS = "rms"
RMS_PLUS_ONE = "rms+1"
LAYER = "layer"
NORM_KINDS = (RMS, RMS_PLUS_ONE, LAYER)
"""Gain w; gain 1 + w (Gemma); subtracts the mean, gain w and bias b."""


@dataclass(frozen=True)
class Matrix:
    """A linear's parameters: `weight` [N, K] (or a stack [E, N, K]), `bias` [N] or None.

    drops_shift: a constant added to all its outputs changes nothing (keys without rotary embedding:
                 it adds the same to every score of a query, which the softmax takes out again).
    """

    weight: str
    bias: str | None = None
    drops_shift: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream (module name), and everything that reads its output."""

    name: str
    kind: str
    readers: tuple[Matrix, ...]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str | None:
        return f"{self.name}.bias" if self.kind == LAYER else None


@dataclass(frozen=True)
class Stream:
    """One residual stream, with a basis of its own.

    name, width: "decoder" or "encoder"; D.
    norms:    whose gain (and bias) is folded into their readers; with the final one where it can.
    writers:  matrices whose outputs are added to the stream.
    tables:   parameters [rows, D] whose rows are vectors of the stream (embeddings, positions).
    enters:   modules where the basis is applied online: what a module puts out ("output"), or the
              first argument it is called with ("input").
    leaves:   the norm (module) before which the basis is undone online; None where the final norm
              is folded too.
    obstacle: why the stream cannot be rotated, a sentence; "" when it can.
    """

    name: str
    width: int
    norms: tuple[Norm, ...]
    writers: tuple[Matrix, ...]
    tables: tuple[str, ...]
    enters: tuple[tuple[str, str], ...] = ()
    leaves: str | None = None
    obstacle: str = ""

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean: then everything written to it is centred instead."""
        return any(norm.kind == LAYER for norm in self.norms)


@dataclass(frozen=True)
class Attention:
    """One attention: where a value basis is fused, and whose queries and keys a key basis turns.

    name:   its key in `Rotation.value` and `Rotation.key`: the block's name; where a block has
            several attentions (cross-attention), the later ones have their module's.
    module: the attention module.
    block:  the block it is in.
    values: the matrix whose last `kv_heads * head_dim` rows are the values (a fused q/k/v linear
            has the others before them).
    output: the matrix whose input columns are the heads, `heads * head_dim`; query head i uses the
            keys and values of head `i // (heads // kv_heads)`.
    """

    name: str
    module: str
    block: str
    values: Matrix
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Hidden:
    """The input of a block's down projection.

    name:    its key in `Rotation.hidden` and its siblings: the block's name.
    down:    what reads it. width: its columns.
    module:  whose input it is; for experts, the module inside which it arises.
    inner:   it arises inside `module`'s forward (experts).
    writers: whose outputs it is computed from, channel by channel (gate and up).
    stacked: how many parts of `width` rows each writer has, one below the other (2: gate over up).
    """

    name: str
    down: Matrix
    module: str
    width: int
    inner: bool = False
    writers: tuple[Matrix, ...] = ()
    stacked: int = 1


@dataclass(frozen=True)
class Wiring:
    """All of a model. `shapes` are those of its parameters; tied: head and embedding are one."""

    model_type: str
    blocks: tuple[str, ...]
    streams: tuple[Stream, ...]
    attentions: tuple[Attention, ...]
    hiddens: tuple[Hidden, ...]
    tied: bool
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False)

    def stream(self, name: str) -> Stream | None:
        """The stream of this name, None when the model has none."""
        return next((stream for stream in self.streams if stream.name == name), None)

    def attention(self, name: str) -> Attention | None:
        """The attention of this name, None when there is none."""
        return next((attention for attention in self.attentions if attention.name == name), None)

    @property
    def cached(self) -> tuple[Attention, ...]:
        """The attentions whose keys and values are kept in a cache: those of the decoder."""
        decoder = self.stream(DECODER)
        writers = {writer.weight for writer in decoder.writers} if decoder is not None else set()
        return tuple(a for a in self.attentions if a.output.weight in writers)

    def hidden(self, name: str) -> Hidden | None:
        """The down projection's input of this name, None when there is none."""
        return next((hidden for hidden in self.hiddens if hidden.name == name), None)
