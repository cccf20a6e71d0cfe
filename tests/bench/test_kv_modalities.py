"""The bench of KV bits by modality, on a tiny Janus in the layout of a bed."""

from pathlib import Path

from quantlib.bench import kv_modalities
from quantlib.bench.beds.folders import CALIBRATION, MODEL, TEST
from quantlib.bench.kv_modalities import ROWS, measure
from quantlib.kernels.kv_format import KvFormat

from ..pipeline import whole_models


def test_every_row_names_formats_that_there_are() -> None:
    for formats, is_static in ROWS.values():
        parsed = {modality: KvFormat.parse(form) for modality, form in formats.items()}
        assert parsed["text"].key.bits == 8 or len(parsed) == 1
        assert not is_static or "image_output" in parsed


def test_rows_tell_figures_and_bytes(tmp_path: Path) -> None:
    whole_models.save("janus", tmp_path / MODEL)
    records = whole_models.records("janus", tmp_path)
    for name in (CALIBRATION, TEST):
        (tmp_path / name).write_text(records.read_text())
    wanted: dict[str, kv_modalities.Row] = {
        "exact": ({"text": "f32"}, False),
        "static": ({"text": "int8", "image_output": "int4"}, True),
    }
    rows = measure(tmp_path, wanted, limit=2, seed=0)
    # 2 layers of 2 heads of 8 columns, padded to 16, keys and values
    floats = 2 * 2 * 2 * 16 * 4
    assert rows["exact"]["bytes_per_token"] == dict.fromkeys(
        ("text", "image_input", "image_output"), floats
    )
    # codes of 4 bits, and no scales
    assert rows["static"]["bytes_per_token"]["image_output"] == 2 * 2 * 2 * 8
    assert rows["static"]["bytes_per_token"]["text"] == 2 * 2 * 2 * (16 + 4)
    assert rows["static"]["static_bytes"] == 2 * 2 * 2 * 16 * 4
    changes = {
        name: [figure["change"] for figure in row["figures"] if figure["change"] is not None]
        for name, row in rows.items()
    }
    assert changes["exact"] != changes["static"]
