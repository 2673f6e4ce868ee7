"""The verbs, and the environment, in processes of their own; and PEFT at the other end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from embedsurgery.errors import EmbedSurgeryWarning
from tests.support.comparing import contents, listing
from tests.support.hub.answers import says, when
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.processes import run
from tests.support.hub.repositories import BASE, REPO
from tests.support.models import logits, tiny
from tests.support.processes import ROOT, python


def test_push_and_pull(hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str]) -> None:
    folder = adapter.save(tmp_path / "rows")
    first = run(env, "push", folder, REPO, "--tag", "v1", "--message", "Rows")
    sha = hub.repos[REPO].branches["main"]
    assert f"made the private repository {REPO}\npushed: {CONFIG_NAME}" in first.stdout
    assert f"commit: {sha}\n{hub.url}/{REPO}/commit/{sha}\n" in first.stdout
    assert first.stderr == ""
    again = run(env, "push", folder, REPO)
    assert again.stdout.startswith(f"unchanged: private repository {REPO} holds this already, nothing was pushed")
    pulled = run(env, "pull", f"{REPO}@v1", "-o", tmp_path / "out")
    assert pulled.stdout.startswith(f"pulled: {REPO}@{sha}, trainable_tokens")
    assert pulled.stderr == ""
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    facts = json.loads(run(env, "push", folder, REPO, "--json").stdout)
    assert (facts["changed"], facts["sha"], facts["private"]) == (False, sha, True)
    got = json.loads(run(env, "pull", REPO, "-o", tmp_path / "two", "--json").stdout)
    assert got["source"] == f"{REPO}@{sha}"


def test_the_environment_is_honoured(hub: Hub, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    hub.repos[REPO].private = True
    nobody = {key: value for key, value in env.items() if key != "HF_TOKEN"}
    refused = run(nobody, "pull", REPO, "-o", tmp_path / "a", code=1)
    assert refused.stderr.count("\n") == 1
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "a").exists()
    run(nobody, "pull", REPO, "-o", tmp_path / "b", "--token", READER)
    (tmp_path / "home" / "token").write_text(READER)
    fresh = {**nobody, "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    run(fresh, "pull", REPO, "-o", tmp_path / "c")
    assert "models--team--rows" in listing(tmp_path / "elsewhere")
    run({**nobody, "HF_HUB_OFFLINE": "1"}, "pull", REPO, "-o", tmp_path / "d")
    lost = run(
        {**env, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "new")}, "pull", REPO, "-o", tmp_path / "e", code=1
    )
    assert "HF_HUB_OFFLINE" in lost.stderr


def test_ids_wherever_a_path_is_taken(hub: Hub, base: Path, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    facts = json.loads(run(env, "inspect", BASE, "--json").stdout)
    assert facts["tables"][0]["shape"] == [40, 16]
    assert facts["rows"] is None
    assert REPO in run(env, "show", REPO).stdout
    run(env, "merge", BASE, REPO, "-o", tmp_path / "one")
    run(env, "merge", base, f"{REPO}@{pushed}", "-o", tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {k: v for k, v in one.items() if "merges" not in k} == {k: v for k, v in two.items() if "merges" not in k}
    done = run(env, "merge", BASE, REPO, "--push", "team/merged", "--public")
    assert "made the public repository team/merged" in done.stdout
    assert "copied by the Hub, not sent: " in done.stdout
    assert "usage" in run(env, "merge", BASE, REPO, "--push", "x/y", "-o", tmp_path / "z", code=2).stderr.lower()


def test_one_line_and_exit_code_1(hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str]) -> None:
    folder = adapter.save(tmp_path / "rows")
    hub.rules.append(when("POST .*/commit/", says(403, f"no rights for {WRITER}")))
    done = run(env, "push", folder, REPO, code=1)
    assert done.stderr.splitlines()[-1].startswith("embedsurgery: cannot push (team/rows): found 403")


def test_nothing_is_imported_on_the_word_of_a_repository(hub: Hub, pushed: str, env: dict[str, str]) -> None:
    hub.add(
        REPO,
        {
            CONFIG_NAME: b'{"peft_type": "antigravity", "auto_mapping": {"parent_library": "antigravity"}}',
            "antigravity.py": b"raise SystemExit(9)",
            "embedsurgery_x.py": b"raise SystemExit(9)",
        },
    )
    code = (
        f"import sys, embedsurgery as es\ntry:\n    es.load({REPO!r})\nexcept es.errors.AdapterError as e:\n"
        "    print(type(e).__name__)\nprint({'antigravity', 'peft', 'torch'} & set(sys.modules))"
    )
    done = python(code, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def peft(env: dict[str, str], code: str, *arguments: object) -> None:
    """Run code in a process that has PEFT and knows where the Hub is."""
    head = (
        "import sys, torch, huggingface_hub.constants\n"
        "from peft import PeftModel, TrainableTokensConfig, get_peft_model\n"
        "from tests.support.models import tiny, logits\n"
    )
    command = [sys.executable, "-c", f"{head}{code}", *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_what_we_push_peft_loads(hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str]) -> None:
    es.push(adapter, REPO)
    peft(
        env,
        f"model = PeftModel.from_pretrained(tiny('llama-untied'), {REPO!r}).merge_and_unload()\n"
        "torch.save(logits(model), sys.argv[1])",
        tmp_path / "logits.pt",
    )
    ours = tiny("llama-untied")
    es.merge(ours, es.load(REPO))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(ours))


def test_what_peft_pushes_we_load(hub: Hub, tmp_path: Path, env: dict[str, str]) -> None:
    peft(
        env,
        "kind = {'target_modules': ['embed_tokens'], 'init_weights': False}\n"
        "config = TrainableTokensConfig(token_indices=[3, 8], **kind)\n"
        f"model = get_peft_model(tiny('llama-untied'), config)\nmodel.push_to_hub({REPO!r})\n"
        "torch.save(logits(model.merge_and_unload()), sys.argv[1])",
        tmp_path / "logits.pt",
    )
    adapter = es.load(REPO)
    assert adapter.source == f"{REPO}@{hub.repos[REPO].branches['main']}"
    ours = tiny("llama-untied")
    with pytest.warns(EmbedSurgeryWarning, match="does not say which base"):
        es.merge(ours, adapter)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(ours))
    es.push(adapter, "team/ours")
    assert es.load("team/ours").raw == adapter.raw
