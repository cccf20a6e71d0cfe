"""What methods are measured on: a language model with text, Whisper with speech.

A subject owns the full-precision model, the calibration data, and the figures it is judged by. It
collects statistics once and hands out copies of the model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlib.bench.w4a4.sites import Site, sites_of
from quantlib.bench.w4a4.statistics import Statistics, collect, unfolded
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.evaluation.words import word_errors
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.binding import wire
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import Wiring

QUICK = 2
"""Calibration windows or clips that a search over one number (SmoothQuant's alpha) looks at."""


class Subject(ABC):
    """A model with its data.

    name:     in the table of results.
    original: the full-precision model, float32, never changed.
    """

    def __init__(self, name: str, original: Any) -> None:
        self.name = name
        self.original = original.eval()
        self.wiring: Wiring = wire(original)
        self.sites: tuple[Site, ...] = sites_of(self.wiring)

    def copy(self, rotation: Rotation | None = None) -> Any:
        """A model of its own, in other bases if they are given."""
        model = copy.deepcopy(self.original)
        if rotation is not None:
            rotate_module(model, self.wiring, rotation)
        return model

    @cached_property
    def folded(self) -> Any:
        """The model with its norms' gains in their readers."""
        return self.copy(Rotation(fold_norms=True))

    @cached_property
    def folded_statistics(self) -> Statistics:
        """Of `folded`, over all calibration data."""
        return collect(self.folded, self.wiring, self.sites, self.show)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the model as it is."""
        biased = any(site.norm is not None and site.norm.bias is not None for site in self.sites)
        if biased:
            return collect(self.copy(), self.wiring, self.sites, self.show)
        return unfolded(self.folded_statistics, self.sites, self.original)

    @abstractmethod
    def run(self, model: Any) -> None:
        """Put calibration data through a model, all at once."""

    def show(self, model: Any) -> None:
        """Put all calibration data through a model, in as many calls as that takes."""
        self.run(model)

    @abstractmethod
    def quick(self, model: Any) -> float:
        """KL from the original on a little of the calibration data."""

    @abstractmethod
    def figures(self, model: Any) -> dict[str, float]:
        """What the table says about a model, on data that calibration has not seen."""


class Language(Subject):
    """A causal language model and windows int64 [W, T] of text, for calibration and held out.

    folder: where the model lies, for methods that begin with files; None: in memory only.
    """

    def __init__(
        self,
        name: str,
        original: Any,
        calibration: Tensor,
        held_out: Tensor,
        folder: Path | None = None,
    ) -> None:
        super().__init__(name, original)
        self.calibration = calibration
        self.held_out = held_out
        self.folder = folder

    @staticmethod
    def open(name: str, folder: Path, calibration: Tensor, held_out: Tensor) -> Language:
        """The model of a folder, in float32."""
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return Language(name, original, calibration, held_out, folder)

    @torch.no_grad()
    def run(self, model: Any) -> None:
        """One batch; the head is left out."""
        model.base_model(input_ids=self.calibration, use_cache=False)

    @cached_property
    def _quick_reference(self) -> Any:
        return reference_logprobs(self.original, self.calibration[:QUICK])

    @cached_property
    def _reference(self) -> Any:
        return reference_logprobs(self.original, self.held_out)

    def quick(self, model: Any) -> float:
        """KL per token on calibration windows."""
        found = evaluate_language(model, self.calibration[:QUICK], self._quick_reference).kl
        return float("inf") if found is None else found.value

    def figures(self, model: Any) -> dict[str, float]:
        """KL, perplexity and share of equal top tokens on held-out windows, and their errors."""
        result = evaluate_language(model, self.held_out, self._reference)
        out: dict[str, float] = {}
        for name in ("kl", "perplexity", "same_top"):
            estimate = getattr(result, name)
            out[name] = estimate.value
            out[f"{name}_error"] = estimate.standard_error or 0.0
        return out


class Speech(Subject):
    """Whisper with calibration clips and transcribed utterances.

    tokenizer, extractor: of the model's folder.
    clips:      float32 [samples] each; the original's own transcripts are the decoder's input.
    utterances: (audio, text) pairs; KL is of logits along the original's transcripts, word errors
                are of greedy transcripts against the text.
    """

    def __init__(
        self,
        name: str,
        original: Any,
        tokenizer: Any,
        extractor: Any,
        clips: list[Tensor],
        utterances: list[tuple[Tensor, str]],
    ) -> None:
        super().__init__(name, original)
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.texts = [text for _, text in utterances]
        self.heard = self._features([audio for audio, _ in utterances])
        self.forced = [self._transcribe(original, one) for one in self.heard]
        self.clips = self._features(clips)
        self.clip_tokens = [self._transcribe(original, one) for one in self.clips]

    @torch.no_grad()
    def run(self, model: Any) -> None:
        """One batch of all clips, without padding: as many tokens of each as the shortest
        transcript has."""
        length = min(len(ids) for ids in self.clip_tokens)
        ids = torch.stack([own[:length] for own in self.clip_tokens])
        model(input_features=self.clips, decoder_input_ids=ids, use_cache=False)

    @torch.no_grad()
    def show(self, model: Any) -> None:
        """Clip by clip, with all of their transcripts: the shortest has 14 tokens."""
        for batch in self.batches():
            model(**batch, use_cache=False)

    @cached_property
    def _quick_logits(self) -> list[Tensor]:
        return [
            self._logits(self.original, self.clips[i], self.clip_tokens[i]) for i in range(QUICK)
        ]

    @cached_property
    def _logits_of_original(self) -> list[Tensor]:
        return [
            self._logits(self.original, one, ids)
            for one, ids in zip(self.heard, self.forced, strict=True)
        ]

    def batches(self) -> Iterator[dict[str, Any]]:
        """Every calibration clip with its transcript, as arguments of the model."""
        for features, ids in zip(self.clips, self.clip_tokens, strict=True):
            yield {"input_features": features[None], "decoder_input_ids": ids[None]}

    def predictions(self, logits: Tensor) -> Tensor:
        """Of one clip's logits [1, T, V], those that predict what follows the prompt [., V]."""
        return logits[0, len(self._prompt) - 1 :]

    @torch.no_grad()
    def heard_by(self, model: Any, count: int) -> list[tuple[Any, Tensor]]:
        """What the encoder makes of the first calibration clips, and their transcripts: the
        arguments of `decoded`."""
        encoder = model.get_encoder()
        return [
            (encoder(features[None]), ids)
            for features, ids in zip(self.clips[:count], self.clip_tokens, strict=False)
        ]

    @torch.no_grad()
    def decoded(self, model: Any, encoded: Any, ids: Tensor) -> Tensor:
        """`predictions` of the decoder alone."""
        out = model(encoder_outputs=encoded, decoder_input_ids=ids[None], use_cache=False)
        return self.predictions(out.logits)

    def quick(self, model: Any) -> float:
        """Mean KL per token over calibration clips."""
        found = [
            divergence(reference, self._logits(model, self.clips[i], self.clip_tokens[i]))
            for i, reference in enumerate(self._quick_logits)
        ]
        return sum(found) / len(found)

    def figures(self, model: Any) -> dict[str, float]:
        """KL per token along the original's transcripts (mean over utterances and its standard
        error), and word errors of greedy transcripts over all words."""
        divergences = [
            divergence(reference, self._logits(model, one, ids))
            for reference, one, ids in zip(
                self._logits_of_original, self.heard, self.forced, strict=True
            )
        ]
        kl = Estimate.mean(divergences)
        wrong = words = 0
        for one, text in zip(self.heard, self.texts, strict=True):
            said = self.tokenizer.decode(
                self._transcribe(model, one).tolist(), skip_special_tokens=True
            )
            errors, length = word_errors(said, text)
            wrong, words = wrong + errors, words + length
        return {
            "kl": kl.value,
            "kl_error": kl.standard_error or 0.0,
            "word_errors": float(wrong),
            "word_error_rate": wrong / words,
        }

    def _features(self, clips: list[Tensor]) -> Tensor:
        """Log-mel spectrograms [clips, mels, frames], each clip padded to 30 seconds."""
        arrays = [clip.numpy() for clip in clips]
        found = self.extractor(arrays, sampling_rate=16_000, return_tensors="pt")
        features: Tensor = found.input_features
        return features

    @property
    def _prompt(self) -> list[int]:
        marks = ("<|startoftranscript|>", "<|notimestamps|>")
        return [int(self.tokenizer.convert_tokens_to_ids(mark)) for mark in marks]

    @torch.no_grad()
    def _transcribe(self, model: Any, features: Tensor, limit: int = 100) -> Tensor:
        """Greedy tokens int64 [T] of one spectrogram, the prompt included, the end left out."""
        end = int(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        encoded = model.get_encoder()(features[None])
        ids = step = torch.tensor([self._prompt])
        past = None
        for _ in range(limit):
            out = model(
                encoder_outputs=encoded,
                decoder_input_ids=step,
                past_key_values=past,
                use_cache=True,
            )
            past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            if int(step) == end:
                break
            ids = torch.cat([ids, step], 1)
        return ids[0]

    @torch.no_grad()
    def _logits(self, model: Any, features: Tensor, ids: Tensor) -> Tensor:
        """Logits [T - 1, V] that predict what follows the prompt, the end of the text included."""
        out = model(input_features=features[None], decoder_input_ids=ids[None], use_cache=False)
        return self.predictions(out.logits)


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(reference || logits), nats."""
    theirs, ours = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).mean())
