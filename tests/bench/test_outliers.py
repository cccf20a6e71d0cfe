"""Outliers: the function stays, the channels do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlib.bench import outliers
from quantlib.transforms.binding import wire

KINDS = ("aligned", "rotated")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Callable[..., Path]) -> Any:
    folder = tiny_llama(tmp_path, tie_word_embeddings=request.param)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0, generator=generator)
    return loaded


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(0))


def energy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return outliers.residual_energy(model, wire(model), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_outliers_do_not_change_the_function(
    model: Any, ids: torch.Tensor, kind: outliers.Kind
) -> None:
    changed = outliers.with_outliers(model, kind, energy(model, ids))
    with torch.no_grad():
        expected, found = model(ids).logits, changed(ids).logits
    # float32: factors up to 60 go in and out again, 1e-6 each.
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_original_and_a_plain_folder_afterwards(
    model: Any, ids: torch.Tensor, kind: outliers.Kind, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = outliers.with_outliers(model, kind, energy(model, ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, changed(ids).logits), "nothing lives in hooks"


@pytest.mark.parametrize("kind", KINDS)
def test_channels_become_tens_of_times_larger(
    model: Any, ids: torch.Tensor, kind: outliers.Kind
) -> None:
    plain = outliers.channel_statistics(model, ids)
    changed = outliers.channel_statistics(
        outliers.with_outliers(model, kind, energy(model, ids)), ids
    )
    # A factor of at least 20 on a channel that was at worst four times below the largest.
    assert changed["residual"]["amax_ratio"] > 5 * plain["residual"]["amax_ratio"]
    assert changed["residual"]["kurtosis"] > 3 * plain["residual"]["kurtosis"]
    for site in ("hidden", "keys", "output"):
        assert changed[site]["amax_ratio"] > 1.5 * plain[site]["amax_ratio"]
    assert changed["residual"]["error"] > 2 * plain["residual"]["error"]


def test_smoothing_undoes_aligned_outliers(model: Any, ids: torch.Tensor) -> None:
    plain = outliers.channel_statistics(model, ids)["residual"]
    aligned = outliers.channel_statistics(outliers.with_outliers(model, "aligned"), ids)["residual"]
    assert aligned["error"] > 4 * aligned["smoothed"]
    # SmoothQuant's factors take any gain out again exactly; what differs is float32.
    assert aligned["smoothed"] == pytest.approx(plain["smoothed"], rel=0.02)


def test_planes_take_a_large_channel_apart_so_that_smoothing_cannot() -> None:
    """One channel 20 times the others: rotated, the best smoothing leaves a larger error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, 5] *= 20
    basis = outliers.plane_rotations(x.square().mean(0), generator).float()
    torch.testing.assert_close(basis.T @ basis, torch.eye(64), rtol=0, atol=1e-6)
    readers = torch.randn(32, 64, generator=generator)
    readers[:, 5] /= 20
    aligned = outliers._smoothing(x, readers)["smoothed"]
    rotated = outliers._smoothing(x @ basis, readers @ basis)["smoothed"]
    assert rotated > 1.2 * aligned


def test_rotated_outliers_need_the_channels_energy(model: Any) -> None:
    with pytest.raises(ValueError, match="energy"):
        outliers.with_outliers(model, "rotated")
