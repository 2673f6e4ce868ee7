"""The commands and the environment in processes of their own; and PEFT at the other end."""

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
    lines = first.stdout.splitlines()
    assert all(word in lines[0] for word in ("private", REPO))
    assert all(name in lines[1] for name in (CONFIG_NAME, WEIGHTS_NAME, "README.md"))
    assert "v1" in lines[2]
    assert sha in lines[3]
    assert lines[4] == f"{hub.url}/{REPO}/commit/{sha}"
    assert first.stderr == ""
    again = run(env, "push", folder, REPO)
    assert all(word in again.stdout.splitlines()[0] for word in ("unchanged", "private", REPO))
    assert CONFIG_NAME not in again.stdout
    pulled = run(env, "pull", f"{REPO}@v1", "-o", tmp_path / "out")
    assert all(word in pulled.stdout.splitlines()[0] for word in (f"{REPO}@{sha}", "trainable_tokens"))
    assert pulled.stderr == ""
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    facts = json.loads(run(env, "push", folder, REPO, "--json").stdout)
    assert (facts["changed"], facts["sha"], facts["private"]) == (False, sha, True)
    got = json.loads(run(env, "pull", REPO, "-o", tmp_path / "two", "--json").stdout)
    assert got["source"] == f"{REPO}@{sha}"


def test_the_environment_is_honoured(hub: Hub, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    hub.repos[REPO].private = True
    without_token = {key: value for key, value in env.items() if key != "HF_TOKEN"}
    refused = run(without_token, "pull", REPO, "-o", tmp_path / "a", code=1)
    assert refused.stderr.count("\n") == 1
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "a").exists()
    run(without_token, "pull", REPO, "-o", tmp_path / "b", "--token", READER)
    (tmp_path / "home" / "token").write_text(READER)
    fresh = {**without_token, "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    run(fresh, "pull", REPO, "-o", tmp_path / "c")
    assert "models--team--rows" in listing(tmp_path / "elsewhere")
    run({**without_token, "HF_HUB_OFFLINE": "1"}, "pull", REPO, "-o", tmp_path / "d")
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
    lines = done.stdout.splitlines()
    assert all(word in lines[0] for word in ("public", "team/merged"))
    copied = [line for line in lines if "copied" in line]
    touched = next(name for name in one if name.endswith(".safetensors") and one[name] != contents(base).get(name))
    assert len(copied) == 1
    assert "model-0000" in copied[0]
    assert touched not in copied[0]
    refused = run(env, "merge", BASE, REPO, "--push", "x/y", "-o", tmp_path / "z", code=2)
    assert all(option in refused.stderr for option in ("--push", "-o"))


def test_one_line_and_exit_code_1(hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str]) -> None:
    folder = adapter.save(tmp_path / "rows")
    hub.rules.append(when("POST .*/commit/", says(403, f"no rights for {WRITER}")))
    done = run(env, "push", folder, REPO, code=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("embedsurgery: ")
    assert all(word in last for word in (REPO, "403"))


def test_the_content_of_a_repository_never_decides_what_is_imported(hub: Hub, pushed: str, env: dict[str, str]) -> None:
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
    """Run code in a process that imports PEFT and uses the loopback Hub."""
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


def test_peft_loads_what_embedsurgery_pushes(
    hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str]
) -> None:
    es.push(adapter, REPO)
    peft(
        env,
        f"model = PeftModel.from_pretrained(tiny('llama-untied'), {REPO!r}).merge_and_unload()\n"
        "torch.save(logits(model), sys.argv[1])",
        tmp_path / "logits.pt",
    )
    mine = tiny("llama-untied")
    es.merge(mine, es.load(REPO))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(mine))


def test_embedsurgery_loads_what_peft_pushes(hub: Hub, tmp_path: Path, env: dict[str, str]) -> None:
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
    mine = tiny("llama-untied")
    with pytest.warns(EmbedSurgeryWarning, match="model.embed_tokens.weight"):
        es.merge(mine, adapter)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(mine))
    es.push(adapter, "team/copy")
    assert es.load("team/copy").raw == adapter.raw
