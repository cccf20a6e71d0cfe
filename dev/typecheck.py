"""Run mypy over the package as it is imported.

`setup.py` installs the top-level folders `kernels/`, `search/`, `bench/` as `quantlib.kernels` and
so on. mypy knows neither `package_dir` nor the import hook of an editable install, so this script
links everything into one folder that looks like the installed package, checks that folder, and
prints the paths of the real files.

    python dev/typecheck.py [mypy arguments]
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "search", "bench")


def main(arguments: list[str]) -> int:
    """Check the package with mypy and return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "quantlib")
        package.mkdir()
        for source in [*(ROOT / "quantlib").iterdir(), *(ROOT / room for room in ROOMS)]:
            package.joinpath(source.name).symlink_to(source)
        settings = f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"
        command = [sys.executable, "-m", "mypy", *settings, "-p", "quantlib", *arguments]
        # mypy searches the working directory first: that must be the links, not the repository.
        result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    rooms = re.compile(rf"^quantlib{re.escape(os.sep)}(?=(?:{'|'.join(ROOMS)})\b)", re.MULTILINE)
    print(rooms.sub("", result.stdout), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
