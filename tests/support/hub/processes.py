"""The command line against the loopback Hub, in processes of their own."""

from __future__ import annotations

import subprocess
from typing import Any

from tests.support.hub.secrets import SECRETS
from tests.support.processes import cli


def run(env: dict[str, str], *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; checks its exit code, and that it prints no secret."""
    done = cli(*arguments, env=env, **options)
    assert done.returncode == code, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    return done
