"""Statistics of a streamed model are those of the whole model, computed directly with autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib.calibration import passes
from quantlib.calibration.observe import SAMPLES_PER_WINDOW, BlockObserver, observed
from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics
from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError, ModelError
from quantlib.models.source import Source

MakeTiny = Callable[[str], Any]
MakeStore = Callable[[], Any]

DENSE = ["llama", "llama_tied", "qwen2", "phi3", "gemma2", "gemma3_text", "bloom", "gpt_bigcode"]
EXPERTS = ["mixtral", "qwen3_moe", "qwen3_moe_some_dense"]

Pair = tuple[Tensor, Tensor]
"""Input [T, K] and output gradient [T, N] of one matrix in one window."""


def quiet(_: str) -> None:
    """A progress bar that shows nothing."""


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels that the head draws, in order of windows."""
    drawn: list[Tensor] = []
    real = torch.multinomial

    def record(*args, **kwargs):
        result = real(*args, **kwargs)
        drawn.append(result[:, 0])
        return result

    monkeypatch.setattr(torch, "multinomial", record)
    return drawn


def calibrate(it, windows, store, seed=0) -> dict[str, GroupStatistics]:
    """All three passes; statistics by group."""
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    gradient, head = passes.head(stream, windows, store, seed)
    store.save(f"gradient.{len(stream.block_names)}", gradient)
    for name, value in head.items():
        store.save(f"head.{name}", value)
    found = {}
    for _, groups in passes.backward(stream, it.model_map, windows, store, seed, quiet):
        found |= {group.name: group for group in groups}
    return found


class Direct:
    """The whole model with plain autograd hooks: pairs[weight][expert] per window, and what enters
    and leaves the head and the embedding."""

    def __init__(self, it, windows: Tensor, labels: list[Tensor]) -> None:
        self.it = it
        weights = [w for w in it.model_map.weights if w.block is not None]
        self.pairs: dict[str, list[list[Pair]]] = {
            w.name: [[] for _ in range(w.experts)] for w in weights
        }
        self.embedded: list[Tensor] = []
        self.head: list[Pair] = []
        for ids, label in zip(windows, labels, strict=True):
            self._window(ids, label, weights)

    def _window(self, ids, label, weights) -> None:
        model, kept, handles = self.it.model, {}, []

        def keep(name):
            def hook(_, args, output):
                if not output.requires_grad:
                    output.requires_grad_(True)
                output.retain_grad()
                kept[name] = (args, output)

            return hook

        modules = {w.module for w in weights}
        first = self.it.model_map.blocks[0]
        handles += [model.get_submodule(n).register_forward_hook(keep(n)) for n in modules]
        entry: list[Tensor] = []
        handles.append(
            model.get_submodule(first).register_forward_pre_hook(
                lambda _, args, kwargs: entry.append(args[0]), with_kwargs=True
            )
        )
        head = model.get_output_embeddings()
        handles.append(
            head.register_forward_pre_hook(lambda _, args: self.head.append((args[0], args[0])))
        )
        model.requires_grad_(True)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        entry[0].retain_grad()
        loss = -logits.log_softmax(-1)[torch.arange(len(ids)), label].sum()
        loss.backward()
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        self.embedded.append(entry[0].grad[0])
        self.head[-1] = (self.head[-1][0].detach()[0], logits.detach())
        for weight in weights:
            args, output = kept[weight.module]
            if weight.kind == "experts":
                self._experts(weight, model.get_submodule(weight.module), args, output.grad)
                continue
            x = args[0].detach().reshape(-1, weight.in_features)
            self.pairs[weight.name][0].append((x, output.grad.reshape(len(x), -1)))

    def _experts(self, weight, module, args, gradient) -> None:
        """Gradients of one stack, from the gradient of the experts' sum: the chain rule by hand
        over the router's weights, by autograd over the rest."""
        hidden, index, routing = (a.detach() for a in args)
        for expert in range(weight.experts):
            token, position = torch.where(index == expert)
            if len(token) == 0:
                continue
            x = hidden[token]
            both = (x @ module.gate_up_proj[expert].T).requires_grad_(True)
            gate, up = both.chunk(2, -1)
            inner = module.act_fn(gate) * up
            y = inner @ module.down_proj[expert].T
            y.retain_grad()
            share = routing[token, position][:, None]
            (y * share * gradient[token]).sum().backward()
            inputs = {"gate_up_proj": (x, both.grad), "down_proj": (inner.detach(), y.grad)}
            self.pairs[weight.name][expert].append(inputs[weight.name.rpartition(".")[2]])

    def matrix(self, members: tuple[str, ...], expert: int) -> MatrixStatistics:
        """Statistics by definition, summed in float64."""
        columns = [self.pairs[name][expert] for name in members]
        x = torch.cat([pair[0] for pair in columns[0]]).double()
        gradients = {
            name: torch.cat([pair[1] for pair in pairs]).double()
            for name, pairs in zip(members, columns, strict=True)
        }
        weight = sum(g.square().sum(1) for g in gradients.values())
        assert isinstance(weight, Tensor)
        hessian = torch.einsum("t,tk,tl->kl", weight, x, x) / weight.sum()
        fisher = {name: g.square().mean(0) for name, g in gradients.items()}
        return MatrixStatistics(hessian, len(x), float(weight.sum()), fisher, token_weight=weight)


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    """Within float32 rounding of sums of some hundred terms, relative to the largest entry."""
    scale = float(expected.abs().max())
    assert found.dtype == torch.float32, what
    error = float((found.double() - expected.double()).abs().max())
    assert error <= 2e-4 * scale, f"{what}: {error} off at a scale of {scale}"


