"""Pictures and sounds from files, checked before anything is computed from them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from quantlib.errors import DataError

MAX_PIXELS = 64_000_000
"""Of a picture that is read: larger ones are a mistake, or meant to fill the memory."""
_SAMPLES: dict[int, tuple[np.dtype[Any], float]] = {
    1: (np.dtype("u1"), 128.0),
    2: (np.dtype("<i2"), 32768.0),
    4: (np.dtype("<i4"), 2147483648.0),
}
"""Bytes of a PCM sample -> its dtype and what full scale is; 8 bits are unsigned."""


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file as a viewer shows it, RGB with 8 bits: turned as its camera says, on
    white where it is transparent, the first one where there are several.

    Raises DataError when it is none, damaged, far too large, or in numbers without a known white.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {width} x {height} pixels, and at most {MAX_PIXELS:,} are read: "
                    "make it smaller"
                )
            if picture.mode in ("I", "F"):
                raise DataError(
                    f"{path} has a number of 32 bits for each pixel, and nothing says which is "
                    "white: save it with 8 or 16 bits"
                )
            return _as_shown(picture)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not a picture: give a PNG or JPEG file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {path} cannot be read: {error}") from error


def _as_shown(picture: Image.Image) -> Image.Image:
    """RGB of an open picture."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I;16"):  # convert() would cut all above 255 off
        grey = np.asarray(turned).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    seen = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def read_audio(path: str | Path, rate: int) -> NDArray[np.float32]:
    """The samples of a WAV file in [-1, 1], float32 [samples]; of several channels, their mean.

    rate: samples a second that the model was made for.
    Raises DataError for another rate, an empty or damaged file, and what is not PCM.
    """
    try:
        with wave.open(str(path), "rb") as sound:
            channels, width, found, count, *_ = sound.getparams()
            raw = sound.readframes(count)
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as sound ({error or 'it is cut off'}): give a WAV file of PCM "
            "samples"
        ) from error
    if found != rate:
        raise DataError(
            f"{path} has {found:,} samples a second, and the model was made for {rate:,}: convert "
            f"it, for example with ffmpeg -i IN -ar {rate} OUT.wav"
        )
    if width not in _SAMPLES:
        raise DataError(f"{path} has samples of {8 * width} bits: give 8, 16 or 32")
    dtype, scale = _SAMPLES[width]
    values = np.frombuffer(raw[: len(raw) // (width * channels) * width * channels], dtype)
    if not len(values):
        raise DataError(f"{path} holds no sound")
    centered = values.astype(np.float32) - (128.0 if width == 1 else 0.0)
    mean: NDArray[np.float32] = (centered / scale).reshape(-1, channels).mean(1, dtype=np.float32)
    return mean
