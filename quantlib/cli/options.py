"""Options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUDGET = "Budget (a size, latencies, or both)"
RULES = "Rules"
TASKS = "Tasks (text, answers, images ...)"
RECIPE = "Recipe"
SEARCH = "How plans are judged"
FILES = "Files"
OTHER = "Output and help"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of the model (config.json, safetensors, tokenizer), or a Hugging Face id.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Folder that quantlib compress or apply wrote.", show_default=False
    ),
]

Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes of the whole checkpoint: 82.8MB, 1.2GB, 85MiB, or 30% of the source.",
        rich_help_panel=BUDGET,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="True bits per parameter: all bytes of the checkpoint counted, such as 4.25.",
        rich_help_panel=BUDGET,
    ),
]

Latency = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TIME",
        help="Time on this machine: 12ms for each decoded token, decode=12ms@2048 for one with so "
        "much context, prefill=0.5s@512 for a prompt of 512 tokens. May be repeated.",
        rich_help_panel=BUDGET,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads that a latency is for; torch's number unless said.",
        rich_help_panel=BUDGET,
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="exact|int8|int8g128|fast",
        help="Activations that a latency is for, as in generate; the scheme decides unless said.",
        rich_help_panel=BUDGET,
    ),
]

Activations = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="The most mean bits of the inputs of linears, scales counted, where candidates round "
        "them: 4.5 leaves room for 4-bit codes, their scales, and a few columns at 8 bits.",
        rich_help_panel=BUDGET,
    ),
]

ComponentSize = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COMPONENT=SIZE",
        help="Bytes of a component, such as vision_tower=2MB, or image_decoder=30% of its own; "
        "quantlib inspect lists them. Beside --size or --bits, or alone; image_* is one budget for "
        "all whose names begin so. May be repeated.",
        rich_help_panel=BUDGET,
    ),
]
TaskWeights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=X,...",
        help="How much each task counts: text=1,image=2. What is weighed is the increase of a "
        "task's loss relative to the full-precision model's; tasks that are not named count 1, "
        "and 0 leaves one out. For models with several tasks.",
        rich_help_panel=TASKS,
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        metavar="sum|minmax",
        help="Minimise the sum of the tasks' increases (the default), or the largest of them: no "
        "task then pays for the others.",
        rich_help_panel=TASKS,
    ),
]

Engine = Annotated[
    str,
    typer.Option(
        metavar="quantlib|vllm",
        help="Who will run the checkpoint: quantlib, or vllm, whose fused weights (q/k/v, gate/up) "
        "share a scheme.",
        rich_help_panel=RULES,
    ),
]
Floor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHERE=BITS",
        help="At least so many bits, such as embeddings=8 or down_proj=4. WHERE is a component "
        "(quantlib inspect lists them), a kind (linear, experts, embedding, head), the end of a "
        "name, a glob, or re: and a regular expression. May be repeated.",
        rich_help_panel=RULES,
    ),
]
Ceiling = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHERE=BITS",
        help="At most so many bits, such as embeddings=4.",
        rich_help_panel=RULES,
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHERE=SCHEME",
        help="Exactly this scheme, such as lm_head=w8g64.",
        rich_help_panel=RULES,
    ),
]

Data = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|RECORDS",
        help="What to calibrate on: a text (a file, .jsonl, a folder of .txt files, or hub:name); "
        "for a model of several parts a .jsonl file of records with pictures or sounds.",
        rich_help_panel=FILES,
    ),
]
Work = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Work directory: what was measured, so that a killed run continues.",
        rich_help_panel=FILES,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Folder for the packed checkpoint.",
        rich_help_panel=FILES,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace a checkpoint of quantlib that OUT already holds.",
        rich_help_panel=FILES,
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Fetch MODEL from the Hugging Face hub when it is not in the local cache.",
        rich_help_panel=FILES,
    ),
]

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="YAML with fields of a recipe (work directories hold one); options count more.",
        rich_help_panel=RECIPE,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="best|fast",
        help="What to spend: best quality (the default), or a few minutes, without the probes that "
        "calibrate the predicted KL.",
        rich_help_panel=RECIPE,
    ),
]
Fast = Annotated[
    bool,
    typer.Option("--fast", help="Short for --preset fast.", rich_help_panel=RECIPE),
]
Schemes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A,B,C",
        help="Candidate schemes, such as w3g64,w4g64z,w8g64zs6: integers w2..w8, fp8, mxfp4, nvfp4;"
        " g: group size, z: zero point, s: two-level scales.",
        rich_help_panel=RECIPE,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="resq|resq-fp",
        help="Round activations and the KV cache too: resq changes the model's basis, keeps the "
        "columns that matter at 8 bits, and rounds the others to the bits of --activations; "
        "resq-fp does it in MXFP4 and NVFP4. Sets --schemes, --rotation and --kv, unless they are "
        "given.",
        rich_help_panel=RECIPE,
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="BITS",
        help="KV cache that the checkpoint is made for: 16 (as it is), 8, 4; mean bits such as "
        "5.2, scales counted, of which every layer's keys and values get their share; or a "
        "format's name such as int4h16 (16 columns of a head at 8 bits) or int4k4 (the first 4 "
        "tokens as they are); by what a token is, text=int8,image_input=int4g32,image_output=int4 "
        "(int4+static: with a scale for every place in an image, known beforehand).",
        rich_help_panel=RECIPE,
    ),
]
Nonlinear = Annotated[
    str | None,
    typer.Option(
        "--nonlinear",
        metavar="sqnr=DB|output=DB",
        help="Compute softmax, GELU and LayerNorm of image and sound encoders in integers, by the "
        "method that suits each layer best: where a layer's output keeps so many dB of signal over "
        "noise (sqnr=30), or in as many layers as leave the encoder's output so many (output=20).",
        rich_help_panel=RECIPE,
    ),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        metavar="none|pca|weights|gradients",
        help="Basis the model is changed to before anything is measured: pca puts columns with "
        "much variance last (ResQ), weights and gradients those whose rounding costs most, by the "
        "weights that read them or by what the loss says. none unless --scheme says otherwise.",
        rich_help_panel=RECIPE,
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens of a window. 512 unless said.", rich_help_panel=RECIPE),
]
Windows = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Windows to calibrate on, or records of each task. The preset decides unless said.",
        rich_help_panel=RECIPE,
    ),
]
TokenWeighting = Annotated[
    str | None,
    typer.Option(
        "--weighting",
        metavar="root|token|modality|none",
        help="Which tokens decide how a model of several parts is rounded: each by the root of its "
        "gradient (the default), by that itself, by the mean gradient of text or of pictures, or "
        "all alike.",
        rich_help_panel=RECIPE,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Components or weights that stay as they are, such as vision or *.lm_head. May be "
        "repeated.",
        rich_help_panel=RECIPE,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Seed of every random draw.", rich_help_panel=RECIPE),
]

Score = Annotated[
    str,
    typer.Option(
        metavar="measured|weights|inputs|hawq|fisher|evolved:FILE",
        help="What predicts the loss of a rounding: measured, the layer bank's own errors; a "
        "formula over statistics of the layers, by its name; or one that was evolved (EMQ), in a "
        "file.",
        rich_help_panel=SEARCH,
    ),
]
Validate = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Then try N exchanges between weights on true KL, with weights from the layer bank. "
        "Goes on where it was when it is killed.",
        rich_help_panel=SEARCH,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Processes that measure for --validate, or actors of --ray; each holds the model in "
        "memory. The plan found is the same with any number.",
        rich_help_panel=SEARCH,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Measure for --validate on a Ray cluster: auto for the one that runs, local to start "
        "one, or its address. Its machines share the work directory's file system.",
        rich_help_panel=SEARCH,
    ),
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the answer as JSON, and nothing else, on stdout.",
        rich_help_panel=OTHER,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Print the traceback of an error too.", rich_help_panel=OTHER),
]
