"""`quantlib.load`: a packed checkpoint, ready to write text.

Text comes from the native engine (`engine.py`) where it knows the model, and from transformers with
packed modules otherwise; which of them, and why, is `.engine` and `.plain_reason`. The transformers
model stays in reach as `.model` for everything else a user may want to do; it is built when it is
first asked for, and so are the engine's weights: whoever needs one of them pays for one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.reader import PackedCheckpoint, read_layout
from quantlib.errors import CheckpointError, UsageError
from quantlib.kernels.cpu.engine_library import FAST, MODES, Decoder
from quantlib.runtime.engine import Engine, NativeCheckpoint
from quantlib.runtime.generate import (
    Generation,
    Sampling,
    Texts,
    TextStream,
    TransformersTexts,
    stop_tokens,
)
from quantlib.runtime.modules import set_mode

if TYPE_CHECKING:
    from PIL.Image import Image

    from quantlib.runtime.media import Media

ENGINES = ("auto", "native", "plain")
SCHEME = "scheme"
"""The mode in which each weight's scheme decides."""
GROUPED = "int8g128"
"""The native engine's mode for schemes that round no activations, unless another is asked for:
exact activations take several times as long, and whole tokens rounded to int8 move the answers
several times as far."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_GENERATION_FILE = "generation_config.json"
_log = logging.getLogger(__name__)


class QuantizedModel:
    """A packed language model and its tokenizer. Made by `load`.

    checkpoint:   the files.
    tokenizer:    the tokenizer, None when the checkpoint has none.
    mode, kv:     what text is written with, see `load`; `set_mode` changes the mode.
    plain_reason: why text comes from transformers; None: it comes from the native engine.
    """

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        tokenizer: Any,
        native: NativeCheckpoint | str,
        stops: set[int],
        mode: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        kv: str | None = None,
    ) -> None:
        """`native`: what the engine reads, or why it cannot. `stops`: tokens that end a text."""
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.plain_reason = native if isinstance(native, str) else None
        self._native = None if isinstance(native, str) else native
        self.mode, self._kv = SCHEME, kv
        self._stops, self._dtype = stops, dtype
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._lock = Lock()
        self._model_mode = SCHEME
        if mode is not None:
            self.set_mode(mode)
        elif self._native is not None:
            self.mode = FAST if self._native.rounds else GROUPED

    @property
    def model(self) -> Any:
        """The transformers model, built at the first call. It shares no memory with the engine.

        Its mode is what was asked for, else its schemes'. Once it is moved to another device, text
        comes from there.
        """
        with self._lock:
            if self._model is None:
                model = _load_model(self.checkpoint.path, self._dtype)
                set_mode(model, self._model_mode)
                self._model = model
        return self._model

    @property
    def engine(self) -> str:
        """What text comes from now: "native" or "plain"."""
        moved = self._model is not None and self._model.device.type != "cpu"
        return "plain" if self._native is None or moved else "native"

    @property
    def kv(self) -> str:
        """How the native engine keeps keys and values: what was asked for, else what the checkpoint
        says."""
        return self._kv or (self._native.kv if self._native is not None else "f32")

    @property
    def decoder(self) -> Decoder:
        """The engine's weights, read at the first call. Raises UsageError when it has none."""
        if self._native is None:
            raise UsageError(f"the native engine does not run this model: {self.plain_reason}")
        with self._lock:
            if self._decoder is None:
                self._decoder = self._native.read()
        return self._decoder

    def make_engine(self, sequences: int = 1, capacity: int = 4096) -> Engine:
        """A native engine for `sequences` texts of at most `capacity` tokens each, all empty.

        Engines share their weights. Raises UsageError when the native engine cannot run the model.
        """
        mode = None if self.mode == SCHEME else self.mode
        return Engine(self.decoder, sequences=sequences, capacity=capacity, mode=mode, kv=self._kv)

    @overload
    def generate(self, prompt: str = ..., max_new_tokens: int = ..., **options: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], max_new_tokens: int = ..., **options: Any
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int = 128,
        *,
        image: str | Path | Image | None = None,
        audio: str | Path | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The text that follows `prompt`, without the prompt; a list of texts for a list.

        Several prompts are answered together, which takes less time; each gets the text that it
        would get alone. Options are those of `stream`.

        image: a file, or a PIL image, that the one prompt asks about.
        audio: a WAV file whose words are written down; it takes no prompt.
        """
        if image is not None or audio is not None:
            if not isinstance(prompt, str):
                raise UsageError("one prompt is answered about a picture: give one, not a list")
            chosen = Sampling(**{name: v for name, v in options.items() if name != "chat"})
            return self.media.answer(
                prompt, image=image, audio=audio, max_new_tokens=max_new_tokens, sampling=chosen
            ).text
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            return []
        texts = self.generation(prompts, max_new_tokens, **options).finish()
        return texts[0] if isinstance(prompt, str) else texts

    def generate_image(
        self,
        prompt: str,
        *,
        guidance: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Image:
        """A picture (PIL) of what `prompt` says, by a model that makes pictures.

        guidance:    how strongly it follows the words; the model's own unless said, 1 for none.
        temperature: 0 takes the likeliest code each time; above, codes are drawn with `seed`.
        Raises UsageError when the model makes no pictures.
        """
        from quantlib.runtime.media_images import to_pictures

        drawn = self.media.draw([prompt], seed=seed, guidance=guidance, temperature=temperature)
        return to_pictures(drawn)[0]

    @property
    def media(self) -> Media:
        """What the model does with pictures and sounds, through transformers.

        Raises UsageError for models that only read and write text.
        """
        from quantlib.runtime.media import Media

        return Media.of(self.model, self.checkpoint.path)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> TextStream:
        """As `generate`, but the text in pieces, as they come; `.speed` says how fast they came.

        chat:        put the prompt into the tokenizer's chat template, as the user's message;
                     None: if there is a template.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn with `top_p`
                     and `seed`.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return TextStream(self.generation([prompt], max_new_tokens, chat=chat, **options))

    def generation(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """As `stream`, for several prompts at once: pieces of text with their prompt's number."""
        sampling = Sampling(temperature, top_p, seed)
        ids = [self.encode(prompt, chat)[0].tolist() for prompt in prompts]
        texts = self._texts(len(ids), max(map(len, ids), default=0) + max_new_tokens)
        stops = self._stops | stop_tokens(self.tokenizer.eos_token_id)
        return Generation(texts, self.tokenizer, ids, max_new_tokens, sampling, stops)

    def set_mode(self, mode: str) -> None:
        """Take activations as they are ("exact"), or round them to 8 bits.

        "int8" rounds per token, "int8g128" per token and 128 columns. "scheme" leaves it to each
        weight's scheme: what was measured when the model was compressed, to float32's rounding.
        "fast" does that too, but the native engine then computes attention in integers of 16 bits
        (on packed keys and values) and rounds what schemes leave as it is as "int8g128" does: the
        output head above all.
        """
        if mode not in (SCHEME, *MODES):
            known = ", ".join((*MODES, SCHEME))
            raise UsageError(f"{mode!r} is not a mode to run in: use one of {known}")
        self.mode = mode
        self._model_mode = SCHEME if mode == FAST else mode
        if self._model is not None:
            set_mode(self._model, self._model_mode)

    def packed_bytes(self) -> int:
        """Bytes of all packed weights."""
        kept = set(self.checkpoint.kept_names)
        headers = self.checkpoint.headers.items()
        return sum(header.nbytes for name, header in headers if name not in kept)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template, so that prompts are messages unless said."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, prompt: str, chat: bool | None = None) -> Tensor:
        """Token ids of a prompt, int64 [1, tokens]. chat: see `stream`."""
        if self.tokenizer is None:
            raise UsageError(
                "this checkpoint has no tokenizer: copy the source model's tokenizer files "
                "into it, or give token ids to .model or .make_engine()"
            )
        if chat and not self.chats:
            raise UsageError("this model's tokenizer has no chat template: use chat=False")
        if chat or (chat is None and self.chats):
            messages = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return ids.to(torch.int64)

    def _texts(self, count: int, capacity: int) -> Texts:
        """What is to write `count` texts of at most `capacity` tokens."""
        if self.engine == "native":
            return self.make_engine(max(count, 1), max(capacity, 1))
        from quantlib.models.skeleton import writer

        model = writer(self.model)
        _require_words(model)
        return TransformersTexts(model)


def load(
    path: str | os.PathLike[str],
    mode: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    *,
    engine: str = "auto",
    kv: str | None = None,
) -> QuantizedModel:
    """Open a checkpoint that `quantlib compress` wrote.

    mode:   activations "exact", or rounded to 8 bits per token ("int8") or per token and 128
            columns ("int8g128"), or as the schemes say ("scheme", "fast": see
            `QuantizedModel.set_mode`). None: as the schemes say for the transformers model; of the
            native engine "fast" where they round activations, else "int8g128".
    dtype:  of the transformers model's activations and of what was kept in 16 bits; the native
            engine computes in float32, so another dtype is the plain way's.
    engine: "native": quantlib's own decode loop; its weights are read at once. "plain": through
            transformers. "auto": native where the engine knows the model (a line at level INFO of
            the log of `quantlib.runtime.load` says why if not), read when text is first asked for.
    kv:     how the native engine keeps keys and values: "f32", "int8", "int4", see `Engine`; None:
            as the checkpoint says, else "f32".
    Raises CheckpointError when the folder is damaged, incomplete, or of another version, and
    UsageError when the native engine is asked for a model that it does not run.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: use one of {', '.join(ENGINES)}")
    checkpoint = read_layout(path)
    config = _load_config(checkpoint.path)
    tokenizer = _load_tokenizer(checkpoint.path)
    native: NativeCheckpoint | str = "the plain way was asked for"
    if engine != "plain":
        native = NativeCheckpoint.open(checkpoint, config)
    if dtype not in (torch.float32, "float32") and not isinstance(native, str):
        native = f"it computes in float32, and {dtype} was asked for"
    stops = _stop_tokens(checkpoint.path, config)
    loaded = QuantizedModel(checkpoint, tokenizer, native, stops, mode, dtype, kv)
    _start(loaded, engine, kv)
    return loaded


def _require_words(model: Any) -> None:
    """Raise UsageError for a model that does not continue a text."""
    model_type = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"a model of type {model_type!r} does not continue a text: give it what it listens to "
            "(--audio, or audio= in Python)"
        )
    if model.get_output_embeddings() is None:
        raise UsageError(f"a model of type {model_type!r} makes vectors and writes no text")


def _start(loaded: QuantizedModel, engine: str, kv: str | None) -> None:
    """Read what was asked for by name, and say what could not be had."""
    reason = loaded.plain_reason
    if reason is None:
        if engine == "native":
            loaded.make_engine(capacity=1)
        return
    if engine == "native" or kv not in (None, "f32"):
        wanted = "" if engine == "native" else f" (and kv={kv!r} is the engine's)"
        raise UsageError(
            f"the native engine does not run {loaded.checkpoint.path}{wanted}: {reason}"
        )
    if engine == "auto":
        _log.info("%s runs through transformers: %s", loaded.checkpoint.path, reason)
    _ = loaded.model  # a damaged checkpoint is reported now


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {path}: {error}") from error


def _stop_tokens(path: Path, config: Any) -> set[int]:
    """As a transformers model would have them: the generation config's, else the config's."""
    if (path / _GENERATION_FILE).exists():
        return stop_tokens(read_json(path / _GENERATION_FILE).get("eos_token_id"))
    return stop_tokens(getattr(config, "eos_token_id", None))


def _load_model(path: Path, dtype: torch.dtype | str) -> Any:
    from quantlib.calibration.paths.voices import read_voices
    from quantlib.models.skeleton import from_pretrained
    from quantlib.runtime.transformers_plugin import register

    register()
    model_type = _load_config(path).model_type
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = from_pretrained(model_type, path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {path}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{path} lacks {absent[0]} ({len(absent)} parameters in all): make the checkpoint again"
        )
    if hasattr(model, "speaker_map"):
        model.speaker_map = read_voices(path)
    return model


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from error
