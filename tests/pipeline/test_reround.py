"""Re-rounding: a block of a plan is run as the quantized model runs it, its moments are what they
say, and what is kept loses less and is what the next block sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import quantlib
from quantlib.calibration.stream import BlockStream
from quantlib.formats.activation import fake_quantize
from quantlib.formats.scheme import Scheme
from quantlib.pipeline.block_rounding import BlockRounding
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.compress import Result, open_run
from quantlib.pipeline.dense import DenseTrial, bank_weight
from quantlib.pipeline.inputs import bank_clips, cache_settings, round_cache
from quantlib.pipeline.measure import measure
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.planned_block import PlannedBlock, Windows
from quantlib.pipeline.reround import _enter, reround
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe

WINDOWS, LENGTH = 6, 48
EXACT = 1e-5
"""Of hidden states around 1: the same sums in float32, in another order."""


@contextmanager
def measured(model: Path, work: Path, text: str, **fields: Any) -> Iterator[Run]:
    """A run whose bank is full: two candidate schemes."""
    given = {"schemes": ["w2g32z4s4", "w4g32zs4"], "probes": 0, "passes": 1, "refine": True}
    shape = {"seqlen": LENGTH, "windows": WINDOWS, "probe_windows": 2}
    recipe = Recipe.create(data=text, **{**shape, **given, **fields})
    with open_run(model, work, recipe) as run:
        calibrate(run)
        measure(run)
        yield run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: str) -> Iterator[Run]:
    with measured(llama, tmp_path_factory.mktemp("reround") / "work", text) as one:
        yield one


def plan(run: Run, linear: str = "w2g32z4s4") -> dict[str, str]:
    """Everything in the blocks in one scheme, the rest as exact as it gets."""
    return {w.name: linear if w.block else "w4g32zs4" for w in run.model_map.weights}


@contextmanager
def block_of(
    run: Run,
    schemes: dict[str, str],
    index: int = 0,
    noise: float = 0.1,
    stream: BlockStream | None = None,
) -> Iterator[PlannedBlock]:
    """A block with made-up hidden states, and the same with noise."""
    stream = stream or BlockStream(run.source, run.model_map)
    stream.embed(run.windows[0])
    generator = torch.Generator().manual_seed(index)
    width = run.model_map.weights[0].in_features
    exact = torch.randn(WINDOWS, LENGTH, width, generator=generator)
    quantized = exact + noise * torch.randn(exact.shape, generator=generator)
    groups = [g for g in run.model_map.groups_in(stream.block_names[index]) if g.kind == "linear"]
    inputs = {
        name: (
            Scheme.parse(schemes[name]).activations(run.model_map.weight(name).in_features),
            None,
        )
        for group in groups
        for name in group.members
    }
    with stream.block(index) as module:
        yield PlannedBlock(
            stream, index, module, groups, inputs, exact, quantized, Windows.split(WINDOWS)
        )


def test_windows_that_judge_are_not_fitted() -> None:
    for count in range(2, 60):
        windows = Windows.split(count)
        assert sorted((*windows.fit, *windows.held)) == list(range(count))
        assert 1 <= len(windows.held) <= max(1, round(count / 4))
    assert Windows.split(40).held == (2, 7, 12, 17, 22, 27, 32, 37)
    assert Windows.split(1) == Windows((0,), (0,))


def test_the_exact_block_and_what_it_adds_to_the_stream(run: Run, llama: Path) -> None:
    with block_of(run, plan(run)) as block:
        block.observe()
        names = [group.name.rpartition(".")[2] for group in block.groups]
        assert names == ["qkv", "o_proj", "gate_up", "down_proj"], "the order in which they run"
        assert block.last_writer is not None
        assert block.last_writer.name.endswith("down_proj")
        layer = AutoModelForCausalLM.from_pretrained(llama).model.layers[0]
        ids = torch.arange(LENGTH)[None]
        model = AutoModelForCausalLM.from_pretrained(llama).model
        positions = model.rotary_emb(block.exact[:1], ids)
        with torch.no_grad():
            expected = layer(block.exact[:1], position_embeddings=positions)
        torch.testing.assert_close(block.outputs[:1], expected, rtol=EXACT, atol=EXACT)


def test_a_norm_behind_linears_is_noticed(tmp_path: Path, tiny_tokenizer: Any, text: str) -> None:
    """Gemma 2 normalises before it adds: its linears do not write to the stream."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tiny_tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING["gemma2"](**shape, **heads, pad_token_id=1, sliding_window=16)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with measured(tmp_path / "model", tmp_path / "work", text) as run:
        with block_of(run, plan(run)) as block:
            block.observe()
            assert block.last_writer is None
        assert reround(run, plan(run))


