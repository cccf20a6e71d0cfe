"""Peak memory does not grow with the number of blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
BLOCK_BYTES = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
"""4.2 MB: eight are 34 MB, thirty-two 134 MB."""

CALIBRATE = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from quantlib.calibration import passes
from quantlib.calibration.statistics import group_to_tensors
from quantlib.calibration.stream import BlockStream
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

# A child for each model: its peak begins at what it has of its parent, which has imported all.
pairs = [(Path(model), Path(work)) for model, work in zip(sys.argv[1::2], sys.argv[2::2])]
for model, work in pairs:
    pid = os.fork()
    if pid == 0:
        break
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{model} was not calibrated")
else:
    raise SystemExit


class FolderStore:
    def path(self, name):
        return work / f"{name}.safetensors"

    def has(self, name):
        return self.path(name).exists()

    def load(self, name):
        return load_file(self.path(name))["value"]

    def save(self, name, value):
        save_file({"value": value}, self.path(name))

    def drop(self, name):
        self.path(name).unlink(missing_ok=True)


def memory(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if field in l)
    return int(line.split()[1]) * 1024


source = Source.open(model)
model_map = ModelMap.from_source(source)
before = memory("VmRSS")
stream, store = BlockStream(source, model_map), FolderStore()
windows = torch.randint(3, 300, (3, 48), generator=torch.Generator().manual_seed(0))
quiet = lambda _: None
passes.forward(stream, windows, store, quiet)
gradient, _ = passes.head(stream, windows, store, 0)
store.save(f"gradient.{len(model_map.blocks)}", gradient)
count = 0
for found in (
    passes.backward(stream, model_map, windows, store, 0, quiet),
    passes.local(stream, model_map, store, 0, quiet),
):
    for _, groups in found:
        for group in groups:
            save_file(group_to_tensors(group), work / f"{group.name}.safetensors")
            count += 1
print(json.dumps({"growth": memory("VmHWM") - before, "groups": count}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_32_blocks_need_the_memory_of_8(tiny_llama: Any, tmp_path: Path) -> None:
    """Within a tenth, over the forward, head, backward and local passes, each model in a process of
    its own, hidden states and statistics on disk."""
    command = [sys.executable, "-P", "-c", CALIBRATE]
    for blocks in (8, 32):
        model, work = tmp_path / f"model-{blocks}", tmp_path / f"work-{blocks}"
        work.mkdir()
        tiny_llama(model, num_hidden_layers=blocks, **SHAPE)
        command += [str(model), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    few, many = map(json.loads, result.stdout.splitlines())
    assert (few["groups"], many["groups"]) == (2 * 4 * 8, 2 * 4 * 32)
    growth = {8: few["growth"], 32: many["growth"]}
    for file in [*tmp_path.glob("model-*/*.safetensors"), *tmp_path.glob("work-*/*")]:
        file.unlink()
    assert growth[8] > BLOCK_BYTES, "not even one block was seen: the measurement is blind"
    assert growth[32] <= 1.1 * growth[8], f"{growth[8]} bytes for 8 blocks, {growth[32]} for 32"
    assert growth[32] < 16 * BLOCK_BYTES, "half the model: that is no longer one block at a time"
