"""Whole-model calibration has the passes' numbers on a decoder, and refuses what tells nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlib.calibration import passes
from quantlib.calibration.losses import LossSum, sampled_tokens, sampled_vectors
from quantlib.calibration.streams import Sample, Stream, require_seen
from quantlib.calibration.watch import Weighting
from quantlib.calibration.whole import calibrate, collect
from quantlib.errors import DataError, ModelError

from ..models.stacked_models import IMAGE
from .tiny_streams import (
    IMAGE_TOKENS,
    Mapped,
    questions,
    random,
    speech_sample,
    text,
    text_of,
    words,
)

MakeTiny = Callable[[str], Any]

# -- the numbers -----------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Both are float32 sums of the same terms: the order of a few hundred additions differs."""
    assert found.shape == expected.shape, what
    if expected.numel() == 0:
        return
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max())
    assert error <= 1e-4 * scale, f"{what}: {error} off at a scale of {scale}"


@pytest.mark.parametrize("case", ["llama", "llama_tied", "mixtral"])
def test_a_decoder_has_the_statistics_of_the_streaming_passes(
    tiny: MakeTiny, store: Any, windows: Tensor, case: str
) -> None:
    it = tiny(case)
    stream = it.stream()
    passes.forward(stream, windows, store, lambda _: None)
    drawn: list[Tensor] = []
    real = torch.multinomial

    def record(*args: Any, **named: Any) -> Tensor:
        drawn.append(real(*args, **named))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", record)
        gradient, head = passes.head(stream, windows, store, 0)
    store.save(f"gradient.{len(stream.block_names)}", gradient)
    expected = {}
    quiet: Callable[[str], None] = lambda _: None  # noqa: E731
    for _, groups in passes.backward(stream, it.model_map, windows, store, 0, quiet):
        expected |= {group.name: group for group in groups}
    embedding = passes.embedding(windows, store.load("gradient.0"), 96, head)

    def same_labels(label: Tensor) -> Callable[[Any, torch.Generator], LossSum]:
        def loss(output: Any, _: torch.Generator) -> LossSum:
            value = torch.nn.functional.cross_entropy(
                output.logits[0], label[:, 0], reduction="sum"
            )
            return LossSum(value, len(label))

        return loss

    samples = [
        Sample({"input_ids": ids[None], "use_cache": False}, same_labels(label))
        for ids, label in zip(windows, drawn, strict=True)
    ]
    found = collect(it.model, it.model_map, Stream("text", samples))
    assert (found.terms, found.samples) == (windows.numel(), len(windows))
    assert found.groups.keys() == expected.keys()
    for name, group in expected.items():
        for one, other in zip(found.groups[name].matrices, group.matrices, strict=True):
            assert one.tokens == other.tokens
            assert one.weight_sum == pytest.approx(other.weight_sum, rel=1e-4)
            close(one.hessian, other.hessian, f"hessian of {name}")
            close(one.token_weight, other.token_weight, f"token weights of {name}")
            close(one.sample_x, other.sample_x, f"samples of {name}")
            assert torch.equal(one.sample_window, other.sample_window)
            for member, value in other.fisher.items():
                close(one.fisher[member], value, f"fisher of {member}")
    lookup = found.embeddings["model.embed_tokens"]
    head_of = found.embeddings.get("lm_head", lookup)
    close(lookup.frequency, embedding.frequency, "frequency")
    close(lookup.gradient, embedding.gradient, "gradient")
    close(head_of.head_input, embedding.head_input, "head input")
    close(head_of.variance, embedding.variance, "variance")
    assert lookup.tokens == embedding.tokens


