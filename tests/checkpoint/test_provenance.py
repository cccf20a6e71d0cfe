"""Hashes that tell apart what differs and nothing else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.checkpoint.provenance import (
    canonical_json,
    digest,
    file_sha256,
    versions,
)
from quantlib.errors import CheckpointError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@given(JSON, JSON)
def test_digests_are_equal_exactly_when_the_texts_are(first: object, second: object) -> None:
    assert (digest(first) == digest(second)) == (canonical_json(first) == canonical_json(second))


def test_a_digest_is_a_fixed_number() -> None:
    """Keys of work directories written last year must still be found."""
    expected = "f4a7ff4325df0514c0b9da53c4cc4ef99161531fe70cf01a08830868cbbc62a3"
    assert digest({"b": [1, 0.1, None], "a": "ü"}) == expected


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        digest(float("inf"))
    with pytest.raises(TypeError):
        digest({"path": Path()})


def test_a_file_hash_reads_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(CheckpointError, match="could not read"):
        file_sha256(tmp_path / "absent")


def test_versions_name_the_three_packages() -> None:
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"quantlib", "torch", "transformers"}
