"""A baked prompt, served by plain transformers from text alone, computes what the attached one does; and unmerging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import transformers as tr

import embedsurgery as es
from embedsurgery.errors import ConfigError, UnsupportedError
from tests.support.baked import CAUSAL, SEQ2SEQ, TEXTS, TOKENIZER, N, Start, greedy, last_logits, start
from tests.support.comparing import contents, state_bits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", params=TOKENIZER)
def baked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Start, Path, Any]:
    """A base with its prompt, the baked checkpoint, and the report. No test may change them."""
    begun = start(request.param, tmp_path_factory.mktemp(request.param))
    out = begun.folder.parent / "out"
    report = es.merge_checkpoint(begun.folder, begun.adapter, out, bake=es.BakeConfig(name="poet"))
    return begun, out, report


def _ids(begun: Start, folder: Path | None, text: str) -> torch.Tensor:
    return begun.tokenizer(folder)(text, return_tensors="pt").input_ids


def test_from_text_alone_it_is_the_attached_model(baked: tuple[Start, Path, Any]) -> None:
    begun, out, report = baked
    virtual = list(report.tokens.values())
    assert list(report.tokens) == [f"<|soft:poet:{number}|>" for number in range(N)]
    assert all(check.ok for check in es.verify_checkpoint(out)), es.verify_checkpoint(out)
    attached, plain = begun.attached(), begun.model(out)
    for text in TEXTS:
        base, with_prompt = _ids(begun, None, text), _ids(begun, out, text)
        assert with_prompt[0].tolist() == [*virtual, *base[0].tolist()]
        expected, found = (last_logits(m, begun.kind, ids) for m, ids in ((attached, base), (plain, with_prompt)))
        found = found[: expected.shape[-1]]
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        if begun.kind in (*CAUSAL, *SEQ2SEQ):
            assert greedy(plain, with_prompt) == greedy(attached, base)


def test_virtual_tokens_are_never_generated(baked: tuple[Start, Path, Any]) -> None:
    """Not in 10,000 tokens sampled with the checkpoint's generation config, nor by greedy decoding without it."""
    begun, out, report = baked
    if begun.kind not in (*CAUSAL, *SEQ2SEQ):
        return
    virtual = set(report.tokens.values())
    model, ids = begun.model(out), _ids(begun, out, TEXTS[0])
    torch.manual_seed(0)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=100,
            max_new_tokens=100,
            min_new_tokens=100,
        )
    new = made if begun.kind in SEQ2SEQ else made[:, ids.shape[1] :]
    assert new.numel() >= 10_000
    assert virtual.isdisjoint(new.unique().tolist())
    model.generation_config = tr.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
    attached = begun.attached()
    for text in TEXTS:
        found = greedy(model, _ids(begun, out, text), 40)
        assert virtual.isdisjoint(found)
        attached.generation_config = tr.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
        assert found == greedy(attached, _ids(begun, None, text), 40)


def test_the_probability_of_a_virtual_token_is_bounded(baked: tuple[Start, Path, Any]) -> None:
    """Without suppression: at most 1 / known tokens in an untied head, by Jensen's inequality, and 0 with a bias."""
    begun, out, report = baked
    if begun.kind not in (*CAUSAL, "t5", "bart", "bert-mlm"):
        return
    virtual = list(report.tokens.values())
    model = begun.model(out)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, begun.rows, (16, 40), generator=generator)
    ids = torch.cat([torch.tensor(virtual).expand(16, -1), text], dim=1)
    with torch.no_grad():
        more = {"decoder_input_ids": text} if begun.kind in SEQ2SEQ else {}
        chances = nnf.softmax(model(input_ids=ids, **more).logits.double(), dim=-1)[..., virtual]
    biased = begun.kind in ("bart", "bert-mlm")
    assert chances.max() <= (0.0 if biased else 1 / begun.rows)


