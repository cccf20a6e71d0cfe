"""What the user asked for: one validated record, written as YAML and hashed into everything it
influences.

Presets are data: a preset fills every field the user did not set. `best` is tuned for quality
within a quarter of an hour on two cores for a 135M model, `fast` for three minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantlib.errors import FormatError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.search.latency import parse_latencies

# fmt: off
NATIVE_SCHEMES = (
    "w2g64z4s4", "w2g32z4s4", "w3g64z4s4", "w3g32z4s4", "w4g64z5s5",
    "w4g32zs4", "w5g64zs5", "w5g32zs5", "w6g64zs6", "w8g64zs6",
)
# fmt: on
"""Candidates for quantlib's own kernels: widths 2..8, groups of 32 and 64, two-level scales, zero
points of 4..8 bits. All lie on the front of weighted error against bits per weight on SmolLM2
(bench/results/rounding.json). Symmetric formats do not; groups of 128 do, as smaller steps between
these widths; they are left out only to round less."""
FUSED_SCHEMES = ("w4g32", "w4g64", "w4g128", "w8g32", "w8g128", "w8")
"""Candidates that engines with fused linears (vLLM's Marlin path) run: symmetric 4 and 8 bits,
float16 scales."""

PRESETS: dict[str, dict[str, Any]] = {
    "best": {"windows": 40, "passes": 3, "probes": 8, "probe_windows": 8, "refine": False},
    "fast": {
        "windows": 10,
        "passes": 1,
        "probes": 0,
        "probe_windows": 4,
        "refine": False,
        "schemes": ("w2g32z4s4", "w3g32z4s4", "w4g32zs4", "w5g32zs5", "w6g32zs6"),
    },
}


class Recipe(BaseModel):
    """Everything that decides the result of a run, except the size and its constraints.

    data:          calibration text: a file, JSONL, a folder, or `hub:name` (`calibration.data`).
    windows, seqlen, seed: calibration windows, their length in tokens, the seed of every draw.
    schemes:       candidate schemes.
    gradients:     False scores every block by its own output error alone.
    damping:       added to the diagonal of Hessians, as a fraction of its mean.
    passes:        coordinate-descent passes after GPTQ.
    probes:        plans whose KL is really measured to calibrate the prediction, at least 3; 0 for
                   none.
    probe_windows: windows each probe is measured on: of the same text, and never calibrated on.
    refine:        re-round the chosen plan block by block with quantized inputs.
    swaps:         exchanges between weights to try on true KL after solving (`search.refine`); 0
                   for none.
    strength:      how far re-rounding moves towards the least-squares target
                   (`rounding.asymmetric`).
    latency:       latency budgets on this machine, as --latency takes them (`search.latency`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(min_length=1)
    preset: Literal["best", "fast"] = "best"
    seqlen: int = Field(512, ge=16, le=131072)
    windows: int = Field(40, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 63)
    schemes: tuple[str, ...] = NATIVE_SCHEMES
    gradients: bool = True
    damping: float = Field(0.01, gt=0, lt=1)
    passes: int = Field(3, ge=0, le=20)
    probes: int = Field(8, ge=0, le=64)
    probe_windows: int = Field(8, ge=1)
    swaps: int = Field(0, ge=0, le=10_000)
    refine: bool = False
    strength: float = Field(0.5, ge=0, le=1)
    latency: tuple[str, ...] = ()

    @field_validator("schemes")
    @classmethod
    def _known_schemes(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        """Canonical names, each once."""
        if not schemes:
            raise ValueError("name at least one candidate scheme, such as w4g64")
        parsed = []
        for name in schemes:
            try:
                scheme = Scheme.parse(name)
            except FormatError as error:
                raise ValueError(str(error)) from error
            if scheme.weight is None:
                raise ValueError(
                    f"{name} leaves a weight as it is and cannot be a candidate; the most exact "
                    "one is w8g32"
                )
            if scheme.activation_bits != 16:
                raise ValueError(
                    f"{name} rounds activations, which calibration does not score yet; write "
                    f"{scheme.weight}"
                )
            parsed.append(str(scheme))
        return tuple(dict.fromkeys(parsed))

    @field_validator("latency")
    @classmethod
    def _known_latency(cls, latency: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_latencies(latency)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return latency

    @model_validator(mode="after")
    def _enough_to_measure(self) -> Recipe:
        if self.probes in (1, 2):
            raise ValueError("probes must be 0, or at least 3: fewer do not carry a line")
        if self.swaps and self.probe_windows < 2:
            raise ValueError("swaps need at least 2 probe_windows to tell a gain from chance")
        return self

    @staticmethod
    def create(**given: Any) -> Recipe:
        """A recipe from the preset and the fields that are given (None counts as not given).

        Raises UsageError naming every field that is wrong.
        """
        asked = {key: value for key, value in given.items() if value is not None}
        preset = asked.get("preset", "best")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        try:
            return Recipe(**{**PRESETS[preset], **asked})
        except ValidationError as error:
            details = "; ".join(_sentence(dict(one)) for one in error.errors())
            raise UsageError(f"the recipe is not valid: {details}") from error

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a YAML recipe. Raises UsageError when it is missing, no YAML, or not valid."""
        return Recipe.create(**read_fields(path))

    def to_yaml(self) -> str:
        """YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML recipe, unchecked. Raises UsageError when it is not a YAML mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the recipe {path} is not YAML: {reason}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(
            f"the recipe {path} must be a YAML mapping of fields, such as 'data: text.txt'"
        )
    return data


def _sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors: the field, and what is wrong with it."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no field {field!r}; the fields are {', '.join(Recipe.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
