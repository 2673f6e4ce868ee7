"""What all contracts share: class attributes become test parameters, and the plugin is registered during each test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest

from embedsurgery.plugins.current import installed


class Contract:
    """Tests that run over the values of class attributes.

    Attributes:
        plugin: The plugin's module, unless its package is installed.
        parameters: Name of a test argument -> class attribute that lists its values.
    """

    plugin: Any = None
    parameters: ClassVar[dict[str, str]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run a test once for each value of each parameter that it takes."""
        for argument, attribute in self.parameters.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, getattr(type(self), attribute))

    @pytest.fixture(autouse=True)
    def _register_plugin(self) -> Iterator[None]:
        with nullcontext() if self.plugin is None else installed(self.plugin):
            yield