@pytest.mark.parametrize("kind", ["qkv", "o_proj", "gate_up", "down_proj"])
def test_moments_are_of_what_each_group_really_reads_and_lacks(run: Run, kind: str) -> None:
    """Against sums over tokens of what hooks see. What a writer lacks is what makes the stream
    behind it exact: adding it to the block's output, in place of the last writer's error, gives the
    exact output."""
    schemes = plan(run)
    with block_of(run, schemes) as block:
        block.observe()
        work = BlockRounding(run, block, schemes)
        weights = work.dense(work.weights)
        (group,) = [g for g in block.groups if g.name.endswith(kind)]
        token_weight = torch.rand(WINDOWS, LENGTH, generator=torch.Generator().manual_seed(0))
        fit, held = block.moments(group, weights, token_weight)
        own = {name: block.originals[name] for name in group.members}
        matrix = torch.cat(list(own.values()))
        expected = {key: torch.zeros(matrix.shape) for key in ("fit", "held")}
        hessians = {key: torch.zeros(matrix.shape[1], matrix.shape[1]) for key in ("fit", "held")}
        seen: list[Tensor] = []
        module = block.stream.model.get_submodule(group.members[0].rpartition(".")[0])
        handle = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
        for window in range(WINDOWS):
            key = "held" if window in block.windows.held else "fit"
            block.put(block.originals)
            with torch.no_grad():
                block._run(block.exact[window])
                block.put({**weights, **own})
                out = block._run(block.quantized[window])
            clean, noisy = seen[-2:]
            lacks = (clean - noisy) @ matrix.T
            if kind == "down_proj":
                lacks = block.outputs[window] - out
            weighted = noisy * token_weight[window][:, None]
            hessians[key] += weighted.T @ noisy
            if kind != "o_proj":
                expected[key] += lacks.T @ weighted
        handle.remove()
        for found, key in ((fit, "fit"), (held, "held")):
            torch.testing.assert_close(found.hessian, hessians[key], rtol=1e-4, atol=1e-4)
            if kind != "o_proj":
                torch.testing.assert_close(found.missing, expected[key], rtol=1e-4, atol=1e-3)
            else:  # the error that entered the block counts, not the layer's own alone
                assert float(found.missing.norm()) > 2 * float(expected[key].norm())


