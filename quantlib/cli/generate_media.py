"""Pictures and sounds in `quantlib generate`."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib.checkpoint.disk import atomic_write_bytes
from quantlib.cli.console import notes, print_json
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.runtime.load import QuantizedModel

DRAWING_TEMPERATURE = 1.0
"""Of pictures, unless said: the likeliest code each time makes them empty."""


@dataclass(frozen=True)
class MediaRequest:
    """What was asked for besides text: false when nothing was.

    image: where a drawn picture goes. image_input, audio: what the text is to be about.
    """

    image: Path | None
    guidance: float | None
    image_input: Path | None
    audio: Path | None

    def __bool__(self) -> bool:
        return any(given is not None for given in (self.image, self.image_input, self.audio))

    def check(self, prompts: Sequence[str], unusable: Mapping[str, bool]) -> None:
        """Raise UsageError for requests that contradict each other, before anything is loaded.

        unusable: options of text alone, and whether they were given.
        """
        names = {"--image": self.image, "--image-input": self.image_input, "--audio": self.audio}
        given = [name for name, value in names.items() if value is not None]
        if self.guidance is not None and self.image is None:
            raise UsageError("--guidance is for pictures that are drawn: give --image FILE too")
        if not given:
            return
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are different requests: make one at a time")
        if len(prompts) > 1:
            raise UsageError(f"{given[0]} takes one prompt, and {len(prompts)} were given")
        wrong = next((name for name, was in unusable.items() if was), None)
        if wrong is not None:
            raise UsageError(f"{wrong} is for text alone: leave it out with {given[0]}")
        if self.image is not None:
            _check_target(self.image)


def run_media(
    model: QuantizedModel,
    prompt: str,
    given: MediaRequest,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    json: bool,
) -> None:
    """Draw a picture, or write text about a picture or a sound. sampling: temperature, top_p,
    seed."""
    if given.image is not None:
        _draw(model, prompt, given.image, given.guidance, sampling, json)
        return
    from quantlib.runtime.generate import Sampling

    temperature = sampling["temperature"] or 0.0
    written = model.media.answer(
        prompt,
        image=given.image_input,
        audio=given.audio,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, sampling["top_p"], sampling["seed"]),
    )
    if json:
        print_json(
            {
                "text": written.text,
                "prompt_tokens": written.prompt_tokens,
                "new_tokens": len(written.tokens),
                "seconds": written.seconds,
                "mode": model.mode,
            }
        )
        return
    sys.stdout.write(written.text + "\n")
    sys.stdout.flush()
    notes().print(
        f"{len(written.tokens)} tokens in {written.seconds:.1f} s (through transformers, "
        f"{model.mode})",
        style="dim",
    )


def _draw(
    model: QuantizedModel,
    prompt: str,
    file: Path,
    guidance: float | None,
    sampling: Mapping[str, Any],
    json: bool,
) -> None:
    given = sampling["temperature"]
    temperature = DRAWING_TEMPERATURE if given is None else given
    began = time.perf_counter()
    picture = model.generate_image(
        prompt, guidance=guidance, temperature=temperature, seed=sampling["seed"]
    )
    seconds = time.perf_counter() - began
    content = io.BytesIO()
    picture.save(content, _format(file))
    atomic_write_bytes(file.expanduser(), content.getvalue())
    width, height = picture.size
    if json:
        print_json({"image": str(file), "width": width, "height": height, "seconds": seconds})
        return
    sys.stdout.write(f"{file}\n")
    notes().print(f"{width} x {height} pixels in {seconds:.1f} s", style="dim")


def _check_target(file: Path) -> None:
    """Raise UsageError where a picture could not be written, before the model is loaded."""
    from PIL import Image

    if _format(file) not in Image.SAVE:
        raise UsageError(f"--image {file}: pictures are not written as {file.suffix!r}; use .png")
    if not file.expanduser().parent.is_dir():
        raise UsageError(f"--image {file}: there is no folder {file.parent}")


def _format(file: Path) -> str | None:
    """PIL's name of the format that the file's suffix stands for."""
    from PIL import Image

    return Image.registered_extensions().get(file.suffix.lower())
