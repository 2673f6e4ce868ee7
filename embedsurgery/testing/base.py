"""What the contracts have in common: class attributes become parameters, and a plugin is there while its tests run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest

from embedsurgery.plugins.current import installed


class Contract:
    """A suite of tests over the values of some class attributes.

    Attributes:
        plugin: The plugin's module, where its package may not be installed.
        parameters: Argument of tests -> class attribute that lists its values.
    """

    plugin: Any = None
    parameters: ClassVar[dict[str, str]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run a test once for each value of what it asks for."""
        for argument, attribute in self.parameters.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, getattr(type(self), attribute))

    @pytest.fixture(autouse=True)
    def _installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.plugin is not None:
                stack.enter_context(installed(self.plugin))
            yield
