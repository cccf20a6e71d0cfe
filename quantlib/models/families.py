"""What we know about a model family, as data: `Family` and the rules it is made of.

A family says where the repeated blocks are, which linears in a block read one input (a *group*),
which embedding and head there are, what is kept in the source precision and why, and how tensors on
disk become the parameters of the transformers-5 module. Adding a family is one table in `tables/`,
no class.

A model of several stacks is a family too: a language model with `parts` beside it (a vision tower,
a projector, an image decoder). What is a model of its own elsewhere, as most towers and language
models are, is not written again: a `Submodel` names the place and the config to look its table up
by, so one table of LLaVA covers every tower and every language model that has a table, mixtures of
experts too (`compose.py`).

Names are parameter names of the transformers-5 module; inside a block they are relative to it. A
rule that matches nothing is an error (`claims.py`) unless the table calls it optional: silently
skipping a weight is the most common way a compressed model comes out larger, or worse, than its
plan says.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGE_MODEL = "language_model"
EMBEDDINGS = "embeddings"
HEAD = "head"
VISION = "vision_tower"
AUDIO = "audio_tower"
TEXT_ENCODER = "text_encoder"
PROJECTOR = "projector"
GENERATION_EMBEDDINGS = "generation_embeddings"
GENERATION_PROJECTOR = "generation_projector"
GENERATION_HEAD = "generation_head"
IMAGE_ENCODER = "image_encoder"
IMAGE_DECODER = "image_decoder"
CODEBOOK = "codebook"


@dataclass(frozen=True)
class GroupRule:
    """Parameters of a block that read one input.

    name:     of the group, relative to the block ("self_attn.qkv"); "" is the block itself.
    members:  parameter names relative to the block, in the order an engine would fuse them.
    kind:     "linear": matrices `[N, K]` of nn.Linear; "experts": stacks `[E, N, K]`, one matrix
              per expert; "conv": `[N, channels, *window]`, a matrix of K = channels x window;
              "embedding": rows `[vocabulary, K]` that are looked up.
    fused:    inference engines run the members as one matrix product, hence with one scheme.
    optional: no block need have it (a biasless or all-sparse variant of the family).
    inner:    the input exists only inside the forward of the members' module (an expert's down
              projection).
    """

    name: str
    members: tuple[str, ...]
    kind: str = "linear"
    fused: bool = False
    optional: bool = False
    inner: bool = False


EXPLAINED = {
    "bias": "one number for each output, added to it and multiplied with nothing",
    "normalisation": "one number for each channel, and its error is in all that follows",
    "class token": "one row that is read with every picture",
}
"""What tables call by a word, and why that is a reason to keep it."""


@dataclass(frozen=True)
class KeptRule:
    """Parameters left in the source's precision: an fnmatch `pattern` of their names, and why."""

    pattern: str
    reason: str
    component: str = LANGUAGE_MODEL
    optional: bool = False

    @property
    def why(self) -> str:
        """The reason as a sentence that needs no table."""
        known = EXPLAINED.get(self.reason)
        return self.reason if known is None else f"{self.reason}: {known}"


@dataclass(frozen=True)
class ExpertParts:
    """Stack `parameter` `[E, N, K]`, stored as 2-D tensors per expert.

    Expert e's matrix is the `parts`, with {expert} = e, one under the other along N. Names are
    suffixes.
    """

    parameter: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class DiskRules:
    """How names on disk become parameter names of the module.

    renames: (regular expression, replacement), applied in order with re.sub.
    experts: stacks that may be stored expert by expert (matched after the renames).
    ignored: regular expressions of tensors the module computes itself (re.search).
    """

    renames: tuple[tuple[str, str], ...] = ()
    experts: tuple[ExpertParts, ...] = ()
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)


POSITION_IDS = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")
"""What old checkpoints store and modules compute, counted positions included."""


@dataclass(frozen=True)
class Part:
    """Weights of one component beside the family's own blocks.

    at:     places where `groups` are looked for: names of modules, in which `*` stands for one
            segment of a name or a piece of one ("vqmodel.decoder.up.*.block.*"). The place "" is
            the whole model.
    blocks: the places are repeated blocks: they form a stack of the ModelMap.
    """

    component: str
    groups: tuple[GroupRule, ...]
    at: tuple[str, ...] = ("",)
    blocks: bool = False


