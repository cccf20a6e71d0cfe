"""What the commands answer, and that --json is JSON and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlib.cli.results import first_data_and_request

from ..pipeline import whole_models
from .conftest import QUICK, Run


def test_inspect_accounts_for_every_parameter(run: Run, model: Path) -> None:
    found = run("inspect", model, "--json").json
    assert {"name", "parameters", "bytes", "share", "bits", "kept"} <= set(found["components"][0])
    for key in ("parameters", "bytes"):
        rows = sum(row[key] for row in found["coverage"])
        assert rows == sum(component[key] for component in found["components"])
    assert sum(component["share"] for component in found["components"]) == pytest.approx(1)
    assert sum(row["parameters"] for row in found["coverage"]) == found["parameters"]
    assert found["estimate"]["disk_bytes"] > 0
    assert found["smallest_bytes"] < found["largest_bytes"] < found["file_bytes"]


def test_inspect_for_people(run: Run, model: Path) -> None:
    short, long = run("inspect", model), run("inspect", model, "--coverage")
    assert "language_model" in short.stdout
    assert "possible sizes" in short.stdout
    assert "model.layers.1.mlp.down_proj.weight" not in short.stdout
    assert "model.layers.1.mlp.down_proj.weight" in long.stdout
    assert short.stderr == ""


def test_a_dry_run_writes_nothing(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--bits", 5, "--data", text, *QUICK, "--dry-run")
    answer = run(*command)
    assert "needs about" in answer.stdout
    assert run(*command, "--json").json["budget"] > 0
    assert not list(tmp_path.iterdir())


def test_compress_answers_in_json(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = run(
        "compress", model, "-o", out, "--size", "30%", "--data", text, *QUICK, "--json", "--refine"
    )
    found = answer.json
    assert Path(found["checkpoint"]) == out
    assert found["bytes"] == (out / "model.safetensors").stat().st_size <= found["budget_bytes"]
    assert found["bits"] == pytest.approx(8 * found["bytes"] / found["parameters"])
    assert found["measured"]["kl"]["value"] > 0
    assert Path(found["report"]).is_file()
    assert "calibrate" in answer.stderr


def test_the_same_command_twice_does_nothing_twice(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--bits", 5, "--data", text, *QUICK)
    assert run(*command).code == 0
    journal = (tmp_path / "out.work" / "journal.jsonl").read_bytes()
    written = (out / "model.safetensors").stat().st_mtime_ns
    answer = run(*command)
    assert answer.code == 0, answer
    assert "continuing: statistics and 9 of 9 groups are already there" in answer.stderr
    assert (tmp_path / "out.work" / "journal.jsonl").read_bytes() == journal
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_a_recipe_file_and_options_that_count_more(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    """The file's own folder is where its data is looked for."""
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: text.txt\npreset: fast\nschemes: [w4g32]\nseqlen: 32\nwindows: 5\n")
    work = tmp_path / "work"
    command = ("measure", model, "--work", work, "--recipe", recipe)
    assert run(*command, "--windows", 6, "--json").json["schemes"] == ["w4g32"]
    used = (work / "recipe.yaml").read_text()
    assert "windows: 6" in used
    assert f"data: {tmp_path / 'text.txt'}" in used
    again = run("measure", model, "--work", work, "--recipe", work / "recipe.yaml")
    assert "continuing: statistics and 9 of 9 groups" in again.stderr


