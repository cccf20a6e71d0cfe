"""What the user asked for: one validated record, written as YAML and hashed into everything it
influences.

Presets are data: a preset fills every field the user did not set. `best` is tuned for quality
within a quarter of an hour on two cores for a 135M model, `fast` for three minutes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantlib.errors import FormatError, UsageError
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.nonlinear.rule import Rule
from quantlib.models.modality import Modality
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
_RESQ_LINEARS = (
    ("w3g64z4s4", "h8/32", (("g64", 0), ("g128", 0), ("g64", -1))),
    ("w3g64z4s4", "h8/16", (("g64", 0),)),
    ("w4g64z5s5", "", (("g64", 0),)),
    ("w4g64z5s5", "h8/32", (("g64", 0), ("g128", 0), ("g64", 1), ("g64", -1))),
    ("w4g64z5s5", "h8/16", (("g64", 0), ("g128", 0))),
    *(("w4g64z5s5", high, (("g64", 0),)) for high in ("h8/8", "h8x3/16", "h8/4", "h8/2")),
    ("w4g32zs4", "h8/32", (("g64", 0),)),
    ("w5g64zs5", "h8/32", (("g64", 0), ("g64", 1))),
    ("w5g64zs5", "h8/16", (("g64", 0),)),
    ("w6g64zs6", "h8/32", (("g64", 0), ("g64", 1))),
)
"""Weights whose inputs are rounded to few bits: their formats; shares of columns at 8 bits; how the
other inputs are rounded, in groups that share a scale, and in how many bits more than asked for."""
_RESQ_COARSE = (
    ("w3g64z4s4", "h8/32", (("", 0),)),
    ("w4g128z5s5", "", (("", 0),)),
    ("w4g128z5s5", "h8/32", (("", 0), ("", -1))),
    ("w4g64z5s5", "h8/32", (("", 0),)),
    ("w5g64zs5", "h8/32", (("", 0),)),
)
"""Further ones, whose inputs have one scale for all low columns: for budgets that scales of groups
do not fit in beside the codes."""
_COARSE_BELOW = 0.25
"""Of a bit beyond the whole ones: scales of 64 columns take 0.31 and more."""
_RESQ_WIDE = ("w4g64z5s5", "w5g64zs5", "w8g64zs6")
"""Weights whose inputs all have 8 bits."""
_RESQ_EMBEDDINGS = ("w3g32z4s4", "w4g32zs4", "w5g32zs5", "w6g64zs6", "w8g64zs6")
FUSED_SCHEMES = ("w4g32", "w4g64", "w4g128", "w8g32", "w8g128", "w8")
"""Candidates that engines with fused linears (vLLM's Marlin path) run: symmetric 4 and 8 bits,
float16 scales."""

# fmt: off
_FLOAT_LINEARS = (
    "mxfp4amxfp4", "mxfp4amxfp4hmxfp6/8", "mxfp4amxfp4hmxfp8/32", "mxfp4amxfp4hmxfp8/16",
    "mxfp4amxfp4hmxfp8/8", "mxfp4amxfp4hmxfp8/4", "nvfp4anvfp4", "nvfp4anvfp4hfp8/32",
    "nvfp4anvfp4hfp8/16", "nvfp4anvfp4hfp8/8", "mxfp6amxfp6", "mxfp8amxfp8",
)
# fmt: on
"""The same in floating point: groups of 32 or 16 share a scale, wide columns have 6 or 8 bits."""

TEXT_DAMPING, STREAM_DAMPING = 0.01, 0.05
"""Records are few: Whisper's decoder sees some two thousand tokens, for matrices with as many
columns. On its utterances 0.05 costs a quarter less KL than 0.01 (scratch, one seed)."""
STREAM_EMBEDDINGS = (
    "w6g64zs6@1/64+w4g32zs4@1/16+w3g32z4s4@1/4+w2g32z4s4",
    "w6g64zs6@1/32+w4g32zs4@7/32+w3g32z4s4",
    "w8g64zs6@1/64+w6g64zs6@1/16+w4g32zs4@1/4+w3g32z4s4",
    "w6g64zs6@1/32+w4g32zs4",
    "w8g64zs6@1/64+w5g32zs5@3/16+w4g32zs4",
    "w8g64zs6@1/32+w6g64zs6@1/8+w5g32zs5",
)
"""Further candidates of embeddings where a model is calibrated on records: blocks of rows. A large
vocabulary may be half of such a model, and few of its rows decide what an error in it costs."""
SIXTEEN_BITS = ("bf16", "f16")
"""Further candidates of every weight there: to stay as it is. A budget that leaves 8 bits and more
for each parameter is best spent by leaving what a task is sensitive to alone."""
METHODS = ("resq", "resq-fp")
"""What --scheme knows: candidates, a rotation and a KV cache under one name (`method_fields`), in
integers or in the floating-point formats of microscaling hardware."""

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


def method_fields(method: str, activations: float | None = None) -> dict[str, Any]:
    """The fields of a recipe that a method of METHODS stands for.

    activations: mean bits that are asked for; low columns get the whole bits in it (4 by default).
    Raises UsageError for another method, and where no candidate has so few bits.
    """
    if method not in METHODS:
        raise UsageError(
            f"unknown --scheme {method!r}: use {', '.join(METHODS)}; to name candidates one by "
            "one, use --schemes"
        )
    if method == "resq-fp":
        return {
            "rotation": "gradients",
            "kv": "int4",
            "schemes": (*_FLOAT_LINEARS, *_RESQ_EMBEDDINGS),
        }
    low = 4 if activations is None else int(activations)
    if not 2 <= low <= 8:
        raise UsageError(f"activations can have 2 to 8 bits, not {activations:g}")
    coarse = activations is not None and activations - low < _COARSE_BELOW
    linears = [
        f"{weight}a{bits}{'' if bits == 8 else 'z'}{group}{high}"
        for weight, high, inputs in (*_RESQ_LINEARS, *(_RESQ_COARSE if coarse else ()))
        for group, more in inputs
        if 2 <= (bits := low + more) <= 8
    ]
    linears += [f"{weight}a8g128" for weight in _RESQ_WIDE]
    return {
        "rotation": "gradients",
        "kv": "int4",
        "schemes": tuple(dict.fromkeys((*linears, *_RESQ_EMBEDDINGS))),
    }


def kv_name(text: str | None) -> str | None:
    """What --kv says as the name of a KV cache format: bits, or already a name."""
    names = {"16": "f32", "8": "int8", "4": "int4"}
    return None if text is None else names.get(text, text)


class Recipe(BaseModel):
    """Everything that decides the result of a run, except the size and its constraints.

    data:          calibration text: a file, JSONL, a folder, or `hub:name` (`calibration.data`); of
                   models of several parts, records of all that they do (`calibration.records`).
    windows, seqlen, seed: calibration windows (records of every stream), their length in tokens,
                   the seed of every draw.
    schemes:       candidate schemes; by default, a model that is calibrated on records has
                   STREAM_EMBEDDINGS and SIXTEEN_BITS, too (`for_streams`).
    gradients:     False scores every block by its own output error alone.
    damping:       added to the diagonal of Hessians, as a fraction of its mean; by default
                   TEXT_DAMPING, or STREAM_DAMPING for models that are calibrated on records.
    passes:        coordinate-descent passes after GPTQ.
    probes:        plans whose KL is really measured to calibrate the prediction, at least 3; 0 for
                   none.
    probe_windows: windows each probe is measured on: of the same text, and never calibrated on.
    refine:        re-round the chosen plan block by block with quantized inputs (of a model of
                   several parts all blocks of all parts, and the linears between them).
    swaps:         exchanges between weights to try on true KL after solving (`search.refine`); 0
                   for none.
    strength:      the longest step that re-rounding takes towards least-squares targets, 1 for all
                   of it (`rounding.asymmetric`); 0 for none.
    learning:      steps of learned rounding for each block that is re-rounded (`rounding.learned`);
                   0 for none.
    rows:          mixtures of the candidates by rows join those of linears (`pipeline.row_blocks`):
                   smaller losses at the same size. Their weights are several matrices each.
    rotation:      the basis the model is changed to before anything is measured: "none"; "pca",
                   ResQ's; "weights" or "gradients", which also weigh what an error costs
                   (`transforms.bases`).
    kv:            the format of the KV cache the checkpoint is made for (`kernels.kv_format`), or
                   mean bits, scales counted: every layer's keys and values then get formats of
                   their own (`pipeline.caches`).
    kv_modalities: formats of the KV cache by what a token is ("text", "image_input",
                   "image_output"), instead of `kv`.
    kv_static:     modalities of images whose scales of the KV cache are calibrated, one for each
                   place in an image (`kernels.kv_static`).
    nonlinear:     "sqnr=30" or "output=20": softmax, GELU and LayerNorm of encoders are computed in
                   integers where that keeps so many dB (`kernels.nonlinear.rule`).
    latency:       latency budgets on this machine, as --latency takes them (`search.latency`).
    weighting:     which tokens decide how a model of several parts is rounded
                   (`calibration.watch.Weighting`): each by its own gradient ("token"), by the root
                   of that ("root", the default there), by the mean gradient of its modality
                   ("modality"), or all alike ("none").
    keep:          fnmatch patterns of components, and of weights, that stay as they are.
    expert_tokens: what every expert of a mixture in a model of several parts has to see.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(min_length=1)
    preset: Literal["best", "fast"] = "best"
    seqlen: int = Field(512, ge=16, le=131072)
    windows: int = Field(40, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 63)
    schemes: tuple[str, ...] = NATIVE_SCHEMES
    gradients: bool = True
    damping: float | None = Field(None, gt=0, lt=1)
    passes: int = Field(3, ge=0, le=20)
    probes: int = Field(8, ge=0, le=64)
    probe_windows: int = Field(8, ge=1)
    swaps: int = Field(0, ge=0, le=10_000)
    refine: bool = False
    strength: float = Field(1.0, ge=0, le=1)
    learning: int = Field(0, ge=0, le=10_000)
    latency: tuple[str, ...] = ()
    rows: bool = False
    rotation: Literal["none", "pca", "weights", "gradients"] = "none"
    kv: str = "f32"
    kv_modalities: dict[Modality, str] = Field(default_factory=dict)
    kv_static: tuple[Literal["image_input", "image_output"], ...] = ()
    nonlinear: str | None = None
    weighting: Literal["token", "root", "modality", "none"] | None = None
    keep: tuple[str, ...] = ()
    expert_tokens: int = Field(32, ge=1)

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
            parsed.append(str(scheme))
        if all(name in KEPT for name in parsed):
            raise ValueError(f"{parsed[0]} leaves a weight as it is: name a scheme that does not")
        return tuple(dict.fromkeys(parsed))

    @field_validator("kv")
    @classmethod
    def _known_kv(cls, kv: str) -> str:
        bits = _number(kv)
        if bits is not None:
            if not 2 <= bits <= 16:
                raise ValueError(f"a KV cache has 2 to 16 bits, not {kv}")
            return f"{bits:g}"
        try:
            return str(KvFormat.parse(kv))
        except FormatError as error:
            raise ValueError(str(error)) from error

    @field_validator("kv_modalities")
    @classmethod
    def _known_kv_modalities(cls, formats: dict[Modality, str]) -> dict[Modality, str]:
        try:
            return {name: str(KvFormat.parse(form)) for name, form in formats.items()}
        except FormatError as error:
            raise ValueError(str(error)) from error

    @field_validator("nonlinear")
    @classmethod
    def _known_nonlinear(cls, rule: str | None) -> str | None:
        try:
            return None if rule is None else str(Rule.parse(rule))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("latency")
    @classmethod
    def _known_latency(cls, latency: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_latencies(latency)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return latency

    def candidates(self, kind: str) -> tuple[str, ...]:
        """Candidate schemes of weights of a kind ("linear", "experts", "conv", "embedding",
        "head").

        Where some candidates round activations or have wider columns, those are the linears', and
        the others are for embeddings and heads, which look rows up or read the residual stream as
        it is, and for convolutions, whose inputs are no rows; if there are no others, the linears'
        formats without that.

        Blocks of rows are for embeddings alone, factors for linears and convolutions, and 2:4
        sparsity for linears; a kind that has nothing else gets the plain formats of these. Schemes
        that leave a weight as it is are for weights of all kinds that are stored so
        (`pipeline.run.candidates`).
        """
        return (*self._rounding_candidates(kind), *(n for n in self.schemes if n in KEPT))

    def _rounding_candidates(self, kind: str) -> tuple[str, ...]:
        parsed = {name: Scheme.parse(name) for name in self.schemes if name not in KEPT}
        fitting = {name: s for name, s in parsed.items() if _suits(s, kind)}
        if not fitting:
            fitting = {str(s): s for s in (_plain(found) for found in parsed.values())}
        for_linears = [name for name, s in fitting.items() if s.activation.rounds or s.high]
        if not for_linears or kind in ("linear", "experts"):
            return tuple(for_linears or fitting)
        others = [name for name in fitting if name not in for_linears]
        return tuple(others or dict.fromkeys(str(Scheme(s.weight)) for s in fitting.values()))

    @property
    def rounds_activations(self) -> bool:
        """Whether some candidate rounds the inputs of linears."""
        return any(Scheme.parse(name).activation.rounds for name in self.schemes)

    def damping_of(self, *, streams: bool) -> float:
        """`damping` of a model that is calibrated on records (`streams`), or on windows of text."""
        return self.damping or (STREAM_DAMPING if streams else TEXT_DAMPING)

    @property
    def stream_weighting(self) -> str:
        """`weighting` of a model that is calibrated on records."""
        return self.weighting or "root"

    @property
    def kv_bits(self) -> float | None:
        """Mean bits of the KV cache, where no format is named."""
        return _number(self.kv)

    @model_validator(mode="after")
    def _one_way_to_cache(self) -> Recipe:
        if self.kv_modalities and self.kv != "f32":
            raise ValueError("kv and kv_modalities both say how the KV cache is kept: give one")
        if set(self.kv_static) - set(self.kv_modalities):
            raise ValueError("kv_static is for modalities that kv_modalities has a format of")
        return self

    @model_validator(mode="after")
    def _enough_to_measure(self) -> Recipe:
        if self.probes in (1, 2):
            raise ValueError("probes must be 0, or at least 3: fewer do not carry a line")
        factored = [name for name in self.schemes if Scheme.parse(name).low_rank is not None]
        if self.refine and factored:
            raise ValueError(
                f"refine rounds weights again in one matrix each, and {factored[0]} has factors "
                "beside it: leave out one of them"
            )
        pruned = [name for name in self.schemes if _is_pruned(Scheme.parse(name))]
        if self.learning and pruned:
            raise ValueError(
                f"learning moves the codes of all columns, and those that {pruned[0]} leaves out "
                "stay zero: leave out one of them"
            )
        if self.rows and self.latency:
            raise ValueError(
                "latencies are sums of products that were timed one by one, and rows makes several "
                "small ones of a linear, whose time together nobody has measured: leave out rows, "
                "or limit the size alone"
            )
        if self.swaps and self.probe_windows < 2:
            raise ValueError("swaps need at least 2 probe_windows to tell a gain from chance")
        return self

    @property
    def leaves_weights(self) -> bool:
        """Whether weights that stay as they are count among the candidates."""
        return any(name in KEPT for name in self.schemes)

    def for_streams(self) -> Recipe:
        """The recipe of a model that is calibrated on records: with the further candidates of
        these, unless candidates were named, or latencies are limited (the native engine runs
        weights of one packed matrix)."""
        if "schemes" in self.model_fields_set or self.latency:
            return self
        return self.model_copy(
            update={"schemes": (*self.schemes, *STREAM_EMBEDDINGS, *SIXTEEN_BITS)}
        )

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


def _suits(scheme: Scheme, kind: str) -> bool:
    """Whether weights of a kind can be stored in a scheme."""
    if scheme.rows:
        return kind == "embedding"
    if scheme.low_rank is not None:
        return kind == "conv" or (kind == "linear" and not scheme.low_rank.alone)
    return not _is_pruned(scheme) or kind in ("linear", "experts")


def _is_pruned(scheme: Scheme) -> bool:
    return scheme.weight is not None and scheme.weight.sparse


def _plain(scheme: Scheme) -> Scheme:
    """The format of a scheme's weights alone, with all of their numbers."""
    return Scheme(scheme.weight and replace(scheme.weight, sparse=False))


def _number(text: str) -> float | None:
    """The number that a text is, None when it is none."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors: the field, and what is wrong with it."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no field {field!r}; the fields are {', '.join(Recipe.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