def test_inputs_are_rounded_as_the_plan_says(run: Run) -> None:
    """Straight through: the gradient is that of the same numbers without a rounding behind them."""
    schemes = {name: (s + "a4z" if "layers" in name else s) for name, s in plan(run).items()}
    with block_of(run, schemes) as block:
        block.observe()
        name = next(name for name in block.originals if name.endswith("down_proj.weight"))
        module = block.stream.model.get_submodule(name.removesuffix(".weight"))
        seen: list[Tensor] = []
        block.metric = type(block.metric).relative(block.outputs)
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0].detach()))
        found = block.gradients(block.originals, [0], block.metric)
        x = seen[-1]
        segments = block.inputs[name][0]
        assert segments
        # Rounded numbers are on their grid: rounding them again moves them by float32 alone.
        torch.testing.assert_close(fake_quantize(x, segments), x, rtol=1e-4, atol=1e-4)
        assert len(x[0].unique()) <= 16
        out = block._run(block.quantized[0], rounded=True)
        weights = block.metric.output_weight * block.metric.token_weight[0][:, None] / LENGTH
        error = 2 * (out - block.outputs[0]) * weights
        torch.testing.assert_close(found[name], error.T @ x, rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_the_judged_loss(run: Run) -> None:
    """By finite differences along random directions, inputs not rounded."""
    with block_of(run, plan(run)) as block:
        block.observe()
        block.metric = type(block.metric).relative(block.outputs)
        held = list(block.windows.held)
        found = block.gradients(block.originals, held, block.metric)
        generator = torch.Generator().manual_seed(0)
        for name, gradient in found.items():
            direction = torch.randn(gradient.shape, generator=generator)
            direction *= 1e-3 * block.originals[name].norm() / direction.norm()
            ends = [
                float(
                    block.judge({**block.originals, name: block.originals[name] + s * direction})
                    .double()
                    .mean()
                )
                for s in (1.0, -1.0)
            ]
            expected = (ends[0] - ends[1]) / 2
            # Third order, and float32 losses around 0.02: a few percent of the difference.
            slope = float((gradient * direction).sum())
            assert slope == pytest.approx(expected, rel=0.1, abs=2e-6), name


@pytest.mark.parametrize("activation", ["", "a8", "a4z"])
@pytest.mark.parametrize("learning", [0, 6])
def test_what_is_kept_loses_less_on_windows_that_were_not_fitted(
    tmp_path: Path, run: Run, activation: str, learning: int
) -> None:
    """With what predecessors did wrong in the block's inputs, there is much to make good."""
    schemes = plan(run)
    rounded = {name: (s + activation if "layers" in name else s) for name, s in schemes.items()}
    changed = run.recipe.model_copy(update={"learning": learning})
    run = Run(run.source, run.model_map, run.work, changed, run.tokenizer)
    with block_of(run, rounded, index=1) as block:
        work = BlockRounding(run, block, schemes)
        kept = work.finish()
        before, after = work.losses
        assert after < 0.95 * before
        assert "down_proj" in "".join(work.kept)
        assert float(block.judge(work.dense(kept)).mean()) == pytest.approx(after, rel=1e-6)
        assert (work.step == 0) if learning == 0 else (work.step in range(learning + 1))
        untouched = [g for g in block.groups if g.name not in work.kept]
        if not work.step:
            for group in untouched:
                for name in group.members:
                    assert (
                        kept[name].segments[0].codes.equal(work._bank_entry(name).segments[0].codes)
                    )


def test_the_model_is_better_by_its_true_kl(run: Run) -> None:
    """And every block keeps what it gained beside its tensors."""
    schemes = plan(run)
    keys = reround(run, schemes)
    assert set(keys) == {w.name for w in run.model_map.weights if w.block}
    assert all(run.bank.has(key) for key in keys.values())
    trial = DenseTrial(run)
    before, after = (trial.measure(schemes, chosen) for chosen in ({}, keys))
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl.value < 0.9 * before.kl.value, "2-bit weights leave much to be made good"
    entries = [run.bank.entry(key).extra for key in keys.values()]
    assert all(0 < extra["after"] <= extra["before"] for extra in entries)


@pytest.mark.parametrize("activation", ["", "a4z"])
@pytest.mark.parametrize("kv", ["f32", "int4"])
def test_hidden_states_are_those_of_the_model_that_ships(
    tmp_path: Path, llama: Path, text: str, activation: str, kv: str
) -> None:
    """What leaves a block is what the dense model computes there: inputs of linears, keys and
    values rounded. What the exact block makes is what the exact model does."""
    given = {"schemes": [f"w4g32zs4{activation}", "w6g64zs6"], "kv": kv}
    with measured(llama, tmp_path / "work", text, **given) as run:
        linear, other = map(str, (Scheme.parse(name) for name in given["schemes"]))
        schemes = {w.name: linear if w.block else other for w in run.model_map.weights}
        trial = DenseTrial(run)
        trial.load(schemes)
        ids = run.windows[:1]
        stream = BlockStream(run.source, run.model_map)
        caches = round_cache(stream.model, run, cache_settings(run))
        entered = _enter(run, stream, schemes)
        with block_of(run, schemes, stream=stream) as block, torch.no_grad():
            block.exact, block.quantized = entered["exact"], entered["quantized"]
            block.caches = {path: state for path, state in caches.items() if "layers.0." in path}
            work = BlockRounding(run, block, schemes)
            found = block.carry(work.dense(work.weights))[0]
            expected = trial.model(ids, output_hidden_states=True).hidden_states[1][0]
            exact = AutoModelForCausalLM.from_pretrained(llama)
            clean = exact(ids, output_hidden_states=True).hidden_states[1][0]
    # A number on the edge between two codes may fall to either side: rare, and a step's width.
    off = (found - expected).abs() > 1e-4
    assert float(off.double().mean()) < (0.02 if activation or kv != "f32" else 1e-9)
    torch.testing.assert_close(block.outputs[0], clean, rtol=EXACT, atol=EXACT)
    assert float((expected - clean).norm() / clean.norm()) > 0.01


def test_columns_that_are_packed_in_another_order(tmp_path: Path, llama: Path, text: str) -> None:
    """Wide columns of o_proj are packed last, wherever they stand: the block runs as it should, and
    gains as much."""
    generator = torch.Generator().manual_seed(0)
    given = {"schemes": ["w2g32z4s4h8/8", "w4g32zs4"], "probes": 0, "passes": 1}
    recipe = Recipe.create(data=text, seqlen=LENGTH, windows=WINDOWS, probe_windows=2, **given)
    with open_run(llama, tmp_path / "work", recipe) as run:
        run.orders = {
            weight.name: torch.randperm(weight.in_features, generator=generator)
            for weight in run.model_map.weights
            if weight.name.endswith("o_proj.weight")
        }
        calibrate(run)
        measure(run)
        schemes = plan(run, "w2g32z4s4h8/8")
        with block_of(run, schemes, noise=0.05) as block:
            work = BlockRounding(run, block, schemes)
            for name, value in work.dense(work.weights).items():
                assert torch.equal(value, bank_weight(run, name, schemes[name]))
            # Rounded columns are nearer to their own weights than to any others'.
            name = next(iter(run.orders))
            error = (work.dense(work.weights)[name] - block.originals[name]).norm()
            assert float(error) < 0.5 * float(block.originals[name].norm())
            work.finish()
            assert any(kept.endswith("o_proj") for kept in work.kept)
            assert work.losses[1] < 0.9 * work.losses[0]


def test_clip_factors_ship_with_the_weights(
    squeeze: Callable[..., Result],
) -> None:
    """Inputs of 3 bits keep less than all of their range, in the trial and in the checkpoint."""
    schemes = ["w6g32a3", "w6g32zs6"]
    result = squeeze(schemes=schemes, size="40%", probes=0, learning=2)
    assert result.refinement is not None
    assert result.refinement.kept
    with reopen_run(result.work, with_data=True) as run:
        keys = reround(run, result.plan.schemes)
        clips = {name: bank_clips(run, key) for name, key in keys.items()}
        trial = DenseTrial(run)
        trial.load(result.plan.schemes, keys)
        ids = torch.arange(2, 42)[None]
        with torch.no_grad():
            expected = trial.model(ids).logits
    assert all(len(found) == 1 for found in clips.values())
    assert min(clips.values()) < (0.95,)
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert {name: tuple(found) for name, found in config["clips"].items()} == clips
    with torch.no_grad():
        found = quantlib.load(result.path).model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{"strength": 0.5}, {"learning": 3}])
def test_other_options_are_other_entries(run: Run, change: dict[str, Any], tmp_path: Path) -> None:
    schemes = plan(run)
    keys = reround(run, schemes)
    assert reround(run, schemes) == keys
    other = Run(
        run.source, run.model_map, run.work, run.recipe.model_copy(update=change), run.tokenizer
    )
    assert set(reround(other, schemes).values()).isdisjoint(keys.values())
