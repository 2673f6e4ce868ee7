"""Model cards: embedsurgery's parts of a README are rewritten, every other byte is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

import embedsurgery as es
from embedsurgery.errors import HubError
from embedsurgery.hub.card import adapter_body, adapter_front_matter, merged_model_front_matter
from embedsurgery.hub.readme import BEGIN, END, FRONT_BEGIN, FRONT_END, read_front_matter, update_readme
from tests.support.errors import raises

FRONT = {"base_model": "team/base", "base_model_relation": "adapter", "tags": ["embedsurgery", "peft"]}


def parsed(readme: str) -> dict[str, Any]:
    return yaml.safe_load(readme.split("---")[1])


def test_a_new_card() -> None:
    text = update_readme(None, FRONT, "rows", "Body.")
    assert parsed(text) == FRONT
    assert text.endswith(f"\n# rows\n\n{BEGIN}\nBody.\n{END}\n")
    assert update_readme(text, FRONT, "other", "Body.") == text


def test_only_embedsurgerys_parts_are_rewritten() -> None:
    old = update_readme(None, FRONT, "rows", "Old body.")
    mine = old.replace("---\n", "---\n# mine\nlicense: mit\n", 1).replace("# rows\n", "# Rows of mine\n\nIntro.\n")
    mine += "\n## Limits\n\n--- not front matter ---\n"
    new = update_readme(mine, {**FRONT, "base_model": "team/other"}, "rows", "New body.")
    assert new == mine.replace("Old body.", "New body.").replace("team/base", "team/other")


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("head", ["", "---\nlicense: mit\n---\n", "---\n---\n", "\ufeff---\nlicense: mit\n---\n"])
def test_a_readme_that_embedsurgery_did_not_write(head: str, line: str) -> None:
    readme = (head + "# Mine\n\nWords, é, 🌍 and --- dashes.\n").replace("\n", line)
    new = update_readme(readme, FRONT, "rows", "Body.")
    assert (line == "\r\n") == ("\r\n" in new)
    assert "\n" not in new.replace(line, "")
    assert readme.split("---", 2)[-1].strip() in new
    assert parsed(new) == ({"license": "mit"} if "mit" in head else {}) | FRONT
    assert update_readme(new, FRONT, "rows", "Body.") == new


@pytest.mark.parametrize(
    ("tags", "result"),
    [
        ("tags: [a, 'b c']  # mine\n", "tags: [a, 'b c', embedsurgery, peft]  # mine\n"),
        ("tags: []\n", "tags: [embedsurgery, peft]\n"),
        ("tags:\n- a\n- b # last\nlicense: mit\n", "tags:\n- a\n- b # last\n- embedsurgery\n- peft\nlicense: mit\n"),
        ("tags:\n  - a\n", "tags:\n  - a\n  - embedsurgery\n  - peft\n"),
        ("tags:\n- a", "tags:\n- a\n- embedsurgery\n- peft"),
        ("tags: one\n", "tags: [one, embedsurgery, peft]\n"),
        ("tags:\nlicense: mit\n", "tags: [embedsurgery, peft]\nlicense: mit\n"),
        ("tags: [peft, embedsurgery]\n", "tags: [peft, embedsurgery]\n"),
    ],
)
def test_tags_join_those_that_are_there(tags: str, result: str) -> None:
    new = update_readme(f"---\n{tags.rstrip(chr(10))}\n---\nMine.\n", {"tags": FRONT["tags"]}, "rows", "Body.")
    assert new.startswith(f"---\n{result.rstrip(chr(10))}\n---\nMine.\n")
    assert {"embedsurgery", "peft"} <= set(parsed(new)["tags"])


def test_what_its_author_set_stays() -> None:
    new = update_readme("---\nbase_model: my/choice\n---\n", FRONT, "rows", "Body.")
    assert parsed(new)["base_model"] == "my/choice"
    assert new.count("base_model:") == 1
    assert new.count(FRONT_BEGIN) == new.count(FRONT_END) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{BEGIN}\nx\n", "1 and 0"),
        (f"{END}\n", "0 and 1"),
        (f"{END}\n{BEGIN}\n", "1 and 1"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", "2 and 1"),
    ],
)
def test_comments_that_were_lost(text: str, found: str) -> None:
    with raises(HubError, where="README.md", expected=(BEGIN, END), found=found, hint=""):
        update_readme(text, FRONT, "rows", "Body.")


def test_what_an_adapters_card_says(adapter: es.Adapter) -> None:
    tokens = {5: "<tool>", 7: f"`a`\n{END}\n| b"}
    named = replace(adapter, manifest=replace(adapter.manifest, base_model="team/base", revision="v1", tokens=tokens))
    assert adapter_front_matter(named) == {
        "base_model": "team/base",
        "base_model_relation": "adapter",
        "library_name": "embedsurgery",
        "tags": ["embedsurgery", "trainable-tokens", "peft"],
    }
    body = adapter_body(named, "team/rows", 1234)
    assert "1,234 bytes" in body
    assert "revision `v1`" in body
    assert "`model.embed_tokens.weight`: 2 x 16 in F32" in body
    assert "- 5: `<tool>`" in body
    assert f"\\n{END}\\n| b ``" in body
    assert "es.load('team/rows')" in body
    assert "PeftModel.from_pretrained(model, 'team/rows')" in body
    assert "embedsurgery merge team/base@v1 team/rows -o merged" in body
    text = update_readme(None, adapter_front_matter(named), "rows", body)
    assert update_readme(text, adapter_front_matter(named), "rows", body) == text


def test_many_tokens_are_not_all_listed(adapter: es.Adapter) -> None:
    named = replace(adapter, manifest=replace(adapter.manifest, tokens={i: f"t{i}" for i in range(50)}))
    body = adapter_body(named, "team/rows", 1)
    assert "- 19: `t19`" in body
    assert "t20" not in body
    assert "and 30 more" in body


def test_a_surgery_can_add_lines(adapter: es.Adapter) -> None:
    class WithLines:
        name = "with_lines"

        def to_peft(self, adapter: es.Adapter) -> Any:
            raise NotImplementedError

        def card_lines(self, adapter: es.Adapter) -> list[str]:
            return ["- virtual token 0: near `river`, `stream`"]

    assert "near `river`" in adapter_body(replace(adapter, surgery=WithLines()), "team/rows", 1)


def test_a_merged_models_front_matter_keeps_what_still_holds() -> None:
    kept = read_front_matter("---\nlicense: mit\nbase_model: old/base\ntags: [x]\npipeline_tag: text-generation\n---\n")
    assert merged_model_front_matter(["team/base"], kept) == {
        "license": "mit",
        "pipeline_tag": "text-generation",
        "base_model": ["team/base"],
        "base_model_relation": "merge",
        "tags": ["embedsurgery"],
    }
    assert read_front_matter("---\n[\n---\n") == read_front_matter("no front matter") == {}
