"""`bench decode`: engines take turns, a peer that fails is left out, and rows have one form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.bench import artifacts, decode, divergence, engines, footprint
from quantlib.bench.checkpoints import Schemes, pack_rounded
from quantlib.bench.engines import Eager, Quantlib, Sample
from quantlib.bench.peers.linear import PeerMissing
from quantlib.bench.peers.llama_cpp import Speed
from quantlib.kernels.cpu import library

ROW = {
    "model", "engine", "bytes", "decode_tok_s", "prefill_tok_s", "decode_quartiles",
    "prefill_quartiles", "threads", "kl", "kl_error",
}  # fmt: skip


class Fake:
    """An engine whose speeds were decided beforehand."""

    def __init__(self, name: str, samples: list[Sample | None], log: list[str]) -> None:
        self.name, self.nbytes = name, 1000
        self._samples, self._log = iter(samples), log

    def sample(self, prompt: int, new: int) -> Sample:
        self._log.append(self.name)
        found = next(self._samples)
        if found is None:
            raise PeerMissing(f"{self.name} broke")
        return found


def test_engines_take_turns_and_medians_are_reported() -> None:
    log: list[str] = []
    samples: list[Sample | None] = [Sample(10, 1), Sample(30, 3), Sample(20, 2)]
    pair = [Fake(name, list(samples), log) for name in ("a", "b")]
    found = decode.Found()
    rows = decode.race("m", pair, 3, found, {"a": divergence.Loss(0.1, 0.01)})
    assert log == ["a", "b"] * 3
    assert [set(row) for row in rows] == [ROW, ROW]
    assert (rows[0]["prefill_tok_s"], rows[0]["decode_tok_s"]) == (20, 2)
    assert (rows[0]["kl"], rows[0]["kl_error"]) == (0.1, 0.01)
    assert rows[1]["kl"] is None
    assert found.missing == {}


def test_a_peer_that_breaks_is_left_out_and_named() -> None:
    log: list[str] = []
    broken = Fake("broken", [Sample(1, 1), None], log)
    good = Fake("good", [Sample(1, 1)] * 3, log)
    found = decode.Found()
    rows = decode.race("m", [broken, good], 3, found)
    assert [row["engine"] for row in rows] == ["good"]
    assert found.missing == {"broken": "broken broke"}
    assert log.count("broken") == 2


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("decode") / "source")


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    library.load()  # from the user's own cache folder, before a test takes another
    return pack_rounded(tiny, tiny.with_name("packed"), Schemes("w4g32", "w8g32"))


def test_a_quick_run_needs_no_peer(
    tiny: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it on a tiny model, where llama.cpp is not installed; footprints in a process."""
    cache = tiny.parent / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(artifacts, "smollm2_rounded", lambda: packed)
    monkeypatch.setattr(decode.assets, "fetch_smollm2", lambda: tiny)
    monkeypatch.setattr(decode, "PROMPT", 40)
    monkeypatch.setattr(decode, "NEW", 6)
    monkeypatch.setattr(footprint, "_load_elsewhere", footprint.load_here)
    decode.main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    names = ["quantlib int8, kv int8", "transformers eager bfloat16", "transformers eager float32"]
    assert [row["engine"] for row in found["rows"]] == names
    assert all(set(row) == ROW for row in found["rows"])
    assert all(row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0 for row in found["rows"])
    assert "make peers" in found["engines_missing"]["llama.cpp"]
    assert found["rows"][0]["bytes"] == footprint_bytes(packed) == found["footprints"][0]["bytes"]
    decode.show(found, decode.answers())
    assert "not measured: llama.cpp" in capsys.readouterr().out


