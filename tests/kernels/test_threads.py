"""Kernels may be called from several threads at once, and after a fork."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlib.kernels import layouts


def test_calls_from_several_threads_do_not_disturb_each_other(library, draw):
    jobs = []
    for seed in range(4):
        _, packed = draw(600, [("w4g64", 2048 + 64 * seed)], seed=seed)
        tiled = layouts.tile(packed)
        x = torch.randn(3, tiled.shape[1], generator=torch.Generator().manual_seed(seed))
        jobs.append((tiled, x))

    def work(index: int) -> torch.Tensor:
        tiled, x = jobs[index % 4]
        mode = "int8" if index % 8 < 4 else "exact"
        return library.linear(tiled.description, x, None, mode, threads=3)

    expected = [work(index) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(work, range(160))):
            assert torch.equal(found, expected[index % 8])


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("rows", [33, 700, 3000])
def test_every_row_is_computed_however_the_work_is_cut(library, draw, mode, rows):
    """Tasks get smaller. All results are kept, so that none lies where one lay before."""
    _, packed = draw(rows, [("w4g64", 1024)])
    tiled = layouts.tile(packed)
    x = torch.randn(9, 1024, generator=torch.Generator().manual_seed(0))
    found = [
        library.linear(tiled.description, x[:tokens], None, mode, threads=threads)
        for threads in (1, 2, 3, 5, 40)
        for tokens in (1, 9)
    ]
    for index, result in enumerate(found):
        assert torch.equal(result, found[index % 2])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_with_threads_of_its_own(library, draw):
    _, packed = draw(1100, [("w4g64", 2048)])
    tiled = layouts.tile(packed)
    x = torch.randn(2, 2048, generator=torch.Generator().manual_seed(0))
    out = library.linear(tiled.description, x, None, "int8", threads=3)
    expected = out.clone()
    child = os.fork()
    if child == 0:
        found = library.linear(tiled.description, x, None, "int8", threads=3)
        os._exit(0 if found.numpy().tobytes() == expected.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0


def test_a_worker_flushes_subnormals_when_its_caller_does(library, draw):
    """Otherwise a row's value would depend on the thread that computed it."""
    _, packed = draw(1100, [("w4g64", 2048)])
    tiled = layouts.tile(packed)
    x = torch.full((1, 2048), 1e-42)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        alone = library.linear(tiled.description, x, None, "exact", threads=1)
        for _ in range(20):
            found = library.linear(tiled.description, x, None, "exact", threads=3)
            # As bits: to this thread, now, a subnormal equals zero.
            assert torch.equal(found.view(torch.int32), alone.view(torch.int32))
    finally:
        torch.set_flush_denormal(False)
