"""Image classifiers: ViT and ResNet under a linear head.

A residual layer of a ResNet is a block: two convolutions, or three around a bottleneck, and one for
the shortcut where the resolution changes. What batch normalisation has counted are buffers.
"""

from quantlib.models.families import (
    HEAD,
    VISION,
    DiskRules,
    Family,
    Part,
    each,
    keep,
)
from quantlib.models.tables.vision import MLP, POSITIONS, attention

FAMILIES = (
    Family(
        model_types=("vit",),
        architecture="ViTForImageClassification",
        groups=(*attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"), *MLP),
        kept=(
            *keep(VISION, "class token", "vit.embeddings.cls_token"),
            *keep(VISION, "token for masked patches", "vit.embeddings.mask_token", optional=True),
            *keep(VISION, POSITIONS, "vit.embeddings.position_embeddings"),
            *keep(VISION, "normalisation", "vit.*layernorm*.weight"),
            *keep(VISION, "bias", "vit.*.bias"),
            *keep(HEAD, "bias", "classifier.bias"),
        ),
        blocks="vit.layers",
        embeddings=(),
        head=None,
        component=VISION,
        parts=(
            Part(VISION, each("vit.embeddings.patch_embeddings.projection", kind="conv")),
            Part(HEAD, each("classifier")),
        ),
        root="vit",
        disk=DiskRules(
            renames=(
                (r"\.attention\.attention\.query\.", ".attention.q_proj."),
                (r"\.attention\.attention\.key\.", ".attention.k_proj."),
                (r"\.attention\.attention\.value\.", ".attention.v_proj."),
                (r"\.attention\.output\.dense\.", ".attention.o_proj."),
                (r"\.intermediate\.dense\.", ".mlp.fc1."),
                (r"\.output\.dense\.", ".mlp.fc2."),
                (r"^vit\.encoder\.layer\.", "vit.layers."),
            )
        ),
    ),
    Family(
        model_types=("resnet",),
        architecture="ResNetForImageClassification",
        groups=(),
        kept=(
            *keep(VISION, "normalisation", "resnet.*.normalization.weight"),
            *keep(VISION, "bias", "resnet.*.bias"),
            *keep(HEAD, "bias", "classifier.1.bias"),
        ),
        blocks="resnet.encoder.stages",
        embeddings=(),
        head=None,
        component=VISION,
        parts=(
            Part(VISION, each("resnet.embedder.embedder.convolution", kind="conv")),
            Part(
                VISION,
                (
                    *each("layer.0.convolution", "layer.1.convolution", kind="conv"),
                    *each(
                        "layer.2.convolution", "shortcut.convolution", kind="conv", optional=True
                    ),
                ),
                ("resnet.encoder.stages.*.layers.*",),
                blocks=True,
            ),
            Part(HEAD, each("classifier.1")),
        ),
        root="resnet",
    ),
)
