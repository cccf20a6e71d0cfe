"""`make demo`: compress a real language model to a byte budget, and show what it cost.

Fetches SmolLM2-135M-Instruct and a Wikipedia extract, runs `quantlib compress` with the fast
preset, measures the packed checkpoint on held-out text against the original, lets both write a
sentence, and prints a before/after table. Everything lands in one folder; run it again and it
continues or reuses what is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from quantlib.bench import assets
from quantlib.checkpoint.disk import atomic_write_json
from quantlib.evaluation.compare import compare
from quantlib.pipeline.reporting import report_of

PROMPT = "What is the capital of France?"
WINDOWS = 12


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        default="76.2MB",
        help="byte budget of the whole checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", default="fast", choices=("fast", "best"), help="default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo-output"), help="default: %(default)s"
    )
    options = parser.parse_args()
    console = Console()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()

    console.rule("1. A real model and real text")
    model = assets.fetch_smollm2()
    calibration, held_out = assets.wikipedia_text("calibration"), assets.wikipedia_text("held_out")
    console.print(f"model {model}\ncalibration text {calibration}\nheld-out text {held_out}")

    console.rule(f"2. quantlib compress to {options.size}")
    from quantlib.cli.progress import Bars
    from quantlib.pipeline.compress import compress

    out = options.folder / "checkpoint"
    options.folder.mkdir(parents=True, exist_ok=True)
    result = compress(
        model,
        out=out,
        work=options.folder / "work",
        data=calibration,
        size=options.size,
        preset=options.preset,
        overwrite=True,
        progress=Bars(console),
    )

    console.rule("3. Before and after, on text it has not seen")
    found = compare(out, model, held_out, seqlen=512, windows=WINDOWS, seed=0)
    table = Table("", "before", "after")
    for row in found.rows():
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{WINDOWS} windows of {found.seqlen} tokens, second half scored; ± is one standard error"
    )

    measured = options.folder / "evaluation.json"
    atomic_write_json(measured, found.to_json())
    report = report_of(result.work, evaluation=measured)

    console.rule("4. It still talks")
    from quantlib.runtime.load import load

    quantized = load(out)
    console.print(f"[bold]{PROMPT}[/bold]\n{quantized.generate(PROMPT, max_new_tokens=40)}")
    console.rule()
    console.print(
        f"report      {report}\ncheckpoint  {out}\ntime        {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
