"""Text in, windows of tokens out: what the loader promises, and the sentences it refuses with."""

import json
import random
import string
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlib.calibration import data
from quantlib.calibration.data import TextSource, load_text, load_windows, windows_sha256
from quantlib.errors import DataError

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
WORDS = [f"w{index}" for index in range(20_000)]


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word: word number n has id n + 2."""
    vocabulary = {"<s>": 0, "<unk>": 1, **{word: index + 2 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


TOKENIZER = make_tokenizer()


def numbered_text(words: int) -> TextSource:
    """w0 w1 w2 ...: a token's id says where in the text it came from."""
    return TextSource("numbered", " ".join(WORDS[:words]))


# -- windows -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    words=st.integers(200, 6000),
    seqlen=st.integers(2, 40),
    windows=st.integers(1, 5),
    seed=st.integers(0, 1000),
    bos=st.booleans(),
)
def test_windows_are_runs_of_the_text_that_never_overlap(words, seqlen, windows, seed, bos):
    drawn = load_windows(numbered_text(words), TOKENIZER, seqlen, windows, seed, bos)
    assert drawn.shape == (windows, seqlen)
    assert drawn.dtype == torch.int64
    body = drawn
    if bos:
        assert (drawn[:, 0] == 0).all()
        body = drawn[:, 1:]
    steps = body.diff(dim=1)
    assert (steps == 1).all(), "each window is consecutive words"
    starts, ends = body[:, 0], body[:, -1]
    assert (starts[1:] > ends[:-1]).all(), "windows are in text order and share no word"


def test_same_seed_same_windows_and_another_seed_others():
    source = numbered_text(20_000)
    first = load_windows(source, TOKENIZER, 64, 8, seed=3)
    assert torch.equal(first, load_windows(source, TOKENIZER, 64, 8, seed=3))
    assert not torch.equal(first, load_windows(source, TOKENIZER, 64, 8, seed=4))


def test_the_global_random_state_is_neither_used_nor_moved():
    before = torch.random.get_rng_state()
    load_windows(numbered_text(2000), TOKENIZER, 16, 4, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_windows_come_from_the_whole_text():
    # 200 draws of 4 windows from a text of 20,000 words: every tenth of it is hit.
    source = numbered_text(20_000)
    tenths = set()
    for seed in range(200):
        starts = load_windows(source, TOKENIZER, 33, 4, seed)[:, 1]
        tenths.update((starts // 2000).tolist())
    assert tenths == set(range(10))


def test_a_long_text_is_not_tokenized_from_end_to_end():
    class Counting:
        bos_token_id = 0
        seen = 0

        def __call__(self, text, **options):
            self.seen += len(text)
            return TOKENIZER(text, **options)

    counting = Counting()
    source = numbered_text(20_000)
    load_windows(source, counting, 33, 4, seed=0)
    assert counting.seen < len(source.text) / 2


def test_a_window_starts_at_a_word():
    # "w123" cut after "w1" would be unknown: no window of a sparse draw holds the unknown token.
    for seed in range(20):
        drawn = load_windows(numbered_text(20_000), TOKENIZER, 33, 4, seed)
        assert not (drawn == 1).any()


def test_stretches_poor_in_tokens_are_passed_over():
    blank = " " * 40_000
    source = TextSource("gaps", blank.join(" ".join(WORDS[i : i + 900]) for i in (0, 900, 1800)))
    drawn = load_windows(source, TOKENIZER, 65, 6, seed=1)
    steps = drawn[:, 1:].diff(dim=1)
    assert (steps == 1).all()


def test_a_tokenizer_without_bos_gives_text_in_every_place():
    drawn = load_windows(numbered_text(500), make_tokenizer(bos=False), 32, 3, seed=0)
    assert (drawn.diff(dim=1) == 1).all()


def test_a_short_text_is_used_to_its_last_window_and_not_beyond():
    source = numbered_text(4 * 31)
    assert load_windows(source, TOKENIZER, 32, 4, seed=0).shape == (4, 32)
    with pytest.raises(DataError, match=r"124 tokens found, 155 needed"):
        load_windows(source, TOKENIZER, 32, 5, seed=0)


def test_a_missing_tokenizer_is_a_sentence():
    with pytest.raises(DataError, match=r"no tokenizer.*tokenizer\.json"):
        load_windows(numbered_text(100), None, 16, 1, seed=0)


@pytest.mark.parametrize(("seqlen", "windows"), [(1, 4), (16, 0), (-3, 2)])
def test_impossible_requests_are_refused(seqlen, windows):
    with pytest.raises(DataError, match="at least 1 window of at least 2 tokens"):
        load_windows(numbered_text(100), TOKENIZER, seqlen, windows, seed=0)


def test_windows_have_a_fingerprint():
    windows = torch.arange(12).view(3, 4)
    assert windows_sha256(windows) == windows_sha256(windows.to(torch.int32))
    assert windows_sha256(windows) != windows_sha256(windows.view(4, 3))
    assert windows_sha256(windows) != windows_sha256(windows + 1)


# -- reading -------------------------------------------------------------------------------------


def test_a_plain_file_is_its_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffnaïve — 漢字\n".encode())
    source = load_text(path)
    assert source.text == "naïve — 漢字\n"
    assert source.sha256 == TextSource("elsewhere", source.text).sha256


def test_a_folder_is_its_txt_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "ignored.md").write_text("no")
    assert load_text(tmp_path).text == "first\n\nsecond\n\nthird"


def test_jsonl_mixes_text_and_chat(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "hi\u2028there"}, {"role": "assistant", "content": "ho"}]
    rows = [json.dumps({"text": "plain", "extra": 1}), "", json.dumps({"messages": chat})]
    path.write_text("\n".join(rows), encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    expected = "plain\n\n<user> hi\u2028there\n<assistant> ho\n"
    assert load_text(path, tokenizer).text.strip() == expected.strip()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{not json", r"line 2: not JSON"),
        ('{"content": "x"}', r'line 2: there is no string "text"'),
        ('["text"]', r'line 2: there is no string "text"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"line 2: chat messages need"),
    ],
)
def test_a_bad_jsonl_row_is_named_by_its_line(tmp_path, line, sentence):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=sentence):
        load_text(path, TOKENIZER)


def test_a_template_that_refuses_is_a_sentence(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "tool", "content": "x"}]}')
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(DataError, match=r"line 1: .*refused.*no tools here"):
        load_text(path, tokenizer)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no text"),
        (b" \n\t\n", "no text"),
        (b"caf\xe9 au lait", r"byte 3 is not UTF-8"),
        (b"PK\x03\x04\x00\x00", "binary file"),
    ],
)
def test_unreadable_files_are_sentences(tmp_path, content, sentence):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_text(path)


