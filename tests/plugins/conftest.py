"""The kit pushes to the loopback Hub here."""

from tests.plugins.hub import embedsurgery_hub as embedsurgery_hub
from tests.plugins.hub import hub as hub