@pytest.mark.parametrize("case", DENSE + EXPERTS)
def test_statistics_equal_those_of_the_whole_model(
    tiny: MakeTiny, store: Any, windows: Tensor, labels: list[Tensor], case: str
) -> None:
    it = tiny(case)
    found = calibrate(it, windows, store)
    direct = Direct(it, windows, labels)
    assert list(found) != []
    assert set(found) == {g.name for b in it.model_map.blocks for g in it.model_map.groups_in(b)}
    for name, group in found.items():
        members = it.model_map.group(name).members
        for expert, matrix in enumerate(group.matrices):
            if not direct.pairs[members[0]][expert]:
                assert matrix.tokens == 0
                continue
            expected = direct.matrix(members, expert)
            where = f"{name}, matrix {expert}"
            assert matrix.has_gradients
            assert matrix.tokens == expected.tokens, where
            assert matrix.weight_sum == pytest.approx(expected.weight_sum, rel=1e-4), where
            assert_near(matrix.hessian, expected.hessian, f"hessian of {where}")
            assert_near(matrix.token_weight, expected.token_weight, f"token weights of {where}")
            assert list(matrix.fisher) == list(members) or set(matrix.fisher) == set(members)
            for member in members:
                assert_near(matrix.fisher[member], expected.fisher[member], f"fisher of {member}")


@pytest.mark.parametrize("case", EXPERTS)
def test_every_routed_token_is_counted_once_per_expert(
    tiny: MakeTiny, store: Any, windows: Tensor, case: str
) -> None:
    """Two experts per token: the tokens of all experts add up to twice those of the windows."""
    it = tiny(case)
    found = calibrate(it, windows, store)
    stacks = [g for g in it.model_map.groups if g.kind == "experts"]
    assert stacks
    for group in stacks:
        tokens = [m.tokens for m in found[group.name].matrices]
        assert len(tokens) == 4
        assert sum(tokens) == 2 * windows.numel()


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_samples_are_tokens_of_their_windows(
    tiny: MakeTiny, store: Any, windows: Tensor, labels: list[Tensor], case: str
) -> None:
    """Input and gradients of a sample belong to one token, that token to the window it names."""
    it = tiny(case)
    found = calibrate(it, windows, store)
    direct = Direct(it, windows, labels)
    for name, group in found.items():
        members = it.model_map.group(name).members
        for expert, matrix in enumerate(group.matrices):
            pairs = {m: direct.pairs[m][expert] for m in members}
            if len(group.matrices) == 1:
                counts = torch.bincount(matrix.sample_window)
                assert counts.tolist() == [SAMPLES_PER_WINDOW] * len(windows)
                seen = matrix.sample_window.tolist()
            else:  # windows without a token for an expert leave no pair
                seen = torch.unique_consecutive(matrix.sample_window, return_inverse=True)[1]
            found_rows = [matrix.sample_x, *(matrix.sample_g[m] for m in members)]
            for sample, window in enumerate(seen):
                window = int(window)
                rows = [pairs[members[0]][window][0], *(pairs[m][window][1] for m in members)]
                # Repeated tokens have equal inputs in the first block: only all together tell.
                distance = sum(
                    (row - found[sample]).abs().amax(1) / row.abs().max()
                    for row, found in zip(rows, found_rows, strict=True)
                )
                assert float(distance.min()) <= 1e-3


