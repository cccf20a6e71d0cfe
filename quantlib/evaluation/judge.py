"""A judge: a small network, and plain rules, that say in words what a picture shows.

A model that writes pictures is measured by what somebody else sees in them. The somebody is one
safetensors file, and nothing in it is code: tensors, and a JSON text in the metadata entry
`quantlib_judge` that lists layers of known kinds (`LAYERS`):

    {"format": 1,
     "size": [32, 32],                       rows and columns; other pictures are resized
     "mean": [0.5, 0.5, 0.5], "std": [...],  of the pixels, which are in 0..1
     "layers": [{"kind": "conv", "name": "first", "stride": 2, "padding": 1},
                {"kind": "batch_norm", "name": "norm"}, {"kind": "relu"},
                {"kind": "mean"}, {"kind": "linear", "name": "features"}, {"kind": "relu"}],
     "heads": {"digit": {"name": "digit", "classes": ["zero", "one", ...]}},
     "rules": {"color": {"of": "foreground", "palette": {"red": [1.0, 0.0, 0.0], ...}},
               "background": {"of": "background", "palette": {...}, "after": "on"}}}

`name` is the prefix of a layer's tensors (`first.weight`, `first.bias`, ...). What the last layer
puts out, [pictures, D], are the features: heads are linears on them, and the Frechet distance
compares them. A rule needs no network: it takes the mean colour of what stands out from the border
("foreground"), or of the border ("background"), and says the nearest colour of its palette.

What a prompt asks for is found in its words: the first one that is a class of the head (or a colour
of the rule), behind the words `after` where that is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlib.checkpoint.disk import atomic_write
from quantlib.errors import DataError

METADATA = "quantlib_judge"
FORMAT = 1
PICTURES_AT_ONCE = 64

Layer = Callable[[Mapping[str, Tensor], Mapping[str, Any], Tensor], Tensor]
"""(tensors by their name without the layer's prefix, the layer's own entry, input) -> output."""


def _conv(tensors: Mapping[str, Tensor], given: Mapping[str, Any], x: Tensor) -> Tensor:
    options = {key: given[key] for key in ("stride", "padding", "groups") if key in given}
    return F.conv2d(x, tensors["weight"], tensors.get("bias"), **options)


def _linear(tensors: Mapping[str, Tensor], given: Mapping[str, Any], x: Tensor) -> Tensor:
    return F.linear(x.flatten(1), tensors["weight"], tensors.get("bias"))


def _batch_norm(tensors: Mapping[str, Tensor], given: Mapping[str, Any], x: Tensor) -> Tensor:
    moments = tensors["running_mean"], tensors["running_var"]
    weight, bias = tensors["weight"], tensors["bias"]
    return F.batch_norm(x, *moments, weight=weight, bias=bias, eps=given.get("eps", 1e-5))


def _group_norm(tensors: Mapping[str, Tensor], given: Mapping[str, Any], x: Tensor) -> Tensor:
    weight, bias = tensors["weight"], tensors["bias"]
    return F.group_norm(x, given["groups"], weight, bias, given.get("eps", 1e-5))


LAYERS: dict[str, Layer] = {
    "conv": _conv,  # weight [out, in, rows, columns], bias; stride, padding, groups
    "linear": _linear,  # weight [out, in], bias; flattens its input
    "batch_norm": _batch_norm,  # weight, bias, running_mean, running_var; eps
    "group_norm": _group_norm,  # weight, bias; groups, eps
    "relu": lambda tensors, given, x: F.relu(x),
    "gelu": lambda tensors, given, x: F.gelu(x),
    "silu": lambda tensors, given, x: F.silu(x),
    "max_pool": lambda tensors, given, x: F.max_pool2d(x, given["size"]),
    "mean_pool": lambda tensors, given, x: F.avg_pool2d(x, given["size"]),
    "mean": lambda tensors, given, x: x.mean((2, 3)),  # over rows and columns
    "flatten": lambda tensors, given, x: x.flatten(1),
}


@dataclass(frozen=True)
class Verdict:
    """Of a number of pictures: features float32 [pictures, D]; question -> a word per picture."""

    features: Tensor
    answers: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Judge:
    """See the module. Made by `load_judge`; `look` is all it does."""

    tensors: Mapping[str, Tensor]
    spec: Mapping[str, Any]

    @property
    def questions(self) -> list[str]:
        """What it answers: the names of heads and rules."""
        return [*self.spec.get("heads", {}), *self.spec.get("rules", {})]

    def look(self, pixels: Tensor) -> Verdict:
        """Judge pictures float [pictures, 3, rows, columns] in 0..1."""
        parts = [self._look(part) for part in pixels.float().split(PICTURES_AT_ONCE)]
        answers = {
            question: [word for part in parts for word in part.answers[question]]
            for question in self.questions
        }
        return Verdict(torch.cat([part.features for part in parts]), answers)

    def asked(self, prompt: str) -> dict[str, str]:
        """Question -> the word that a picture of this prompt has to be given; a question that the
        prompt says nothing about is left out."""
        found: dict[str, str] = {}
        given = {**self.spec.get("heads", {}), **self.spec.get("rules", {})}
        for question, entry in given.items():
            words = _words(prompt)
            if "after" in entry:
                words = _behind(words, _words(entry["after"]))
            known = entry.get("classes") or list(entry["palette"])
            matching = [word for word in words if word in known]
            if matching:
                found[question] = matching[0]
        return found

    @torch.no_grad()
    def _look(self, pixels: Tensor) -> Verdict:
        size = tuple(self.spec["size"])
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = pixels.clamp(0, 1)
        x = (pixels - _channels(self.spec["mean"])) / _channels(self.spec["std"])
        for layer in self.spec["layers"]:
            x = LAYERS[layer["kind"]](self._of(layer.get("name")), layer, x)
        answers = {}
        for question, head in self.spec.get("heads", {}).items():
            chosen = _linear(self._of(head["name"]), head, x).argmax(-1)
            answers[question] = [head["classes"][index] for index in chosen.tolist()]
        for question, rule in self.spec.get("rules", {}).items():
            answers[question] = nearest_colors(mean_color(pixels, rule["of"]), rule["palette"])
        return Verdict(x, answers)

    def _of(self, name: str | None) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }


def mean_color(pixels: Tensor, of: str) -> Tensor:
    """Mean colours [pictures, 3] of pictures [pictures, 3, rows, columns] in 0..1.

    of: "background": the median colour of the outermost pixels. "foreground": the mean of the
        pixels that are farther from it than half of the farthest pixel's distance.
    """
    border = torch.cat(
        [pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], dim=-1
    )
    background = border.median(dim=-1).values
    if of == "background":
        return background
    distance = (pixels - background[..., None, None]).square().sum(1, keepdim=True).sqrt()
    stands_out = (distance >= distance.amax((2, 3), keepdim=True) / 2).to(pixels.dtype)
    return (pixels * stands_out).sum((2, 3)) / stands_out.sum((2, 3))


def nearest_colors(colors: Tensor, palette: Mapping[str, Sequence[float]]) -> list[str]:
    """The name of the palette's nearest colour (Euclidean distance) for each of colors [n, 3]."""
    names = list(palette)
    known = torch.tensor([list(palette[name]) for name in names], dtype=colors.dtype)
    nearest = torch.cdist(colors, known).argmin(-1)
    return [names[index] for index in nearest.tolist()]