def test_nothing_there_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_text(tmp_path / "missing.txt")
    with pytest.raises(DataError, match=r"no \.txt files"):
        load_text(tmp_path)


# -- datasets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hub:wikitext", ("wikitext", None, "train")),
        ("hub:wikitext:test", ("wikitext", None, "test")),
        ("hub:org/name:wikitext-2-raw-v1", ("org/name", "wikitext-2-raw-v1", "train")),
        ("hub:org/name:config:validation", ("org/name", "config", "validation")),
        ("hub:org/name:train[:100]", ("org/name", None, "train[:100]")),
        ("hub:org/name:config:train[10:20]", ("org/name", "config", "train[10:20]")),
    ],
)
def test_hub_specs_are_read(spec, parsed):
    assert data._parse_hub(spec) == parsed


@pytest.mark.parametrize("spec", ["hub:", "hub::x", "hub:a:b:c:d", "hub:a:"])
def test_malformed_hub_specs_are_refused(spec):
    with pytest.raises(DataError, match="write hub:name"):
        load_text(spec)


def fake_datasets(load_dataset):
    """Stands in for the `datasets` package: its import takes seconds and its data a network."""
    return SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=False))


def test_without_the_datasets_package_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="install `datasets`"):
        load_text("hub:org/name")


def test_a_dataset_is_its_rows_up_to_the_limit(monkeypatch):
    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split)
        return ({"text": letter * 10} for letter in string.ascii_lowercase)

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    monkeypatch.setattr(data, "MAX_HUB_CHARACTERS", 25)
    assert load_text("hub:org/name:test").text == "\n\n".join(c * 10 for c in "abc")
    assert asked == {"name": "org/name", "config": None, "split": "test"}


def test_a_dataset_out_of_reach_is_a_sentence(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("could not reach the hub\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    with pytest.raises(DataError, match=r"'org/name'.*could not reach the hub; .*local text file"):
        load_text("hub:org/name")


def test_the_text_decides_the_windows_not_where_it_lay(tmp_path):
    words = random.Random(0).sample(WORDS, 3000)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" ".join(words))
    first = load_windows(tmp_path / "a.txt", TOKENIZER, 32, 4, seed=0)
    assert torch.equal(first, load_windows(str(tmp_path / "b.txt"), TOKENIZER, 32, 4, seed=0))
