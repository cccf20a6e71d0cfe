"""Tables of configurations: the nearest shape is found, and tuning measures what can win."""

import json

import pytest

from quantlib.errors import FormatError, UsageError
from quantlib.kernels.triton import configurations, tune
from quantlib.kernels.triton.configurations import Configuration, Shape

SMALL, LARGE = Configuration(64, 16, 4, 4), Configuration(128, 64, 4, 3)
TABLE = (
    (Shape("numbers", 4, 16, 4096, 4096), SMALL),
    (Shape("numbers", 4, 256, 4096, 4096), LARGE),
)


def test_the_nearest_shape_decides():
    assert configurations.choose(TABLE[1][0], TABLE) == LARGE
    assert configurations.choose(Shape("numbers", 3, 5, 14336, 4096), TABLE) == SMALL
    assert configurations.choose(Shape("numbers", 8, 100, 1024, 1024), TABLE) == LARGE
    with pytest.raises(FormatError, match="no products of integers"):
        configurations.choose(Shape("integers", 4, 1, 64, 64), TABLE)


def test_a_table_is_found_by_a_gpus_name(tmp_path, monkeypatch):
    """Tuned here, predicted for its kind, or untuned."""
    monkeypatch.setattr(configurations, "user_tables", lambda: tmp_path)
    table_for = configurations.table_for.__wrapped__
    kept = {path.stem: configurations.read(path) for path in configurations.TABLES.glob("*.json")}
    assert table_for("NVIDIA H100 PCIe") == table_for("NVIDIA H100 80GB HBM3") == kept["h100"]
    assert table_for("NVIDIA GeForce RTX 4090") == kept["rtx-4090"]
    assert table_for("NVIDIA GeForce RTX 3090") == table_for("A1000") == kept["untuned"]
    for table in kept.values():
        assert {shape.kind for shape, _ in table} == set(configurations.KINDS)
    rows = [(*TABLE[0], 12.5)]
    (tmp_path / "nvidia-h100-pcie.json").write_text(json.dumps(configurations.to_json(rows)))
    assert table_for("NVIDIA H100 PCIe") == TABLE[:1]
    (tmp_path / "nvidia-a10.json").write_text('{"rows": [{"shape": {}}]}')
    with pytest.raises(FormatError, match=r"nvidia-a10\.json is no table.*delete it"):
        table_for("NVIDIA A10")


def test_few_programs_are_split_along_k_and_many_are_not():
    shape = Shape("numbers", 4, 1, 4096, 4096)
    # 64 blocks of rows for 108 multiprocessors, twice each.
    assert configurations.splits(SMALL, shape, 32, 108) == 3
    assert configurations.splits(SMALL, Shape("numbers", 4, 1, 65536, 4096), 32, 108) == 1
    assert configurations.splits(SMALL, shape, 4, 108) == 1, "four tiles are one program's"
    assert configurations.splits(Configuration(64, 16, 4, 4, 5), shape, 32, 108) == 5


def test_what_is_no_configuration_is_a_sentence():
    with pytest.raises(FormatError, match="powers of two"):
        Configuration(48, 16, 4, 4)
    with pytest.raises(FormatError, match="is no product"):
        Shape("letters", 4, 1, 1, 1)


def test_tuning_tries_only_what_fits_and_suits():
    shape = Shape("numbers", 4, 16, 4096, 4096)
    tried = tune.candidates(shape, shared_bytes=99 << 10, processors=72)
    assert SMALL in {Configuration(c.block_rows, c.block_tokens, c.warps, c.stages) for c in tried}
    assert all(c.block_tokens == 16 for c in tried)
    assert all(tune.stage_bytes(shape, c) * c.stages <= 99 << 10 for c in tried)
    assert len(set(tried)) == len(tried) <= 40
    many = Shape("integers", 8, 256, 4096, 4096)
    assert {c.block_tokens for c in tune.candidates(many, 99 << 10, 72)} <= {64, 128}


def test_the_fastest_is_kept_and_what_fails_is_passed_over():
    def measure(shape, configuration):
        if configuration.stages == 5:
            raise RuntimeError("out of resources")
        return 10.0 + abs(configuration.block_rows - 64) + configuration.stages

    shape = Shape("numbers", 4, 1, 4096, 4096)
    ((found, chosen, time),) = tune.tune([shape], measure, 227 << 10, 132)
    assert found == shape
    assert (chosen.block_rows, chosen.stages) == (64, 3)
    assert time == 13.0
    with pytest.raises(UsageError, match="no configuration runs"):
        tune.tune([shape], lambda *_: 1 / 0, 227 << 10, 132)


def test_without_a_gpu_tuning_is_a_sentence(capsys):
    assert tune.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