@dataclass(frozen=True)
class Submodel:
    """A part with a table of its own: that of the `model_type` in the config under `config`.

    prefix:  of its parameters in the whole model ("model.vision_tower").
    config:  key in config.json; of a config within a config, both with a dot between them.
    default: the model type when that config does not name one (as old files do not).
    """

    prefix: str
    config: str
    default: str = ""


@dataclass(frozen=True)
class Family:
    """What we know about the models whose config.json has one of these `model_types`.

    blocks:       name of the list of repeated blocks; block i is `{blocks}.{i}`. Of a model of
                  several stacks: those of its language model, or of its only encoder.
    groups:       of the blocks' linears; `component` is the part of the model they belong to.
    embeddings:   token embeddings `[vocabulary, K]`.
    head:         the output projection, which may be tied to an embedding; None when there is none.
    kept:         everything else.
    language:     where the language model is, when it has a table of its own: then blocks, groups
                  and embeddings are those of that table.
    parts:        what there is beside them.
    architecture: transformers class to build; "" is what AutoModelForCausalLM builds.
    root:         what every name of this table begins with, which a Submodel's prefix replaces; "":
                  names begin at the module.
    """

    model_types: tuple[str, ...]
    groups: tuple[GroupRule, ...]
    kept: tuple[KeptRule, ...]
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens.weight",)
    head: str | None = "lm_head.weight"
    component: str = LANGUAGE_MODEL
    disk: DiskRules = DiskRules()
    language: Submodel | None = None
    parts: tuple[Part | Submodel, ...] = ()
    architecture: str = ""
    root: str = "model"


def linears(name: str, *modules: str, fused: bool = False, optional: bool = False) -> GroupRule:
    """The weights of these nn.Linear modules of a block read one input."""
    members = tuple(f"{module}.weight" for module in modules)
    return GroupRule(name, members, fused=fused, optional=optional)


def experts(parameter: str, *, inner: bool = False) -> GroupRule:
    """All experts' matrices in one 3-D parameter `[E, N, K]`."""
    return GroupRule(parameter, (parameter,), kind="experts", inner=inner)


def lookup(module: str) -> GroupRule:
    """The rows of an nn.Embedding that is no head."""
    return GroupRule(module, (f"{module}.weight",), kind="embedding")


def whole(kind: str = "linear", *, optional: bool = False) -> GroupRule:
    """The place is one module, a group of its own."""
    return GroupRule("", ("weight",), kind=kind, optional=optional)


def each(*modules: str, kind: str = "linear", optional: bool = False) -> tuple[GroupRule, ...]:
    """Modules of a place that are a group of their own each."""
    return tuple(
        GroupRule(module, (f"{module}.weight",), kind=kind, optional=optional) for module in modules
    )


def keep(component: str, reason: str, *patterns: str, optional: bool = False) -> list[KeptRule]:
    """What a component keeps for one reason."""
    return [KeptRule(pattern, reason, component, optional) for pattern in patterns]


def norms(*names: str, prefix: str = "model.layers.*") -> tuple[KeptRule, ...]:
    """Normalisation weights of every block."""
    return tuple(KeptRule(f"{prefix}.{name}.weight", "normalisation") for name in names)


FINAL_NORM = KeptRule("model.norm.weight", "normalisation")
BIASES = KeptRule("*.bias", "bias")
OPTIONAL_BIASES = KeptRule("*.bias", "bias", optional=True)

QKV = linears(
    "self_attn.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", fused=True
)
ATTENTION = (QKV, linears("self_attn.o_proj", "self_attn.o_proj"))
MLP = (
    linears("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj", fused=True),
    linears("mlp.down_proj", "mlp.down_proj"),
)
EXPERTS = (experts("mlp.experts.gate_up_proj"), experts("mlp.experts.down_proj", inner=True))
ROUTER = KeptRule(
    "*.mlp.gate.weight", "router: a rounding error here sends tokens to other experts"
)

QWEN_EXPERT_PARTS = (
    ExpertParts(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    ExpertParts("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
)
MIXTRAL_EXPERT_PARTS = (
    ExpertParts(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight"),
    ),
    ExpertParts("mlp.experts.down_proj", ("mlp.experts.{expert}.w2.weight",)),
)
