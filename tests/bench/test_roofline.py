"""The model of speed: a launch takes as long as the longest of what it must do."""

from dataclasses import replace

import pytest

from quantlib.bench import roofline
from quantlib.errors import UsageError
from quantlib.kernels.cuda.cubins import Compiled


def compiled(products: int = 16, issued: int = 150) -> Compiled:
    return Compiled("w4-g64-f16-m16", 80, 111, 0, 2, 5, 68224, 64, products, 95, issued)


def test_bytes_of_a_launch():
    """4096 x 4096 of 4 bits: 8 MiB of codes, 256 KiB of scales, and little else."""
    moved = roofline.moved_bytes(4096, 4096, 4, 128, tokens=1)
    assert moved == (8 << 20) + (256 << 10) + 4 * 4096 + 2 * 8192
    assert roofline.moved_bytes(4096, 4096, 4, 0, 1) == moved - (256 << 10)


def test_the_longest_limit_is_the_prediction():
    gpu = roofline.Gpu(80, 100, 1.0, 1000, 100)
    # 64 x 128: 4 strips of 32 x 64. A product is 4096 operations: 100 TFLOP/s are 1e8 in a us.
    found = roofline.predict(gpu, compiled(16, 150), 64, 128, moved=2e6)
    assert found.memory == pytest.approx(2.0)
    assert found.products == pytest.approx(4 * 16 * 4096 / 1e8)
    assert found.issue == pytest.approx(4 * 150 / (100 * 4 * 1000))
    assert found.total == found.memory
    assert found.of_bandwidth == 1
    slow = roofline.predict(gpu, compiled(16, 4_000_000), 64, 128, moved=2e6)
    assert slow.total == slow.issue == pytest.approx(40.0)
    assert slow.of_bandwidth == pytest.approx(0.05)


def test_a_step_of_a_sparse_weight_has_twice_the_columns():
    gpu = roofline.Gpu(80, 100, 1.0, 1000, 100)
    dense, sparse = compiled(), replace(compiled(), columns=128)
    limits = [roofline.predict(gpu, own, 64, 128, moved=2e6) for own in (dense, sparse)]
    assert limits[0].products == pytest.approx(2 * limits[1].products)
    assert limits[0].issue == pytest.approx(2 * limits[1].issue)


def test_what_is_not_known_is_not_a_limit():
    gpu = roofline.Gpu(100, 100, 1.0, 1000, 100, warp_share=None)
    found = roofline.predict(gpu, compiled(), 64, 128, moved=2e6)
    assert found.products is None
    assert found.total == found.memory


def test_a_gpu_that_is_not_in_the_table_is_a_sentence(capsys):
    with pytest.raises(UsageError, match="nothing is known of V100: one of A10, A100"):
        roofline.chosen(["A10", "V100"])
    assert roofline.main(["--gpus", "V100"]) == 1
    assert "nothing is known of V100" in capsys.readouterr().err
