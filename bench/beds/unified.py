"""The test-bed `unified`: a Janus of 6.6 million parameters that captions coloured-digit scenes,
answers questions about them, and draws them.

    python -P -m quantlib.bench.beds.unified build     # the bed's folder, from committed weights
    python -P -m quantlib.bench.beds.unified gates     # what the model can do, as JSON
    python -P -m quantlib.bench.beds.unified train     # all stages; goes on where it was stopped
    python -P -m quantlib.bench.beds.unified release   # the trained model as weights to commit
"""

from __future__ import annotations

from quantlib.bench.beds import unified_gates, unified_model, unified_stages
from quantlib.bench.beds.command import Bed, commands, run

BED = Bed(
    name="unified",
    empty=unified_model.build,
    train=unified_stages.train,
    measure=unified_gates.measure,
    guidance=unified_model.GUIDANCE,
)
app = commands(BED, __doc__)

if __name__ == "__main__":
    run(app)
