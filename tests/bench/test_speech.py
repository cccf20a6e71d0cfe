"""Speech: recordings are read as they sound, Debian packages are unpacked or refused in sentences,
and a CTranslate2 file becomes the model it was made from."""

import shutil
import struct
import subprocess
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlib.bench import packages, speech, whisper
from quantlib.errors import DataError

DPKG = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")


def write_wave(path: Path, samples: np.ndarray, rate: int, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def test_a_recording_of_8_khz_sounds_the_same_at_16(tmp_path: Path) -> None:
    """A 440 Hz tone stays one: each sample in the middle is within 1 % of the true sine."""
    times = np.arange(8000) / 8000
    write_wave(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * times), 8000)
    heard = speech.read_wave(tmp_path / "tone.wav").numpy()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert heard.shape == (16000,)
    error = np.abs(heard - expected)[1000:-1000].max()
    assert error < 0.005


def test_two_channels_are_refused(tmp_path: Path) -> None:
    write_wave(tmp_path / "stereo.wav", np.zeros(64), 16000, channels=2)
    with pytest.raises(DataError, match="2 channels of 2 bytes"):
        speech.read_wave(tmp_path / "stereo.wav")


def test_what_is_no_recording_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(DataError, match="could not be read as a WAV file"):
        speech.read_wave(tmp_path / "text.wav")


def test_transcripts_and_recordings_go_together(tmp_path: Path) -> None:
    for listing, name in (("librivox/transcription", "a-1"), ("cards/cards.transcription", "001")):
        path = tmp_path / listing
        write_wave(path.parent / f"{name}.wav", np.zeros(160), 16000)
        path.write_text(f"<s> one  two </s> ({name})\n")
    found = speech.utterances(tmp_path)
    assert [(one.name, one.text, len(one.audio)) for one in found] == [
        ("a-1", "one two", 160),
        ("001", "one two", 160),
    ]
    (tmp_path / "librivox/transcription").write_text("one two\n")
    with pytest.raises(DataError, match="not a transcript: 'one two'"):
        speech.utterances(tmp_path)


def test_clips_are_full_and_share_no_prompt(tmp_path: Path) -> None:
    for index in range(12):
        write_wave(tmp_path / f"{index}.wav", np.full(16000 * 9, (index + 1) / 20), 16000)
    clips = speech.calibration_clips(tmp_path, 3)
    heard = [sorted(set((clip * 20).round().int().tolist()) - {0}) for clip in clips]
    assert [len(prompts) for prompts in heard] == [2, 2, 2], "two of 9 seconds fit 28 with pauses"
    assert len({prompt for prompts in heard for prompt in prompts}) == 6
    with pytest.raises(DataError, match="enough for 5 clips and not for 9"):
        speech.calibration_clips(tmp_path, 9)


@pytest.fixture
def debian(tmp_path: Path) -> tuple[packages.DebianPackage, Path]:
    """A small Debian package in a folder, pinned."""
    tree, folder = tmp_path / "tree", tmp_path / "wheels"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: sounds\nVersion: 1-1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    (tree / "usr/share/sounds").mkdir(parents=True)
    (tree / "usr/share/sounds/list").write_text("hello")
    folder.mkdir()
    file = folder / "sounds_1-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(file)], check=True, capture_output=True)
    return (
        packages.DebianPackage("sounds", "1-1", file.name, sha256(file), "usr/share/sounds"),
        folder,
    )


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@DPKG
def test_a_debian_package_is_unpacked_once(
    debian: tuple[packages.DebianPackage, Path], tmp_path: Path
) -> None:
    package, folder = debian
    found = speech.fetch_recordings(package, tmp_path / "cache", folder)
    assert (found / "list").read_text() == "hello"
    assert speech.fetch_recordings(package, tmp_path / "cache", tmp_path / "nowhere") == found


@DPKG
def test_a_changed_debian_package_is_refused(
    debian: tuple[packages.DebianPackage, Path], tmp_path: Path
) -> None:
    package, folder = debian
    with (folder / package.file).open("ab") as file:
        file.write(b"changed")
    with pytest.raises(DataError, match=rf"sounds_1-1_all\.deb.*expected {package.sha256}") as info:
        speech.fetch_recordings(package, tmp_path / "cache", folder)
    assert not isinstance(info.value, packages.AssetUnavailable), "a test must not skip on this"


@DPKG
def test_a_missing_debian_package_is_named_with_the_way_to_get_it(
    debian: tuple[packages.DebianPackage, Path], tmp_path: Path
) -> None:
    package, folder = debian
    (folder / package.file).unlink()
    with pytest.raises(packages.AssetUnavailable, match=r"apt-get download sounds=1-1"):
        speech.fetch_recordings(package, tmp_path / "cache", folder)


