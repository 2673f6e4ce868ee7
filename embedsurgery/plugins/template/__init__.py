"""The package that ``embedsurgery plugins new NAME`` writes. It installs, registers and passes the test kit.

Its files are beside this one, with placeholders for the names that `write_plugin` fills in.
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
"""Path in the new package -> template."""


def write_plugin(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write a new plugin's package.

    Args:
        name: Such as "scaling": the distribution is ``embedsurgery-scaling``, the module ``embedsurgery_scaling``.
        folder: The folder to write its directory into.

    Returns:
        The directory, and the paths of its files in it.

    Raises:
        ConfigError: The name is not valid.
        OutputExistsError: The directory exists.
    """
    short = name.removeprefix("embedsurgery-")
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) is None or keyword.iskeyword(short):
        raise ConfigError(
            "not a plugin name",
            found=repr(name)[:80],
            expected="lower-case letters, digits and single hyphens, such as row-scaling",
        )
    surgery = short.replace("-", "_")
    title = "".join(part.capitalize() for part in short.split("-"))
    values = {"@NAME@": short, "@MODULE@": f"embedsurgery_{surgery}", "@SURGERY@": surgery, "@CLASS@": title}
    target = folder / f"embedsurgery-{short}"
    if target.exists():
        raise OutputExistsError("the directory exists already", where=target, hint="choose another name or --output")
    written = []
    with staged_directory(target) as staging:
        for destination, template in _FILES.items():
            text = files(__name__).joinpath(template).read_text(encoding="utf-8")
            for placeholder, value in values.items():
                text = text.replace(placeholder, value)
            path = staging / destination.format(module=values["@MODULE@"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path.relative_to(staging).as_posix())
    return target, tuple(written)
