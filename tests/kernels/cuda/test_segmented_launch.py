"""Kernel (b) and its quantizer, launched as a GPU gets them: workspace, arguments, files."""

from contextlib import nullcontext

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.formats import Scheme
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import workspace
from quantlib.kernels.cuda import cache, cubins, launch, loading, quantizer, segmented

from .emulated_segmented import expected, linear

F16, BF16 = torch.float16, torch.bfloat16
CPU = torch.device("cpu")


class Alone(launch.EmulatedRunner):
    """One block has every tile to itself: sums are in the order of the reference."""

    processors = 1


pytestmark = pytest.mark.usefixtures("compiler")


def inputs_of(tokens, columns, dtype=F16, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launched(own, x, bias=None, runner=None):
    runner = runner or Alone()
    weight = launch.pack_segmented(own.weight, own.layout(runner.architecture))
    return launch.segmented_linear(runner, x, weight, own.activations, bias)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_whoever_rounds_the_inputs_the_bits_are_the_references(draw, dtype, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(quantizer, "takes", lambda *_: False)
        monkeypatch.setattr(quantizer, "empty", None)
    own = linear(draw, "w4g64z5s5a4zg64h8/8", 70, 320)
    x, bias = inputs_of(9, 320, dtype), inputs_of(1, 70, dtype, seed=1)[0]
    found = launched(own, x, bias)
    assert torch.equal(found, expected(own, x, bias).to(dtype))
    # Columns of a wider matrix, a bias of another type.
    wide = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :320]
    assert torch.equal(launched(own, wide, bias.float()), found)
    assert not workspace.flags(CPU).any()


def test_blocks_that_share_a_tile_find_their_flags_as_they_left_them(draw):
    own = linear(draw, "w4a4h8/8", 40, 700, unit_scales=True)
    x = inputs_of(3, 700).sign() * 7
    x[:, -1] = 127 * x[:, -1].sign()
    runner = launch.EmulatedRunner()
    first = launched(own, x, runner=runner)
    assert torch.equal(first, launched(own, x, runner=runner))
    assert torch.equal(first, launched(own, x))  # integers have no order
    assert not workspace.flags(CPU).any()


def test_the_quantizer_takes_the_weights_own_segments_that_fit_a_block():
    segments = Scheme.parse("w4h8/8").segments(512)
    together = (ActivationSegment(0, 512, ActivationFormat(8)),)
    split = tuple(
        ActivationSegment(part.start, part.length, ActivationFormat(8)) for part in segments
    )
    for rounding in (split, together):
        layout = segmented.layout(segments, rounding, 86)
        # One scale for a token is none for each segment.
        assert quantizer.takes(layout, rounding, 86) == (rounding is split)
    long = (ActivationSegment(0, 1 << 15, ActivationFormat(4)),)
    layout = segmented.layout(Scheme.parse("w4g64").segments(1 << 15), long, 86)
    assert not quantizer.takes(layout, long, 86)
    assert quantizer.takes(layout, long, 90)


def test_inputs_of_another_width_are_a_sentence(draw):
    with pytest.raises(FormatError, match=r"inputs are \[M, 96\], not \[2, 5\]"):
        launched(linear(draw, "w8a8", 16, 96), torch.zeros(2, 5, dtype=F16))


@pytest.mark.parametrize("scheme", ["w4g64z5s5a4zg64h8/8", "w8a8"])
def test_a_gpu_looks_for_the_files_that_are_built_ahead(draw, scheme, monkeypatch):
    asked = []

    class Driver:
        def load(self, cubin, name, shared_bytes):
            return name

        def launch(self, kernel, blocks, threads, shared_bytes, stream, arguments):
            asked.append((kernel, blocks, threads, shared_bytes, stream))
            # Addresses have 64 bits, numbers 32.
            assert {argument.dtype.itemsize for argument in arguments} == {4, 8}

    files = []
    monkeypatch.setattr(cache, "find", lambda name: files.append(name) or b"cubin")
    monkeypatch.setattr(launch, "_stream", lambda device: 77)
    monkeypatch.setattr(launch, "_on", lambda device: nullcontext())
    own = linear(draw, scheme, 40, 512)
    for architecture in (80, 90):
        units = list(cubins.rounded_units(scheme, 512, architecture))
        built = {cache.file_name(unit.source, unit.macros, architecture) for unit in units}
        assert len(built) == len({unit.name for unit in units}) == len(units)
        files.clear()
        runner = launch.GpuRunner(loading.Loader(Driver(), architecture), CPU, processors=108)
        for dtype in (F16, BF16):
            for tokens in (1, 9, 20, 64, 500):
                launched(own, inputs_of(tokens, 512, dtype), runner=runner)
        assert set(files) == built
    kernels = [one[0] for one in asked]
    assert kernels == [quantizer.NAME, segmented.NAME] * 20
    assert {one[2:3] + one[4:] for one in asked} == {(256, 77)}
    # Few tokens leave processors idle when they are rounded; products have a block on each.
    assert [one[1] for one in asked[:4]] == [1, 108, 9, 108]
    assert asked[8][1] == 432


def test_what_is_not_built_ahead_is_a_sentence(tmp_path, capsys):
    for asked, said in (("w4a4", "write for example w4a4:4096"), ("w4g16a4:64", "too many")):
        assert cubins.main([str(tmp_path), "--rounded", asked]) == 1
        assert said in capsys.readouterr().err
