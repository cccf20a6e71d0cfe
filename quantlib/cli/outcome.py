"""How a command ends: exit codes, and errors as sentences.

    0     it worked
    1     it understood the request and could not do it
    2     the request itself is wrong
    130   interrupted with Ctrl-C

A user sees a sentence on stderr and never a traceback: what is wrong, where, and what to do. A
traceback is for us, and is printed with --debug.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from quantlib.cli.console import notes
from quantlib.errors import QuantlibError

FAILED = 1
INTERRUPTED = 130
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def guarded(command: Callable[..., None], resumes: bool = False) -> Callable[..., None]:
    """`command` with every error turned into a sentence and an exit code.

    resumes: the command keeps what it finished, and an interrupted user is told so.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except QuantlibError as error:
            _end(str(error), error.exit_code, options)
        except KeyboardInterrupt:
            again = ": the same command continues where it stopped" if resumes else ""
            _end(f"interrupted{again}", INTERRUPTED, options)
        except BrokenPipeError:
            # Whoever read our output has seen enough (`... | head`); that is no failure of ours.
            _discard_stdout()
            raise typer.Exit(0) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{error.strerror or error}", FAILED, options)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                _end(_bug(error), FAILED, options)
            _end(_memory_sentence(resumes), FAILED, options)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            _end(_bug(error), FAILED, options)

    return run


def _discard_stdout() -> None:
    """Send what is still buffered nowhere: Python would complain of the closed pipe at its exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(sentence: str, code: int, options: dict[str, Any]) -> None:
    if options.get("debug"):
        traceback.print_exc()
    notes().print(sentence, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def _bug(error: Exception) -> str:
    return (
        f"this is a bug in quantlib ({type(error).__name__}: {error}). Run the command again with "
        "--debug and report what it prints"
    )


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def _memory_sentence(resumes: bool) -> str:
    advice = "use fewer --windows or a shorter --seqlen, or close other programs"
    kept = "; what was finished is kept, and the same command continues" if resumes else ""
    return f"there is not enough memory: {advice}{kept}"
