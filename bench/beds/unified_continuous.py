"""The test-bed `unified-continuous`: the task of `unified` in the form of Pisces. A model of 4.7
million parameters writes pictures as nine continuous vectors, which a flow decoder draws.

Training starts from the committed weights of `unified`.

    python -P -m quantlib.bench.beds.unified_continuous build     # the bed's folder
    python -P -m quantlib.bench.beds.unified_continuous gates     # what the model can do, as JSON
    python -P -m quantlib.bench.beds.unified_continuous train     # goes on where it was stopped
    python -P -m quantlib.bench.beds.unified_continuous release   # weights to commit
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantlib.bench.beds import continuous_gates, continuous_model, continuous_stages, unified
from quantlib.bench.beds.command import JUDGE, Bed, commands, run


def train(stages: Path, digits: Path, seed: int, steps_divided_by: int = 1) -> Any:
    """All stages, from the committed `unified` model and with its judge."""
    janus = unified.BED.load(unified.BED.weights)
    stages.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(unified.BED.weights / JUDGE, stages / JUDGE)
    return continuous_stages.train(stages, janus, digits, seed, steps_divided_by)


BED = Bed(
    name="unified-continuous",
    empty=continuous_model.build,
    train=train,
    measure=continuous_gates.measure,
    guidance=continuous_model.GUIDANCE,
)
app = commands(BED, __doc__)

if __name__ == "__main__":
    run(app)
