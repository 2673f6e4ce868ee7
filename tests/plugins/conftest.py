"""The kit pushes to the loopback Hub here."""

from tests.support.hub_fixtures import embedsurgery_hub as embedsurgery_hub
from tests.support.hub_fixtures import hub as hub
