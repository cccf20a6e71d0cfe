"""The bed `unified`: scenes show what they say, training can be stopped, and the folder is what
the other rooms read."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from quantlib.bench.beds import training, unified_folder, unified_gates, unified_stages, vq
from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.judge import Reader, judge_spec, read_right
from quantlib.bench.beds.scenes import (
    COLORS,
    DIGITS,
    FOLDS,
    SIDE,
    Handwriting,
    Scenes,
    compose,
    draw,
    fetch_digits,
    handwriting,
    normalised,
    varied,
)
from quantlib.bench.beds.training import Schedule, Stage, initialise
from quantlib.bench.beds.unified import BED
from quantlib.bench.beds.vq import spherical_kmeans, train_vq
from quantlib.bench.packages import AssetUnavailable
from quantlib.calibration.forwards import janus_image_logits
from quantlib.calibration.records import GENERATION, QUESTION, TEXT, of_kind, read_records
from quantlib.errors import DataError
from quantlib.evaluation.judge import Judge, save_judge
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """And few points to gather codes around: what a short run can afford."""
    monkeypatch.setattr(vq, "BATCH", 4)
    monkeypatch.setattr(vq, "CLUSTERED_BATCHES", 8)
    monkeypatch.setattr(unified_stages, "READER_BATCH", 4)
    monkeypatch.setattr(unified_stages, "JOINT_BATCH", 4)


@pytest.fixture(scope="module")
def strokes():
    """Handwriting of twenty "digits" that are rectangles of different sizes."""
    masks = torch.zeros(20, SIDE, SIDE)
    for index in range(20):
        masks[index, 4 : 10 + index // 2, 9 : 12 + index % 4] = 1
    return Handwriting(masks, torch.arange(20) % 10)


@pytest.fixture(scope="module")
def model():
    made = unified.build()
    initialise(made, rng())
    return made


@pytest.fixture(scope="module")
def digits():
    try:
        return fetch_digits()
    except AssetUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("weights")
    save_judge(folder / "judge.safetensors", Reader().eval().state_dict(), judge_spec())
    BED.write_weights(model, folder / "judge.safetensors", folder / "weights")
    return folder / "weights"


# -- scenes ----------------------------------------------------------------------------------------


@pytest.mark.assets
def test_folds_share_no_image_and_have_every_digit_equally_often(digits):
    folds = {fold: handwriting(digits, fold) for fold in FOLDS}
    seen = [{mask.numpy().tobytes() for mask in fold.masks} for fold in folds.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    for fold, (first, last) in FOLDS.items():
        counts = torch.bincount(folds[fold].labels, minlength=10)
        assert counts.tolist() == [last - first] * 10


def test_the_rules_of_colour_read_every_scene_as_it_was_drawn(strokes):
    scenes = draw(strokes, 200, rng(), vary=True)
    judge_file = Reader().eval().state_dict()
    right = read_right(Judge(judge_file, judge_spec()), scenes.pixels, scenes)
    assert right["color"] == 1.0
    assert right["background"] == 1.0


def test_a_caption_names_digit_colour_and_background_of_its_picture(strokes):
    scenes = compose(strokes, torch.arange(20), rng(3), vary=False)
    for index, sentence in enumerate(scenes.captions()):
        words = sentence.split()
        assert words[2] == DIGITS[strokes.labels[index]]
        most = scenes.pixels[index].flatten(1)
        front = torch.tensor(COLORS[words[1]])
        # Strokes of weight one have exactly the colour that the caption names.
        assert ((most - front[:, None]).abs().amax(0) < 1e-6).any()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_varied_handwriting_stays_handwriting(seed, strokes):
    masks = varied(strokes.masks, rng(seed))
    assert masks.shape == strokes.masks.shape
    assert masks.min() >= 0
    assert masks.max() <= 1
    # Scale moves by at most 8 % a side, and interpolation loses nothing inside the frame.
    grown = masks.sum((1, 2)) / strokes.masks.sum((1, 2))
    assert (grown > 0.8).all()
    assert (grown < 1.25).all()


# -- training --------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def _trained(file, stop_at=None):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    initialise(module, rng(1))
    unused = nn.Parameter(torch.ones(2))
    module.register_parameter("unused", unused)

    def loss(step, generator):
        if step == stop_at:
            raise Stopped
        x = torch.randn(16, 4, generator=generator)
        return {"error": (module(x).float() - x.sum(1, keepdim=True)).square().mean()}

    Stage(file, module, Schedule(30, 1e-2, warmup=5), seed=7).run(loss)
    return module


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_FILES", 0.0)
    whole = _trained(tmp_path / "whole.safetensors")
    with pytest.raises(Stopped):
        _trained(tmp_path / "stopped.safetensors", stop_at=17)
    resumed = _trained(tmp_path / "stopped.safetensors")
    for left, right in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(left, right)


def test_a_finished_stage_is_only_read(tmp_path):
    first = _trained(tmp_path / "a.safetensors")
    again = _trained(tmp_path / "a.safetensors", stop_at=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_a_stage_of_another_model_is_refused(tmp_path):
    _trained(tmp_path / "a.safetensors")
    other = Stage(tmp_path / "a.safetensors", nn.Linear(3, 3, bias=False), Schedule(30, 1e-2), 0)
    with pytest.raises(DataError, match="another model"):
        other.run(lambda step, generator: {})


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    module = nn.Linear(2, 2)
    stage = Stage(tmp_path / "a.safetensors", module, Schedule(3, 1e-2), 0)
    with pytest.raises(DataError, match="step 0"):
        stage.run(lambda step, generator: {"x": module.weight.sum() * float("nan")})


@given(seed=st.integers(0, 1000), count=st.integers(2, 24))
@settings(max_examples=15, deadline=None)
def test_every_center_of_kmeans_is_a_unit_vector_that_owns_points(seed, count):
    points = nn.functional.normalize(torch.randn(200, 4, generator=rng(seed)), dim=-1)
    centers = spherical_kmeans(points, count, rng(seed))
    # float32 normalisation of four coordinates
    assert (centers.norm(dim=-1) - 1).abs().max() < 1e-5
    used = (points @ centers.T).argmax(1).unique()
    # A last round may leave a center without points; never a tenth of them.
    assert len(used) >= 0.9 * count


def test_what_the_vq_model_was_trained_to_decode_is_what_transformers_decodes(tmp_path, strokes):
    """Its codebook is on the sphere, where comparing without and decoding with a norm agree."""
    made = unified.build()
    initialise(made, rng())
    vqmodel = made.model.vqmodel
    train_vq(
        vqmodel,
        lambda count, generator: normalised(draw(strokes, count, generator, vary=True).pixels),
        tmp_path / "vq.safetensors",
        0,
        Schedule(2, 1e-3, warmup=1),
    )
    codebook = vqmodel.quantize.embedding.weight
    assert (codebook.norm(dim=-1) - 1).abs().max() < 1e-5
    codes = unified.image_codes(made, normalised(draw(strokes, 4, rng(), vary=True).pixels))
    assert codes.shape == (4, unified.TOKENS)
    assert len(codes.unique()) > 4


# -- model -----------------------------------------------------------------------------------------


def test_the_processor_makes_the_tokens_that_the_model_was_trained_on(weights):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(weights / "model")
    picture = Image.new("RGB", (SIDE, SIDE), (255, 0, 51))
    asked = processor(text=["<image>what digit ?"], images=[picture], return_tensors="pt")
    assert asked["input_ids"][0].tolist() == unified.question_ids("what digit ?")
    assert asked["pixel_values"][0, :, 3, 3].tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)
    scene = Scenes(torch.empty(1, 0), *torch.tensor([[3], [0], [1]]))
    wanted = processor(text=scene.captions(), generation_mode="image", return_tensors="pt")
    assert torch.equal(wanted["input_ids"], unified.prompts(scene, torch.zeros(1).bool()))


def test_the_answer_loss_is_that_of_transformers(model, strokes):
    scenes = draw(strokes, 3, rng(), vary=False)
    batch, pixels = unified.questions_batch(scenes, rng()), normalised(scenes.pixels)
    ours = unified.answer_loss(model, pixels, batch)
    theirs = model(input_ids=batch.ids, pixel_values=pixels, labels=batch.labels).loss
    # The same float32 sums in another order.
    assert abs(ours.item() - theirs.item()) <= 1e-5


def test_the_image_loss_is_that_of_the_calibration_stream(model, strokes):
    scenes = draw(strokes, 3, rng(), vary=False)
    codes = unified.image_codes(model, normalised(scenes.pixels))
    kept = torch.zeros(3, dtype=torch.bool)
    ids = unified.prompts(scenes, kept)
    image, _ = unified.image_losses(model, ids, codes, kept)
    logits = janus_image_logits(model, ids, codes)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert abs(image.item() - expected.item()) <= 1e-5


def test_dropped_prompts_keep_only_what_guidance_keeps(strokes):
    scenes = draw(strokes, 2, rng(), vary=False)
    kept, dropped = unified.prompts(scenes, torch.tensor([False, True]))
    assert kept[0] == dropped[0] == unified.IDS[unified.BOS]
    assert kept[-1] == dropped[-1] == unified.IDS[unified.BEGIN]
    assert (dropped[1:-1] == unified.IDS[unified.PAD]).all()


def test_pictures_are_sampled_as_transformers_samples_them(model):
    """A head so sure of itself that sampling is choosing the likeliest."""
    scene = Scenes(torch.empty(1, 0), *torch.tensor([[3], [0], [1]]))
    ids = unified.prompts(scene, torch.zeros(1, dtype=torch.bool))
    head = model.model.generation_head.vision_head.weight
    before = head.detach().clone()
    try:
        with torch.no_grad():
            head.mul_(1e5)
            ours = unified_gates.sampled_codes(model, ids, unified.GUIDANCE, rng())
        theirs = model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
        )
    finally:
        head.data.copy_(before)
    assert torch.equal(ours, theirs)


# -- gates and folder ------------------------------------------------------------------------------


def test_gates_fail_on_a_model_that_learnt_nothing(model, strokes):
    judge = Judge(Reader().eval().state_dict(), judge_spec())
    few = Handwriting(strokes.masks[:4], strokes.labels[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unified_gates, "REPEATS", 1)
        shares = unified_gates.measure(model, judge, few)
    assert not unified_gates.passed(shares)
    told = unified_gates.as_json(shares)
    assert not told["passed"]
    gates = {name for name, share in told["shares"].items() if "at_least" in share}
    assert gates == set(unified_gates.LIMITS)
    assert shares["generation_digit"].count == 80


@pytest.mark.assets
def test_the_folder_has_records_that_can_be_read_and_share_no_picture(digits, weights, tmp_path):
    bed = tmp_path / "bed"
    unified_folder.write_folder(weights, digits, bed)
    records = {name: read_records(bed / f"{name}.jsonl") for name in ("calibration", "test")}
    for name in records:
        kinds = [len(of_kind(records[name], kind)) for kind in (QUESTION, GENERATION, TEXT)]
        assert min(kinds) >= 100
    pictures = [{r.file.read_bytes() for r in found if r.media} for found in records.values()]
    assert not pictures[0] & pictures[1]
    assert len(of_kind(records["test"], QUESTION)) == 1000
    scenes = unified_gates.test_scenes(handwriting(digits, "test"))
    stored = torch.frombuffer(
        bytearray(Image.open(bed / "test" / "007.png").tobytes()), dtype=torch.uint8
    )
    shown = stored.view(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    # A PNG has 255 levels.
    assert (shown - scenes.pixels[7]).abs().max() <= 0.5 / 255 + 1e-6


def test_the_saved_model_is_small_enough_to_be_committed_and_accounts_for_itself(weights, model):
    size = (weights / "model" / "model.safetensors").stat().st_size
    assert size < 20e6
    settings = json.loads((weights / "model" / "generation_config.json").read_text())
    assert settings["generation_kwargs"] == {"boi_token_id": unified.IDS[unified.BEGIN]}
    assert settings["guidance_scale"] == unified.GUIDANCE
    listed = ModelMap.from_source(Source.open(weights / "model"))
    assert listed.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.assets
@pytest.mark.slow
def test_all_stages_run_and_a_second_call_only_reads(digits, tmp_path):
    first = unified_stages.train(tmp_path, digits, 0, 1500)
    second = unified_stages.train(tmp_path, digits, 0, 1500)
    theirs = dict(second.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in first.named_parameters())
