"""Rules for every file: no paths of one machine, nothing too long, no test that cannot fail."""

import ast
import re
import shutil
import subprocess
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 80

# Spelled in pieces, so that this file does not contain what it forbids. Examples use placeholders
# such as MODEL, tests use tmp_path.
MACHINE_PATHS = re.compile(
    r"(?<![\w.~$}])/" + r"(?:work|root|tmp|home/\w+|Users/\w+|mnt|workspace)" + r"(?:/|\b)"
)
HOSTS = re.compile(r"\b(?:pypi\.or" + r"g|pythonhosted\.or" + r"g|download\.pytorch\.or" + r"g)\b")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def repository_files() -> tuple[Path, ...]:
    """Files git tracks or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def python_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py"]


def text_of(path: Path) -> str | None:
    """The file's text, or None for a binary one."""
    content = path.read_bytes()
    return None if b"\0" in content else content.decode("utf-8", errors="replace")


def functions(path: Path) -> list[FunctionNode]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return [node for node in ast.walk(tree) if isinstance(node, FunctionNode)]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, HOSTS], ids=["paths", "hosts"])
def test_no_file_names_a_place_on_one_machine(pattern: re.Pattern[str]) -> None:
    found = [
        f"{where(path, number)}: {match.group()}"
        for path in repository_files()
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)


def test_the_pattern_finds_paths_and_leaves_other_text() -> None:
    slash = "/"
    for bad in ("work/main", "root/.cache", "tmp/x", "home/ann/x", "Users/ann/x"):
        assert MACHINE_PATHS.search(f"see {slash}{bad} there"), bad
    for good in ("~/.cache/x", "network/x", "/proc/self"):
        assert not MACHINE_PATHS.search(good), good
    for before, after in (("dev", "work/x"), ("https://x.y", "root/z"), ("a", "tmp")):
        assert not MACHINE_PATHS.search(f"{before}{slash}{after}"), before


def test_modules_fit_in_a_head() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = [f"{where(path, 1)} has {n} lines" for path, n in sizes.items() if n > MAX_MODULE_LINES]
    assert not long, "\n".join(long)


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{where(path, node.lineno)} {node.name} has {lines} lines"
        for path in python_files()
        for node in functions(path)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def asserts_something(test: FunctionNode, helpers: Collection[str] = ()) -> bool:
    """Whether a test can fail except by crashing: it asserts, or calls what does.

    helpers: names of functions of its module that assert.
    """
    known = {"raises", "warns", "fail", "opcheck", *helpers}
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name in known or name.startswith(("assert_", "check_")):
                return True
    return False


def asserting_helpers(path: Path) -> set[str]:
    """Functions of a test module, tests aside, that assert."""
    return {
        node.name
        for node in functions(path)
        if not node.name.startswith(("test_", "_")) and asserts_something(node)
    }


def test_every_test_asserts_something() -> None:
    empty = [
        f"{where(path, node.lineno)} {node.name}"
        for path in python_files()
        if path.name.startswith("test_")
        for helpers in [asserting_helpers(path)]
        for node in functions(path)
        if node.name.startswith("test_") and not asserts_something(node, helpers)
    ]
    assert not empty, "\n".join(empty)


def test_a_test_without_an_assertion_is_noticed() -> None:
    empty, real = ast.parse("def test_a():\n    run()\ndef test_b():\n    assert run()").body
    assert isinstance(empty, FunctionNode)
    assert isinstance(real, FunctionNode)
    assert asserts_something(real)
    assert not asserts_something(empty)
