"""A room stands only on rooms below it: the order of dev/ARCHITECTURE.md, read from the imports.

Every import counts, also those inside functions and under TYPE_CHECKING: laziness hides a wrong
direction, it does not mend it.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the floor up. Rooms on one level may use each other as long as no cycle arises. `quantlib` is
# the facade, `import quantlib`; `bench` is above everything, so nothing may need it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("formats",),
    ("kernels",),
    ("models",),
    ("rounding", "transforms", "calibration"),
    ("search",),
    ("checkpoint",),
    ("runtime",),
    ("evaluation",),
    ("report",),
    ("recipe",),
    ("pipeline",),
    ("quantlib",),
    ("cli",),
    ("bench",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Installed by extras only: a module of the core may import them inside a function, never on load.
OPTIONAL = {"triton", "cupy", "ray", "lm_eval", "optimum", "gptqmodel", "datasets", "gguf"}
OPTIONAL |= {"torch_geometric", "compressed_tensors", "deap", "optuna"}
# Folders that are themselves imported only when their extra is there.
OPTIONAL_ROOMS = ("quantlib.kernels.triton", "quantlib.kernels.cuda")


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder in ("quantlib", "kernels", "search", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "quantlib" else ("quantlib", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """`quantlib.formats.scheme` -> `formats`; the package itself -> `quantlib`."""
    return module.split(".")[1] if "." in module else module


def imported(module: str, node: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = f"{package}.{node.module}".rstrip(".") if node.level else node.module
        base = base.removesuffix(".None")
        for alias in node.names:
            name = f"{base}.{alias.name}"
            yield name if name in MODULES else base


def package_imports() -> Iterator[tuple[str, str]]:
    """Pairs (importing module, imported module) inside quantlib."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            for name in imported(module, node):
                if name.split(".")[0] == "quantlib":
                    yield module, name


def test_every_room_has_a_level() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= set(LEVEL), f"give these a place in LEVELS: {sorted(rooms - set(LEVEL))}"


def test_imports_point_down() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, name in package_imports()
        if LEVEL[room_of(name)] > LEVEL[room_of(module)]
    ]
    assert not upwards, "\n".join(upwards)


def test_rooms_of_one_level_form_no_cycle() -> None:
    uses: dict[str, set[str]] = {room: set() for room in LEVEL}
    for module, name in package_imports():
        if room_of(name) != room_of(module):
            uses[room_of(module)].add(room_of(name))
    # Peel off rooms that use nothing any more; whatever cannot be peeled stands on itself.
    while free := {room for room, below in uses.items() if not below}:
        uses = {room: below - free for room, below in uses.items() if room not in free}
    assert not uses, f"these rooms import each other in a circle: {sorted(uses)}"


def test_imports_name_the_installed_rooms() -> None:
    """`import kernels` would find the folder, or another package of that name, by accident."""
    bare = [
        f"{module} imports {name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        for name in imported(module, node)
        if name.split(".")[0] in {"kernels", "search", "bench"}
    ]
    assert not bare, "\n".join(bare)


def load_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not inside functions, not for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from load_time(node)


def test_optional_packages_are_imported_only_when_used() -> None:
    eager = [
        f"{module} imports {name}"
        for module, tree in TREES.items()
        if not module.startswith(OPTIONAL_ROOMS)
        for node in load_time(tree)
        for name in imported(module, node)
        if name.split(".")[0] in OPTIONAL
    ]
    assert not eager, "\n".join(eager)


def test_what_is_imported_is_declared_in_setup_py() -> None:
    """What happens to be installed here may be missing where only quantlib was installed."""
    declared = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements()}
    # A distribution of another name than its package's is known only where it is installed.
    providers = {"cupy": ["cupy-cuda12x"], **importlib.metadata.packages_distributions()}
    undeclared = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            for name in imported(module, node):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "quantlib":
                    continue
                distributions = {normal(found) for found in providers.get(top, [top])}
                if not distributions & declared:
                    undeclared.add(f"{module} imports {top}")
    assert not undeclared, "\n".join(sorted(undeclared))


def test_a_search_on_what_was_measured_waits_for_no_model_library() -> None:
    code = (
        "import sys, quantlib.pipeline.workfiles, quantlib.pipeline.plan\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def requirements() -> list[str]:
    """REQUIRES and all EXTRAS of setup.py, as written there (what is installed may be older)."""
    found: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"REQUIRES", "EXTRAS"}:
            value = ast.literal_eval(node.value)
            found += (
                value
                if isinstance(value, list)
                else [name for extra in value.values() for name in extra]
            )
    assert found, "setup.py no longer lists its requirements in REQUIRES and EXTRAS"
    return found


def normal(name: str) -> str:
    """A distribution's name in the form that PEP 503 compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from quantlib.errors import DataError", "quantlib.errors"),
        ("from quantlib import errors", "quantlib.errors"),
        ("from ..errors import DataError", "quantlib.errors"),
        ("from .. import errors", "quantlib.errors"),
        ("from . import scheme", "quantlib.formats.scheme"),
        ("from .scheme import Scheme", "quantlib.formats.scheme"),
        ("import quantlib.kernels.ops as ops", "quantlib.kernels.ops"),
    ],
)
def test_the_reader_of_imports_resolves_every_spelling(source: str, expected: str) -> None:
    node = ast.parse(source).body[0]
    assert list(imported("quantlib.formats.scheme", node)) == [expected]
