"""A process that has imported everything, and runs compressions in forked children.

A fresh process pays seconds for importing torch before it does anything that could be killed; a
fork of this one pays nothing. Reads one JSON request a line and answers with one JSON line:

    {"call": {...}}                            arguments of quantlib.compress
    {"call": {...}, "seconds": 0.3}            SIGKILL after so many seconds
    {"call": {...}, "operation": 17}           SIGKILL in place of the 17th change of the disk
    {"call": {...}, "stage": ["measure", 2]}   SIGKILL after the second step of a stage

    {"killed": true, "error": "", "seconds": 0.31}

`error` is the text of the QuantlibError the child ended with (with "!" before it, if it was another
exception). A child that was not killed also says how many changes of the disk it made
(`operations`), how many bytes it wrote (`written`), and by how many its memory grew (`memory`).

It is started by tests, not collected: nothing here has run on threads before a fork.
"""

import json
import math
import os
import signal
import sys
import time
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama  # noqa: F401

from quantlib.checkpoint.disk import Sink
from quantlib.errors import QuantlibError
from quantlib.pipeline.compress import compress

OPERATIONS = ("replace", "rename", "unlink", "rmdir", "write", "ftruncate", "fsync", "mkdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Counts changes of the disk and dies in place of one; a journal line is then half written."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last
        for name in OPERATIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                if name == "write":
                    function(args[0], bytes(args[1])[: len(args[1]) // 2])
                die()
            return function(*args, **kwargs)

        return call


class Steps:
    """Progress that dies after a step of a stage; after step 0 as soon as the stage begins."""

    def __init__(self, stage: str, step: int) -> None:
        self.wanted, self.stage, self.step = (stage, step), "", 0

    def start(self, stage: str, total: int) -> None:
        self.stage, self.step = stage, 0
        self._check()

    def tick(self, message: str = "") -> None:
        self.step += 1
        self._check()

    def _check(self) -> None:
        if (self.stage, self.step) == self.wanted:
            die()

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


def child(request: dict[str, Any], answers: int) -> None:
    torch.set_num_threads(1)
    error, written = "", 0
    write = Sink.write

    def counted(sink: Sink, data: Any) -> int:
        nonlocal written
        written += memoryview(data).nbytes
        return write(sink, data)

    Sink.write = counted  # type: ignore[method-assign]
    disk = Disk(request.get("operation"))
    call = dict(request["call"])
    if "stage" in request:
        call["progress"] = Steps(*request["stage"])
    try:
        compress(**call)
    except QuantlibError as sentence:
        error = str(sentence)
    except BaseException as other:
        error = f"!{type(other).__name__}: {other}"
    answer = {"error": error, "operations": disk.count, "written": written}
    with os.fdopen(answers, "w") as pipe:
        json.dump(answer, pipe)
    os._exit(0)


def run(request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(request, writing)
    os.close(writing)
    first, most, status = memory_of(pid), 0, 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        most = max(most, memory_of(pid))
        if time.monotonic() - started > request.get("seconds", math.inf):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    _, status = os.waitpid(pid, 0)
    answer: dict[str, Any] = {"killed": os.WIFSIGNALED(status), "error": "", "memory": most - first}
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if not answer["killed"]:
        answer |= json.loads(text)
    return {**answer, "seconds": time.monotonic() - started}


def memory_of(pid: int) -> int:
    """Bytes of a process in memory that are its own: no code, no mapped files."""
    with open(f"/proc/{pid}/status") as file:
        found = [line.split()[1] for line in file if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
