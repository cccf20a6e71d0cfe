"""`import quantlib` is light, and transformers learns of it in either order of imports."""

import importlib
import subprocess
import sys

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import quantlib
from quantlib.checkpoint.writer import QUANT_METHOD
from quantlib.runtime import transformers_plugin
from quantlib.runtime.autoregister import register_with_transformers

QUANTLIB_FIRST = """
import sys
import quantlib
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
waiting = [type(finder).__name__ for finder in sys.meta_path]
import quantlib.runtime.autoregister as autoregister
autoregister.register_with_transformers()
assert [type(finder).__name__ for finder in sys.meta_path] == waiting, "a second finder"
assert waiting.count("_AfterRegistry") == 1
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
assert "quantlib" in AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__name__ == "_AfterRegistry"], "still waiting"
assert "quantlib.runtime.assemble" not in sys.modules, "more than the plug-in was imported"
"""


def test_quantlib_imported_first_waits_for_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUANTLIB_FIRST], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_transformers_imported_first_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "quantlib")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "quantlib")
    before = list(sys.meta_path)
    importlib.reload(quantlib)
    assert AUTO_QUANTIZER_MAPPING["quantlib"] is transformers_plugin.QuantlibQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["quantlib"] is transformers_plugin.QuantlibConfig
    assert sys.meta_path == before


def test_a_second_registration_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register_with_transformers()
    transformers_plugin.register()
    importlib.reload(quantlib)
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before


def test_the_plugin_goes_by_the_name_that_checkpoints_say() -> None:
    """It is written twice, because the plug-in must not import the checkpoint room on load."""
    assert transformers_plugin.METHOD == QUANT_METHOD


def test_the_public_names_are_found_at_first_use() -> None:
    assert callable(quantlib.load)
    assert issubclass(quantlib.QuantlibError, Exception)
    assert set(quantlib.__all__) <= set(dir(quantlib))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        quantlib.lode  # noqa: B018


def test_the_plug_in_may_be_the_first_to_import_transformers() -> None:
    # quantlib.load imports the plug-in, which imports transformers' tables: they would register it.
    code = (
        "import quantlib; from quantlib.runtime.transformers_plugin import register; register();"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known;"
        "print('quantlib' in known)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