class InstalledLlama:
    """llama.cpp as far as a benchmark asks it for speed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def speed(self, model: Path, prompt: int, new: int, repetitions: int) -> Speed:
        assert model.exists()
        return Speed([1000.0] * repetitions, [100.0] * repetitions)


def test_a_full_run_measures_models_losses_and_footprints(
    tiny: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes minutes is a stand-in: compressing, llama.cpp, large models."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(bytes(300_000))
    windows = torch.arange(32).reshape(2, 16)
    losses = {"llama.cpp Q4_0": divergence.Loss(0.5, 0.1)}
    sizes: list[float] = []

    def compressed(megabytes: float, *_: Path) -> Path:
        sizes.append(megabytes)
        return packed

    monkeypatch.setattr(decode, "LlamaCpp", InstalledLlama)
    monkeypatch.setattr(decode, "_compressed", compressed)
    monkeypatch.setattr(decode, "ROUNDS", 1)
    monkeypatch.setattr(decode, "PROMPT", 12)
    monkeypatch.setattr(decode, "NEW", 4)
    monkeypatch.setattr(artifacts, "smollm2_gguf", lambda *_: gguf)
    monkeypatch.setattr(artifacts, "llama_1b", lambda _: ({"": packed, " mixed": packed}, gguf))
    monkeypatch.setattr(divergence, "of_llama", lambda *_: (losses, windows))
    monkeypatch.setattr(footprint, "_load_elsewhere", footprint.load_here)
    monkeypatch.setattr(decode.assets, "fetch_smollm2", lambda: tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    found = decode.run(quick=False)
    assert sizes == [69.6, 76.2, 0.3], "our own sizes, and that of the smallest of theirs"
    rows = {(row["model"], row["engine"]): row for row in found["rows"]}
    ours = rows[decode.SMOLLM2, "quantlib int8 0.3 MB, kv int8"]
    assert 0 < ours["kl"] < 1
    assert rows[decode.SMOLLM2, "llama.cpp Q4_0"]["kl"] == 0.5
    assert rows[decode.SMOLLM2, "llama.cpp Q4_K_M"]["kl"] is None
    assert rows[decode.LLAMA_1B.name, "llama.cpp Q4_0"]["decode_tok_s"] == 100.0
    assert found["engines_missing"] == {}
    models = [row["model"] for row in found["footprints"]]
    assert models == [decode.SMOLLM2] * 3 + [decode.LLAMA_1B.name] * 2
    promised = {target["what"] for target in found["targets"]}
    assert "decoding against llama.cpp Q4_0" in promised
    assert "KL of llama.cpp Q4_0 over ours" in promised


def footprint_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def test_every_sample_starts_from_an_empty_cache(tiny: Path, packed: Path) -> None:
    """As many tokens as the cache has room for, again and again."""
    ours = Quantlib(packed, "int8", capacity=24)
    for _ in range(3):
        assert min(ours.sample(24, 8)) > 0
    assert min(Eager(tiny, "float32").sample(24, 8)) > 0


def test_a_loss_is_that_of_the_engine_that_is_timed(
    tiny: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coarser keys and values lose more, and the figure says so."""
    monkeypatch.setattr(divergence.assets, "fetch_smollm2", lambda: tiny)
    windows = torch.tensor([engines.random_tokens(24, 300), engines.random_tokens(48, 300)[24:]])
    ours = [Quantlib(packed, "exact", 24, kv=kv) for kv in ("f32", "int8", "int4")]
    losses = divergence.of_engines(ours, windows)
    assert list(losses) == [f"quantlib exact, kv {kv}" for kv in ("f32", "int8", "int4")]
    exact, fine, coarse = (loss.kl for loss in losses.values())
    assert coarse > 1.02 * exact > 0
    assert abs(fine - exact) < 0.2 * (coarse - exact)


def test_random_tokens_are_tokens_and_the_same_every_time() -> None:
    tokens = engines.random_tokens(100, 7)
    assert tokens == engines.random_tokens(100, 7)
    assert set(tokens) <= set(range(7))
    assert len(set(tokens)) > 1


def test_a_footprint_has_both_states_and_the_bytes_of_the_files(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "_load_elsewhere", footprint.load_here)
    row = footprint.measure(packed)
    assert row["bytes"] == footprint_bytes(packed)
    assert all(
        row[f"{what}_s_{s}"] > 0 for what in ("read", "keep", "load") for s in ("cold", "warm")
    )


def test_loading_is_measured_in_another_process(packed: Path) -> None:
    found = footprint._load_elsewhere(packed)
    assert found["load_s"] > 0
    # A tiny model: what is resident is work space, far below what Python and torch take.
    assert 0 < found["resident_bytes"] < 200e6
    assert found["peak_bytes"] >= found["resident_bytes"]


def test_a_process_that_cannot_load_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(footprint.QuantlibError, match=r"in its own process: .*config\.json"):
        footprint._load_elsewhere(tmp_path)


def test_an_artifact_appears_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fails(made: Path, scratch: Path) -> None:
        made.write_text("half")
        raise PeerMissing("the tool failed")

    with pytest.raises(PeerMissing):
        artifacts.kept("model.gguf", fails)
    assert not list(tmp_path.rglob("*.gguf"))
    path = artifacts.kept("model.gguf", lambda made, _: made.write_text("whole"))
    assert path.read_text() == "whole"
    assert artifacts.kept("model.gguf", fails) == path, "made once"


def test_options_of_the_compression_reach_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        decode,
        "run",
        lambda quick, work, models: asked.update(quick=quick, work=work, models=models),
    )
    monkeypatch.setattr(decode, "print_json", lambda _: None)
    monkeypatch.setattr(decode.record, "write", lambda name, _: asked.update(kept=name))
    monkeypatch.setattr(decode.record, "of_kernels", "{}_avx".format)
    decode.main(["--json", "--work", str(tmp_path)])
    assert asked == {"quick": False, "work": tmp_path, "models": None, "kept": "decode_avx"}
    decode.main(["--json", "--model", decode.SMOLLM2])
    assert (asked["models"], asked["kept"]) == ([decode.SMOLLM2], "decode_smollm2-135m_avx")
