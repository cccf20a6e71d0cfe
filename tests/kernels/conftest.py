"""Random weights, packed and tiled, and the compiled library (or a reason to skip)."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from quantlib.formats import QuantizedSegment, QuantizedWeight, Scheme, Segment, pack
from quantlib.kernels import dispatch
from quantlib.kernels.cpu import build
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

Draw = Callable[..., tuple[QuantizedWeight, PackedWeight]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long part of the GPU kernels' tests runs when it is asked for: `make test-kernels`, or
    `-m kernels`."""
    if "kernels" in config.getoption("markexpr"):
        return
    long = {item for item in items if item.get_closest_marker("kernels")}
    if long:
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def library() -> cpu.Library:
    """The compiled kernels."""
    loaded = cpu.load()
    if loaded is None:
        pytest.skip("the CPU kernels could not be compiled here")
    return loaded


@pytest.fixture(params=cpu.ISAS[1:])
def isa(request: pytest.FixtureRequest, library: cpu.Library) -> str:
    """Each instruction set in turn, forced."""
    if not library.supports(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def compiler() -> None:
    """A C++ compiler, which the emulator needs."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`use(name)`: what QUANTLIB_KERNELS=name does, in this process."""

    def force(name: str) -> None:
        monkeypatch.setattr(dispatch, "forced", lambda: name)
        dispatch.machine.cache_clear()

    yield force
    dispatch.machine.cache_clear()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a compiler."""

    def no_compiler() -> None:
        raise build.BuildError("there is no C++ compiler: install g++")

    monkeypatch.setattr(build, "find", lambda: None)
    monkeypatch.setattr(build, "build", no_compiler)
    cpu.load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    cpu.load.cache_clear()


@pytest.fixture(scope="session")
def draw() -> Draw:
    """`draw(rows, [(scheme, length), ...], seed, unit_scales)`: random codes, scales, zero points,
    and the same packed.

    Every code, stored scale and zero point is equally likely, which rounding a weight would not
    give. `unit_scales` makes float16 scales 1, so that products are integers.
    """

    def build(
        rows: int, parts: Sequence[tuple[str, int]], seed: int = 0, unit_scales: bool = False
    ) -> tuple[QuantizedWeight, PackedWeight]:
        generator = torch.Generator().manual_seed(seed)
        segments, start = [], 0
        for scheme, length in parts:
            form = Scheme.parse(scheme).weight
            assert form is not None
            segments.append(
                _random_segment(rows, Segment(start, length, form), unit_scales, generator)
            )
            start += length
        weight = QuantizedWeight((rows, start), tuple(segments))
        layout = [part.segment for part in segments]
        return weight, PackedWeight.from_tensors(pack(weight), weight.shape, layout)

    return build


def _random_segment(
    rows: int, segment: Segment, unit_scales: bool, generator: torch.Generator
) -> QuantizedSegment:
    form = segment.format
    shape = (1 if form.group_size < 0 else rows, form.groups(segment.length))

    def codes(limit: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(0, limit, size, generator=generator).to(torch.uint8)

    drawn = codes(1 << form.bits, (rows, segment.length))
    if form.element in ("e4m3", "e5m2"):
        drawn &= 0xBB  # not the exponent of infinities and NaNs
    elif form.element == "e5m1":
        drawn &= 0x5D
    row_scale = None
    if form.scale == "f16":
        scale = torch.rand(shape, generator=generator).add(0.5).to(torch.float16)
        if unit_scales:
            scale = torch.ones_like(scale)
    elif form.scale == "e8m0":
        scale = codes(8, shape) + 123
    else:
        scale = codes(min(1 << form.scale_bits, 0x7F), shape)
        row_scale = torch.rand(rows if form.two_level else 1, generator=generator)
        row_scale = row_scale.to(torch.float16 if form.two_level else torch.float32)
    zero = None if form.symmetric else codes(1 << form.zero_bits, shape)
    return QuantizedSegment(segment, drawn, scale, row_scale, zero)
