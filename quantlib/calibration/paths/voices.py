"""Voices: what a model that speaks is told of who is speaking.

Qwen2.5-Omni is published with `spk_dict.pt`, which is a pickle and is not opened here. The same
numbers as safetensors are: of every voice NAME the tensors

    NAME.cond       float32 [1, size]           what stands for the speaker
    NAME.ref_mel    float32 [1, frames, bins]   a spectrogram of the voice
    NAME.bos_token  int64 []                    the word that its speech begins with

in a folder of their own: safetensors beside a model's are taken for its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from quantlib.calibration.paths.tools import Tools
from quantlib.errors import DataError

VOICES, PICKLED = "voices/speakers.safetensors", "spk_dict.pt"
_PARTS = ("cond", "ref_mel", "bos_token")
_CONVERT = (
    "mkdir voices; python -c \"import torch, safetensors.torch as s; s.save_file({f'{n}.{k}': "
    f"torch.as_tensor(v).contiguous() for n, p in torch.load('{PICKLED}', weights_only=True)"
    f".items() for k, v in p.items()}}, '{VOICES}')\""
)


@dataclass(frozen=True)
class Voice:
    """speaker: float32 [1, size]. reference: float32 [1, frames, bins]. start: a token."""

    speaker: Tensor
    reference: Tensor
    start: int


def read_voices(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Name -> "cond", "ref_mel" and "bos_token" of every voice beside a model; {} when there is no
    file of them. Raises DataError for one that cannot be read, or lacks a part of a voice."""
    file = folder / VOICES
    if not file.is_file():
        return {}
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        name, _, part = key.rpartition(".")
        found.setdefault(name, {})[part] = tensor
    for name, parts in found.items():
        missing = [part for part in _PARTS if part not in parts]
        if missing:
            raise DataError(f"{file} does not have {', '.join(missing)} of the voice {name!r}")
    return found


def read_voice(tools: Tools) -> Voice:
    """The first voice beside a model, by its name.

    Raises DataError when there is none, or its tensors are not of the sizes in config.json.
    """
    voices = read_voices(tools.folder)
    if not voices:
        raise DataError(
            f"{tools.folder} has no {VOICES}, and a model speaks with somebody's voice: make it of "
            f"the model's {PICKLED}, in its folder, with {_CONVERT}; or keep the parts that speak "
            "with --keep talker --keep token2wav"
        )
    name = min(voices)
    speaker, reference, start = (voices[name][part] for part in _PARTS)
    config = tools.config["token2wav_config"]["dit_config"]
    sizes = (speaker.shape[-1], reference.shape[-1])
    wanted = (config["enc_emb_dim"], config["mel_dim"])
    if sizes != wanted:
        raise DataError(
            f"the voice {name!r} in {tools.folder / VOICES} has {sizes[0]} and {sizes[1]} numbers, "
            f"and by config.json a voice has {wanted[0]} and {wanted[1]}: they do not belong "
            "together"
        )
    speaker, reference = speaker.float().view(1, -1), reference.float()
    return Voice(speaker, reference.view(1, *reference.shape[-2:]), int(start))