def test_in_memory_it_is_the_same(baked: tuple[Start, Path, Any]) -> None:
    begun, out, _ = baked
    model, tokenizer = begun.model(), begun.tokenizer()
    before, config, text = state_bits(model), model.config.to_dict(), tokenizer(list(TEXTS)).input_ids
    generation = str(getattr(model, "generation_config", None))
    tied = _tied(model)
    undo = es.merge(model, begun.adapter, tokenizer, bake=es.BakeConfig(name="poet"))
    plain = begun.model(out)
    assert state_bits(model) == state_bits(plain)
    assert tokenizer(list(TEXTS)).input_ids == begun.tokenizer(out)(list(TEXTS)).input_ids
    assert undo.facts["prompt"]["text"] == "".join(f"<|soft:poet:{n}|>" for n in range(N))
    if begun.kind in CAUSAL:
        ids = _ids(begun, out, TEXTS[1])
        assert greedy(model, ids) == greedy(plain, ids)
        assert model.generation_config.suppress_tokens == plain.generation_config.suppress_tokens
    es.unmerge(model, undo)
    assert state_bits(model) == before
    assert model.config.to_dict() == config
    assert str(getattr(model, "generation_config", None)) == generation
    assert tokenizer(list(TEXTS)).input_ids == text
    assert _tied(model) == tied
    assert not any(text.startswith("<|soft:") for text in tokenizer.get_vocab())


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2", "gemma3", "bert-mlm", "t5"])
def test_unmerged_it_is_the_base_byte_for_byte(kind: str, dtype: str, tmp_path: Path) -> None:
    for shards in (False, True):
        begun = start(kind, tmp_path / str(shards), dtype=DTYPES[dtype], shards=shards, spare=3 * shards)
        before = contents(begun.folder)
        out = tmp_path / f"out-{shards}"
        es.merge_checkpoint(begun.folder, begun.adapter, out)
        assert contents(begun.folder) == before
        assert all(check.ok for check in es.verify_checkpoint(out)), es.verify_checkpoint(out)
        es.unmerge_checkpoint(out, tmp_path / f"back-{shards}")
        assert contents(tmp_path / f"back-{shards}") == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_dividing_by_the_lookups_scale(dtype: str, tmp_path: Path) -> None:
    """Two roundings, of the row and of the product: a relative error of at most 1.5 eps of the dtype."""
    begun = start("gemma3", tmp_path, dtype=DTYPES[dtype])
    es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    model = begun.model(tmp_path / "out")
    lookup = model.get_input_embeddings()
    found = lookup(torch.arange(begun.rows, begun.rows + N)).detach().double()
    prompt = begun.adapter.tensors["prompt_embeddings"]
    wanted = prompt.to(DTYPES[dtype]).double()
    error = ((found - wanted).abs() / wanted.abs()).max().item()
    print(f"{dtype}: {error:.2e} relative, eps {torch.finfo(DTYPES[dtype]).eps:.2e}")
    assert error <= 1.5 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_keeping_the_tie_leaves_it_to_the_generation_config(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out", bake=es.BakeConfig(tied="keep"))
    virtual = set(report.tokens.values())
    assert not any("lm_head" in line for line in report.edits)
    model, attached = begun.model(tmp_path / "out"), begun.attached()
    assert _tied(model)
    bare, wins = begun.model(tmp_path / "out"), 0
    bare.generation_config = tr.GenerationConfig(pad_token_id=0)
    for text in TEXTS:
        ids = _ids(begun, tmp_path / "out", text)
        assert greedy(model, ids) == greedy(attached, _ids(begun, None, text))
        wins += len(virtual & set(greedy(bare, ids)))
    assert wins, "a tied row wins where nothing suppresses it, which is why untying is the default"
    before = contents(begun.folder)
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_several_prompts_are_selected_by_text(tmp_path: Path) -> None:
    """Each by the texts of its own tokens."""
    from tests.support.baked import random_prompt

    begun = start("llama-tied", tmp_path)
    prompts = {
        name: random_prompt(begun.model(), 3 + seed, seed) for seed, name in enumerate(("poet", "cook", "judge"))
    }
    for name, adapter in prompts.items():
        adapter.save(tmp_path / name)
    before = contents(begun.folder)
    out = tmp_path / "out"
    es.merge_checkpoint(begun.folder, [tmp_path / name for name in prompts], out)
    assert all(check.ok for check in es.verify_checkpoint(out)), es.verify_checkpoint(out)
    model, tokenizer = begun.model(out), begun.tokenizer(out)
    assert tokenizer(TEXTS[0]).input_ids == begun.tokenizer()(TEXTS[0]).input_ids
    plain = begun.model()
    bare = _ids(begun, None, TEXTS[0])
    assert (
        last_logits(model, "llama-tied", bare)[: begun.rows] - last_logits(plain, "llama-tied", bare)
    ).abs().max() < 1e-5
    for number, (name, adapter) in enumerate(prompts.items()):
        attached = begun.attached(adapter)
        marks = "".join(f"<|soft:{name}:{n}|>" for n in range(3 + number))
        ids = tokenizer(
            f"{marks}{tokenizer.bos_token}{TEXTS[1]}", return_tensors="pt", add_special_tokens=False
        ).input_ids
        base = _ids(begun, None, TEXTS[1])
        assert ids.shape[1] == base.shape[1] + 3 + number
        expected = last_logits(attached, "llama-tied", base)
        assert (last_logits(model, "llama-tied", ids)[: begun.rows] - expected).abs().max() < 1e-5
        assert greedy(model, ids) == greedy(attached, base)
    at = out
    for number in range(3):
        es.unmerge_checkpoint(at, tmp_path / f"back-{number}")
        at = tmp_path / f"back-{number}"
    assert contents(at) == before


def test_the_prompt_may_follow_the_bos(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out", bake=es.BakeConfig(after_bos=True))
    bos, *rest = _ids(begun, None, TEXTS[0])[0].tolist()
    assert _ids(begun, tmp_path / "out", TEXTS[0])[0].tolist() == [bos, *report.tokens.values(), *rest]


def test_a_tie_that_is_stored_twice(tmp_path: Path) -> None:
    """The head has a table already: its rows change, and are restored."""
    from safetensors.torch import load_file, save_file

    begun = start("llama-tied", tmp_path)
    path = begun.folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    before = contents(begun.folder)
    es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    model = begun.model(tmp_path / "out")
    assert not _tied(model)
    base, ids = _ids(begun, None, TEXTS[0]), _ids(begun, tmp_path / "out", TEXTS[0])
    assert greedy(model, ids) == greedy(begun.attached(), base)
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_reserved_tokens_give_their_rows(tmp_path: Path) -> None:
    begun = start("bert-mlm", tmp_path)
    before = contents(begun.folder)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out", bake=es.BakeConfig(reserved=True))
    assert max(report.tokens.values()) < begun.rows
    model, base = begun.model(tmp_path / "out"), _ids(begun, None, TEXTS[0])
    ids = _ids(begun, tmp_path / "out", TEXTS[0])
    assert ids[0].tolist() == [*report.tokens.values(), *base[0].tolist()]
    expected = last_logits(begun.attached(), "bert-mlm", base)
    found = last_logits(model, "bert-mlm", ids)
    known = [i for i in range(begun.rows) if i not in report.tokens.values()]
    assert (found[known] - expected[known]).abs().max() < 1e-5
    assert found[list(report.tokens.values())].max() < -9000
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("kind", ["llama-tied", pytest.param("gemma3", marks=pytest.mark.sweep)])
def test_trained_saved_baked_and_served(kind: str, tmp_path: Path) -> None:
    """From training until the loss fell to a served checkpoint."""
    begun = start(kind, tmp_path)
    model, tokenizer = begun.model(), begun.tokenizer()
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    answer = tokenizer("the quick brown fox", return_tensors="pt", add_special_tokens=False).input_ids
    batch = torch.cat([ids, answer], dim=1)
    labels = torch.cat([torch.full_like(ids, -100), answer], dim=1)
    torch.manual_seed(0)
    attachment = es.attach(model, es.SoftPromptConfig(8))
    optimizer = torch.optim.Adam(attachment.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    attachment.adapter().save(tmp_path / "fox")
    report = es.merge_checkpoint(begun.folder, tmp_path / "fox", tmp_path / "out")
    assert next(iter(report.tokens)) == "<|soft:fox:0|>"
    plain = begun.model(tmp_path / "out")
    found = _ids(begun, tmp_path / "out", "hello world")
    expected, logits = last_logits(model, kind, ids), last_logits(plain, kind, found)[: begun.rows]
    assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert greedy(plain, found, 30) == greedy(model, ids, 30)
    print(kind, losses[0], losses[-1], tokenizer.decode(greedy(plain, found, 4)))
    virtual = set(report.tokens.values())
    with torch.no_grad():
        drawn = plain.generate(
            input_ids=found,
            attention_mask=torch.ones_like(found),
            do_sample=True,
            top_k=0,
            num_return_sequences=100,
            max_new_tokens=100,
            min_new_tokens=100,
        )
    assert drawn[:, found.shape[1] :].numel() >= 10_000
    assert virtual.isdisjoint(drawn[:, found.shape[1] :].unique().tolist())
    plain.generation_config = tr.GenerationConfig(pad_token_id=0)
    assert virtual.isdisjoint(greedy(plain, found, 60))
    assert not begun.model(tmp_path / "out").config.tie_word_embeddings


@pytest.mark.parametrize("first", ["prompt", "rows"])
def test_together_with_trained_tokens(first: str, tmp_path: Path) -> None:
    """In any order of the adapters: rows of a tied table are set in both tables if the prompt unties them."""
    begun = start("llama-tied", tmp_path)
    model = begun.model()
    attachment = es.attach(model, es.TrainableTokensConfig([9, 10]))
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.5)
    rows = attachment.adapter()
    both = [begun.adapter, rows] if first == "prompt" else [rows, begun.adapter]
    out, before = tmp_path / "out", contents(begun.folder)
    es.merge_checkpoint(begun.folder, both, out)
    es.attach(model, begun.adapter, name="prompt")
    attachment.activate("default", "prompt")
    plain = begun.model(out)
    for text in TEXTS:
        expected = last_logits(model, begun.kind, _ids(begun, None, text))
        found = last_logits(plain, begun.kind, _ids(begun, out, text))[: begun.rows]
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    es.unmerge_checkpoint(out, tmp_path / "once")
    es.unmerge_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert contents(tmp_path / "twice") == before


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("llama-tied", "rows"),
        ("llama-tied", "prompt"),
        ("llama-untied", "rows"),
        *(
            pytest.param(k, first, marks=pytest.mark.sweep)
            for k in ("gpt2", "bert-mlm")
            for first in ("rows", "prompt")
        ),
        pytest.param("llama-untied", "prompt", marks=pytest.mark.sweep),
    ],
)
def test_together_with_new_tokens(kind: str, first: str, tmp_path: Path) -> None:
    """New tokens keep their ids, and the prompt gets those after them, in any order of the adapters."""
    begun = start(kind, tmp_path)
    before = contents(begun.folder)
    model, tokenizer = begun.model(), begun.tokenizer()
    ids = es.add_tokens(model, tokenizer, ["<tool>"])
    attachment = es.attach(model, es.TrainableTokensConfig(ids), tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.1)
    rows, bake = attachment.adapter(), [None, es.BakeConfig(name="poet")]
    both = [rows, begun.adapter]
    both, bake = (both, bake) if first == "rows" else (both[::-1], bake[::-1])
    es.merge_checkpoint(begun.folder, both, tmp_path / "out", bake=bake)
    target, tokenizer = begun.model(), begun.tokenizer()
    bits, text = state_bits(target), tokenizer.backend_tokenizer.to_str()
    undo = es.merge(target, both, tokenizer, bake=bake)
    plain = begun.model(tmp_path / "out")
    assert state_bits(target) == state_bits(plain)
    es.attach(model, begun.adapter, name="prompt")  # beside the tokens, whose rows the model has
    text_ids = begun.tokenizer(tmp_path / "out")("hello <tool> world", return_tensors="pt").input_ids
    assert text_ids[0, :N].tolist() == list(range(begun.rows + 1, begun.rows + 1 + N))
    expected, found = last_logits(model, kind, text_ids[:, N:]), last_logits(plain, kind, text_ids)
    assert (found[: begun.rows + 1] - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert begun.tokenizer(tmp_path / "out").convert_tokens_to_ids(["<tool>", "<|soft:poet:0|>"]) == [
        begun.rows,
        begun.rows + 1,
    ]
    es.unmerge(target, undo)
    assert state_bits(target) == bits
    assert tokenizer.backend_tokenizer.to_str() == text
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", all=True)
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("kind", ["llama-tied", "bert-mlm"])
def test_baked_in_place_and_out_again(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    before = contents(begun.folder)
    es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    es.merge_checkpoint(begun.folder, begun.adapter, in_place=True)
    kept = {name: data for name, data in contents(begun.folder).items() if not name.startswith(".embedsurgery/")}
    assert kept == {n: data for n, data in contents(tmp_path / "out").items() if not n.startswith(".embedsurgery/")}
    es.unmerge_checkpoint(begun.folder, in_place=True)
    assert contents(begun.folder) == before


@pytest.mark.parametrize("given", ["weight", "text", "too many"])
def test_options_that_do_not_fit_a_prompt_are_refused(given: str, tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path)
    adapters: Any = (begun.adapter, 0.5) if given == "weight" else begun.adapter
    bake: Any = {"weight": None, "text": "all", "too many": [es.BakeConfig(), es.BakeConfig()]}[given]
    with pytest.raises(UnsupportedError if given == "weight" else ConfigError):
        es.merge_checkpoint(begun.folder, adapters, tmp_path / "out", bake=bake)
    assert not (tmp_path / "out").exists()