def test_without_apt_a_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.AssetUnavailable) as caught:
        speech.fetch_recordings(speech.UTTERANCES, tmp_path / "cache")
    message = str(caught.value)
    for part in ("apt-get could not download pocketsphinx-testdata=", "--wheels FOLDER"):
        assert part in message
    assert speech.UTTERANCES.sha256 in message


# -- CTranslate2 ---------------------------------------------------------------------------------


def tiny_whisper() -> Any:
    """Random, float16, with keys without bias, as Whisper has them."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=whisper.ENGLISH_VOCABULARY,
        num_mel_bins=8,
        d_model=4,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=6,
        max_target_positions=5,
        pad_token_id=0,
    )
    model = WhisperForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.half().eval()


def ctranslate2(model: Any) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 file of this model."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found: dict[str, np.ndarray] = {
        "encoder/num_heads": np.array(model.config.encoder_attention_heads, np.int16),
        "decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"],
    }

    def put(theirs: str, ours: str) -> None:
        found[f"{theirs}/weight"], found[f"{theirs}/bias"] = (
            state[f"{ours}.weight"],
            state[f"{ours}.bias"],
        )

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = (
            state[f"{ours}.weight"],
            state[f"{ours}.bias"],
        )

    def fuse(theirs: str, ours: str, letters: str) -> None:
        parts = [state[f"{ours}.{letter}_proj.weight"] for letter in letters]
        zeros = np.zeros(len(parts[0]), np.float16)
        biases = [state.get(f"{ours}.{letter}_proj.bias", zeros) for letter in letters]
        found[f"{theirs}/weight"], found[f"{theirs}/bias"] = (
            np.concatenate(parts),
            np.concatenate(biases),
        )

    for side in ("encoder", "decoder"):
        for index in range(2):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            fuse(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                fuse(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        name = f"{side}/position_encodings/encodings"
        found[name] = state[f"model.{side}.embed_positions.weight"]
    for convolution in ("conv1", "conv2"):
        put(f"encoder/{convolution}", f"model.encoder.{convolution}")
    return found


def write_container(path: Path, variables: dict[str, np.ndarray]) -> None:
    types = {np.dtype(np.float16): 4, np.dtype(np.int16): 2}

    def text(value: str) -> bytes:
        data = value.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        out += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", types[value.dtype], value.nbytes) + value.tobytes()
    path.write_bytes(out)


@pytest.fixture
def container(tmp_path: Path, tiny_tokenizer: Any) -> tuple[Any, Path, Path]:
    """A random Whisper, its CTranslate2 file, and a tokenizer's file."""
    model = tiny_whisper()
    write_container(tmp_path / "model.bin", ctranslate2(model))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return model, tmp_path / "model.bin", tmp_path / "tokenizer/tokenizer.json"


def test_a_ctranslate2_file_becomes_the_model_it_was_made_from(
    container: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    from transformers import WhisperForConditionalGeneration

    model, file, tokenizer = container
    whisper.export_whisper(file, tokenizer, tmp_path / "out")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_cut_file_and_a_file_without_a_part_are_refused(
    container: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, file, tokenizer = container
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="could not be read as a CTranslate2 model"):
        whisper.export_whisper(file, tokenizer, tmp_path / "out")
    variables = ctranslate2(model)
    del variables["decoder/layer_1/ffn/linear_1/bias"]
    write_container(file, variables)
    with pytest.raises(DataError, match="no variable 'decoder/layer_1/ffn/linear_1/bias'"):
        whisper.export_whisper(file, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_with_a_bias_are_refused(container: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, file, tokenizer = container
    variables = ctranslate2(model)
    variables["encoder/layer_0/self_attention/linear_0/bias"][4:8] = 1
    write_container(file, variables)
    with pytest.raises(DataError, match="its keys have a bias"):
        whisper.export_whisper(file, tokenizer, tmp_path / "out")


@pytest.mark.assets
@pytest.mark.slow
def test_the_real_whisper_hears_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third utterance: the encoder takes each for half a minute, whatever its length."""
    from quantlib.bench.quality_w4a4 import open_whisper

    every = speech.utterances
    monkeypatch.setattr(speech, "utterances", lambda folder: every(folder)[::3])
    try:
        subject = open_whisper(2)
    except packages.AssetUnavailable as error:
        pytest.skip(str(error))
    figures = subject.figures(subject.original)
    assert abs(figures["kl"]) < 1e-9
    # 9 of 81 words when this was written: three card names and two words of the readings.
    assert figures["word_error_rate"] < 0.15
