"""A process that measures plans of a work directory until the one that started it closes its
stdin.

    python -P -m quantlib.pipeline.trial_worker WORK NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quantlib.errors import QuantlibError
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.validate import THREADS, TRIALS_FILE, measure_in, settings
from quantlib.search.trials import FAILED, TrialJournal, parent_left, serve


def main(work: Path, name: str) -> int:
    """Measure; returns the exit code."""
    try:
        with reopen_run(work, with_data=True, reading=True) as run:
            journal = TrialJournal(work / TRIALS_FILE, settings(run))
            torch.set_num_threads(THREADS)
            serve(journal, measure_in(run), name, parent_left)
    except QuantlibError as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
