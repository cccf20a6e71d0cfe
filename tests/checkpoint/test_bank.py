"""The bank returns what was put, and never a damaged entry."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from quantlib.checkpoint.bank import LayerBank
from quantlib.checkpoint.tensorfile import atomic_save_tensors
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import CheckpointError
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight import dequantize, pack, unpack

SCHEMES = ("w4g32z", "w3", "w2g16zs6", "nvfp4", "w8t")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkDir]:
    with WorkDir.open(tmp_path / "work") as work:
        yield work


def packed(scheme: str, seed: int = 0) -> dict[str, torch.Tensor]:
    weight = torch.randn(36, 72, generator=torch.Generator().manual_seed(seed))
    return pack(quantize_rtn(weight, Scheme.parse(scheme).segments(72)))


def entry_file(work: WorkDir, key: str) -> Path:
    (path,) = work.path.glob(f"bank/*/{key}.safetensors")
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_put_is_got_back_and_unpacks_to_the_same_weight(work: WorkDir, scheme: str) -> None:
    bank, tensors = LayerBank(work), packed(scheme)
    key = bank.put("a.weight", scheme, "inputs", tensors, {"loss": 0.1})
    got = bank.get(key)
    assert got.keys() == tensors.keys()
    segments = Scheme.parse(scheme).segments(72)
    expected = dequantize(unpack(tensors, (36, 72), segments))
    torch.testing.assert_close(
        dequantize(unpack(got, (36, 72), segments)), expected, rtol=0, atol=0
    )
    assert bank.nbytes(key) == payload_bytes((36, 72), segments)
    assert bank.entry(key).extra == {"loss": 0.1}


def test_an_entry_is_found_again_by_its_key_after_reopening(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path) as work, LayerBank(work).batch() as batch:
        for scheme in SCHEMES:
            batch.put("a.weight", scheme, "inputs", packed(scheme), {"loss": 1.5}, seconds=0.25)
    with WorkDir.open(tmp_path) as work:
        bank = LayerBank(work)
        assert [(entry.weight, entry.scheme) for entry in bank.entries()] == [
            ("a.weight", scheme) for scheme in SCHEMES
        ]
        assert all(bank.has(bank.key("a.weight", scheme, "inputs")) for scheme in SCHEMES)
        assert not bank.has(bank.key("a.weight", "w5", "inputs"))


def test_a_key_depends_on_weight_scheme_and_inputs() -> None:
    keys = {
        LayerBank.key(*parts)
        for parts in (("a", "w4", "x"), ("b", "w4", "x"), ("a", "w5", "x"), ("a", "w4", "y"))
    }
    assert len(keys) == 4
    assert LayerBank.key("a", str(Scheme.parse("w4g64z")), "x") in {
        LayerBank.key("a", "w4g64z", "x")
    }


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        with WorkDir.open(tmp_path / name) as work:
            key = LayerBank(work).put("a.weight", "w4g32z", "inputs", packed("w4g32z"))
            files.append(entry_file(work, key).read_bytes())
    assert files[0] == files[1]


def test_a_batch_that_fails_leaves_nothing(work: WorkDir) -> None:
    bank = LayerBank(work)
    with suppress(ZeroDivisionError), bank.batch() as batch:
        batch.put("a.weight", "w3", "inputs", packed("w3"))
        raise ZeroDivisionError
    assert not list(bank.entries())
    assert not [path for path in work.path.glob("bank/**/*") if path.is_file()]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "replaced"])
def test_a_damaged_entry_is_refused_and_can_be_put_again(work: WorkDir, damage: str) -> None:
    bank = LayerBank(work)
    key = bank.put("a.weight", "w3", "inputs", packed("w3"))
    path = entry_file(work, key)
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(data[:100])
    elif damage == "missing":
        path.unlink()
    else:
        atomic_save_tensors(path, packed("w3", seed=1), {"weight": "a.weight", "scheme": "w3"})
    with pytest.raises(CheckpointError, match=r"missing or damaged .* run the same command again"):
        bank.get(key)
    assert not bank.has(key)
    assert not bank.verify(key)
    assert bank.put("a.weight", "w3", "inputs", packed("w3")) == key
    assert bank.verify(key)
    assert path.read_bytes() == data


def test_verify_drops_a_damaged_entry_without_raising(work: WorkDir) -> None:
    bank = LayerBank(work)
    key = bank.put("a.weight", "w3", "inputs", packed("w3"))
    assert bank.verify(key)
    with WorkDir.open(work.path.parent / "other") as other:
        other_bank = LayerBank(other)
        other_bank.put("a.weight", "w3", "inputs", packed("w3"))
        path = entry_file(other, key)
        path.write_bytes(bytes(path.stat().st_size))
        assert other_bank.has(key)
        assert not other_bank.verify(key)
        assert not other_bank.has(key)


def test_lazy_tensors_know_their_layout_and_load_the_same_numbers(work: WorkDir) -> None:
    bank, tensors = LayerBank(work), packed("w4g32z")
    lazy = bank.lazy(bank.put("a.weight", "w4g32z", "inputs", tensors))
    for suffix, tensor in tensors.items():
        assert (lazy[suffix].dtype, lazy[suffix].shape) == (tensor.dtype, tuple(tensor.shape))
        assert lazy[suffix].load().equal(tensor)


def test_numbers_that_are_not_finite_are_refused(work: WorkDir) -> None:
    with pytest.raises(CheckpointError, match="cannot be recorded"):
        LayerBank(work).put("a.weight", "w3", "inputs", packed("w3"), {"loss": float("inf")})


def test_an_unknown_key_is_a_sentence(work: WorkDir) -> None:
    bank = LayerBank(work)
    for ask in (bank.get, bank.entry, bank.nbytes):
        with pytest.raises(CheckpointError, match="no result under the key"):
            ask("0" * 64)
