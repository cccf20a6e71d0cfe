"""`make peers`: installs everything quantlib is measured beside, as far as it can be had here.

Each peer is installed on its own, and one that fails costs one sentence. The exit code is 1 only
when none could be installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from quantlib.bench.peers import llama_build
from quantlib.bench.peers.linear import PeerMissing

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
"""Peer -> Python packages."""


def install_packages(names: Sequence[str], constraints: Sequence[Path], options: str) -> None:
    """pip install into this environment. Raises PeerMissing."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options.split()]
    for path in constraints:
        command += ["--constraint", str(path)]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerMissing(f"pip failed: {llama_build.reason(done.stderr)}")


def install_all(peers: dict[str, Callable[[], object]]) -> bool:
    """Run every installer, print one line for each; whether any worked."""
    worked = False
    for name, install in peers.items():
        print(f"{name}: installing", flush=True)
        try:
            install()
        except PeerMissing as error:
            print(f"{name}: not installed: {error}", flush=True)
        else:
            worked = True
            print(f"{name}: ready", flush=True)
    return worked


def main() -> None:
    """Install from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraint", type=Path, action="append", default=[], help="for pip")
    parser.add_argument("--pip-args", default="", help="further arguments of pip install")
    parser.add_argument("--jobs", type=int, help="compilers at once for llama.cpp")
    options = parser.parse_args()
    peers: dict[str, Callable[[], object]] = {
        name: lambda names=names: install_packages(  # type: ignore[misc]
            names, options.constraint, options.pip_args
        )
        for name, names in PACKAGES.items()
    }
    peers["llama.cpp"] = lambda: llama_build.install(jobs=options.jobs)
    sys.exit(0 if install_all(peers) else 1)


if __name__ == "__main__":
    main()