def test_a_convolution_has_the_statistics_of_its_matrix_product(mapped: Mapped) -> None:
    """Against the definition, through unfolded inputs and the gradient that autograd gives."""
    model, model_map = mapped("whisper")
    name = "model.encoder.conv2"
    conv = model.get_submodule(name)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        kept.append((args[0].detach(), output))

    sample = speech_sample(0, lambda out, _: LossSum(out.logits.square().sum(), 1))
    model.requires_grad_(True)
    handle = conv.register_forward_hook(keep)
    model(**sample.inputs).logits.square().sum().backward()
    handle.remove()
    model.requires_grad_(False).zero_grad(set_to_none=True)
    (x, y), gradient = kept[0], kept[0][1].grad
    assert gradient is not None
    # stride 2, window 3, padding 1, as a 2-D image of height 1
    pieces = torch.nn.functional.unfold(x[:, :, None], (1, 3), padding=(0, 1), stride=(1, 2))
    pieces = pieces.transpose(1, 2).reshape(-1, 32 * 3)
    torch.testing.assert_close(
        (pieces @ conv.weight.detach().reshape(32, -1).T + conv.bias.detach()),
        y.detach().transpose(1, 2).reshape(-1, 32),
    )
    columns = gradient.transpose(1, 2).reshape(-1, 32)
    weight = columns.square().sum(1)
    found = collect(model, model_map, Stream("speech", [sample])).groups[name].matrices[0]
    close(found.hessian, (pieces.T * weight) @ pieces / weight.sum(), "hessian")
    close(found.fisher[f"{name}.weight"], columns.square().mean(0), "fisher")
    assert found.tokens == len(pieces)


# -- who decides -----------------------------------------------------------------------------------


def mixed(model: PreTrainedModel) -> Stream:
    """Questions that say which of their tokens are image vectors."""
    asked = questions(lambda n: random(1, 3, 28, 28, seed=n), IMAGE_TOKENS)
    samples = [
        replace(sample, modality=(sample.inputs["input_ids"][0] == IMAGE).long())
        for sample in asked.samples
    ]
    return Stream("mixed", samples, modalities=("words", "image"))


