"""The layer bank: every weight in every candidate scheme, rounded once and kept.

A trial of the search is a list of references into the bank, and the final checkpoint is assembled
from it, so what was measured is what ships. An entry is one safetensors file with the packed
tensors of one weight in one scheme, under a key that hashes the weight's name, the scheme, and
everything the rounding saw. One file per entry, rather than one per linear group: applying a plan
then reads and verifies only the entries it chose, about a twentieth of the bank, and a scheme can
be added later without touching the others. What would make thousands of small files slow is waiting
for the disk after each, so a batch (the schemes of one group) is recorded together and flushed
once. Its data files are left to the kernel's write-back: a kill loses none of them, and after a
power cut the hashes say which must be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantlib.checkpoint.tensorfile import LazyTensor, TensorFile, tensor_content
from quantlib.checkpoint.workdir import Batch, Unit, WorkDir

KIND = "bank"


@dataclass(frozen=True)
class BankEntry:
    """One weight in one scheme.

    nbytes: of its tensors, the file's header not counted.
    extra:  what the rounding reported of itself.
    """

    key: str
    weight: str
    scheme: str
    nbytes: int
    extra: dict[str, float]


class BankBatch:
    """Entries that are recorded together when `LayerBank.batch` ends; on the disk meanwhile."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def put(
        self,
        weight: str,
        scheme: str,
        inputs_hash: str,
        tensors: Mapping[str, torch.Tensor],
        extra: Mapping[str, float] | None = None,
        seconds: float = 0.0,
    ) -> str:
        """Add an entry; returns its key. See `LayerBank.put`."""
        key = LayerBank.key(weight, scheme, inputs_hash)
        values = {
            "weight": weight,
            "scheme": str(scheme),
            "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
            "extra": dict(extra or {}),
        }
        content = tensor_content(tensors, {"weight": weight, "scheme": str(scheme)})
        self._batch.add(key, KIND, {f"bank/{key[:2]}/{key}.safetensors": content}, values, seconds)
        return key


class LayerBank:
    """The packed tensors kept in a work directory, by key."""

    def __init__(self, workdir: WorkDir) -> None:
        self._workdir = workdir

    @staticmethod
    def key(weight: str, scheme: str, inputs_hash: str) -> str:
        """The key of a weight in a scheme.

        inputs_hash: of all else the result depends on: weights, statistics, rounding method.
        """
        return WorkDir.key(KIND, weight=weight, scheme=str(scheme), inputs=inputs_hash)

    @contextmanager
    def batch(self) -> Iterator[BankBatch]:
        """Put many entries and record them at once; none of them when the block raises."""
        with self._workdir.batch(durable=False) as batch:
            yield BankBatch(batch)

    def put(
        self,
        weight: str,
        scheme: str,
        inputs_hash: str,
        tensors: Mapping[str, torch.Tensor],
        extra: Mapping[str, float] | None = None,
        seconds: float = 0.0,
    ) -> str:
        """Keep a packed weight (suffix -> tensor, see `formats.weight.pack`); return its key.

        extra: finite numbers worth keeping beside the tensors, such as the rounding's own loss.
        Raises CheckpointError when the disk is full or a number is not finite.
        """
        with self.batch() as batch:
            return batch.put(weight, scheme, inputs_hash, tensors, extra, seconds)

    def has(self, key: str) -> bool:
        """Whether the entry is there, by its size. `verify` compares its content."""
        return self._workdir.has(key)

    def verify(self, key: str) -> bool:
        """Whether the entry is there and undamaged. A damaged one is dropped: put it again."""
        return self._workdir.intact(key)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, on the memory map of the entry's file. Its hash is checked once.

        Raises CheckpointError when the entry is missing, or damaged (it is then dropped, and made
        again by the next run).
        """
        file = self._open(key)
        return {suffix: file.read(suffix) for suffix in file.headers}

    def lazy(self, key: str) -> dict[str, LazyTensor]:
        """`get` for the checkpoint writer: dtypes and shapes now, the numbers later."""
        file = self._open(key)
        return {suffix: file.lazy(suffix) for suffix in file.headers}

    def _open(self, key: str) -> TensorFile:
        return TensorFile.open(self._workdir.file(key))

    def entry(self, key: str) -> BankEntry:
        """What is known of an entry unopened. Raises CheckpointError when there is none."""
        return _entry(self._workdir.unit(key))

    def entries(self) -> Iterator[BankEntry]:
        """All entries, in the order in which they were put."""
        return map(_entry, self._workdir.units(KIND))

    def nbytes(self, key: str) -> int:
        """Bytes of the entry's tensors. Raises CheckpointError when there is none."""
        return self.entry(key).nbytes


def _entry(unit: Unit) -> BankEntry:
    values = unit.values
    return BankEntry(
        unit.key, values["weight"], values["scheme"], values["nbytes"], values["extra"]
    )
