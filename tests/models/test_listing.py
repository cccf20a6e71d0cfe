"""Names are listed short, and none is lost."""

import re

from hypothesis import given
from hypothesis import strategies as st

from quantlib.models.listing import some, together

part = st.text("abc*", min_size=1, max_size=2)
names = st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), min_size=1, unique=True)


@given(names=names)
def test_every_name_can_be_read_off_the_shared_form(names: list[str]) -> None:
    found = re.fullmatch(r"(?P<before>[^{]*)\{(?P<inside>[^}]*)\}(?P<after>.*)", together(names))
    if found is None:
        assert [together(names)] == names
        return
    read = [found["before"] + one + found["after"] for one in found["inside"].split(", ")]
    assert read == names


def test_what_names_share_is_said_once() -> None:
    block = "model.layers.*"
    norms = [f"{block}.attn_norm.weight", f"{block}.mlp_norm.weight"]
    assert together(norms) == "model.layers.*.{attn_norm, mlp_norm}.weight"
    assert together([]) == ""
    assert together(["lm_head.bias"]) == "lm_head.bias"


def test_the_first_few_and_how_many_more() -> None:
    assert some(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert some(["a"]) == "a"
