"""`quantlib generate`: prompts in, texts out, and which engine wrote them at what speed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlib.kernels.cpu import library as cpu

from .conftest import QUICK, Run

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")
COUNT = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def out(run: Run, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "out"
    answer = run("compress", model, "--bits", 6, "-o", folder, "--data", text, *QUICK)
    assert answer.code == 0, answer
    return folder


def test_the_text_is_the_answer_and_the_speed_a_note(run: Run, out: Path) -> None:
    answer = run("generate", out, "Bread needs", *COUNT)
    assert (
        answer.stdout == run("generate", out, "Bread needs", *COUNT, "--json").json["text"] + "\n"
    )
    note = r"6 tokens, \d+\.\d tokens/s; prompt of \d+ with its chat template, \d+\.\d tokens/s"
    assert re.search(note, answer.stderr)
    assert f"(native engine, {cpu.load().isa}, int8g128, kv f32)" in answer.stderr  # type: ignore[union-attr]


def test_several_prompts_are_answered_at_once(run: Run, out: Path, tmp_path: Path) -> None:
    """From the command line and from a file, each as it would be alone."""
    file = tmp_path / "prompts.txt"
    file.write_text("The ships\n\nRivers carry stones\n", encoding="utf-8")
    prompts = ["Bread needs", "The ships", "Rivers carry stones"]
    found = run("generate", out, "Bread needs", "--file", file, *COUNT, "--json").json
    alone = [run("generate", out, prompt, *COUNT, "--json").json for prompt in prompts]
    assert found["texts"] == [one["text"] for one in alone]
    assert found["text"] is None
    assert found["new_tokens"] == sum(one["new_tokens"] for one in alone)
    assert found["prompt_tokens"] == sum(one["prompt_tokens"] for one in alone)
    printed = run("generate", out, "Bread needs", "--file", file, *COUNT).stdout
    assert printed == "".join(f"> {p}\n{t}\n\n" for p, t in zip(prompts, found["texts"]))


def test_the_engine_can_be_chosen(run: Run, out: Path) -> None:
    command = ("generate", out, "Bread needs", *COUNT, "--mode", "exact", "--json")
    native, plain = (run(*command, "--engine", engine).json for engine in ("native", "plain"))
    assert (native["engine"], plain["engine"]) == ("native", "plain")
    assert native["text"] == plain["text"]
    assert native["plain_reason"] is None
    assert plain["plain_reason"] == "the plain way was asked for"
    said = run(*command[:-1], "--engine", "plain").stderr
    assert "through transformers: the plain way was asked for" in said


def test_mode_cache_and_threads_are_the_callers(run: Run, out: Path) -> None:
    command = ("generate", out, "Bread needs", *COUNT, "--json")
    found = run(*command, "--mode", "int8", "--kv", "int8/int4r", "--threads", 1).json
    assert (found["mode"], found["kv"], found["threads"]) == ("int8", "int8/int4r", 1)
    assert found["new_tokens"] == 6


def test_what_cannot_be_done_is_a_sentence(
    fails: Callable[..., str], out: Path, tmp_path: Path
) -> None:
    assert "there is no prompt" in fails(2, "generate", out)
    assert "unknown --engine fast" in fails(2, "generate", out, "Hello", "--engine", "fast")
    assert "not a format of a KV cache" in fails(2, "generate", out, "Hello", "--kv", "int2")
    assert "--threads 0" in fails(2, "generate", out, "Hello", "--threads", 0)
    assert "cannot be read" in fails(2, "generate", out, "--file", tmp_path / "nothing.txt")
    both = ("--engine", "plain", "--kv", "int8")
    assert "the plain way was asked for" in fails(2, "generate", out, "Hello", *both)
