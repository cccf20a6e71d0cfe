"""Encoders that compute softmax, GELU and LayerNorm in integers.

`attach` puts an integer operator (`kernels.nonlinear`) in the place of each named layer: a softmax
is that of an attention module, a GELU and a LayerNorm are modules. `attached` says what a model
computes so, which is what a checkpoint stores; parameters keep their names, so weights load as they
would. Which layer gets which operator is decided in `nonlinear_fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
)

from quantlib.errors import ModelError
from quantlib.kernels.nonlinear import Kind, Operator
from quantlib.transforms.attention import ATTRIBUTE, AttentionState, attach_attention

GELUS = (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    nn.GELU,
)


@dataclass(frozen=True)
class Site:
    """A layer that may compute in integers. A softmax is an attention module: which modules of an
    encoder are those, only a run tells."""

    name: str
    kind: Kind
    module: nn.Module


class IntegerLayerNorm(nn.LayerNorm):
    """A LayerNorm over one axis, in integers; it has the plain one's parameters."""

    def __init__(self, plain: nn.LayerNorm, operator: Operator) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = plain.normalized_shape, plain.eps
        self.elementwise_affine = plain.elementwise_affine
        self.weight, self.bias = plain.weight, plain.bias
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> the same shape and dtype, contiguous as torch's."""
        return self.operator.layer_norm(x, self.weight, self.bias).to(x.dtype).contiguous()


class IntegerGelu(nn.Module):
    """A GELU in integers, in place of `plain`."""

    def __init__(self, plain: nn.Module, operator: Operator) -> None:
        super().__init__()
        self.plain, self.operator = plain, operator

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> the same shape and dtype, contiguous as torch's."""
        return self.operator.gelu(x).to(x.dtype).contiguous()


class IntegerSoftmax:
    """What attention calls, in place of torch's softmax."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    def __call__(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        """Weights of scores (`transforms.explicit_attention.Softmax`)."""
        return self.operator.softmax(scores, seen)


def encoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The modules of all parts of a model that read images or sound and no words: name, module, and
    the innermost transformers model that it is part of."""
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inherited = owners.get(name.rpartition(".")[0], model)
        owners[name] = module if isinstance(module, PreTrainedModel) else inherited
        if name and _reads_no_words(owners[name]):
            yield name, module, owners[name]


def sites(model: nn.Module) -> list[Site]:
    """LayerNorms over one axis and GELUs of a model's encoders."""
    found = []
    for name, module, _ in encoder_modules(model):
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            found.append(Site(name, "layer_norm", module))
        elif isinstance(module, GELUS):
            found.append(Site(name, "gelu", module))
    return found


def attach(model: PreTrainedModel, operators: Mapping[str, Operator]) -> None:
    """Have layers of a model, by name, compute in integers; weights may still be on meta.

    Raises ModelError when there is no such layer, or it is of another kind.
    """
    softmaxes = {}
    for name, operator in operators.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"this model has no layer {name} to compute its {operator.kind} in integers"
            ) from None
        if operator.kind == "softmax":
            state = module.__dict__.get(ATTRIBUTE) or AttentionState()
            softmaxes[name] = replace(state, softmax=IntegerSoftmax(operator))
        else:
            _replace(model, name, _integer(name, module, operator))
    if softmaxes:
        attach_attention(model, softmaxes)


def attached(model: nn.Module) -> dict[str, Operator]:
    """The integer operators of a model, by layer: the inverse of `attach`."""
    found = {}
    for name, module in model.named_modules():
        state = module.__dict__.get(ATTRIBUTE)
        if isinstance(module, IntegerLayerNorm | IntegerGelu):
            found[name] = module.operator
        elif state is not None and isinstance(state.softmax, IntegerSoftmax):
            found[name] = state.softmax.operator
    return found


def detach(model: nn.Module) -> None:
    """Have all layers compute in floats again."""
    for name in attached(model):
        module = model.get_submodule(name)
        if isinstance(module, IntegerGelu):
            _replace(model, name, module.plain)
        elif isinstance(module, IntegerLayerNorm):
            _replace(model, name, _plain_norm(module))
        else:
            state = module.__dict__[ATTRIBUTE]
            setattr(module, ATTRIBUTE, replace(state, softmax=None))


def _reads_no_words(owner: nn.Module) -> bool:
    given = getattr(owner, "input_modalities", "text")
    return "text" not in ((given,) if isinstance(given, str) else tuple(given))


def _integer(name: str, module: nn.Module, operator: Operator) -> nn.Module:
    if isinstance(module, IntegerGelu):
        module = module.plain
    if operator.kind == "layer_norm" and isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape[-1]
        if operator.shifts and len(operator.shifts) != channels:
            raise ModelError(
                f"{name} normalizes {channels} channels, and grids of {len(operator.shifts)} are "
                "given: they belong to another model"
            )
        return IntegerLayerNorm(module, operator)
    if operator.kind == "gelu" and isinstance(module, GELUS):
        return IntegerGelu(module, operator)
    raise ModelError(
        f"{name} is a {type(module).__name__}, whose {operator.kind} cannot be computed in integers"
    )


def _plain_norm(module: IntegerLayerNorm) -> nn.LayerNorm:
    plain = nn.LayerNorm(module.normalized_shape, module.eps, device="meta")
    plain.elementwise_affine = module.elementwise_affine
    plain.weight, plain.bias = module.weight, module.bias
    return plain.train(module.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, module.train(before.training))