def save_judge(path: str | Path, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Judge:
    """Write a judge file, whole or not at all, once it has looked at an empty picture.

    Raises DataError when the spec does not fit the tensors.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    judge = _checked(stored, {"format": FORMAT, **spec}, Path(path))
    metadata = {METADATA: json.dumps(judge.spec)}
    atomic_write(Path(path), safetensors.torch.save(stored, metadata))
    return judge


def load_judge(path: str | Path) -> Judge:
    """Read a judge file. Raises DataError when it is missing, damaged, or not a judge's."""
    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"judge {path} cannot be read: {error}") from error
    if METADATA not in metadata:
        raise DataError(
            f"{path} is not a judge: its metadata has no entry {METADATA}; give a file that "
            "evaluation.judge.save_judge wrote"
        )
    try:
        spec = json.loads(metadata[METADATA])
    except ValueError as error:
        raise DataError(f"judge {path}: {METADATA} is not JSON ({error})") from error
    return _checked(tensors, spec, path)


def _checked(tensors: dict[str, Tensor], spec: Any, path: Path) -> Judge:
    """The judge, after it looked at an empty picture."""
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise DataError(f"judge {path} is of another format than {FORMAT}: make it again")
    floats = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    judge = Judge(floats, spec)
    unknown = [layer for layer in spec.get("layers", ()) if layer.get("kind") not in LAYERS]
    if unknown:
        raise DataError(f"judge {path} has a layer {unknown[0]}; the kinds are {', '.join(LAYERS)}")
    try:
        verdict = judge.look(torch.zeros(1, 3, *spec["size"]))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"judge {path}: its tensors do not fit its layers ({type(error).__name__}: {reason})"
        ) from error
    if verdict.features.ndim != 2 or not judge.questions:
        raise DataError(
            f"judge {path} answers nothing: its last layer must leave [pictures, D] "
            "(mean, flatten or linear), and it needs a head or a rule"
        )
    return judge


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values)).view(1, -1, 1, 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _behind(words: list[str], mark: list[str]) -> list[str]:
    """What follows the first place where `mark` stands; nothing where it does not."""
    for start in range(len(words) - len(mark) + 1):
        if words[start : start + len(mark)] == mark:
            return words[start + len(mark) :]
    return []
