"""Tables for GPUs that are not here: what the model prefers, and that the files say just that."""

import pytest

from quantlib.bench import triton_tables
from quantlib.bench.roofline import GPUS
from quantlib.kernels.triton import configurations
from quantlib.kernels.triton.configurations import Configuration, Shape

GPU = GPUS["A100"]


@pytest.mark.parametrize("name", GPUS)
def test_the_files_are_what_the_model_says(name):
    path = configurations.TABLES / f"{triton_tables.NAMES[name]}.json"
    assert path.read_text() == triton_tables.text(GPUS[name])
    assert "not measured" in path.read_text()


def test_only_configurations_that_are_compiled_are_chosen():
    """Those of the untuned table: for the others nobody has looked at the machine code."""
    untuned = configurations.read(configurations.TABLES / "untuned.json")
    known = {(c.block_rows, c.block_tokens, c.warps, c.stages) for _, c in untuned}
    for gpu in GPUS.values():
        for _, own, _ in triton_tables.rows(gpu):
            assert (own.block_rows, own.block_tokens, own.warps, own.stages) in known


def test_few_rows_are_split_more_than_many():
    few = Shape("numbers", 4, 1, 1024, 4096)
    many = Shape("numbers", 4, 1, 65536, 4096)
    chosen = {shape: triton_tables.best(GPU, shape, table()) for shape in (few, many)}
    assert chosen[few].splits > chosen[many].splits


def test_blocks_are_no_wider_than_tokens_need():
    assert triton_tables.best(GPU, Shape("numbers", 4, 1, 4096, 4096), table()).block_tokens == 16


def test_a_product_takes_longer_with_more_of_anything():
    own = Configuration(64, 16, 4, 4, 2)
    less = triton_tables.seconds(GPU, Shape("numbers", 4, 16, 4096, 4096), own)
    for shape in (
        Shape("numbers", 4, 16, 8 * 4096, 4096),
        Shape("numbers", 4, 16, 4096, 2 * 4096),
        Shape("numbers", 8, 16, 4096, 4096),
    ):
        assert triton_tables.seconds(GPU, shape, own) > less


def table():
    return configurations.read(configurations.TABLES / "untuned.json")