def test_search_needs_no_model(
    run: Run, model: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlib.models.source import Source

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(Source, "open", refuse)
    answer = run("search", "--work", measured, "--bits", 5, "--json")
    found = answer.json
    assert found["bytes"] <= found["budget_bytes"]
    assert found["lp_gap"] >= 0
    assert found["seconds"] < 2
    assert json.loads((measured / "plan.json").read_text())["bytes"] == found["bytes"]


def test_search_for_people(run: Run, measured: Path) -> None:
    answer = run("search", "--work", measured, "--size", "30%", "--pareto")
    assert "gap to LP bound" in answer.stdout
    assert "sum of losses" in answer.stdout, "no probes were measured by the fast preset"
    assert "quantlib apply" in answer.stderr


def test_the_front_needs_no_budget_and_falls(run: Run, measured: Path) -> None:
    front = run("search", "--work", measured, "--pareto", "--json").json["front"]
    assert len(front) > 5
    losses = [point["loss"] for point in front]
    assert losses == sorted(losses, reverse=True)
    assert not (measured / "plan.json").exists()


def test_rules_hold_and_engines_fuse(run: Run, measured: Path) -> None:
    command = ("search", "--work", measured, "--bits", 5.5, "--json")
    rules = ("--floor", "down_proj=8", "--ceiling", "up_proj=4", "--pin", "embeddings=w4g32")
    schemes = run(*command, *rules).json["schemes"]
    assert {s for n, s in schemes.items() if "down_proj" in n} == {"w8g32"}
    assert {s for n, s in schemes.items() if "up_proj" in n} <= {"w2g32", "w4g32"}
    assert schemes["model.embed_tokens.weight"] == "w4g32"
    fused = run(*command, "--engine", "vllm").json["schemes"]
    for block in (0, 1):
        attention = f"model.layers.{block}.self_attn."
        assert len({fused[f"{attention}{x}_proj.weight"] for x in "qkv"}) == 1


def test_a_pin_makes_its_scheme_a_candidate(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--bits", 6, "--pin", "lm_head=w6g64", "--json")
    answer = run("compress", model, "-o", out, "--data", text, *QUICK, *options)
    assert answer.code == 0, answer
    plan = json.loads((out / "quantlib_plan.json").read_text())
    assert plan["weights"]["model.embed_tokens.weight"]["scheme"] == "w6g64"


def test_a_method_rounds_inputs_and_the_cache_too(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    """A model this small is mostly bases: hence so many bits. Text comes as its schemes say."""
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--data", text, "--seqlen", 32, "--windows", 6)
    options = ("--fast", "--bits", 7.5, "--scheme", "resq", "--activations", 6.7, "--kv", "8")
    answer = run(*command, *options, "--json")
    assert answer.code == 0, answer
    plan = json.loads((out / "quantlib_plan.json").read_text())
    schemes = [row["scheme"] for name, row in plan["weights"].items() if "_proj" in name]
    assert schemes
    assert all("a6z" in scheme or "a8" in scheme for scheme in schemes)
    written = run("generate", out, "Bread", "--max-new-tokens", 3, "--json").json
    assert written["new_tokens"] == 3
    assert written["kv"] in ("int8", "f32"), "f32: through transformers, which rounds it itself"
    recipe = (tmp_path / "out.work" / "recipe.yaml").read_text()
    assert "rotation: gradients" in recipe
    assert "kv: int8" in recipe


def test_an_edited_plan_is_priced_and_applied(run: Run, measured: Path, tmp_path: Path) -> None:
    assert run("search", "--work", measured, "--bits", 5, "-o", tmp_path / "mine.json").code == 0
    plan = json.loads((tmp_path / "mine.json").read_text())
    for row in plan["weights"].values():
        row["scheme"] = "w2g32"
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    out = tmp_path / "out"
    answer = run("apply", tmp_path / "mine.json", "--work", measured, "-o", out, "--json")
    found = answer.json
    assert found["predicted"] == {}, "the promise of the search does not hold for an edited plan"
    assert found["bytes"] <= json.loads((out / "quantlib_plan.json").read_text())["bytes"]


def test_apply_can_refine_and_says_what_it_gave(run: Run, measured: Path, tmp_path: Path) -> None:
    assert run("search", "--work", measured, "--bits", 4).code == 0
    command = ("apply", measured / "plan.json", "-o", tmp_path / "out", "--refine")
    answer = run(*command)
    assert answer.code == 0, answer
    assert "KL on held-back windows" in answer.stdout
    page = (measured / "report.html").read_text()
    assert "this model" in page or "measured" in page


def test_apply_refines_a_model_that_hears_and_says_what_each_task_loses(
    run: Run, tmp_path: Path
) -> None:
    model = whole_models.save("whisper", tmp_path / "model")
    data = whole_models.records("whisper", tmp_path)
    schemes = ("--schemes", "w2g32z4s4", "--schemes", "w3g32z4s4")
    asked = (*schemes, "--fast", "--windows", 4, "--size", "60%", "--json")
    plain = run("compress", model, "-o", tmp_path / "plain", "--data", data, *asked)
    assert plain.json["measured"] is None
    work = tmp_path / "plain.work"
    command = ("apply", work / "plan.json", "-o", tmp_path / "out", "--refine", "--work", work)
    shown = run(*command)
    assert shown.code == 0, shown
    assert "answer: measured loss on held-back records" in shown.stdout
    found = run(*command, "--json").json
    loss = found["measured"]["tasks"]["answer"]
    assert loss["value"] > 0
    assert found["refined"] == ("before" in found["measured"])
    assert not found["refined"] or loss["value"] < found["measured"]["before"]["answer"]["value"]


def test_the_report_of_a_plan_without_a_checkpoint(run: Run, measured: Path) -> None:
    assert run("search", "--work", measured, "--bits", 5, "--floor", "down_proj=4").code == 0
    answer = run("report", "--work", measured, "--json")
    assert Path(answer.json["report"]) == measured / "report.html"
    assert "--floor down_proj=4" in (measured / "report.html").read_text()


def test_the_report_takes_what_eval_printed(
    run: Run, fails: Callable[..., str], model: Path, text: Path, measured: Path, tmp_path: Path
) -> None:
    assert run("search", "--work", measured, "--bits", 5).code == 0
    out, file = tmp_path / "out", tmp_path / "eval.json"
    assert run("apply", measured / "plan.json", "-o", out).code == 0
    command = ("eval", out, "--against", model, "--data", text, "--seqlen", 32, "--windows", 5)
    found = run(*command, "--json")
    file.write_text(found.stdout)
    report = ("report", "--work", measured, "--evaluation", file)
    assert "Measured KL" not in (measured / "report.html").read_text()
    assert run(*report).code == 0
    page = (measured / "report.html").read_text()
    assert "Measured KL" in page
    assert f"{found.json['result']['kl']['value']:.2g}" in page
    file.write_text(json.dumps({**found.json, "model_bytes": 1}))
    assert "not the checkpoint that was last made from this plan" in fails(2, *report)
    file.write_text("{}")
    assert "is not what quantlib eval --json prints" in fails(1, *report)


def test_the_first_prompt_suits_the_model(
    run: Run, measured: Path, copied: Path, tmp_path: Path
) -> None:
    """A question where there is a chat template, half a sentence where there is none."""
    assert run("search", "--work", measured, "--bits", 5).code == 0
    apply = ("apply", measured / "plan.json", "--model", copied, "-o")
    assert "'What is the capital of France?'" in run(*apply, tmp_path / "chats").stderr
    for file in copied.glob("chat_template*"):
        file.unlink()
    assert "'The capital of France is'" in run(*apply, tmp_path / "continues").stderr


@pytest.mark.parametrize(
    ("model_type", "task", "data", "request_"),
    [
        ("janus", "tasks", "HELD_OUT.jsonl", "'a red three on a black background' --image out.png"),
        ("llava", "tasks", "HELD_OUT.jsonl", "'What is this?' --image-input photo.png"),
        ("whisper", "answer", "HELD_OUT.jsonl", "--audio clip.wav"),
        ("dinov2", "vectors", "HELD_OUT.jsonl", None),
        ("janus", "kl", "HELD_OUT_TEXT", "'The capital of France is'"),
    ],
)
def test_what_to_try_first_is_what_the_model_was_calibrated_for(
    model_type: str, task: str, data: str, request_: str | None, tmp_path: Path
) -> None:
    """Pictures of a model that draws, nothing of an encoder; text where all else was kept."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert first_data_and_request(tmp_path, task) == (data, request_)


@pytest.fixture(scope="module")
def packed(run: Run, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    assert run("compress", model, "-o", out, "--bits", 6, "--data", text, *QUICK).code == 0
    return out


def test_eval_for_people_and_alone(run: Run, packed: Path, model: Path, text: Path) -> None:
    command = ("eval", packed, "--data", text, "--seqlen", 32, "--windows", 5)
    compared = run(*command, "--against", model)
    for word in ("perplexity", "KL per token", "same most likely token", "±"):
        assert word in compared.stdout
    alone = run(*command, "--json").json["result"]
    assert "kl" not in alone
    assert alone["perplexity"]["standard_error"] > 0


def test_generate_repeats_itself_with_a_seed(run: Run, packed: Path) -> None:
    command = ("generate", packed, "Bread needs", "--max-new-tokens", 12, "--temperature", 1.5)
    first, again, other = (run(*command, "--seed", seed, "--json").json for seed in (1, 1, 2))
    assert first["text"] == again["text"] != other["text"]
    assert first["new_tokens"] == 12
    streamed = run(*command, "--seed", 1)
    assert streamed.stdout == first["text"] + "\n"
    assert "tokens/s" in streamed.stderr


def test_generate_modes_and_templates(run: Run, packed: Path) -> None:
    command = ("generate", packed, "Bread", "--max-new-tokens", 4, "--json")
    for options in (("--mode", "exact"), ("--mode", "int8"), ("--no-chat",)):
        assert run(*command, *options).code == 0
    plain = run(*command, "--no-chat").json["prompt_tokens"]
    chat = run(*command, "--chat").json["prompt_tokens"]
    assert plain < chat, "the chat template adds tokens"
    assert run(*command).json["prompt_tokens"] == chat, "it is used where there is one"
    assert f"prompt of {chat} with its chat template" in run(*command[:-1]).stderr
    assert f"prompt of {plain}," in run(*command[:-1], "--no-chat").stderr


def test_infinite_figures_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    from quantlib.cli.console import print_json

    print_json({"a": [float("inf"), 1.5, float("nan")], "b": Path("x"), "c": None, "d": True})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": [None, 1.5, None], "b": "x", "c": None, "d": True}