def test_seeds_choose_labels_and_samples(
    tiny: MakeTiny, new_store: MakeStore, windows: Tensor
) -> None:
    it = tiny("llama")
    first, again, other = (calibrate(it, windows, new_store(), seed) for seed in (0, 0, 1))
    for name, group in first.items():
        (a,), (b,), (c,) = group.matrices, again[name].matrices, other[name].matrices
        assert torch.equal(a.hessian, b.hessian)
        assert torch.equal(a.sample_x, b.sample_x)
        assert not torch.equal(a.hessian, c.hessian)
        assert not torch.equal(a.sample_x, c.sample_x)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "gemma2", "mixtral"])
def test_head_and_embedding_statistics_equal_those_of_the_whole_model(
    tiny: MakeTiny, store: Any, windows: Tensor, labels: list[Tensor], case: str
) -> None:
    it = tiny(case)
    calibrate(it, windows, store)
    direct = Direct(it, windows, labels)
    gradient = store.load("gradient.0")
    assert_near(gradient, torch.stack(direct.embedded), "gradient at the first block")
    head = {k[5:]: v for k, v in store.values.items() if k.startswith("head.")}
    stats = passes.embedding(windows, gradient, 96, head)
    h = torch.cat([pair[0] for pair in direct.head]).double()
    p = torch.cat([pair[1] for pair in direct.head]).double().softmax(-1)
    assert stats.tokens == windows.numel()
    assert_near(stats.head_input, h.T @ h / len(h), "head input")
    assert_near(stats.variance, (p * (1 - p)).mean(0), "variance of the head")
    expected = torch.cat(direct.embedded).double().square().mean(0)
    assert_near(stats.gradient, expected, "gradient of the embedding")
    assert torch.equal(stats.frequency, torch.bincount(windows.flatten(), minlength=96).float())
    for sample, window in zip(stats.sample_h, stats.sample_window.tolist(), strict=True):
        distance = (direct.head[window][0] - sample).abs().amax(1).min()
        assert float(distance) <= 1e-4 * float(sample.abs().max())


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "bloom"])
def test_block_local_statistics_are_plain_second_moments(
    tiny: MakeTiny, store: Any, windows: Tensor, labels: list[Tensor], case: str
) -> None:
    """No gradients: every token counts the same, and `has_gradients` says so."""
    it = tiny(case)
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    passes.head(stream, windows, store, 0)  # draws the labels that `Direct` wants
    direct = Direct(it, windows, labels)
    ticks: list[str] = []
    order = []
    for block, groups in passes.local(stream, it.model_map, store, 0, ticks.append):
        order.append(block)
        for group in groups:
            first = it.model_map.group(group.name).members[0]
            for expert, matrix in enumerate(group.matrices):
                x = torch.cat([pair[0] for pair in direct.pairs[first][expert]]).double()
                assert not matrix.has_gradients
                assert matrix.tokens == len(x) == matrix.weight_sum
                assert_near(matrix.hessian, x.T @ x / len(x), group.name)
                assert matrix.sample_g == {}
                assert len(matrix.sample_x) == len(matrix.sample_window)
    assert order == list(it.model_map.blocks)
    assert len(ticks) == len(order)


