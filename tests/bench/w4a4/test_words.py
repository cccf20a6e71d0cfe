"""Word errors: the edit distance, on words as they are spoken."""

from hypothesis import given
from hypothesis import strategies as st

from quantlib.bench.w4a4.words import normalised, word_errors

SENTENCES = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


def test_marks_case_titles_and_small_numbers_do_not_count() -> None:
    assert word_errors("ten of clubs", " 10 of Clubs.") == (0, 3)
    assert word_errors("mister dashwood had then", "Mr. Dashwood, had then") == (0, 4)
    assert normalised("Cold-hearted; don't!") == ["cold", "hearted", "don't"]


def test_changed_missing_and_added_words_count_one_each() -> None:
    assert word_errors("a b c", "a x c") == (1, 3)
    assert word_errors("a b c", "a c") == (1, 3)
    assert word_errors("a b c", "a b b c c") == (2, 3)
    assert word_errors("a b", "") == (2, 2)


@given(SENTENCES, SENTENCES)
def test_it_is_a_distance(one: list[str], other: list[str]) -> None:
    there, _ = word_errors(" ".join(one), " ".join(other))
    back, _ = word_errors(" ".join(other), " ".join(one))
    assert there == back
    assert (there == 0) == (one == other)
    assert abs(len(one) - len(other)) <= there <= max(len(one), len(other))
