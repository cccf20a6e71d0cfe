"""Peers: what they print is read as printed, and one that is not there is a sentence."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantlib.bench.peers import install, linear, llama_build, llama_cpp
from quantlib.bench.peers.linear import PeerMissing
from quantlib.bench.peers.llama_cpp import LlamaCpp

# What llama-bench b0c1e570 printed for -p 64 -n 16 -r 2 -o json, less fields that are not read.
SPEED = """[
  {"build_commit": "0c1e570", "model_type": "llama 256M Q4_0", "model_size": 89941248,
   "n_threads": 2, "n_prompt": 64, "n_gen": 0, "n_depth": 0, "avg_ts": 38.675152,
   "samples_ns": [ 938138044, 7009805891 ], "samples_ts": [ 68.2202, 9.13007 ]},
  {"build_commit": "0c1e570", "model_type": "llama 256M Q4_0", "model_size": 89941248,
   "n_threads": 2, "n_prompt": 0, "n_gen": 16, "n_depth": 0, "avg_ts": 8.267565,
   "samples_ns": [ 3050162068, 1417245180 ], "samples_ts": [ 5.24562, 11.2895 ]}
]
"""
# And llama-perplexity --kl-divergence, two windows.
DIVERGENCE = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence
   1      15.4368 ±    2.6056       0.28771 ±    0.05799       0.39369 ±    0.03341

====== Perplexity statistics ======
Mean PPL(Q)                   :  15.270135 ±   1.878189
Mean PPL(base)                :  11.781282 ±   1.455643
Mean ln(PPL(Q)/PPL(base))     :   0.259387 ±   0.042874
Mean PPL(Q)/PPL(base)         :   1.296135 ±   0.055570
Mean PPL(Q)-PPL(base)         :   3.488852 ±   0.713566

====== KL divergence statistics ======
Mean    KLD:   0.401070 ±   0.029257
Maximum KLD:   9.431968
"""


def test_llama_bench_is_read() -> None:
    speed = llama_cpp.parse_speed(SPEED)
    assert speed.prefill == [68.2202, 9.13007]
    assert speed.decode == [5.24562, 11.2895]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "oops", '[{"n_prompt": 1, "n_gen": 0}]'])
def test_llama_bench_that_printed_something_else_is_missing(text: str) -> None:
    with pytest.raises(PeerMissing, match="llama-bench printed"):
        llama_cpp.parse_speed(text)


def test_llama_perplexity_is_read() -> None:
    found = llama_cpp.parse_divergence(DIVERGENCE)
    assert found == llama_cpp.Divergence(0.40107, 0.029257, 1.296135, 0.05557)
    with pytest.raises(PeerMissing, match="no KL divergence"):
        llama_cpp.parse_divergence("failed to open file")


def test_the_windows_that_llama_scored_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "logits"
    tokens = list(range(12))
    file.write_bytes(b"_logits_" + struct.pack("<Iii12i", 4, 99, 3, *tokens) + b"logits follow")
    windows = llama_cpp.read_windows(file)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    file.write_bytes(b"something else altogether")
    with pytest.raises(PeerMissing, match="no file of llama-perplexity"):
        llama_cpp.read_windows(file)


def test_llama_that_is_not_installed_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PeerMissing, match="make peers"):
        LlamaCpp(2, cache=tmp_path)


@pytest.fixture
def fake_llama(tmp_path: Path) -> LlamaCpp:
    """llama-bench that prints the recorded sample, llama-quantize that fails, and no others."""
    folder = llama_build.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "sample.json").write_text(SPEED)
    for name, line in (
        ("llama-bench", f"cat {folder / 'sample.json'}"),
        ("llama-quantize", "echo loading; echo 'main: error: no tensor' >&2; exit 3"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return LlamaCpp(2, cache=tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="the programs here are shell scripts")
def test_programs_are_run_and_their_failures_are_sentences(
    fake_llama: LlamaCpp, tmp_path: Path
) -> None:
    assert fake_llama.speed(tmp_path / "m.gguf", 64, 16, 2).decode == [5.24562, 11.2895]
    with pytest.raises(PeerMissing, match="llama-quantize failed: main: error: no tensor"):
        fake_llama.quantize(tmp_path / "a", tmp_path / "b", "Q4_0")
    with pytest.raises(PeerMissing, match=r"llama-imatrix cannot be run .*make peers"):
        fake_llama.importance(tmp_path / "a", tmp_path / "t", tmp_path / "o", 2)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", "it said nothing"),
        ("one\ntwo\n", "two"),
        ("ok\nCMake Error: no compiler\nmore\n", "CMake Error: no compiler"),
    ],
)
def test_the_reason_is_the_line_that_says_most(output: str, expected: str) -> None:
    assert llama_build.reason(output) == expected


def test_a_package_that_is_not_there_or_broken_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerMissing, match=r"no_such_package_.*make peers"):
        linear.optional("no_such_package_anywhere")
    monkeypatch.setitem(sys.modules, "here_but_none", None)
    with pytest.raises(PeerMissing, match="here_but_none cannot be imported"):
        linear.optional("here_but_none")
    monkeypatch.setitem(sys.modules, "here", ModuleType("here"))
    assert linear.optional("here").__name__ == "here"


def test_one_peer_that_fails_to_install_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = []

    def fails() -> None:
        raise PeerMissing("there is no network")

    assert install.install_all({"a": fails, "b": lambda: installed.append("b")})
    assert installed == ["b"]
    printed = capsys.readouterr().out
    assert "a: not installed: there is no network" in printed
    assert "b: ready" in printed
    assert not install.install_all({"a": fails})


def test_pip_that_fails_is_a_sentence() -> None:
    with pytest.raises(PeerMissing, match="pip failed"):
        install.install_packages(["not a requirement !"], [], "--no-index")


def test_llama_needs_cmake_and_the_pinned_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*command: str) -> None:
        folder = Path(command[command.index("--dest") + 1])
        (folder / llama_build.ARCHIVE).write_bytes(b"another archive")

    monkeypatch.setattr(llama_build, "_run", download)
    monkeypatch.setattr(shutil, "which", lambda _: "cmake")
    with pytest.raises(PeerMissing, match="sha256"):
        llama_build.install(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PeerMissing, match="needs cmake"):
        llama_build.install(tmp_path)
    assert not llama_build.installed(tmp_path)
    assert not list(tmp_path.rglob("*.tar.gz")), "nothing half-made stays"


@pytest.mark.parametrize("peer", linear.peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("shape", [(64, 128), (32, 192)])
def test_every_peer_multiplies_or_says_why_not(
    peer: linear.LinearPeer, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small weights, two copies each; M = 3 after M = 1, as in a benchmark."""
    monkeypatch.setattr(linear, "MAX_COPIES", 2)
    try:
        bind = peer.prepare(*shape)
    except PeerMissing as error:
        pytest.skip(str(error))
    for tokens in (1, 3):
        run = bind(tokens)
        for index in range(3):
            run(index)
    assert callable(bind(2))


def test_copies_exceed_the_caches_but_have_a_limit() -> None:
    assert len(linear.copies(object, linear.footprint() // 3)) >= 3
    assert len(linear.copies(object, linear.footprint() * 2)) == 1
    assert len(linear.copies(object, 1)) == linear.MAX_COPIES


def test_the_recorded_sample_is_json() -> None:
    assert len(json.loads(SPEED)) == 2
