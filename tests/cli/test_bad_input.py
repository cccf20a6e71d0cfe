"""Every bad input gets a sentence (what is wrong, what to do) and leaves nothing behind."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import QUICK, Run

Fails = Callable[..., str]


@pytest.fixture
def compress_fails(fails: Fails, model: Path, text: Path, tmp_path: Path) -> Fails:
    """`compress_fails(code, *options, model=..., data=...)`: the sentence; no output is left."""

    def call(code: int, *options: object, model: Path = model, data: Path = text) -> str:
        out = tmp_path / "out"
        sentence = fails(code, "compress", model, "-o", out, "--data", data, *QUICK, *options)
        assert not list(tmp_path.glob("out*")), "something was left behind"
        return sentence

    return call


# -- the model -----------------------------------------------------------------------------------


def test_a_model_folder_that_does_not_exist(compress_fails: Fails, tmp_path: Path) -> None:
    sentence = compress_fails(1, "--bits", 5, model=tmp_path / "nowhere")
    assert "there is no folder" in sentence
    assert "nowhere" in sentence


def test_a_hub_id_that_is_not_cached(compress_fails: Fails) -> None:
    assert "allow downloads" in compress_fails(1, "--bits", 5, model=Path("nobody/nothing"))


def test_missing_weight_files(compress_fails: Fails, copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "has no safetensors files" in compress_fails(1, "--bits", 5, model=copied)


def test_a_truncated_weight_file(compress_fails: Fails, copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    sentence = compress_fails(1, "--bits", 5, model=copied)
    assert "model.safetensors" in sentence
    assert "truncated" in sentence or "shorter" in sentence


def test_a_weight_file_that_is_cut_in_its_header(compress_fails: Fails, copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert "model.safetensors" in compress_fails(1, "--bits", 5, model=copied)


def test_weights_of_wrong_shape(compress_fails: Fails, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["intermediate_size"] = 96
    (copied / "config.json").write_text(json.dumps(config))
    sentence = compress_fails(1, "--bits", 5, model=copied)
    assert "mlp" in sentence
    assert "shape" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(
    fails: Fails, copied: Path, text: Path, tmp_path: Path, name: str, value: float
) -> None:
    """Found only when the weight is read: the work directory is there by then, the output never."""
    tensors = load_file(copied / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    sentence = fails(1, "compress", copied, "-o", out, "--data", text, "--bits", 5, *QUICK)
    assert f"{name} in {copied} holds 1 values that are inf or nan" in sentence
    assert not out.exists()


def test_an_unknown_architecture(compress_fails: Fails, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "perceptron9000", "architectures": ["Perceptron9000"]}
    (copied / "config.json").write_text(json.dumps(config))
    assert "perceptron9000" in compress_fails(1, "--bits", 5, model=copied)


def test_pickle_files_are_refused_by_name(compress_fails: Fails, copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    sentence = compress_fails(1, "--bits", 5, model=copied)
    assert "pytorch_model.bin" in sentence
    assert "convert the model to safetensors" in sentence


def test_a_model_without_a_tokenizer(compress_fails: Fails, copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in compress_fails(1, "--bits", 5, model=copied)


# -- the data ------------------------------------------------------------------------------------


def test_data_that_does_not_exist(compress_fails: Fails, tmp_path: Path) -> None:
    sentence = compress_fails(1, "--bits", 5, data=tmp_path / "nothing.txt")
    assert "nothing.txt" in sentence
    assert "no such file" in sentence


def test_data_that_is_empty(compress_fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert "there is no text in it" in compress_fails(1, "--bits", 5, data=tmp_path / "empty.txt")


def test_data_that_is_too_short(compress_fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words.")
    sentence = compress_fails(1, "--bits", 5, data=tmp_path / "short.txt")
    assert "too short" in sentence
    assert "needed for 10 windows" in sentence


def test_more_windows_than_the_text_has(compress_fails: Fails) -> None:
    sentence = compress_fails(1, "--bits", 5, "--windows", 5000)
    assert "too short" in sentence
    assert "fewer windows" in sentence


def test_windows_longer_than_the_model_s_positions(compress_fails: Fails) -> None:
    assert "use --seqlen 512 or less" in compress_fails(2, "--bits", 5, "--seqlen", 600)


def test_a_tokenizer_of_another_model(
    compress_fails: Fails, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    small = tiny_llama(tmp_path / "small", vocab_size=100)
    sentence = compress_fails(1, "--bits", 5, model=small)
    assert "does not belong to its weights" in sentence
    assert "100 rows" in sentence


def test_an_unknown_preset(fails: Fails, model: Path, text: Path, tmp_path: Path) -> None:
    command = ("compress", model, "-o", tmp_path / "out", "--data", text, "--bits", 5)
    assert "unknown preset 'medium'" in fails(2, *command, "--preset", "medium")


def test_no_data_at_all(fails: Fails, model: Path, tmp_path: Path) -> None:
    assert "add --data TEXT" in fails(2, "compress", model, "-o", tmp_path / "out", "--bits", 5)


# -- the budget and the rules --------------------------------------------------------------------


def test_an_impossible_budget_says_the_smallest_possible(compress_fails: Fails) -> None:
    sentence = compress_fails(1, "--size", "10kB")
    assert "impossible" in sentence
    assert "the smallest possible checkpoint has" in sentence


def test_the_smallest_possible_size_is_possible(
    run: Run, compress_fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    sentence = compress_fails(1, "--size", "10kB")
    size = int(sentence.split("checkpoint has ")[1].split(" bytes")[0].replace(",", ""))
    command = ("compress", model, "-o", tmp_path / "out", "--data", text, *QUICK, "--dry-run")
    assert run(*command, "--size", size).code == 0
    assert run(*command, "--size", size - 1).code == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give one budget"),
        (("--bits", 5, "--size", "90kB"), "give one budget"),
        (("--size", "90 bananas"), "is not a size"),
        (("--size", "-5MB"), "is not a size"),
        (("--bits", "many"), "--bits"),
        (("--bits", 99), "out of range"),
        (("--bits", 5, "--floor", "embeddings"), "write PATTERN=VALUE"),
        (("--bits", 5, "--floor", "q_proj=lots"), "is not a number of bits"),
        (("--bits", 5, "--pin", "q_proj=w17"), "is not a scheme"),
        (("--bits", 5, "--floor", "q_porj=8"), "q_proj"),
        (("--bits", 5, "--floor", "re:(=8"), "not a regular expression"),
        (("--bits", 5, "--floor", "q_proj=8", "--ceiling", "q_proj=4"), "contradict"),
        (("--bits", 5, "--pin", "q_proj=w2g32", "--floor", "q_proj=8"), "contradict"),
        (("--bits", 5, "--floor", "q_proj=16"), "leaves no scheme"),
        (("--bits", 5, "--engine", "abacus"), "unknown engine"),
        (("--bits", 5, "--schemes", "w4g77"), "group size 77"),
        (("--bits", 5, "--schemes", "int4"), "is not a scheme"),
        (("--bits", 5, "--schemes", "bf16"), "name what is to stay as it is with --keep"),
        (("--bits", 5, "--schemes", "w4g32a8z"), "cannot be asymmetric"),
        (("--bits", 5, "--pin", "q_proj=w4g32a8"), "and no candidate does"),
        (("--bits", 5, "--scheme", "resk"), "unknown --scheme 'resk'"),
        (("--bits", 5, "--kv", "int5"), "is not a format of a KV cache"),
        (("--bits", 5, "--activations", 5), "no candidate scheme rounds the inputs of linears"),
        (("--bits", 5, "--pin", "q_proj=bf16"), "leaves no scheme"),
        (("--bits", 5, "--preset", "best"), "contradict"),
        (("--bits", 5, "--windows", 0), "windows"),
        (("--bits", 5, "--seqlen", 2), "seqlen"),
        (("--bits", 5, "--no-such-option"), "no-such-option"),
    ],
)
def test_a_request_that_is_wrong_is_exit_code_2(
    compress_fails: Fails, options: tuple[object, ...], words: str
) -> None:
    assert words in compress_fails(2, *options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: [", "is not YAML"),
        ("- a\n- b\n", "must be a YAML mapping"),
        ("data: text.txt\nwindos: 4\n", "windos"),
        ("data: text.txt\nwindows: many\n", "windows"),
        ("data: text.txt\npreset: [best]\n", "unknown preset"),
        ("windows: 4\n", "add --data TEXT"),
    ],
)
def test_a_recipe_that_is_wrong(
    fails: Fails, model: Path, tmp_path: Path, content: str, words: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    command = ("compress", model, "-o", tmp_path / "out", "--bits", 5, "--recipe", recipe)
    assert words in fails(2, *command)
    assert words in fails(2, *command, "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


# -- folders -------------------------------------------------------------------------------------


def compress(model: Path, text: Path, out: Path, *options: object) -> tuple[object, ...]:
    return ("compress", model, "-o", out, "--data", text, "--bits", 5, *QUICK, *options)


def test_an_output_that_is_taken(fails: Fails, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("important")
    for overwrite in ((), ("--overwrite",)):
        sentence = fails(1, *compress(model, text, out, *overwrite))
        assert "is not empty and is not a checkpoint of quantlib" in sentence
    assert (out / "thesis.doc").read_text() == "important"
    assert not (tmp_path / "out.work").exists(), "work began although it could not end"


@pytest.mark.parametrize("place", ["out", "out/work"])
def test_a_work_directory_in_the_output(
    fails: Fails, model: Path, text: Path, tmp_path: Path, place: str
) -> None:
    command = compress(model, text, tmp_path / "out", "--work", tmp_path / place)
    assert "choose a --work beside it" in fails(2, *command)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(fails: Fails, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in fails(1, *compress(model, text, tmp_path / "out"))


def test_another_checkpoint_is_not_replaced_unasked(
    run: Run, fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    assert run(*compress(model, text, out, "--work", work)).code == 0
    before = (out / "model.safetensors").read_bytes()
    other = ("--work", work, "--ceiling", "down_proj=2")
    assert "--overwrite" in fails(1, *compress(model, text, out, *other))
    assert (out / "model.safetensors").read_bytes() == before
    assert run(*compress(model, text, out, *other, "--overwrite")).code == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_a_work_directory_that_holds_something_else(
    fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    sentence = fails(1, *compress(model, text, tmp_path / "out", "--work", work))
    assert "is not a work directory" in sentence


def test_a_work_directory_of_another_model(
    fails: Fails,
    tiny_llama: Callable[..., Path],
    model: Path,
    measured: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    other = tiny_llama(tmp_path / "other", intermediate_size=96)
    before = (measured / "sensitivity.json").read_bytes()
    sentence = fails(1, *compress(other, text, tmp_path / "out", "--work", measured))
    assert "is the work directory of another model" in sentence
    assert str(model) in sentence
    assert (measured / "sensitivity.json").read_bytes() == before


def test_a_work_directory_in_use(
    fails: Fails, model: Path, measured: Path, text: Path, tmp_path: Path
) -> None:
    """By another process: the lock is the kernel's, so this process must not hold it."""
    code = (
        "import sys\n"
        "from quantlib.checkpoint.workdir import WorkDir\n"
        "with WorkDir.open(sys.argv[1], 'quantlib something'):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-P", "-c", code, str(measured)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        sentence = fails(1, *compress(model, text, tmp_path / "out", "--work", measured))
        assert f"in use by process {holder.pid}" in sentence
        assert "quantlib something" in sentence
        holder.communicate("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(fails: Fails, model: Path, text: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Choose a folder you may write to" in fails(1, *compress(model, text, closed / "out"))


def test_a_full_disk_is_noticed_before_work(
    monkeypatch: pytest.MonkeyPatch, fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    sentence = fails(1, *compress(model, text, tmp_path / "out"))
    assert "1.0 kB is free" in sentence
    assert not list((tmp_path / "out.work").glob("statistics/**/*"))


def test_a_disk_that_fills_up_midway_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    fails: Fails,
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    """The disk is full in the middle of the layer bank; room is made; the run goes on."""
    from quantlib.checkpoint.disk import PendingFile

    write, entries = PendingFile.write, count()

    def limited(path: Path, *arguments: object) -> PendingFile:
        if "bank" in path.parts and next(entries) == 12:
            arguments = (fill_up, *arguments[1:])
        return write(path, *arguments)

    def fill_up(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PendingFile, "write", limited)
        assert "the disk is full" in fails(1, *compress(model, text, out))
    assert not out.exists()
    answer = run(*compress(model, text, out))
    assert answer.code == 0, answer
    assert "continuing: statistics and" in answer.stderr


# -- the files of a work directory ---------------------------------------------------------------


def test_a_work_directory_where_nothing_was_measured(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        for command in (("search", "--bits", 5), ("report",)):
            assert "quantlib measure" in fails(1, *command, "--work", tmp_path / place)


@pytest.mark.parametrize("file", ["model.json", "sensitivity.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "garbled", "swapped"])
def test_damaged_files_of_a_work_directory(
    fails: Fails, measured: Path, file: str, damage: str
) -> None:
    content = (measured / file).read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "garbled": b"\xff\xfe" + content[2:],
        "swapped": b'{"format": "something else"}',
    }
    (measured / file).write_bytes(damaged[damage])
    sentence = fails(1, "search", "--work", measured, "--bits", 5)
    assert file in sentence
    assert not (measured / "plan.json").exists()


def test_a_sensitivity_table_of_another_model(fails: Fails, measured: Path) -> None:
    file = measured / "sensitivity.json"
    table = json.loads(file.read_text())
    table["model"] = "0" * 64
    file.write_text(json.dumps(table))
    assert "was measured on another model" in fails(1, "search", "--work", measured, "--bits", 5)


def test_a_corrupt_journal(
    fails: Fails, model: Path, measured: Path, text: Path, tmp_path: Path
) -> None:
    journal = measured / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = b"{ this is no JSON\n"
    journal.write_bytes(b"".join(lines))
    sentence = fails(1, *compress(model, text, tmp_path / "out", "--work", measured))
    assert "line 3 of" in sentence
    assert "delete that line" in sentence


def test_a_corrupt_bank_entry_is_made_again(
    run: Run, fails: Fails, model: Path, measured: Path, text: Path, tmp_path: Path
) -> None:
    """Every entry has one bit flipped: the run that finds it says so, and the next one repairs."""
    out = tmp_path / "out"
    for entry in (measured / "bank").rglob("*.safetensors"):
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    command = compress(model, text, out, "--work", measured)
    assert "missing or damaged" in fails(1, *command)
    assert not out.exists()
    answer = run(*command)
    assert answer.code == 0, answer


# -- plans ---------------------------------------------------------------------------------------


@pytest.fixture
def plan(run: Run, measured: Path) -> Path:
    assert run("search", "--work", measured, "--bits", 5).code == 0
    return measured / "plan.json"


def test_a_plan_for_another_model(fails: Fails, plan: Path, tmp_path: Path) -> None:
    content = json.loads(plan.read_text())
    content["model"] = "0" * 64
    plan.write_text(json.dumps(content))
    sentence = fails(1, "apply", plan, "-o", tmp_path / "out")
    assert "plan.json: the plan is for another model" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: text.replace("quantlib-plan", "shopping-list"), "is not a quantlib-plan"),
        (lambda text: text.replace("down_proj", "donw_proj", 1), "did you mean"),
        (lambda text: text.replace('"scheme": "', '"scheme": "x', 1), "is not a scheme"),
        (lambda text: text.replace("g32", "g64", 1), "was not measured in"),
        (lambda text: text.replace('"bytes": 1', '"bytes": -1'), "cannot be negative"),
    ],
)
def test_a_corrupt_plan(
    fails: Fails, plan: Path, tmp_path: Path, edit: Callable[[str], str], words: str
) -> None:
    before = plan.read_text()
    plan.write_text(edit(before))
    assert plan.read_text() != before
    assert words in fails(1, "apply", plan, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_not_there(fails: Fails, measured: Path, tmp_path: Path) -> None:
    sentence = fails(1, "apply", measured / "plan.json", "-o", tmp_path / "out")
    assert "quantlib search" in sentence
    assert "quantlib search" in fails(1, "report", "--work", measured)


def test_a_plan_outside_of_its_work_directory(fails: Fails, plan: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "plan.json"
    alone.parent.mkdir()
    alone.write_bytes(plan.read_bytes())
    assert "--work" in fails(1, "apply", alone, "-o", tmp_path / "out")


def test_a_model_that_has_moved_or_changed(
    run: Run, fails: Fails, text: Path, copied: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    assert run("measure", copied, "--data", text, "--work", work, *QUICK).code == 0
    assert run("search", "--work", work, "--bits", 5).code == 0
    apply = ("apply", work / "plan.json", "-o", out)
    moved = copied.rename(tmp_path / "moved")
    assert "there is no folder" in fails(1, *apply)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    changed = tmp_path / "changed"
    shutil.copytree(moved, changed)
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert "is not the model that was measured" in fails(1, *apply, "--model", changed)
    assert not out.exists()
    assert run(*apply, "--model", moved).code == 0


def test_text_that_has_changed_cannot_refine(
    run: Run, fails: Fails, model: Path, sample_text: str, tmp_path: Path
) -> None:
    text, work, out = tmp_path / "text.txt", tmp_path / "work", tmp_path / "out"
    text.write_text(sample_text)
    assert run("measure", model, "--data", text, "--work", work, *QUICK).code == 0
    assert run("search", "--work", work, "--bits", 5).code == 0
    text.write_text(sample_text[::-1])
    apply = ("apply", work / "plan.json", "-o", out)
    assert "is not the one that was measured" in fails(1, *apply, "--refine")
    assert run(*apply).code == 0, "without --refine the text is not needed"


# -- checkpoints ---------------------------------------------------------------------------------


def test_evaluating_and_generating_need_a_model(
    fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    assert "there is no config.json" in fails(1, "eval", tmp_path / "no", "--data", text)
    assert fails(1, "generate", tmp_path / "no", "Hello")
    assert fails(1, "generate", model, "Hello"), "a dense model is not a checkpoint of ours"
    assert "unknown --mode" in fails(2, "generate", model, "Hello", "--mode", "quick")


def test_a_checkpoint_cut_short(run: Run, fails: Fails, model: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run(*compress(model, text, out)).code == 0
    file = out / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for size in (4, length // 2, len(content) - 100):
        file.write_bytes(content[:size])
        assert "model.safetensors" in fails(1, "generate", out, "Hello")
        assert "model.safetensors" in fails(1, "eval", out, "--data", text, "--seqlen", 32)


def test_learning_without_refining_is_refused(compress_fails: Fails) -> None:
    assert "add --refine" in compress_fails(2, "--bits", 6, "--learning", 5)
