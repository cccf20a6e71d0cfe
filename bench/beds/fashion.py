"""Fashion-MNIST: 60,000 and 10,000 photographs of clothes, 28 x 28, of ten kinds (MIT licence; from
Debian's package `dataset-fashion-mnist`)."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quantlib.bench.packages import DebianPackage, built_once, default_cache, fetch_debian
from quantlib.errors import DataError

FASHION = DebianPackage(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    folder="usr/share/datasets/fashion-mnist",
)
KINDS = (
    *("a t-shirt", "trousers", "a pullover", "a dress", "a coat"),
    *("a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"),
)
"""What label i is called."""
Split = Literal["train", "t10k"]


def fetch_fashion(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """The folder of its four files. Parameters and errors as `speech.fetch_recordings`."""

    def build(scratch: Path, target: Path) -> None:
        shutil.move(fetch_debian(FASHION, scratch, wheels), target)

    return built_once((cache or default_cache()) / FASHION.name, build)


def read_fashion(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    """(images uint8 [N, 28, 28], labels int64 [N]) of the training or the test set. Raises
    DataError for files that are not what their names say."""
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz").to(torch.int64)
    if images.ndim != 3 or len(images) != len(labels) or not bool((labels < len(KINDS)).all()):
        raise DataError(
            f"{folder}: {split} has images {tuple(images.shape)} and labels {tuple(labels.shape)}, "
            f"which do not fit, or kinds beyond {len(KINDS)}: fetch the package again"
        )
    return images, labels


def _read_idx(path: Path) -> Tensor:
    """A file of MNIST's form: two zeros, a type (8: uint8), the number of dimensions, the
    dimensions as big-endian u32, the values."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, dtype, dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dims}I", data, 4)
    except (OSError, EOFError, struct.error) as error:
        raise DataError(f"{path} could not be read: {error}") from error
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if zeros or dtype != 8 or values.size != int(np.prod(shape)):
        raise DataError(f"{path} is not an IDX file of bytes with as many values as it announces")
    return torch.from_numpy(values.copy()).reshape(shape)