def test_block_local_statistics_skip_what_is_done(
    tiny: MakeTiny, store: Any, windows: Tensor
) -> None:
    it = tiny("llama")
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    done = it.model_map.blocks[:2]
    found = passes.local(stream, it.model_map, store, 0, quiet, done)
    assert [block for block, _ in found] == [it.model_map.blocks[2]]


class Killed(Exception):
    """Stands for SIGKILL: nothing after it happens."""


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("where", ["tick", "consumer", "save", "drop"])
def test_an_interrupted_pass_goes_on_and_gives_identical_statistics(
    tiny: MakeTiny,
    new_store: MakeStore,
    windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    where: str,
) -> None:
    """Interrupted at every step of its kind in turn, each time with a fresh stream, as a new
    process would: what is kept in the end equals an undisturbed run to the bit."""
    it = tiny(case)
    expected = calibrate(it, windows, new_store())
    store, kept = new_store(), {}
    countdown = 0

    def step(kind: str) -> None:
        nonlocal countdown
        if kind == where:
            countdown -= 1
            if countdown == 0:
                raise Killed

    def attempt() -> None:
        stream = it.stream()
        passes.forward(stream, windows, store, lambda _: step("tick"))
        if not any(store.has(f"gradient.{i}") for i in range(4)):
            gradient, _ = passes.head(stream, windows, store, 0)
            type(store).save(store, "gradient.3", gradient)
        tick = lambda _: step("tick")  # noqa: E731
        for _, groups in passes.backward(stream, it.model_map, windows, store, 0, tick):
            step("consumer")
            kept.update({group.name: group for group in groups})

    for kind in ("save", "drop"):
        real = getattr(type(store), kind)

        def watched(*args, kind=kind, real=real):
            step(kind)
            real(store, *args)

        monkeypatch.setattr(store, kind, watched)
    interruptions = 0
    for fuse in (1, 2, 3, 1, 4, 2, 5, 6, 7):
        countdown = fuse
        try:
            attempt()
        except Killed:
            interruptions += 1
    countdown = 0
    attempt()
    assert interruptions >= 2
    assert set(kept) == set(expected)
    for name, group in expected.items():
        for a, b in zip(group.matrices, kept[name].matrices, strict=True):
            assert (a.tokens, a.weight_sum) == (b.tokens, b.weight_sum)
            assert torch.equal(a.hessian, b.hessian)
            assert torch.equal(a.sample_x, b.sample_x)
            assert torch.equal(a.token_weight, b.token_weight)
            for member, value in a.fisher.items():
                assert torch.equal(value, b.fisher[member])
                assert torch.equal(a.sample_g[member], b.sample_g[member])
    assert sorted(n for n in store.values if n.startswith("gradient")) == ["gradient.0"]


