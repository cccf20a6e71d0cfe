"""Options that the beds of pretrained models have in common."""

from pathlib import Path
from typing import Annotated

import typer

Cache = Annotated[Path | None, typer.Option(help="In place of the user's cache folder.")]
Wheels = Annotated[
    Path | None, typer.Option(help="Folder that holds the packages already: no network is used.")
]
