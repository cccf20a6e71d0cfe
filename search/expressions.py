"""A small language of formulas over columns of numbers: what an evolved score is written in.

    mul(noise, sqrt(mul(weighted_rows, input_energy)))

Names are columns, functions are those of UNARY and BINARY, and there are numbers; nothing else, so
a formula out of a file can compute and do nothing more. Functions are not protected: where one is
not defined (the logarithm of a negative number) the result is not a number, and whoever asked for
the formula refuses it, instead of ranking weights by what an exception was papered over with.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from quantlib.errors import SearchError

UNARY: dict[str, Callable[..., np.ndarray]] = {
    "sqrt": np.sqrt,
    "cbrt": np.cbrt,
    "square": np.square,
    "inverse": np.reciprocal,
    "log": np.log,
    "log1p": np.log1p,
    "exp": np.exp,
    "abs": np.abs,
}
BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}
LONGEST = 2000
"""Characters of a formula: one that is longer is no formula that anybody evolved."""

Tree = float | str | tuple["str | Tree", ...]
"""A number, the name of a column, or (function, argument, ...)."""


@dataclass(frozen=True)
class Expression:
    """A formula: its text in canonical form, and the same as a tree."""

    text: str
    tree: Tree

    @staticmethod
    def parse(text: str, columns: Collection[str]) -> Expression:
        """Read a formula over these columns. Raises SearchError that says what is wrong with it."""
        if len(text) > LONGEST:
            raise SearchError(
                f"a formula has {len(text)} characters, and at most {LONGEST} are read"
            )
        try:
            parsed = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise SearchError(f"{text!r} is not a formula such as mul(noise, rows)") from error
        tree = _tree(parsed, frozenset(columns))
        return Expression(_text(tree), tree)

    def names(self) -> frozenset[str]:
        """The columns it reads."""
        return frozenset(_leaves(self.tree))

    def nodes(self) -> int:
        """Functions, columns and numbers in it."""
        return _nodes(self.tree)

    def evaluate(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Its value in every row: float64, of the columns' shape; inf or nan where a function is
        not defined. Raises SearchError for a column that is not there."""
        missing = sorted(self.names() - columns.keys())
        if missing:
            raise SearchError(f"{self.text} needs {', '.join(missing)}, which nothing measured")
        shape = np.shape(next(iter(columns.values()))) if columns else ()
        with np.errstate(all="ignore"):
            value = np.asarray(_value(self.tree, columns), np.float64)
        return np.broadcast_to(value, shape)


def _tree(node: ast.expr, columns: frozenset[str]) -> Tree:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name):
            if name not in columns:
                raise SearchError(
                    f"a formula reads {name!r}: it can read {', '.join(sorted(columns))}"
                )
            return name
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            wanted = 1 if name in UNARY else 2 if name in BINARY else 0
            if not wanted:
                raise SearchError(
                    f"a formula calls {name!r}: it can call {', '.join((*UNARY, *BINARY))}"
                )
            if len(arguments) != wanted:
                raise SearchError(
                    f"{name} takes {wanted} arguments in a formula, not {len(arguments)}"
                )
            return (name, *(_tree(argument, columns) for argument in arguments))
    raise SearchError(
        f"a formula holds {ast.unparse(node)!r}: write names, numbers and calls, such as "
        "mul(noise, 2)"
    )


def _text(tree: Tree) -> str:
    if isinstance(tree, tuple):
        return f"{tree[0]}({', '.join(map(_text, tree[1:]))})"
    return tree if isinstance(tree, str) else f"{tree:g}"


def _leaves(tree: Tree) -> list[str]:
    if isinstance(tree, tuple):
        return [name for part in tree[1:] for name in _leaves(part)]
    return [tree] if isinstance(tree, str) else []


def _nodes(tree: Tree) -> int:
    return 1 + sum(map(_nodes, tree[1:])) if isinstance(tree, tuple) else 1


def _value(tree: Tree, columns: Mapping[str, np.ndarray]) -> np.ndarray | np.float64:
    if isinstance(tree, tuple):
        name, *arguments = tree
        values = [_value(argument, columns) for argument in arguments]
        return UNARY[str(name)](values[0]) if len(values) == 1 else BINARY[str(name)](*values)
    return columns[tree] if isinstance(tree, str) else np.float64(tree)
