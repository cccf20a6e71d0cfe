"""The command line: one command per stage, and `compress` for all of them.

    main          the console script `quantlib`
    app           the commands and how they are grouped
    outcome       exit codes, and errors as sentences
    options       options that several commands share
    console       what goes to stdout and what to stderr
    progress      bars with the time left, or plain lines

Each command imports what it needs when it runs: `quantlib --help` answers without torch.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with 0, 1 (failed) or 2 (bad usage)."""
    from quantlib.cli.app import app

    app()