def test_shares_of_modalities_are_those_of_the_token_weights(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    found = collect(model, model_map, mixed(model))
    shares = found.modality_shares()
    read = {name for name in found.groups if ".language_model." in name}
    assert shares.keys() == read
    name = "model.language_model.layers.0.mlp.gate_up"
    weight = found.groups[name].matrices[0].token_weight
    image = float(weight[found.modality == 1].sum() / weight.sum())
    assert shares[name]["image"] == pytest.approx(image)
    assert sum(shares[name].values()) == pytest.approx(1.0)
    image_tokens = int((found.modality == 1).sum())
    assert found.modality_tokens() == {
        "words": len(found.modality) - image_tokens,
        "image": image_tokens,
    }
    assert image_tokens > 0
    assert collect(model, model_map, text(1)).modality_shares() == {}


def test_the_weighting_decides_the_hessian_and_not_the_output_gradients(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    by = {kind: collect(model, model_map, mixed(model), weighting=kind) for kind in Weighting}
    name = "model.language_model.layers.0.mlp.gate_up"
    found = {kind: statistics.groups[name].matrices[0] for kind, statistics in by.items()}
    token, root, modality, none = (found[kind].token_weight for kind in Weighting)
    torch.testing.assert_close(root, token.sqrt())
    is_image = by[Weighting.TOKEN].modality == 1
    first = is_image[: len(is_image) // 2]
    for chosen in (first, ~first):
        own = modality[: len(first)][chosen]
        torch.testing.assert_close(own, token[: len(first)][chosen].mean().expand(len(own)))
    assert torch.equal(none, torch.ones(len(none)))
    assert found[Weighting.NONE].weight_sum == len(none)
    for kind in (Weighting.ROOT, Weighting.MODALITY, Weighting.NONE):
        assert found[kind].energy == pytest.approx(found[Weighting.TOKEN].weight_sum, rel=1e-4)
        for member, value in found[Weighting.TOKEN].fisher.items():
            close(found[kind].fisher[member], value, member)
        difference = found[kind].hessian - found[Weighting.TOKEN].hessian
        assert float(difference.norm() / found[kind].hessian.norm()) > 0.01


def test_a_modality_that_the_stream_does_not_name_is_refused(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    stream = replace(mixed(model), modalities=("words",))
    with pytest.raises(DataError, match="tokens of modality 1, and the stream names 1"):
        collect(model, model_map, stream)


def test_experts_inside_janus_are_counted_one_by_one(mapped: Mapped) -> None:
    model, model_map = mapped("janus_mixture")
    found = collect(model, model_map, text(8))
    stack = found.groups["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert len(stack.matrices) == 4
    assert sum(matrix.tokens for matrix in stack.matrices) == 8 * 12 * 2  # two experts per token
    one = collect(model, model_map, Stream("text", [text_of(2)]))
    idle = [name for name in one.unseen() if "expert " in name]
    assert idle, "two tokens cannot reach four experts in both layers"
    with pytest.raises(DataError, match=r"parts of the model saw no calibration data"):
        require_seen(one)
    with pytest.raises(DataError, match=r"expert \d"):
        require_seen(one, [name for name in one.unseen() if "expert " not in name])


def test_a_reserve_is_run_until_every_expert_has_its_minimum(mapped: Mapped) -> None:
    model, model_map = mapped("janus_mixture")
    reserve = [text_of(12, n) for n in range(40)]
    stream = Stream("text", [text_of(2)], reserve=reserve)
    found = collect(model, model_map, stream, expert_tokens=5)
    stacks = [group for group in found.groups.values() if len(group.matrices) > 1]
    assert min(group.tokens for group in stacks) >= 5
    assert 1 < found.samples < 41
    assert collect(model, model_map, replace(stream, reserve=())).samples == 1
    scarce = [name for name in found.unseen(10**6) if "expert " in name or "experts" in name]
    assert len(scarce) == len(stacks)
    allowed = [name for name in found.unseen() if "expert" not in name]
    with pytest.raises(DataError, match=r"of 1000000 tokens, fewer reached .*experts"):
        require_seen(found, allowed, 10**6)


# -- what is refused, and what is left behind ------------------------------------------------------


def test_an_empty_stream_is_named(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    with pytest.raises(DataError, match="stream 'pictures' is empty"):
        calibrate(model, model_map, [Stream("pictures", [])])


def test_two_streams_of_one_name_are_refused(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    with pytest.raises(DataError, match="two calibration streams are called 'text'"):
        calibrate(model, model_map, [text(1), text(1)], allow_unseen=["*"])


def test_a_loss_that_depends_on_nothing_is_named(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    nothing = Sample({"input_ids": words(4)}, lambda _, __: LossSum(torch.ones(()), 1))
    with pytest.raises(DataError, match="sample 0 of the calibration stream 'odd'"):
        collect(model, model_map, Stream("odd", [nothing]))


def test_a_sample_without_an_answer_and_output_that_overflows_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="no position whose prediction counts"):
        sampled_tokens(torch.zeros(1, 4, 7), generator, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ModelError, match="inf or nan"):
        sampled_tokens(torch.full((1, 2, 3), float("nan")), generator)
    with pytest.raises(ModelError, match="inf or nan"):
        sampled_vectors(torch.full((1, 2, 3), float("inf")), generator)


def test_sampled_vectors_have_unit_gradients_in_relative_units() -> None:
    """Mean squared gradient 1 / variance: half of it times a squared error is the loss."""
    vectors = (3.0 * random(400, 50)).requires_grad_(True)
    loss = sampled_vectors(vectors, torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(loss.value, vectors)
    expected = 1 / float(vectors.detach().square().mean())
    # 20,000 squares of normals: a standard error of sqrt(2 / 20,000) = 1 %
    assert float(gradient.square().mean()) == pytest.approx(expected, rel=0.05)
    assert loss.terms == 400


def test_the_model_is_left_as_it_was(mapped: Mapped) -> None:
    model, model_map = mapped("janus_mixture")
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, model_map, text(1))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    model.requires_grad_(False)
