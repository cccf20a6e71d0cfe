"""Bits of the KV cache by modality, on the test-bed `unified`.

    python -P -m quantlib.bench.kv_modalities

The bed's full-precision model is evaluated in both directions with its cache in one format after
the other: the same bits for all tokens, fewer for images that are read or written, and scales of
written images that are known beforehand (calibrated on other pictures) beside those of each token.
Weights stay as they are, so nothing else is to blame. A row tells the figures of `quantlib eval
--suite multimodal` and the bytes that a token of each modality takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlib.bench import record
from quantlib.bench.beds.command import JUDGE
from quantlib.bench.beds.folders import CALIBRATION, MODEL, TEST
from quantlib.bench.beds.unified import BED
from quantlib.calibration.paths import find
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import GENERATION, read_records
from quantlib.evaluation.multimodal import Baseline, Given, open_model
from quantlib.evaluation.passes import Options
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.modality import MODALITIES, Modality
from quantlib.runtime.modality_cache import Static, full_formats
from quantlib.runtime.modality_hooks import attach_caches, image_token_of
from quantlib.runtime.static_scales import static_scales

PICTURES = 32
"""Of calibration, that static scales are found on."""
SEQLEN = 512
Row = tuple[dict[Modality, str], bool]
"""Formats, and whether scales of written images are known beforehand."""
ROWS: dict[str, Row] = {
    "int8": ({"text": "int8"}, False),
    "int4g32": ({"text": "int4g32"}, False),
    "int4": ({"text": "int4"}, False),
    "images read int4": ({"text": "int8", "image_input": "int4"}, False),
    "images written int4": ({"text": "int8", "image_output": "int4"}, False),
    "images written int4, static": ({"text": "int8", "image_output": "int4"}, True),
    "images written int8, static": ({"text": "int8", "image_output": "int8"}, True),
    "images int4g32, values int8": (
        {"text": "int8", "image_input": "int4g32/int8", "image_output": "int4g32/int8"},
        False,
    ),
}


@dataclass
class Opening:
    """Opens the bed's model, with the caches of the row that is evaluated now."""

    formats: dict[Modality, KvFormat] | None = None
    static: Static = field(default_factory=dict)

    def __call__(self, folder: Path) -> Any:
        """The model of a folder."""
        model = open_model(folder)
        if self.formats is not None:
            attach_caches(model, self.formats, image_token_of(model.config), self.static)
        return model


def measure(folder: Path, wanted: Mapping[str, Row], limit: int, seed: int) -> dict[str, Any]:
    """The rows of a bed's folder; at most so many records of a kind."""
    opening, judge = Opening(), folder / JUDGE
    given = Given(
        folder / TEST,
        judge if judge.exists() else None,
        limit=limit,
        options=Options(seed=seed, guidance=BED.guidance),
        load=opening,
    )
    rows = {}
    with Baseline(folder / MODEL, given) as baseline:
        for name, (formats, is_static) in wanted.items():
            parsed = {modality: KvFormat.parse(form) for modality, form in formats.items()}
            opening.formats, opening.static = None, {}
            scales = scales_of(opening(folder / MODEL), folder, parsed) if is_static else {}
            opening.formats, opening.static = parsed, scales
            result = baseline.evaluate(folder / MODEL)
            rows[name] = {
                "formats": formats,
                "static": is_static,
                "bytes_per_token": bytes_per_token(parsed, is_static, opening(folder / MODEL)),
                "static_bytes": sum(meta.nbytes for meta in scales.values()),
                "figures": [figure.to_json() for figure in result.figures],
            }
    return rows


def scales_of(model: Any, folder: Path, formats: Mapping[Modality, KvFormat]) -> Static:
    """Static scales of written images, from the bed's calibration records."""
    routes = find(model.config.model_type)
    assert routes is not None
    (route,) = [one for one in routes.routes if one.stream == "image"]
    tools = Tools(folder / MODEL, model.config.to_dict(), SEQLEN)
    wanted = [one for one in read_records(folder / CALIBRATION) if one.kind == GENERATION]
    samples = (route.sample(tools, model, one) for one in islice(wanted, PICTURES))
    runs: list[Callable[[], Any]] = [
        partial(route.run, model, **sample.inputs) for sample in samples
    ]
    tokens = model.config.vision_config.num_image_tokens
    return static_scales(model, runs, formats, "image_output", tokens)


def bytes_per_token(
    formats: Mapping[Modality, KvFormat], is_static: bool, model: Any
) -> dict[str, int]:
    """Modality -> bytes that one token takes in all layers."""
    config = model.config.text_config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    heads = config.num_hidden_layers * config.num_key_value_heads
    found: dict[str, int] = {}
    for modality, form in zip(MODALITIES, full_formats(formats), strict=True):
        size = form.bytes_per_position(head_dim)
        if is_static and modality == "image_output":
            size -= 4 * sum(len(side.groups(head_dim)) for side in (form.key, form.value))
        found[modality] = heads * size
    return found


def main(
    limit: Annotated[int, typer.Option(min=1, help="Records of a kind.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Measure, and keep `results/kv_modalities_unified.json`."""
    rows = measure(BED.fetch(), ROWS, limit, seed)
    settings = {"limit": limit, "seed": seed, "pictures": PICTURES}
    print(record.write("kv_modalities_unified", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
