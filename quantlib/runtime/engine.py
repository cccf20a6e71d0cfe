"""`Engine`: a packed decoder on quantlib's own kernels, one call per step.

transformers' eager loop spends about 9 ms a token on a 135M model in Python and in small operators;
here a step of the whole model is one call of the C++ library, for the tokens of a prompt and for
one token of each of several texts alike. The weights come from `engine_weights.py`; what remains
here is bookkeeping: which text has how many tokens, and prompts cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.reader import PackedCheckpoint
from quantlib.errors import FormatError, QuantlibError, UsageError
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.cpu.engine_library import MODES, Decoder, NativeEngine
from quantlib.kernels.kv_format import KvFormat
from quantlib.runtime.engine_changes import attention_name, cache_format, unsupported_changes
from quantlib.runtime.engine_spec import EngineSpec, unsupported
from quantlib.runtime.engine_weights import Plan, make_plan, read_decoder

CHUNK = 512
"""Tokens of a step at most: the kernels are at full speed by then, and work space stays small."""

Tokens = Sequence[int] | Tensor


class Engine:
    """A decoder and the keys and values of `sequences` texts, each of at most `capacity` tokens.

    Results are the same for any number of threads, and a text's do not depend on the others.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        sequences: int = 1,
        capacity: int = 4096,
        mode: str | None = None,
        kv: str | None = None,
        threads: int | None = None,
        isa: str = "best",
        integer_attention: bool | None = None,
    ) -> None:
        """
        decoder: what `NativeCheckpoint.read` gives; several engines may share one.
        mode:    activations "exact", or rounded to 8 bits per token ("int8") or per token and 128
                 columns ("int8g128"); None: each weight's scheme decides; "fast": likewise where it
                 rounds them, and "int8g128" elsewhere.
        kv:      how keys and values are kept, by the names of `quantlib.kernels.kv_format`: "f32",
                 "int8", "int4", "int4g32r", "int8/int4rk4", ...; None: as the checkpoint says for
                 each layer, else "f32".
        threads: at most so many; None: torch's number at each step.
        integer_attention: multiply packed keys and values in integers, queries and weights of
                 attention rounded to 16 bits; None: in the modes "int8", "int8g128" and "fast".
        Raises UsageError for an unknown mode or cache, and without compiled kernels.
        """
        library = cpu.load()
        if library is None:
            raise UsageError("there are no compiled kernels on this machine: use engine='plain'")
        if mode not in (None, *MODES):
            raise UsageError(f"{mode!r} is not a mode to run in: use one of {', '.join(MODES)}")
        if isa not in cpu.ISAS:
            raise UsageError(f"unknown instruction set {isa!r}: use one of {', '.join(cpu.ISAS)}")
        if sequences < 1 or capacity < 1:
            raise UsageError(f"an engine for {sequences} texts of {capacity} tokens holds nothing")
        self.sequences, self.capacity = sequences, capacity
        self.mode, self.kv, self.threads = mode, kv, threads
        self.isa = library.isa if isa == "best" else isa
        self._vocabulary = decoder.vocabulary
        form = None if kv is None else _kv_format(kv, decoder.head_dim)
        self._numbers = torch.arange(sequences, dtype=torch.int32, device="cpu")
        self._native = NativeEngine(
            library, decoder, sequences, capacity, form, mode, isa, integer_attention
        )

    def prefill(self, ids: Tokens, sequence: int = 0) -> Tensor:
        """Append a prompt, or a part of one, to a text: logits after its last token, float32 [V].

        Raises UsageError when the text would be too long, DataError for a token out of range.
        """
        return self.extend({sequence: ids})[0]

    def score(self, ids: Tokens, sequence: int = 0) -> Tensor:
        """As `prefill`, but the logits after every token: float32 [tokens, V]."""
        tokens, before = _int32(ids), self._native.length(sequence)
        logits = torch.empty(len(tokens), self._vocabulary, dtype=torch.float32, device="cpu")
        with self._undone({sequence: before}):
            for start in range(0, len(tokens), CHUNK):
                part, out = tokens[start : start + CHUNK], logits[start : start + CHUNK]
                rows = torch.arange(len(part), device="cpu")
                numbers = torch.full_like(part, sequence)
                self._native.step(part, numbers, rows, self._threads(), out)
        return logits

    def decode(self, ids: Tokens, sequences: Sequence[int] | None = None) -> Tensor:
        """Append one token to each of B texts (the first B unless said): logits, float32 [B, V]."""
        logits = torch.empty(len(ids), self._vocabulary, dtype=torch.float32, device="cpu")
        self._decode(ids, sequences, logits=logits)
        return logits

    def decode_best(self, ids: Tokens, sequences: Sequence[int] | None = None) -> Tensor:
        """As `decode`, but only the likeliest next token of each text: int32 [B]."""
        best = torch.empty(len(ids), dtype=torch.int32, device="cpu")
        self._decode(ids, sequences, best=best)
        return best

    def extend(self, texts: Mapping[int, Tokens]) -> Tensor:
        """Append any number of tokens to each of some texts, by their number, at least one each.

        Returns the logits after the last token of each, float32 [texts, V], in the order of
        `texts`. When it raises, no text has changed.
        """
        if not all(map(len, texts.values())):
            raise UsageError("a text was given no tokens: it needs at least one")
        if all(len(ids) == 1 for ids in texts.values()):
            return self.decode([int(ids[0]) for ids in texts.values()], list(texts))
        tokens = {sequence: _int32(ids) for sequence, ids in texts.items()}
        before = {sequence: self._native.length(sequence) for sequence in tokens}
        logits = torch.empty(len(tokens), self._vocabulary, dtype=torch.float32, device="cpu")
        with self._undone(before):
            self._extend(tokens, logits)
        return logits

    def extend_best(self, texts: Mapping[int, Tokens]) -> Tensor:
        """As `extend`, but only the likeliest next token of each text: integers [texts]."""
        if all(len(ids) == 1 for ids in texts.values()):
            return self.decode_best([int(ids[0]) for ids in texts.values()], list(texts))
        return self.extend(texts).argmax(dim=-1)

    def reset(self) -> None:
        """Forget all texts."""
        for sequence in range(self.sequences):
            self.truncate(sequence, 0)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a text's tokens from position `length` on."""
        self._native.truncate(sequence, length)

    def copy(self, source: int, target: int) -> None:
        """Give the text `target` the tokens of `source`: a prompt that several answers share."""
        self._native.copy(source, target)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [self._native.length(sequence) for sequence in range(self.sequences)]

    @property
    def memory(self) -> int:
        """Bytes of keys, values and work space; the weights are not among them."""
        return self._native.memory

    def _decode(
        self,
        ids: Tokens,
        sequences: Sequence[int] | None,
        logits: Tensor | None = None,
        best: Tensor | None = None,
    ) -> None:
        chosen = self._numbers[: len(ids)] if sequences is None else _int32(sequences)
        if len(chosen) != len(ids):
            raise UsageError(f"{len(ids)} tokens for {len(chosen)} texts: give one for each")
        wanted = torch.arange(len(ids), device="cpu")
        self._native.step(_int32(ids), chosen, wanted, self._threads(), logits, best)

    def _extend(self, tokens: Mapping[int, Tensor], logits: Tensor) -> None:
        done = 0
        for piece in pieces({sequence: len(ids) for sequence, ids in tokens.items()}):
            rows = torch.cat([tokens[part.sequence][part.start : part.stop] for part in piece])
            numbers = torch.empty_like(rows)
            wanted, count = [], 0
            for part in piece:
                size = part.stop - part.start
                numbers[count : count + size] = part.sequence
                count += size
                if part.stop == len(tokens[part.sequence]):
                    wanted.append(count - 1)
            last = torch.tensor(wanted, dtype=torch.int64, device="cpu")
            out = logits[done : done + len(wanted)]
            self._native.step(rows, numbers, last, self._threads(), out)
            done += len(wanted)

    @contextmanager
    def _undone(self, lengths: Mapping[int, int]) -> Iterator[None]:
        """Give texts these lengths again if what is done here fails."""
        try:
            yield
        except QuantlibError:
            for sequence, length in lengths.items():
                self.truncate(sequence, length)
            raise

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()


