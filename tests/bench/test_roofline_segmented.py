"""The model of speed of the segmented kernel: as long as the longest of what it must do."""

import pytest
import torch

from quantlib.bench import roofline, roofline_segmented
from quantlib.formats import Scheme
from quantlib.kernels.cuda import machine_code, segmented


def case_of(scheme: str, tokens: int) -> tuple[segmented.Layout, segmented.GemmCase]:
    own = Scheme.parse(scheme)
    layout = segmented.layout(own.segments(4096), own.activations(4096), 80)
    return layout, segmented.case(layout, tokens, torch.float16, 80)


def test_resqs_form_is_limited_to_three_and_a_half_times_fp16():
    """An eighth at twice the rate and seven eighths at four times it: 32 / 9 of fp16."""
    _, case = case_of("w4a4h8/8", 4096)
    gpu = roofline.Gpu(80, 100, 1.0, 1e9, 100)
    loops = [
        roofline_segmented.Loop(32, 8, 0, 0),
        roofline_segmented.Loop(32, 4, 0, 0),
    ]
    shape = 4096, 4096, 4096
    found = roofline_segmented.predict(gpu, (200, 400), case, loops, shape, moved=0.0)
    base = roofline_segmented.half_precision(gpu, *shape)
    assert base / found.products == pytest.approx(32 / 9)
    # 36 steps of 64 KiB for each of 1024 tiles.
    assert found.shared == pytest.approx(1024 * 36 * 65536 / 128 / 1e5)


def test_instructions_of_a_step_and_of_a_span():
    _, case = case_of("w4a4h8/8", 4096)
    gpu = roofline.Gpu(80, 100, 1.0, 1e9, 100)
    loops = [roofline_segmented.Loop(32, 8, 100, 200), roofline_segmented.Loop(32, 4, 50, 400)]
    found = roofline_segmented.predict(gpu, (200, 400), case, loops, (4096, 4096, 4096), 0.0)
    # 8 steps and a span of bytes, 28 steps and a span of nibbles; 8 warps, 1024 tiles.
    each = 8 * 100 + 200 + 28 * 50 + 400
    assert found.issue == pytest.approx(8 * 1024 * each / (100 * 4 * 1000))


def test_bytes_of_a_launch():
    layout, _ = case_of("w4a4h8/8", 1)
    codes = 4096 * (512 + 3584 // 2)
    planes = 4 * 2 * (4096 + 1)
    assert roofline_segmented.moved_bytes(layout, 1, 4096) == codes + planes + 36 * 64 + 2 * 4096


def test_rates_that_are_not_known_are_not_limits():
    _, case = case_of("w4a4h8/8", 4096)
    gpu = roofline.GPUS["B200"]
    loops = [roofline_segmented.Loop(32, 8, 1, 0), roofline_segmented.Loop(32, 8, 1, 0)]
    found = roofline_segmented.predict(gpu, (4500, None), case, loops, (1, 4096, 4096), 1.0)
    assert found.products is None
    assert found.total > 0


def test_loops_are_told_apart_in_machine_code():
    blocks = (("IMMA.16832.S8.S8", "LDS.128"), ("FFMA", "FFMA", "I2F"), ("LDGSTS.E.128", "IADD3"))
    code = machine_code.MachineCode((*blocks, ("LDGSTS.E.128", "IADD3")))
    _, case = case_of("w8a8", 1)
    found = roofline_segmented.loop_of(code, case.segments[0])
    assert found == roofline_segmented.Loop(1, 8, 2 + 2, 3)


def test_a_gpu_that_is_not_in_the_table_is_a_sentence(capsys):
    assert roofline_segmented.main(["--gpus", "V100"]) == 1
    assert "nothing is known of V100" in capsys.readouterr().err
