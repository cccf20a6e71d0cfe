"""What turns words, pictures and sounds into a model's inputs: the files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from quantlib.calibration.records import Record
from quantlib.errors import DataError, QuantlibError

GUIDANCE = {"emu3": 3.0}
USUAL_GUIDANCE = 5.0
"""Of classifier-free guidance, where a model's generation config names none: what its authors draw
with, by model_type (Emu3's: `image_generation.py` of their repository), else transformers' own."""
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""A processor's settings are in one of them: newer and older versions of transformers differ."""
_PLACES = ("max_position_embeddings", "max_target_positions")


@dataclass(frozen=True)
class Tools:
    """Tokenizer and processors of a model's folder, each read at its first use.

    config: config.json. seqlen: the most tokens taken of a text.
    """

    folder: Path
    config: Mapping[str, Any]
    seqlen: int

    @cached_property
    def tokenizer(self) -> Any:
        """Raises DataError when there is none."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer, "tokenizer", "tokenizer.json", "tokenizer_config.json")

    @cached_property
    def processor(self) -> Any:
        """The model's own mixture of tokenizer and processors. Raises DataError when there is none.

        Without its configuration, transformers hands out one of the parts: not enough.
        """
        from transformers import AutoProcessor

        _ = self.tokenizer  # read first: where there is none, transformers blames the processor
        found = self._load(AutoProcessor, "processor", *_PROCESSORS)
        if not hasattr(found, "tokenizer"):
            raise DataError(
                f"{self.folder} has no processor that joins words with pictures or sounds: put the "
                "model's processor_config.json (or preprocessor_config.json) beside its weights"
            )
        return found

    @cached_property
    def template(self) -> str | None:
        """The chat template: the tokenizer's, else the processor's."""
        own = getattr(self.tokenizer, "chat_template", None)
        if own is None:
            try:
                own = getattr(self.processor, "chat_template", None)
            except DataError:  # whoever needs the processor itself will say so
                return None
        return own if isinstance(own, str) else None

    @cached_property
    def pictures(self) -> Any:
        """The image processor. Raises DataError when there is none."""
        from transformers import AutoImageProcessor

        return self._load(AutoImageProcessor, "image processor", *_PROCESSORS)

    @cached_property
    def sounds(self) -> Any:
        """The feature extractor of sounds. Raises DataError when there is none."""
        from transformers import AutoFeatureExtractor

        return self._load(AutoFeatureExtractor, "feature extractor", *_PROCESSORS)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty when there is none. Raises DataError for a damaged one."""
        file = self.folder / "generation_config.json"
        try:
            found = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        return found if isinstance(found, dict) else {}

    @property
    def guidance(self) -> float:
        """How strongly pictures follow their prompt."""
        usual = GUIDANCE.get(str(self.config.get("model_type")), USUAL_GUIDANCE)
        return float(self.generation.get("guidance_scale") or usual)

    @property
    def reader(self) -> Mapping[str, Any]:
        """Config of what reads: the whole, but of models with other parts that speak."""
        found: Mapping[str, Any] = self.config.get("thinker_config") or self.config
        return found

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Of the language model: the config itself, where it is of nothing else."""
        found: Mapping[str, Any] = self.reader.get("text_config") or self.reader
        return found

    @property
    def longest(self) -> int:
        """The most tokens that the language model was made for."""
        limits = [self.text_config[key] for key in _PLACES if self.text_config.get(key)]
        return min(int(limit) for limit in limits) if limits else 1 << 30

    @property
    def image_token_id(self) -> int:
        """The token that stands where a picture is. Raises DataError when config.json names
        none."""
        named = self._placeholder("image")
        if named is None:
            named = (self.config.get("vocabulary_map") or {}).get("<image>")
        if named is None:
            raise DataError(f"the config.json in {self.folder} names no token for pictures")
        return int(named)

    @property
    def audio_token_id(self) -> int:
        """The same for sounds."""
        named = self._placeholder("audio")
        if named is None:
            raise DataError(f"the config.json in {self.folder} names no token for sounds")
        return named

    def token(self, name: str) -> int | None:
        """Id of a special token ("bos", "eos", "pad"): the tokenizer's, else the config's."""
        found = getattr(self.tokenizer, f"{name}_token_id", None)
        if found is None:
            found = self.text_config.get(f"{name}_token_id")
        return int(found[0] if isinstance(found, list) else found) if found is not None else None

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer may add its special tokens: not to what a chat template began."""
        bos = getattr(self.tokenizer, "bos_token", None)
        return not (bos and text.startswith(bos))

    def ids(self, text: str, longest: int | None = None) -> list[int]:
        """Token ids of a text, special tokens included, at most `longest` of them."""
        found = self.tokenizer(text, add_special_tokens=self.adds_special(text), verbose=False)
        return list(found["input_ids"])[:longest]

    def asked(
        self, question: str, answer: str, placeholder: str, medium: str = "image"
    ) -> tuple[str, str]:
        """The text that asks about a picture (or "audio"), and the same with the answer behind it.

        By the chat template, where there is one; else the placeholder of the picture, the question
        and the answer in a row, with a space between the words.
        """
        template = self.template
        if template is None:
            prompt = f"{placeholder}{question}"
            return prompt, f"{prompt} {answer}"
        content: Any = f"{placeholder}\n{question}"
        if medium in template:  # it knows what stands for it
            content = [{"type": medium}, {"type": "text", "text": question}]
        prompt = self._filled(template, content)
        return prompt, prompt + answer

    def drawn(self, prompt: str) -> str:
        """The text that asks for a picture."""
        template = self.template
        if template is None:
            return prompt
        parts = [{"type": "text", "text": prompt}]
        return self._filled(template, parts if "image" in template else prompt)

    def fits(self, ids: Tensor, where: str) -> None:
        """Raise DataError for more tokens [..., T] than the language model was made for."""
        if ids.shape[-1] > self.longest:
            raise DataError(
                f"{where}: {ids.shape[-1]} tokens, pictures counted, and the model was made for "
                f"{self.longest}: shorten the texts"
            )

    @contextmanager
    def taking(self, image: Image, record: Record) -> Iterator[None]:
        """While a processor takes a record's picture, what it raises is a DataError: some refuse
        pictures that are far longer than wide, or smaller than a patch."""
        try:
            yield
        except QuantlibError:
            raise
        except Exception as error:  # transformers raises many types here, for one reason
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{record.where}: the processor in {self.folder} refuses {record.file}, a picture "
                f"of {image.width} x {image.height} pixels ({reason}): take another picture, or "
                "the model's own processor"
            ) from error

    def _placeholder(self, medium: str) -> int | None:
        for key in (f"{medium}_token_id", f"{medium}_token_index"):
            if self.reader.get(key) is not None:
                return int(self.reader[key])
        return None

    def _filled(self, template: str, content: Any) -> str:
        """The template with one message of the user's, and the beginning of an answer."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template is a program: jinja2, key and type errors come out
            raise DataError(
                f"the chat template in {self.folder} refused a question: {error}"
            ) from error
        return text

    def _load(self, factory: Any, what: str, *files: str) -> Any:
        """What transformers makes of the files. Raises DataError when they are none or damaged."""
        try:
            return factory.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many types here, for one reason
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not any((self.folder / name).exists() for name in files):
                reason = f"there is no {' or '.join(files)}"
            raise DataError(
                f"{self.folder} has no usable {what} ({reason}): put the model's own "
                f"({', '.join(files)}) beside its weights"
            ) from error


def row(ids: list[int]) -> Tensor:
    """int64 [1, T]."""
    return torch.tensor([ids], dtype=torch.int64)