def test_a_finished_pass_repeats_nothing(
    tiny: MakeTiny, store: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = tiny("llama")
    calibrate(it, windows, store)
    stream = it.stream()

    def refuse(*_):
        raise AssertionError("a block was loaded again")

    passes.forward(stream, windows, store, quiet)
    monkeypatch.setattr(stream, "block", refuse)
    assert list(passes.backward(stream, it.model_map, windows, store, 0, quiet)) == []


def test_a_member_that_gets_no_gradient_leaves_its_group_unseen(
    tiny: MakeTiny, store: Any, windows: Tensor
) -> None:
    """It must not be taken for a group of zeros: `tokens` says that nothing was seen."""
    it = tiny("llama")
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    blocks = len(stream.block_names)
    store.save(f"gradient.{blocks}", torch.zeros_like(store.load(f"hidden.{blocks}")))
    for _, groups in passes.backward(stream, it.model_map, windows, store, 0, quiet):
        for group in groups:
            for matrix in group.matrices:
                assert matrix.weight_sum == 0
                assert not bool(matrix.hessian.any()), "zero gradients: zero, not nan"
                assert all(not bool(value.any()) for value in matrix.fisher.values())


def test_hooks_are_gone_and_experts_restored_afterwards(tiny: MakeTiny, windows: Tensor) -> None:
    it = tiny("mixtral")
    stream = it.stream()
    stream.embed(windows[0])
    name = it.model_map.blocks[0]
    observer = BlockObserver(it.model_map, name, True, 0)
    with stream.block(0) as block:
        with (
            pytest.raises(ZeroDivisionError),
            observed(stream.model, it.model_map, name, observer),
        ):
            raise ZeroDivisionError
        modules = list(block.modules())
        assert not any(module._forward_hooks for module in modules)
        assert not any("forward" in vars(module) for module in modules)


def test_the_observed_experts_compute_what_the_module_computes(
    tiny: MakeTiny, windows: Tensor
) -> None:
    """To float32 rounding: the loop adds experts in another order."""
    it = tiny("qwen3_moe")
    stream = it.stream()
    hidden = stream.embed(windows[0])
    name = it.model_map.blocks[0]
    with stream.block(0) as block, torch.no_grad():
        plain = stream.run(0, block, hidden)
        with observed(
            stream.model, it.model_map, name, BlockObserver(it.model_map, name, False, 0)
        ):
            shown = stream.run(0, block, hidden)
    torch.testing.assert_close(shown, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", ["is_transposed", "has_bias", "has_post_expert_norm"])
def test_experts_of_another_layout_are_refused(
    tiny: MakeTiny, windows: Tensor, setting: str
) -> None:
    it = tiny("mixtral")
    stream = it.stream()
    stream.embed(windows[0])
    name = it.model_map.blocks[0]
    observer = BlockObserver(it.model_map, name, True, 0)
    with stream.block(0) as block:
        (experts,) = [m for m in block.modules() if hasattr(m, "gate_up_proj")]
        setattr(experts, setting, True)
        with (
            pytest.raises(ModelError, match=f"experts with {setting} = True"),
            observed(stream.model, it.model_map, name, observer),
        ):
            pass


def test_the_wrong_order_of_passes_is_a_sentence(
    tiny: MakeTiny, store: Any, windows: Tensor
) -> None:
    it = tiny("llama")
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    with pytest.raises(DataError, match="run the head first"):
        next(passes.backward(stream, it.model_map, windows, store, 0, quiet))
    gradient, _ = passes.head(stream, windows, store, 0)
    store.save("gradient.3", gradient)
    with pytest.raises(DataError, match="other windows"):
        next(passes.backward(stream, it.model_map, windows[:2], store, 0, quiet))


def test_a_model_whose_logits_overflow_is_a_sentence(
    tiny: MakeTiny, store: Any, windows: Tensor
) -> None:
    stream = tiny("llama").stream()
    passes.forward(stream, windows, store, quiet)
    store.save("hidden.3", store.load("hidden.3") * torch.nan)
    with pytest.raises(ModelError, match="logits are inf or nan on calibration window 0"):
        passes.head(stream, windows, store, 0)


def test_a_model_without_a_head_is_a_sentence(
    tiny: MakeTiny, store: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny("llama").stream()
    passes.forward(stream, windows, store, quiet)
    monkeypatch.setattr(stream.model, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="no output head"):
        passes.head(stream, windows, store, 0)


def test_bfloat16_sources_are_calibrated_in_float32(
    tiny: MakeTiny, store: Any, windows: Tensor, tmp_path: Path
) -> None:
    """Weights are widened when they are read; statistics lose nothing to the stored dtype."""
    it = tiny("llama")
    model = type(it.model)(it.model.config).to(torch.bfloat16)
    model.load_state_dict(it.model.state_dict())
    model.save_pretrained(tmp_path)
    stream = BlockStream(Source.open(tmp_path), it.model_map)
    passes.forward(stream, windows, store, quiet)
    assert store.load("hidden.1").dtype == torch.float32
    with torch.no_grad():
        expected = model.float()(input_ids=windows[:1]).logits
        found = stream.logits(store.load("hidden.3")[:1], windows[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(stream.model.get_output_embeddings(), nn.Linear)
