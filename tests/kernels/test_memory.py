"""Kernels stay inside the memory they are given, and do nothing undefined."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantlib.kernels.cpu import build

SCRIPT = Path(__file__).with_name("guarded.py")


def run_guarded(path: Path) -> int:
    """Calls that gave the right answer; fails the test when the process died or one was wrong."""
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return int(done.stdout)


def test_no_kernel_reads_past_the_end_of_a_tensor(library):
    assert run_guarded(build.find() or build.build()) > 200


@pytest.mark.slow
def test_the_portable_kernels_do_nothing_undefined(tmp_path):
    flags = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-O0")
    try:
        path = build.build_into(tmp_path, flags, portable_only=True)
    except build.BuildError as error:
        pytest.skip(f"no compiler with a sanitizer: {error}")
    assert run_guarded(path) > 200
