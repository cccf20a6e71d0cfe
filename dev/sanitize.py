"""Run the CPU kernels under sanitizers: memory errors, undefined behaviour, races.

The kernels and a program that calls everything they offer (tests/kernels/sanitize) are compiled
together, once with the address and undefined behaviour sanitizers and once with the thread
sanitizer, and run on every instruction set of this processor. Nothing else is in the program: under
Python, a sanitizer sees neither the ends of torch's buffers nor what its threads do to one another.

    python dev/sanitize.py [address] [thread]

Objects stay in build/sanitize: a second run compiles what has changed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "cpu"))  # the package need not be installed

import build  # noqa: E402

DRIVER = ROOT / "tests" / "kernels" / "sanitize"
FOLDER = ROOT / "build" / "sanitize"
SANITIZERS = {
    # Converting a float that no integer equals is undefined too; the group leaves it out.
    "address": ("address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    "thread": ("thread",),
}
OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def flags_of(sanitizer: str) -> tuple[str, ...]:
    """Compiler flags. They come after the library's own, so that -O1 counts: it compiles faster."""
    groups, *others = SANITIZERS[sanitizer]
    return ("-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={groups}", *others)


def compile_driver(sanitizer: str) -> Path:
    """The program, with the library's objects inside.

    Raises BuildError or CalledProcessError when it cannot be compiled.
    """
    folder = FOLDER / sanitizer
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    flags = flags_of(sanitizer)
    build.build_into(folder, flags, objects=objects)
    program = folder / "driver"
    sources = [*map(str, sorted(DRIVER.glob("*.cpp"))), *map(str, sorted(objects.glob("*.o")))]
    include = f"-I{build.SOURCES}"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-pthread", *flags, include, *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def check(sanitizer: str) -> bool:
    """Compile and run with one sanitizer; whether it found nothing and every answer was right."""
    print(f"{sanitizer}: compiling", flush=True)
    start = time.monotonic()
    program = compile_driver(sanitizer)
    print(f"{sanitizer}: running, after {time.monotonic() - start:.0f} s", flush=True)
    status = subprocess.run([str(program)], env={**os.environ, **OPTIONS}, check=False).returncode
    found = "nothing found" if status == 0 else f"FAILED with exit status {status}"
    print(f"{sanitizer}: {found}, {time.monotonic() - start:.0f} s in all", flush=True)
    return status == 0


def main(names: list[str]) -> int:
    """Check with the named sanitizers, or all; 0 when nothing was found."""
    if unknown := set(names) - set(SANITIZERS):
        print(f"there is no sanitizer {sorted(unknown)}: use {sorted(SANITIZERS)}", file=sys.stderr)
        return 2
    try:
        results = [check(name) for name in names or SANITIZERS]
    except (build.BuildError, subprocess.CalledProcessError) as error:
        print(f"the sanitizers could not be compiled: {error}", file=sys.stderr)
        return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
