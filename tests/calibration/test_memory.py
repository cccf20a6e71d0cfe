"""Peak memory does not grow with the number of blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
"""A block of 4.2 million parameters, 17 MB: eight are 134 MB, thirty-two 537 MB."""
BLOCK_BYTES = 4 * (4 * 512 * 512 // 2 + 512 * 512 + 3 * 512 * 2048)

CALIBRATE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from quantlib.calibration import passes
from quantlib.calibration.statistics import group_to_tensors
from quantlib.calibration.stream import BlockStream
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

model, work, gradients = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "gradients"


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


def one_block_of_work():
    # what the first use of a thread pool, of autograd and of a factorisation allocates for good
    x = torch.randn(64, 512, requires_grad=True)
    (x @ torch.randn(512, 512)).sum().backward()


source = Source.open(model)
model_map = ModelMap.from_source(source)
one_block_of_work()
before = memory("VmRSS")
stream, store = BlockStream(source, model_map), FolderStore()
windows = torch.randint(3, 300, (3, 48), generator=torch.Generator().manual_seed(0))
quiet = lambda _: None
passes.forward(stream, windows, store, quiet)
if gradients:
    gradient, _ = passes.head(stream, windows, store, 0)
    store.save(f"gradient.{len(model_map.blocks)}", gradient)
    found = passes.backward(stream, model_map, windows, store, 0, quiet)
else:
    found = passes.local(stream, model_map, store, 0, quiet)
count = 0
for _, groups in found:
    for group in groups:
        save_file(group_to_tensors(group), work / f"{group.name}.safetensors")
        count += 1
print(json.dumps({"growth": memory("VmHWM") - before, "groups": count}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("mode", ["gradients", "local"])
def test_32_blocks_need_the_memory_of_8(tiny_llama: Any, tmp_path: Path, mode: str) -> None:
    """Within a tenth, in processes of their own, hidden states and statistics on disk.

    Malloc keeps freed memory as it likes; fixed thresholds make it give large blocks back, so that
    what is measured is what is in use.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    growth = {}
    for blocks in (8, 32):
        model, work = tmp_path / f"model-{blocks}", tmp_path / f"work-{blocks}"
        work.mkdir()
        tiny_llama(model, num_hidden_layers=blocks, **SHAPE)
        command = [sys.executable, "-P", "-c", CALIBRATE, str(model), str(work), mode]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["groups"] == 4 * blocks
        growth[blocks] = report["growth"]
        for file in model.glob("*.safetensors"):
            file.unlink()
    assert growth[8] > BLOCK_BYTES, "not even one block was seen: the measurement is blind"
    print(growth); assert growth[32] <= 1.1 * growth[8], f"{growth[8]} bytes for 8 blocks, {growth[32]} for 32"
    assert growth[32] < 8 * BLOCK_BYTES, "that is no longer one block at a time"
