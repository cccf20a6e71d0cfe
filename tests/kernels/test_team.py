"""The thread team keeps its promises: barriers, shared loops, many callers, forks."""

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.kernels.cpu import build

THREADS = (1, 2, 3, 5)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """team_probe.cpp and the team, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    path = tmp_path_factory.mktemp("team") / "probe.so"
    sources = [str(Path(__file__).with_name("team_probe.cpp")), str(build.SOURCES / "team.cpp")]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", f"-I{build.SOURCES}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.probe_loops.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
    library.probe_parallel_for.argtypes = [ctypes.c_int32, ctypes.c_int64]
    return library


def barriers(probe: ctypes.CDLL, threads: int, rounds: int, sleep_us: int = 0) -> tuple[int, int]:
    """What went wrong, and how many threads took part."""
    members = ctypes.c_int32()
    wrong = probe.probe_barriers(threads, rounds, sleep_us, ctypes.byref(members))
    return wrong, members.value


@pytest.mark.parametrize("threads", THREADS)
def test_nobody_passes_a_barrier_before_everybody_came(probe, threads):
    wrong, members = barriers(probe, threads, rounds=2000 if threads < 3 else 200)
    assert wrong == 0
    assert 1 <= members <= threads


def test_a_thread_that_comes_late_wakes_those_who_fell_asleep(probe):
    """5 ms is long after a waiting thread stopped looking."""
    for threads in (2, 3):
        wrong, _ = barriers(probe, threads, rounds=12, sleep_us=5000)
        assert wrong == 0


def test_where_threads_only_wait_for_each_other_fewer_take_part_for_a_while(probe):
    """As on a machine whose processors others use: two threads would be slower than one."""
    seen: set[tuple[int, int]] = set()
    for _ in range(400):
        seen.add(barriers(probe, 2, rounds=4, sleep_us=3000))
        if len(seen) == 2:
            break
    assert seen == {(0, 1), (0, 2)}
    assert any(barriers(probe, 2, rounds=100) == (0, 2) for _ in range(5000))


@settings(deadline=None, max_examples=60)
@given(
    threads=st.sampled_from(THREADS),
    count=st.integers(0, 300),
    most=st.one_of(st.integers(1, 20), st.just(2**62)),
)
def test_a_shared_loop_gives_out_every_index_once(probe, threads, count, most):
    assert probe.probe_loops(threads, 5, count, most) == 0


@settings(deadline=None, max_examples=60)
@given(threads=st.sampled_from(THREADS), count=st.integers(0, 300))
def test_parallel_for_calls_every_index_once(probe, threads, count):
    assert probe.probe_parallel_for(threads, count) == 0


def test_a_region_inside_a_region_runs_alone(probe):
    assert all(probe.probe_nested(threads) == 0 for threads in THREADS for _ in range(20))


def test_callers_on_several_threads_do_not_disturb_each_other(probe):
    def work(index: int) -> int:
        if index % 3 == 0:
            return barriers(probe, 2, rounds=20)[0]
        if index % 3 == 1:
            return probe.probe_loops(3, 3, 50, 4)
        return probe.probe_parallel_for(2, 100)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(300))) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_team_of_its_own(probe):
    assert barriers(probe, 2, rounds=10)[0] == 0
    child = os.fork()
    if child == 0:
        results = [barriers(probe, 2, rounds=10) for _ in range(50)]
        together = max(members for _, members in results) == 2
        os._exit(0 if together and not any(wrong for wrong, _ in results) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
