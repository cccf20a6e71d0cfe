"""What models do with records, family by family.

    routes      a route: one stream, as data
    tools       tokenizer and processors beside a model
    reading     text, and answers about pictures
    vlm, unified, one_vocabulary, continuous, speech, omni, vectors
                the families
    talker, voices
                speaking, in models that do
    workload    records of a run, by stream, calibrated on and held back

`find("janus")` is what a family's models do; None where nobody has said so.
"""

from __future__ import annotations

from quantlib.calibration.paths import (
    continuous,
    omni,
    one_vocabulary,
    speech,
    unified,
    vectors,
    vlm,
)
from quantlib.calibration.paths.route import Routes

FAMILIES: tuple[Routes, ...] = (
    *vlm.FAMILIES,
    *unified.FAMILIES,
    *one_vocabulary.FAMILIES,
    *continuous.FAMILIES,
    *speech.FAMILIES,
    *omni.FAMILIES,
    *vectors.FAMILIES,
)


def find(model_type: str) -> Routes | None:
    """The routes of models of this type."""
    return next((routes for routes in FAMILIES if model_type in routes.model_types), None)


def known() -> list[str]:
    """Model types that have routes."""
    return sorted(name for routes in FAMILIES for name in routes.model_types)
