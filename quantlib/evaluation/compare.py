"""Two model folders, one text: sizes and quality side by side.

The reference runs first and leaves only what `reference_logprobs` keeps of it, so both models are
never in memory together. A folder holds a dense `transformers` model or a packed checkpoint of
ours; a caller with another way to open folders passes `load`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from quantlib.calibration.data import TextSource, load_text, load_windows
from quantlib.checkpoint.disk import read_json
from quantlib.errors import ModelError, UsageError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs
from quantlib.search.budget import format_size

Loader = Callable[[Path], tuple[nn.Module, Any]]
"""Folder -> (causal language model, tokenizer or None)."""

StageProgress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`, stage being "reference" or "model"."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, with enough of its circumstances to repeat it."""

    model: str
    against: str | None
    model_bytes: int
    against_bytes: int | None
    data: str
    data_sha256: str
    seqlen: int
    seed: int
    second_half: bool
    result: LanguageResult
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Every field, for `--json` and for the report."""
        return {**vars(self), "result": self.result.to_json()}

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, reference, model) as text, for a table; a dash where there is no reference."""
        result = self.result
        rows = [
            ("weights on disk", _size(self.against_bytes), _size(self.model_bytes)),
            ("perplexity", _text(result.reference_perplexity), _text(result.perplexity)),
            ("NLL per token (nats)", _text(result.reference_nll), _text(result.nll)),
        ]
        if result.kl is not None:
            rows += [
                ("perplexity ratio", "1", _text(result.perplexity_ratio)),
                ("KL per token (nats)", "0", _text(result.kl)),
                ("same most likely token", "1", _text(result.same_top)),
            ]
        return rows

    def table(self) -> str:
        """The rows in aligned plain text, and below them what they were measured on."""
        header = ("", Path(self.against).name if self.against else "-", Path(self.model).name)
        lines = [header, *self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        body = "\n".join(
            f"{name:<{widths[0]}}  {theirs:>{widths[1]}}  {ours:>{widths[2]}}"
            for name, theirs, ours in lines
        )
        which = "second half of " if self.second_half else ""
        return (
            f"{body}\n{self.result.windows} windows of {self.seqlen} tokens of {self.data}, "
            f"{which}each scored; ± is one standard error over windows"
        )


def compare(
    model: str | Path,
    against: str | Path | None,
    data: str | Path | TextSource,
    *,
    seqlen: int = 512,
    windows: int = 12,
    seed: int = 0,
    second_half: bool = True,
    load: Loader | None = None,
    cache: str | Path | None = None,
    progress: StageProgress | None = None,
) -> Comparison:
    """Evaluate the folder `model`, against the folder `against` if given, on windows of `data`.

    The tokenizer is the reference's when it has one, so both models read the same tokens. `cache`
    keeps the reference's answers in a file for the next comparison (see `reference_logprobs`); it
    is keyed by the folder's path and weight sizes.
    """
    began = time.monotonic()
    load = load or load_folder
    target, base = model_folder(model), None if against is None else model_folder(against)
    loaded, tokenizer = load(base if base is not None else target)
    if tokenizer is None and base is not None:
        tokenizer = load_tokenizer(target)
    _require_continuation(loaded, base if base is not None else target)
    source = data if isinstance(data, TextSource) else load_text(data, tokenizer)
    ids = load_windows(source, tokenizer, seqlen, windows, seed)
    reference: Reference | None = None
    if base is not None:
        identity = f"{base.resolve()} {weight_bytes(base)}"
        reference = reference_logprobs(
            loaded,
            ids,
            second_half=second_half,
            cache=cache,
            identity=identity,
            progress=_stage(progress, "reference"),
        )
        del loaded  # the reference model's memory, before the other is opened
        loaded, _ = load(target)
    result = evaluate_language(
        loaded, ids, reference, second_half=second_half, progress=_stage(progress, "model")
    )
    return Comparison(
        model=str(model),
        against=None if against is None else str(against),
        model_bytes=weight_bytes(target),
        against_bytes=None if base is None else weight_bytes(base),
        data=source.spec,
        data_sha256=source.sha256,
        seqlen=seqlen,
        seed=seed,
        second_half=second_half,
        result=result,
        seconds=time.monotonic() - began,
    )


def load_folder(folder: Path) -> tuple[nn.Module, Any]:
    """Open a packed checkpoint with the runtime, any other folder with `transformers`."""
    if not is_packed(folder):
        return load_dense(folder)
    from quantlib.runtime.load import load

    packed = load(folder)
    return packed.model, packed.tokenizer


def is_packed(folder: Path) -> bool:
    """Whether the folder's config.json says that quantlib made it."""
    config = read_json(folder / "config.json")
    described = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == "quantlib"


def load_dense(folder: Path) -> tuple[nn.Module, Any]:
    """Open a folder with `transformers`, in float32: a reference should add no rounding."""
    from quantlib.models.skeleton import from_pretrained

    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type")) if isinstance(config, dict) else ""
    options = {"dtype": torch.float32, "use_safetensors": True}
    try:
        model = from_pretrained(model_type, folder, **options).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"model {folder} could not be opened: {reason[0]}") from error
    return model, load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_continuation(model: nn.Module, folder: Path) -> None:
    """Raise UsageError for a model that does not continue a text."""
    head = getattr(model, "get_output_embeddings", None)
    heard = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if heard or (head is not None and head() is None):
        raise UsageError(
            f"{folder} is no model that continues a text: evaluate it on records of what it reads, "
            "with --suite multimodal"
        )


def model_folder(path: str | Path) -> Path:
    """The path, if there is a model. Raises ModelError when it has no config.json."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {path}: there is no config.json; give the folder of a model")
    return folder


def weight_bytes(folder: Path) -> int:
    """Size of all safetensors files: what the weights take on disk, headers included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _stage(progress: StageProgress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _size(count: int | None) -> str:
    return "-" if count is None else format_size(count)


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)
