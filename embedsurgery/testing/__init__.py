"""The test kit for plugins: ``class TestMine(SurgeryContract): config = ...`` runs the whole suite.

`SurgeryContract`, `InitializerContract` and `StoreContract` are base classes of pytest classes; the built-in surgeries,
initialisers and stores pass them too. A plugin that is not installed is set as the class's ``plugin``. The kit needs
torch, pytest and safetensors.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "embedsurgery.testing.initializers",
    "embedsurgery.testing.stores",
    "embedsurgery.testing.surgeries",
    "embedsurgery.testing.surgery_setup",
)

from embedsurgery.plugins.current import installed as installed  # noqa: E402 - after register_assert_rewrite, which must precede the import
from embedsurgery.testing.initializers import InitializerContract as InitializerContract  # noqa: E402
from embedsurgery.testing.models import TinyModel as TinyModel  # noqa: E402
from embedsurgery.testing.models import bits as bits  # noqa: E402
from embedsurgery.testing.models import contents as contents  # noqa: E402
from embedsurgery.testing.models import write_checkpoint as write_checkpoint  # noqa: E402
from embedsurgery.testing.stores import StoreContract as StoreContract  # noqa: E402
from embedsurgery.testing.surgeries import SurgeryContract as SurgeryContract  # noqa: E402
