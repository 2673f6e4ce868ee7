"""A baked checkpoint in engines without soft prompts, which do not read generation_config.json."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import torch

import embedsurgery as es
from tests.support.baked import TEXTS, greedy, start

COUNT = 40
CHAT = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
def test_ctranslate2_gives_the_same_greedy_tokens(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "converted"))
    engine = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32", intra_threads=1)
    tokenizer, attached = begun.tokenizer(tmp_path / "out"), begun.attached()
    for text in TEXTS:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        (found,) = engine.generate_batch(
            [pieces], max_length=COUNT, min_length=COUNT, sampling_topk=1, include_prompt_in_result=False
        )
        ids = torch.tensor([begun.tokenizer()(text).input_ids])
        assert found.sequences_ids[0] == greedy(attached, ids, COUNT)
        assert set(report.tokens.values()).isdisjoint(found.sequences_ids[0])


def llama_cpp(path: Path) -> Any:
    """llama.cpp's server in this process, in fp32 on one thread."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.n_gpu_layers = 160, 1, 0
    options.warmup = options.fit_params = False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.verbosity = -1
    return xllamacpp.Server(options)


def generated(answer: Any) -> list[int]:
    """The ids that llama.cpp generates greedily."""
    (choice,) = answer["choices"]
    return [token["id"] for token in choice["logprobs"]["content"]]


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and "EMBEDSURGERY_TEST_LLAMA_CPP" not in os.environ,
    reason="llama.cpp is not installed (.ci/run installs it, for this test alone)",
)
def test_llama_cpp_gives_the_same_greedy_tokens(tmp_path: Path) -> None:
    """The prompt's tokens come from the request for a text, and from the template for a chat."""
    from tests.support.gguf_files import write_gguf

    begun = start("llama-tied", tmp_path)
    (begun.folder / "chat_template.jinja").write_text(CHAT)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out", bake=es.BakeConfig(prefix="chat"))
    write_gguf(tmp_path / "out", tmp_path / "out.gguf")
    engine, attached, tokenizer = llama_cpp(tmp_path / "out.gguf"), begun.attached(), begun.tokenizer()
    how = {"max_tokens": COUNT, "temperature": 0, "cache_prompt": False}
    for text in TEXTS:
        wanted = greedy(attached, tokenizer(text, return_tensors="pt").input_ids, COUNT)
        request = "".join(report.tokens) + tokenizer.bos_token + text
        for prompt in (request, [*report.tokens.values(), *tokenizer(text).input_ids]):
            assert generated(engine.handle_completions({"prompt": prompt, "logprobs": 1, **how})) == wanted
        chat = {"messages": [{"role": "user", "content": text}], "logprobs": True, **how}
        assert generated(engine.handle_chat_completions(chat)) == wanted
        assert set(report.tokens.values()).isdisjoint(wanted)
