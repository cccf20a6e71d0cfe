"""Every family that has routes is evaluated, and answers about pictures where it reads them."""

from pathlib import Path

import pytest

from quantlib.evaluation.multimodal import evaluate_suite, open_model
from quantlib.evaluation.passes import Options
from quantlib.runtime.media import Media

from ..pipeline import whole_models

READERS = ("llava_siglip", "idefics3", "gemma3", "qwen2_5_vl", "chameleon", "emu3")
ENCODERS = ("bert", "dinov2", "clip")
TASKS = {
    "bert": {"vectors"},
    "dinov2": {"vectors"},
    "clip": {"vectors"},
    "chameleon": {"text", "answer", "codes"},
    "emu3": {"text", "answer", "image", "image under guidance", "decoder", "codes"},
}


@pytest.mark.parametrize("case", [*READERS, *ENCODERS, "janus_mixture"])
def test_a_model_beside_itself_has_all_its_tasks_and_no_change(case: str, tmp_path: Path) -> None:
    folder = whole_models.save(case, tmp_path / "model")
    data = whole_models.records(case, tmp_path, count=2)
    found = evaluate_suite(folder, folder, data, limit=2, options=Options(max_new_tokens=3))
    tasks = {figure.task for figure in found.figures}
    if case == "janus_mixture":
        assert tasks >= {"image", "decoder", "codes", "text", "answer"}
    else:
        assert tasks == TASKS.get(case, {"text", "answer"})
    for figure in found.figures:
        if figure.name.startswith(("KL", "relative error to the reference's")):
            # the same float32 forward twice
            assert abs(figure.model.value) <= 1e-6, figure
        elif figure.change is not None:
            assert figure.change.value == 0, figure


@pytest.mark.parametrize("case", READERS)
def test_answers_come_behind_the_prompt_of_calibration(case: str, tmp_path: Path) -> None:
    folder = whole_models.save(case, tmp_path / "model")
    media = Media.of(open_model(folder), folder)
    photo = whole_models.write_picture(tmp_path / "photo.png", 1)
    written = media.answer("w1 w2 w3", image=photo, max_new_tokens=3)
    assert 1 <= len(written.tokens) <= 3
    assert written.prompt_tokens > 4, "the picture stands in the prompt"
    assert media.answer("w1 w2 w3", image=photo, max_new_tokens=3).tokens == written.tokens
