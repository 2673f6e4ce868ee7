"""Fresh virtual environments for installed packages. They see this environment's libraries and nothing else of it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A virtual environment.

    Args:
        folder: Where it goes.
        root: Whether it sees this repository's embedsurgery; otherwise install one.
    """

    def __init__(self, folder: Path, *, root: bool) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *([str(ROOT)] if root else [])]
        (self.site / "libraries.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")

    def run(self, *arguments: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``python`` in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL"))}
        kept |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=cwd,
            env=kept,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert run.returncode == 0 or not check, f"{arguments}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
        return run

    def install(self, *packages: Any) -> None:
        """Install packages without their dependencies, which it sees already."""
        self.run(
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            *packages,
            cwd=self.site,
        )


def wheel(package: Path, folder: Path) -> Path:
    """Build a package's wheel into a folder; returns the wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(package),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    (built,) = folder.glob("*.whl")
    return built
