"""Registers the transformers plugin without importing transformers.

transformers has no entry points: whoever adds a quantization method must run code after
`transformers.quantizers.auto` is imported and before a checkpoint is opened. Importing that module
from `import quantlib` would be the plain way, and takes seconds (it pulls in torch and half of
transformers), which `quantlib --help` and a re-solve of a plan would pay for nothing. So: if the
module is there already, register now; if not, a finder waits on `sys.meta_path` for its import,
registers right after it, and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
"""The module that holds transformers' tables of quantization methods."""
PLUGIN = "quantlib.runtime.transformers_plugin"


class _AfterRegistry(MetaPathFinder):
    """Lets the import of REGISTRY go its usual way and registers once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            loader.exec_module = run  # type: ignore[method-assign]
            run(module)
            _register()

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register now if transformers' tables are imported, otherwise as soon as they are.

    Repeated calls do nothing more.
    """
    if hasattr(sys.modules.get(REGISTRY), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


def _register() -> None:
    """Register, unless it is the plug-in itself that is importing transformers' tables just now.

    Whoever imports the plug-in by name does so to call its `register`.
    """
    plugin = sys.modules.get(PLUGIN)
    if plugin is None or hasattr(plugin, "register"):
        import_module(PLUGIN).register()
