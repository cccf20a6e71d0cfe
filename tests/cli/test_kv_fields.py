"""--kv says one format for all tokens, or one for each kind of them."""

import pytest

from quantlib.cli.request import kv_fields
from quantlib.errors import UsageError
from quantlib.recipe import Recipe


def test_one_format_is_the_field_kv() -> None:
    assert kv_fields("8") == {"kv": "int8"}
    assert kv_fields("int4h16") == {"kv": "int4h16"}
    assert kv_fields(None) == {"kv": None}


def test_formats_by_modality_take_its_place() -> None:
    fields = kv_fields("text=8, image_input=int4g32,image_output=int4g32/int8")
    recipe = Recipe.create(data="a", **fields)
    assert recipe.kv == "f32"
    assert recipe.kv_modalities == {
        "text": "int8",
        "image_input": "int4g32",
        "image_output": "int4g32/int8",
    }


def test_scales_of_images_can_be_known_beforehand() -> None:
    recipe = Recipe.create(data="a", **kv_fields("text=8,image_output=4+static"))
    assert recipe.kv_modalities == {"text": "int8", "image_output": "int4"}
    assert recipe.kv_static == ("image_output",)


@pytest.mark.parametrize(
    ("kv", "what"),
    [
        ("text=8,text=4", "two formats"),
        ("text=8,video=4", "kv_modalities"),
        ("text=8,image_output=4+fixed", "not 'fixed'"),
        ("text=8+static", "kv_static"),
    ],
)
def test_what_makes_no_sense_is_refused(kv: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Recipe.create(data="a", **kv_fields(kv))
