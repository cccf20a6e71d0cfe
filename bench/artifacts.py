"""The models that `bench.decode` runs, made once and kept in the user's cache folder.

GGUF files come from llama.cpp's own tools, weighted with an importance matrix of the calibration
text where quality is compared (as its users are advised to). The random model of Llama-3.2-1B's
shape is one set of weights for both engines.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from quantlib.bench import assets, checkpoints
from quantlib.bench.checkpoints import (
    LLAMA_1B,
    LLAMA_8B,
    AnySchemes,
    PlannedSchemes,
    Schemes,
)
from quantlib.bench.peers.llama_cpp import LlamaCpp

IMATRIX_WINDOWS = 60
SMOLLM2_QUICK = Schemes("w4g64z5s5", "w6g64zs6")
"""Of the uncalibrated SmolLM2: bytes below those of Q4_0, which keeps the tied head in 8 bits."""
LLAMA_1B_SCHEMES = Schemes("w4g32zs4", "w6g64zs6")
"""4.25 and 6.2 bits a weight, where Q4_0 takes 4.5 and, for the tied head, 6.6."""
SMOLLM2_PLAN = "smollm2-69.6MB"
"""What quantlib gives SmolLM2 at 4.14 bits a weight, where it still loses less than Q4_0 does at
5.46 (`bench.decode` measures both)."""
LLAMA_8B_SCHEMES = Schemes("w4g64z5s5", "w6g64zs6")


def folder() -> Path:
    """Where they are kept."""
    return assets.default_cache() / "bench"


def kept(name: str, build: Callable[[Path, Path], object]) -> Path:
    """The file or folder `name` of the cache. When it is not there, `build(target, scratch)` makes
    it, and it appears when it is complete; `scratch` is a folder that is deleted afterwards."""
    target = folder() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
            made = Path(scratch, "made", name)
            made.parent.mkdir()
            build(made, Path(scratch))
            made.rename(target)
    return target


def _without_scratch(build: Callable[[Path], object], target: Path, _: Path) -> None:
    build(target)


def smollm2_f32(llama: LlamaCpp) -> Path:
    """SmolLM2-135M in full precision as GGUF."""
    model = assets.fetch_smollm2()
    return kept("smollm2-f32.gguf", lambda made, _: llama.convert(model, made, "f32"))


def smollm2_gguf(llama: LlamaCpp, kind: str, weighted: bool) -> Path:
    """SmolLM2-135M in one of llama.cpp's types; weighted: with an importance matrix."""
    full = smollm2_f32(llama)
    imatrix = smollm2_imatrix(llama) if weighted else None
    name = f"smollm2-{kind}{'-imatrix' if weighted else ''}.gguf"
    return kept(name, lambda made, _: llama.quantize(full, made, kind, imatrix))


def smollm2_imatrix(llama: LlamaCpp) -> Path:
    """llama.cpp's importance matrix of SmolLM2-135M on the calibration text."""
    full, text = smollm2_f32(llama), assets.wikipedia_text("calibration")
    return kept(
        "smollm2-imatrix.gguf",
        lambda made, _: llama.importance(full, text, made, IMATRIX_WINDOWS),
    )


def smollm2_rounded() -> Path:
    """SmolLM2-135M packed without calibration, for speed alone."""
    model, schemes = assets.fetch_smollm2(), SMOLLM2_QUICK
    name = f"smollm2-rounded-{schemes.linear}-{schemes.embedding}"
    return kept(name, lambda made, _: checkpoints.pack_rounded(model, made, schemes))


def llama_1b(llama: LlamaCpp | None) -> tuple[dict[str, Path], Path | None]:
    """The random model of Llama-3.2-1B's shape: packed, by label, and as Q4_0 if llama.cpp is
    there.

    "": about the bits of Q4_0 everywhere; " mixed": as SMOLLM2_PLAN. Needs 6 GB of disk while it is
    made, and keeps 2.1 GB.
    """
    same, mixed = LLAMA_1B_SCHEMES, PlannedSchemes.load(SMOLLM2_PLAN, LLAMA_1B.layers)
    schemes: dict[str, AnySchemes] = {"": same, " mixed": mixed}
    packed = {
        "": folder() / f"llama-1b-rounded-{same.linear}-{same.embedding}",
        " mixed": folder() / f"llama-1b-rounded-{mixed.name}",
    }
    gguf = folder() / "llama-1b-Q4_0.gguf"
    if all(path.exists() for path in packed.values()) and (llama is None or gguf.exists()):
        return packed, gguf if llama else None
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder()) as scratch:
        tokenizer = assets.fetch_smollm2()
        source = checkpoints.write_source(LLAMA_1B, Path(scratch, "source"), tokenizer)
        for label, path in packed.items():
            pack = partial(checkpoints.pack_rounded, source, schemes=schemes[label])
            kept(path.name, partial(_without_scratch, pack))
        if llama is not None and not gguf.exists():
            full = Path(scratch, "full.gguf")
            llama.convert(source, full, "bf16")
            shutil.rmtree(source)
            kept(gguf.name, lambda made, _: llama.quantize(full, made, "Q4_0"))
    return packed, gguf if llama else None


def llama_8b(scratch: Path) -> Path:
    """A packed checkpoint of random codes in Llama-3.1-8B's shape, 4.5 GB, in `scratch`."""
    return checkpoints.pack_random(LLAMA_8B, scratch / "llama-8b", LLAMA_8B_SCHEMES)
