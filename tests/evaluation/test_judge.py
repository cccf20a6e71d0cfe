"""A judge answers as the network it was written from, and refuses files that are none."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from quantlib.errors import DataError
from quantlib.evaluation import judge as judging
from quantlib.evaluation.judge import load_judge, mean_color, nearest_colors, save_judge

DIGITS = ["zero", "one", "two"]
PALETTE = {"black": [0, 0, 0], "red": [1, 0, 0], "blue": [0, 0, 1], "white": [1, 1, 1]}
SPEC = {
    "size": [8, 8],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "layers": [
        {"kind": "conv", "name": "0", "stride": 2, "padding": 1},
        {"kind": "batch_norm", "name": "1"},
        {"kind": "relu"},
        {"kind": "max_pool", "size": 2},
        {"kind": "flatten"},
        {"kind": "linear", "name": "5"},
        {"kind": "gelu"},
    ],
    "heads": {"digit": {"name": "7", "classes": DIGITS}},
    "rules": {
        "color": {"of": "foreground", "palette": PALETTE},
        "background": {"of": "background", "palette": PALETTE, "after": "on a"},
    },
}


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 3)]
        found = nn.Sequential(*layers)
        found[1].running_mean.normal_()
        found[1].running_var.uniform_(0.5, 2)
    return found.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_judge(tmp_path / "judge.safetensors", network().state_dict(), SPEC)
    return tmp_path / "judge.safetensors"


def pictures(count: int, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_computes_what_the_network_computes(file: Path) -> None:
    pixels = pictures(judging.PICTURES_AT_ONCE + 3)  # more than one batch
    mean, std = (torch.tensor(SPEC[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    expected = network()[:-1]((pixels - mean) / std)
    verdict = load_judge(file).look(pixels)
    torch.testing.assert_close(verdict.features, expected)
    chosen = network()[-1](expected).argmax(-1).tolist()
    assert verdict.answers["digit"] == [DIGITS[index] for index in chosen]
    assert len(set(chosen)) > 1, "a judge that always says the same would pass, too"


def test_pictures_of_another_size_are_resized(file: Path) -> None:
    assert load_judge(file).look(pictures(2, 16)).features.shape == (2, 6)


def test_colours_are_read_from_what_stands_out_of_the_border() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[0, 2] = 1.0  # blue ground
    pixels[0, :, 3:5, 2:6] = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    pixels[1, :, 2:4, 2:4] = 0.8
    assert nearest_colors(mean_color(pixels, "foreground"), PALETTE) == ["red", "white"]
    assert nearest_colors(mean_color(pixels, "background"), PALETTE) == ["blue", "black"]
    torch.testing.assert_close(mean_color(pixels, "foreground")[0], torch.tensor([0.9, 0.1, 0.1]))


def test_what_is_asked_for_stands_in_the_prompt(file: Path) -> None:
    judge = load_judge(file)
    asked = judge.asked("A red two, on a black background!")
    assert asked == {"digit": "two", "color": "red", "background": "black"}
    assert judge.asked("a blue one") == {"digit": "one", "color": "blue"}
    assert judge.asked("a phone") == {}, "a class inside another word is none"


def test_files_that_are_no_judges_are_sentences(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_judge(tmp_path / "missing.safetensors")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(DataError, match="is not a judge"):
        load_judge(other)
    safetensors.torch.save_file({"a": torch.zeros(2)}, other, {judging.METADATA: "{"})
    with pytest.raises(DataError, match="not JSON"):
        load_judge(other)
    newer = json.dumps({**SPEC, "format": 2})
    safetensors.torch.save_file(network().state_dict(), other, {judging.METADATA: newer})
    with pytest.raises(DataError, match="another format"):
        load_judge(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [{"kind": "exec", "name": "0"}]}, "the kinds are conv"),
        ({"layers": [*SPEC["layers"][:5], {"kind": "linear", "name": "7"}]}, "do not fit"),
        ({"layers": SPEC["layers"][:2]}, "do not fit"),
        ({"layers": [{"kind": "conv", "name": "9"}]}, "do not fit"),
        ({"heads": {}, "rules": {}}, "answers nothing"),
        ({"size": None}, "do not fit"),
    ],
)
def test_a_spec_that_does_not_fit_its_tensors_is_a_sentence(
    change: dict, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        save_judge(tmp_path / "judge.safetensors", network().state_dict(), {**SPEC, **change})
    assert not list(tmp_path.iterdir()), "nothing is left on the disk"
