"""A wheel is complete: every module, the kernel sources, and the compiled library where g++ is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quantlib.kernels.cpu.library import Library

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "search", "bench")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what goes into a wheel: building in the repository would leave folders there."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("quantlib", *ROOMS):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-P", "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no compiler can be found: CXX names none, and PATH is empty."""
    return build_wheel(source, tmp_path_factory.mktemp("plain"), PATH="", CXX="")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_has_every_module_and_data_file_under_its_installed_name(
    source: Path, plain_wheel: Path
) -> None:
    expected = set()
    for folder in ("quantlib", *ROOMS):
        for path in (source / folder).rglob("*"):
            # Settings of editors and formatters, and what building compiled of its own modules.
            hidden = path.name.startswith(".") or path.parent.name == "__pycache__"
            if path.is_file() and not hidden:
                name = path.relative_to(source).as_posix()
                expected.add(name if folder == "quantlib" else f"quantlib/{name}")
    missing = {name for name in expected - names_in(plain_wheel) if "/results/" not in name}
    assert not missing


def test_a_wheel_installs_nothing_outside_quantlib(plain_wheel: Path) -> None:
    """Bare packages `kernels`, `search` or `bench` would collide with others."""
    tops = {name.split("/")[0] for name in names_in(plain_wheel)}
    assert {top for top in tops if not top.startswith("quantlib_torch-")} == {"quantlib"}


def test_a_wheel_built_without_a_compiler_computes(plain_wheel: Path, tmp_path: Path) -> None:
    """Installed alone and run where there is still no compiler: the torch reference takes over."""
    assert not any(name.endswith(".so") for name in names_in(plain_wheel))
    with zipfile.ZipFile(plain_wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import quantlib.kernels.cpu.library as library\n"
        "assert 'site' in library.__file__, library.__file__\n"
        "assert library.load() is None\n"
    )
    environment = os.environ | {"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_wheel_built_with_a_compiler_brings_the_library(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source, tmp_path)
    libraries = [name for name in names_in(wheel) if name.endswith(".so")]
    assert len(libraries) == 1
    with zipfile.ZipFile(wheel) as archive:
        library = Library(Path(archive.extract(libraries[0], tmp_path)))
    assert library.supports("portable")
    assert libraries[0].startswith("quantlib/kernels/cpu/")
    assert "-py3-none-" in wheel.name, "any Python 3"
    assert not wheel.name.endswith("-any.whl"), "but one platform"
