"""Statistics collected once stand for those of every transformed model."""

import copy
from dataclasses import replace

import pytest
import torch

from quantlib.bench.w4a4 import methods
from quantlib.bench.w4a4.fake import attach
from quantlib.bench.w4a4.grids import Grids
from quantlib.bench.w4a4.statistics import collect
from quantlib.bench.w4a4.subjects import Language, Speech, Subject

TOLERANCE = 2e-4
"""Relative: float32 sums over hundreds of tokens, of inputs behind two random blocks."""


@pytest.mark.parametrize("name", ["smoothquant", "quik", "quarot", "resq", "resq_no_a", "coquant"])
def test_a_shared_hessian_is_that_of_the_transformed_model(language: Language, name: str) -> None:
    prepared = {**methods.METHODS, **methods.ABLATIONS}[name].prepare(language, 3)
    assert prepared.hessian is not None
    direct = collect(prepared.model, language.wiring, language.sites, language.run)
    for site in language.sites:
        shared, own = prepared.hessian(site), direct.inputs[site.name].second
        error = float((shared - own).norm() / own.norm())
        assert error < TOLERANCE, f"{site.name}: {error}"


def test_the_same_for_whisper_whose_norms_have_biases(whisper: Speech) -> None:
    for name in ("smoothquant", "resq"):
        prepared = methods.METHODS[name].prepare(whisper, 3)
        assert prepared.hessian is not None
        direct = collect(prepared.model, whisper.wiring, whisper.sites, whisper.run)
        for site in whisper.sites:
            shared, own = prepared.hessian(site), direct.inputs[site.name].second
            assert float((shared - own).norm() / own.norm()) < TOLERANCE, site.name


def test_extremes_of_the_unfolded_model_follow_from_the_folded_one(language: Language) -> None:
    direct = collect(language.original, language.wiring, language.sites, language.run)
    for site in language.sites:
        for field in ("amax", "mean", "second"):
            derived = getattr(language.statistics.inputs[site.name], field)
            own = getattr(direct.inputs[site.name], field)
            torch.testing.assert_close(derived, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["language", "whisper"])
def test_every_linear_of_the_blocks_is_at_one_site(
    which: str, request: pytest.FixtureRequest
) -> None:
    subject: Subject = request.getfixturevalue(which)
    inside = tuple(f"{block}." for block in subject.wiring.blocks)
    linears = {
        f"{name}.weight"
        for name, module in subject.original.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(inside)
    }
    readers = [reader.weight for site in subject.sites for reader in site.readers]
    assert sorted(readers) == sorted(linears)


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.ABLATIONS])
def test_without_rounding_a_transformed_model_is_the_original(
    language: Language, name: str
) -> None:
    """Slices of 16 bits: what is left is the transform and the order of columns."""
    prepared = {**methods.METHODS, **methods.ABLATIONS}[name].prepare(language, 0)
    for site in language.sites:
        order = prepared.plans[site.name].order
        if order is not None:
            for reader in site.readers:
                parameter = prepared.model.get_parameter(reader.weight).data
                parameter.copy_(parameter[:, order])
    prepared.plans = {
        site: replace(plan, activations=exact(plan.activations))
        for site, plan in prepared.plans.items()
    }
    prepared.heads = {
        module: replace(plan, keys=exact(plan.keys), values=exact(plan.values))
        for module, plan in prepared.heads.items()
    }
    attach(prepared)
    with torch.no_grad():
        found = prepared.model(language.held_out).logits
        expected = language.original(language.held_out).logits
    # float32, bases of 64 columns and two blocks: 1e-6 each, with a wide margin.
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def exact(grids: Grids) -> Grids:
    """The same slices, not rounded."""
    return tuple(replace(grid, bits=16) for grid in grids)


def test_the_original_is_never_changed(language: Language) -> None:
    before = copy.deepcopy(language.original.state_dict())
    for method in methods.METHODS.values():
        methods.quantize(method, language, 0, prefix=False)
    after = language.original.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
