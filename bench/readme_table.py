"""The README's table of results, made from `bench/results/` so that no figure is typed by hand.

python -P -m quantlib.bench.readme_table            print it
python -P -m quantlib.bench.readme_table --write    put it into README.md, between its two markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quantlib.bench.record import RESULTS
from quantlib.checkpoint.disk import atomic_write_text

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
README = Path(__file__).resolve().parent.parent / "README.md"


def results_table() -> str:
    """Markdown: one row per budget, KL of quantlib and of simpler allocations at equal bytes."""
    budgets = _read("quality_budgets")["rows"]
    baselines = {row["budget_mb"]: row for row in _read("quality_baselines")["rows"]}
    lines = [
        "| checkpoint | KL, measured | KL, predicted (95 %) | perplexity "
        "| uniform bits | first/last + down_proj | random |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in budgets:
        base = baselines[row["budget_mb"]]
        kl = row["predicted"]
        cells = [
            f"{row['bytes'] / 1e6:.1f} MB",
            f"**{row['kl']:.4f}** ± {row['kl_error']:.4f}",
            f"{kl['kl']:.3f} ({kl['kl_low']:.3f} to {kl['kl_high']:.3f})",
            f"x {row['perplexity_ratio']:.3f}",
            *(f"{base[name]['kl']:.4f}" for name in ("uniform", "first_last", "random")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_sentence() -> str:
    """What the two presets take and give at one budget, and what re-rounding gives. Its time is not
    said: its result may have been made from re-rounded entries that were already there."""
    presets = {row["preset"]: row for row in _read("quality_presets")["rows"]}
    refined = {row["variant"]: row for row in _read("quality_refinement")["rows"]}
    best, fast = presets["best"], presets["fast"]
    return (
        f"From nothing to {best['bytes'] / 1e6:.1f} MB on two cores: {best['seconds'] / 60:.0f} "
        f"minutes (KL {best['kl']:.4f}), or {fast['seconds'] / 60:.0f} with `--fast` (KL "
        f"{fast['kl']:.4f}). `--refine` on top of the former gives {refined['refine']['kl']:.4f}."
    )


def updated(text: str) -> str:
    """README text with what is between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{results_table()}\n\n{time_sentence()}\n{END}{after}"


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        atomic_write_text(README, updated(README.read_text(encoding="utf-8")))
    else:
        print(results_table())


if __name__ == "__main__":
    main()
