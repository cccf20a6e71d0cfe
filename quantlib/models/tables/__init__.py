"""The known families. `find("llama")` is the table of a model type, None when there is none."""

from __future__ import annotations

from quantlib.models.families import Family
from quantlib.models.tables import (
    classifiers,
    encoders,
    gemma,
    llama,
    moe,
    omni,
    phi,
    pisces,
    qwen,
    unified,
    vision,
    vlm,
    vq,
    whisper,
)

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *qwen.FAMILIES,
    *gemma.FAMILIES,
    *phi.FAMILIES,
    *moe.FAMILIES,
    *vision.FAMILIES,
    *classifiers.FAMILIES,
    *encoders.FAMILIES,
    *vlm.FAMILIES,
    *whisper.FAMILIES,
    *vq.FAMILIES,
    *unified.FAMILIES,
    *omni.FAMILIES,
    *pisces.FAMILIES,
)


def find(model_type: str) -> Family | None:
    """The family whose table lists this `model_type` of config.json."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