@dataclass(frozen=True)
class Part:
    """Tokens start..stop-1 of what one text is given."""

    sequence: int
    start: int
    stop: int


def pieces(lengths: Mapping[int, int], chunk: int = CHUNK) -> Iterator[list[Part]]:
    """Cut texts of these lengths into steps of at most `chunk` tokens, in order.

    A step takes the end of one text and the beginning of the next together.
    """
    piece: list[Part] = []
    room = chunk
    for sequence, length in lengths.items():
        start = 0
        while start < length:
            stop = min(length, start + room)
            piece.append(Part(sequence, start, stop))
            room, start = room - (stop - start), stop
            if not room:
                yield piece
                piece, room = [], chunk
    if piece:
        yield piece


def _kv_format(name: str, head_dim: int) -> KvFormat:
    """The format of a cache for heads of `head_dim` columns. Raises UsageError."""
    try:
        form = KvFormat.parse(name)
        form.key.check(head_dim)
        form.value.check(head_dim)
    except FormatError as error:
        raise UsageError(str(error)) from error
    return form


class NativeCheckpoint:
    """A packed checkpoint that the engine can run: checked by its headers, read when asked."""

    def __init__(self, checkpoint: PackedCheckpoint, spec: EngineSpec, plan: Plan) -> None:
        self.checkpoint, self.spec, self._plan = checkpoint, spec, plan

    @staticmethod
    def open(checkpoint: PackedCheckpoint, config: Any) -> NativeCheckpoint | str:
        """`config`: the checkpoint's config.json as a transformers object, None if it has no class.

        A sentence that says why the engine cannot run the model, if it cannot. Raises
        CheckpointError when a weight is missing or has another shape than it should.
        """
        reason = unsupported(config)
        if reason is not None:
            return reason
        spec = EngineSpec.from_config(config)
        reason = unsupported_changes(checkpoint, spec)
        if reason is not None:
            return reason
        plan = make_plan(checkpoint, spec)
        if plan is None:
            return "its weights go by names it does not know"
        if cpu.load() is None:
            return "there are no compiled kernels on this machine"
        return NativeCheckpoint(checkpoint, spec, plan)

    @property
    def rounds(self) -> bool:
        """Whether its schemes say how activations are rounded."""
        return any(scheme.activation.rounds for scheme in self.checkpoint.schemes.values())

    @property
    def kv(self) -> str:
        """How its layers keep keys and values: the formats there are, as text."""
        caches = self.checkpoint.around.caches
        kept = {caches.get(attention_name(layer)) for layer in range(len(self.spec.layers))}
        return ", ".join(sorted("f32" if one is None else str(cache_format(one)) for one in kept))

    def read(self) -> Decoder:
        """All weights, rearranged for the kernels."""
        return read_decoder(self.checkpoint, self.spec, self._plan)


def _int32(ids: Tokens) -> Tensor:
    """int32 [tokens]; what does not fit becomes another token that does not exist."""
    wide = torch.as_tensor(ids, device="cpu").reshape(-1)
    return wide.clamp(-1, 2**31 - 1).to(torch.int32).contiguous()
