"""What ``embedsurgery plugins new NAME`` writes: a package that installs, registers and passes the kit at once.

The files lie beside this one as they are written, but for the names that `write_plugin` fills in.
"""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path

from embedsurgery.errors import ConfigError, OutputExistsError
from embedsurgery.files.atomic import staged_directory

_FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "{module}/__init__.py": "plugin.py.in",
    "tests/test_{module}.py": "test_plugin.py.in",
}
"""Where each template goes."""


def write_plugin(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write a new plugin's package.

    Args:
        name: Such as "scaling": the distribution is ``embedsurgery-scaling``, the module ``embedsurgery_scaling``.
        folder: Where its directory goes.

    Returns:
        The directory, and its files.

    Raises:
        ConfigError: No name for a package.
        OutputExistsError: The directory exists.
    """
    short = name.removeprefix("embedsurgery-")
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) is None or keyword.iskeyword(short):
        raise ConfigError(
            "no name for a plugin",
            found=repr(name)[:80],
            expected="lower-case letters, digits and single hyphens, such as row-scaling",
        )
    surgery = short.replace("-", "_")
    title = "".join(part.capitalize() for part in short.split("-"))
    words = {"@NAME@": short, "@MODULE@": f"embedsurgery_{surgery}", "@SURGERY@": surgery, "@CLASS@": title}
    target = folder / f"embedsurgery-{short}"
    if target.exists():
        raise OutputExistsError("the directory exists", where=target, hint="choose another name or --output")
    written = []
    with staged_directory(target) as staging:
        for place, template in _FILES.items():
            text = files(__name__).joinpath(template).read_text(encoding="utf-8")
            for word, meaning in words.items():
                text = text.replace(word, meaning)
            path = staging / place.format(module=words["@MODULE@"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path.relative_to(staging).as_posix())
    return target, tuple(written)
