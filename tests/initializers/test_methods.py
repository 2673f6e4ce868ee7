"""Each initialiser against a reference implementation, in every store and dtype, and its errors."""

from __future__ import annotations

import json
import os
import tracemalloc
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PluginError, TokenIndexError, UnsupportedError
from embedsurgery.initializers import (
    BUILT_IN,
    Ask,
    Initializer,
    InitializerRecord,
    NewToken,
    TableView,
    add_parts,
    compute_initial_rows,
    parse_init,
)
from embedsurgery.plan import blocks
from embedsurgery.plugins.current import registry
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.store import Store
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits
from tests.support.errors import raises
from tests.support.homes import DTYPES, EMBED, HOMES
from tests.support.models import KINDS, VOCABULARY, tiny
from tests.support.processes import cli, python

INITS = {record.name: record for record in BUILT_IN}
ROWS, WIDTH, KNOWN = 1000, 6, 690
NEW = [NewToken("<a>", 690), NewToken("<b>", 691), NewToken("<c>", 1005)]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


def values(dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH, known: int = KNOWN) -> torch.Tensor:
    """Return a table with columns of different means and scales, and garbage after the known rows."""
    generator = torch.Generator().manual_seed(rows + width)
    table = torch.randn((rows, width), generator=generator) * torch.linspace(0.1, 2, width)
    table = (table + torch.linspace(-1, 3, width)).to(dtype)
    table[known:] = 3e4
    table[known + 1 :: 3] = float("nan")
    table[known + 2 :: 3] = float("-inf")
    return table


def view_of(folder: Path, table: torch.Tensor, known: int, home: str = "state dict") -> TableView:
    store = HOMES[home].make_store(folder, table)
    return TableView.of_table(store, store.graph.table(EMBED), known)


class Vectors:
    """The part of a store that reads vectors."""

    name = "fake"

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector

    def read_vector(self, name: str) -> RawArray:
        return to_raw(self.vector)


def vector_view(vector: torch.Tensor, known: int) -> TableView:
    return TableView.of_vector(cast(Store, Vectors(vector)), "lm_head.bias", known)


def start(init: str, view: TableView, tokens: Sequence[NewToken] = NEW, seed: int = 0) -> torch.Tensor:
    """Return the rows that `compute_initial_rows` computes."""
    record, argument = parse_init(init, INITS)
    raw = compute_initial_rows(record, argument, view, tokens, seed)
    assert raw.dtype == "F32"
    return torch.from_numpy(raw.float32().copy())


def many(count: int) -> list[NewToken]:
    return [NewToken(f"t{i}", i) for i in range(count)]


every_home = pytest.mark.parametrize("home", HOMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@every_home
@every_dtype
def test_mean_uses_the_known_rows_only(home: str, dtype: torch.dtype, tmp_path: Path) -> None:
    table = values(dtype)
    expected = table[:KNOWN].double().mean(0).float()
    rows = start("mean", view_of(tmp_path, table, KNOWN, home))
    torch.testing.assert_close(rows, expected.repeat(3, 1), **TOLERANCE)
    assert not torch.allclose(expected, table.float().nan_to_num(0, 0, 0).mean(0), rtol=0.1)


def phi() -> Any:
    """Return a model with an untied head and a bias, with random values."""
    import transformers as tr

    config = tr.PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tr.PhiForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.2)
    return model.eval()


@pytest.mark.parametrize("kind", [*KINDS, "phi"])
def test_mean_and_normal_agree_with_transformers_up_to_its_noise(kind: str) -> None:
    """In every table of the model and in its bias. The noise of transformers is 1e-9 of the variance."""
    model = phi() if kind == "phi" else tiny(kind)
    store = module_store(model)
    names = [table.name for table in store.graph.tables if table.shape[0] == VOCABULARY]
    views = {name: TableView.of_table(store, store.graph.table(name), VOCABULARY) for name in names}
    if kind == "phi":
        views["lm_head.bias"] = vector_view(model.lm_head.bias, VOCABULARY)
    assert len(views) == {"llama-untied": 2, "phi": 3}.get(kind, 1)
    ours = {name: (start("mean", view), start("normal", view)) for name, view in views.items()}
    model.resize_token_embeddings(VOCABULARY + 3)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, (mean, normal) in ours.items():
        expected = theirs[name].detach()[VOCABULARY:].reshape(mean.shape)
        torch.testing.assert_close(mean, expected, rtol=0, atol=6e-5)
        torch.testing.assert_close(normal, expected, rtol=0, atol=1.2e-4)
        assert not torch.equal(mean, normal)
        assert mean.abs().max() > 0.01


@pytest.mark.parametrize(("rows", "width"), [(400, 4), (3, 5)], ids=["full rank", "fewer rows than columns"])
def test_normal_has_the_tables_mean_and_a_billionth_of_its_covariance(rows: int, width: int, tmp_path: Path) -> None:
    table = values(torch.float32, rows + 20, width, rows)
    wide = table[:rows].double().numpy()
    record, tokens = INITS["normal"], many(20_000)
    streams = [np.random.default_rng(i) for i in range(len(tokens))]
    drawn = record.initializer.rows(view_of(tmp_path, table, rows), tokens, None, streams) - wide.mean(0)
    covariance = np.cov(wide.T, bias=True)
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(0) / np.sqrt(1e-9) / scale, 0, atol=4 / np.sqrt(len(tokens)))
    found = np.cov(drawn.T, bias=True) / 1e-9
    np.testing.assert_allclose(found / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.05)
    rank = min(rows - 1, width)
    assert np.linalg.matrix_rank(drawn, tol=1e-6 * np.linalg.norm(drawn, 2)) == rank


@every_dtype
def test_random_has_each_columns_mean_and_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    table = values(dtype)
    wide, tokens = table[:KNOWN].double(), many(20_000)
    rows = start("random", view_of(tmp_path, table, KNOWN), tokens).double()
    scale = wide.std(0, correction=0)
    torch.testing.assert_close((rows.mean(0) - wide.mean(0)) / scale, torch.zeros(WIDTH).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(rows.std(0) / scale, torch.ones(WIDTH).double(), rtol=0, atol=0.03)
    assert abs(rows.square().sum(1).mean() / wide.square().sum(1).mean() - 1) < 0.02


class Ones:
    """A random stream that always returns one standard deviation."""

    def standard_normal(self, size: int) -> Any:
        return np.ones(size)


def test_random_keeps_its_digits_if_the_mean_is_far_from_zero(tmp_path: Path) -> None:
    table = values(torch.float32) + 1e5
    rows = INITS["random"].initializer.rows(view_of(tmp_path, table, KNOWN), NEW[:1], None, [cast(Any, Ones())])
    wide = table[:KNOWN].double().numpy()
    np.testing.assert_allclose(rows[0] - wide.mean(0), wide.std(0), rtol=1e-8)


@every_home
@every_dtype
def test_copied_rows_are_exact(home: str, dtype: torch.dtype, tmp_path: Path) -> None:
    table = values(dtype).float().to(dtype)
    view, name = view_of(tmp_path, table, KNOWN, home), {v: k for k, v in DTYPES.items()}[dtype]
    tokens = [NewToken("<a>", 5, (3,)), NewToken("<b>", 690, (689,))]
    for init, indices in (("current", [5, 690]), ("copy:x", [3, 689]), ("zeros", None)):
        record, argument = parse_init(init, INITS)
        raw = compute_initial_rows(record, argument, view, tokens, 0).to(name)
        expected = torch.zeros((2, WIDTH), dtype=dtype) if indices is None else table[indices]
        assert raw.data == bits(expected)


@every_dtype
def test_subtokens_and_description_are_means_of_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    table = values(dtype)
    view = view_of(tmp_path, table, KNOWN)
    tokens = [NewToken("<a>", 690, (1, 600, 1)), NewToken("<b>", 691, (7,))]
    expected = torch.stack([table[[1, 600, 1]].double().mean(0), table[7].double()]).float()
    for init in ("subtokens", "description:a text"):
        torch.testing.assert_close(start(init, view, tokens), expected, **TOLERANCE)


@every_dtype
def test_a_vector_is_initialised_by_the_same_rules(dtype: torch.dtype) -> None:
    vector = values(dtype, width=1)[:, 0] - 5
    view = vector_view(vector, KNOWN)
    known = vector[:KNOWN].double()
    assert (view.shape, view.roles) == ((ROWS, 1), ("output",))
    torch.testing.assert_close(start("mean", view), known.mean().float().repeat(3, 1), **TOLERANCE)
    drawn = start("random", view, many(5000)).double()
    assert abs((drawn.mean() - known.mean()) / known.std()) < 0.1
    assert abs(drawn.std() / known.std() - 1) < 0.1
    near = start("normal", view, many(5000)).double() - known.mean()
    assert abs(near.std() / known.std() / 1e-9**0.5 - 1) < 0.1
    assert start("copy:x", view, [NewToken("a", 9, (3,))]).item() == vector[3].float().item()
    assert start("current", view, [NewToken("a", 4)]).item() == vector[4].float().item()


@pytest.mark.parametrize("init", ["mean", "random", "normal"])
def test_a_seed_gives_the_same_rows_in_every_store(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for number, home in enumerate(HOMES):
        for size in (1, 5000, blocks.BLOCK_BYTES):
            monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
            folder = tmp_path / f"{number}-{size}"
            folder.mkdir()
            found.add(bits(start(init, view_of(folder, values(torch.bfloat16), KNOWN, home))))
    assert len(found) == 1


PROCESS = """
import hashlib, numpy as np
from embedsurgery.initializers import BUILT_IN, NewToken, TableView, compute_initial_rows
from embedsurgery.tensors.raw import RawArray
table = RawArray.of(np.random.default_rng(0).standard_normal((3000, 96), dtype=np.float32))
view = TableView("x", table.shape, "F32", ("input",), 2999,
                 lambda a, b: table.take(range(a, b)), lambda i: table.take(i))
tokens = [NewToken(f"t{i}", i, (i,)) for i in range(40)]
print(hashlib.sha256(b"".join(compute_initial_rows(r, "x", view, tokens, 3).data for r in BUILT_IN)).hexdigest())
import sys
assert "torch" not in sys.modules
"""


def test_a_seed_gives_the_same_rows_in_every_process_and_on_any_number_of_threads() -> None:
    runs = [python(PROCESS, env={**os.environ, "PYTHONHASHSEED": n, "OPENBLAS_NUM_THREADS": n}) for n in ("1", "2")]
    assert [run.stderr for run in runs] == ["", ""]
    assert runs[0].stdout == runs[1].stdout != ""


@pytest.mark.parametrize("init", ["random", "normal"])
def test_a_random_row_depends_only_on_its_token(init: str, tmp_path: Path) -> None:
    """Not on other new tokens and not on its id. Other seeds and tables give other rows."""
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    rows = start(init, view)
    assert torch.equal(start(init, view, [NewToken("<x>", 690), NewToken("<c>", 691)])[1], rows[2])
    padding = start(init, view, [NewToken("", 692), NewToken("", 693), NewToken("692", 692)])
    other = start(init, replace(view, name="lm_head.weight"))
    different = [*rows, *start(init, view, seed=1), *start(init, view, seed=-1), *padding, *other]
    assert len({bits(row) for row in different}) == 15


def test_broken_rows_are_left_out_with_a_warning(tmp_path: Path) -> None:
    table = values(torch.float32)
    table[3, 1], table[600] = float("nan"), float("inf")
    kept = torch.tensor([i for i in range(KNOWN) if i not in (3, 600)])
    view = view_of(tmp_path, table, KNOWN)
    with pytest.warns(EmbedSurgeryWarning, match=r"embed_tokens.*3, 600$"):
        rows = start("mean", view)
    torch.testing.assert_close(rows[0], table[kept].double().mean(0).float(), **TOLERANCE)
    with pytest.warns(EmbedSurgeryWarning, match="3, 600$"):
        drawn = start("random", view, many(5000))
    torch.testing.assert_close(drawn.std(0) / table[kept].std(0), torch.ones(WIDTH), rtol=0, atol=0.05)
    with pytest.warns(EmbedSurgeryWarning, match="3, 600$"):
        near = start("normal", view, many(5000)) - rows[0]
    torch.testing.assert_close(near.std(0) / table[kept].std(0) / 1e-9**0.5, torch.ones(WIDTH), rtol=0, atol=0.05)
    with pytest.warns(EmbedSurgeryWarning, match="3, 600$"):
        mixed = start("subtokens", view, [NewToken("a", 690, (3, 5, 600))])
    assert torch.equal(mixed[0], table[5])
    with pytest.warns(EmbedSurgeryWarning), raises(ConfigError, where=EMBED, found="3, 600"):
        start("subtokens", view, [NewToken("a", 690, (3, 600))])
    with pytest.warns(EmbedSurgeryWarning, match=r"'copy'\): 690$"):
        start("copy:x", view, [NewToken("a", 690, (3,)), NewToken("b", 691, (4,))])
    table[:] = float("nan")
    for init in ("mean", "random", "normal"):
        with pytest.warns(EmbedSurgeryWarning), raises(ConfigError, where=EMBED, expected="finite", found=KNOWN):
            start(init, view_of(tmp_path, table, KNOWN))


@pytest.mark.parametrize("init", ["mean", "random", "normal"])
def test_one_known_row_is_the_mean_and_none_is_refused(init: str, tmp_path: Path) -> None:
    table = values(torch.float32)
    assert torch.equal(start(init, view_of(tmp_path, table, 1)), table[:1].repeat(3, 1))
    with raises(ConfigError, where=EMBED, found="0 rows", hint="'zeros'"):
        start(init, view_of(tmp_path, table, 0))
    assert not start("zeros", view_of(tmp_path, table, 0)).any()


@pytest.mark.parametrize("init", ["mean", "random", "normal", "subtokens"])
def test_memory_stays_far_below_the_tables(init: str, tmp_path: Path) -> None:
    """The table takes 41 MB as bf16, and 82 MB as fp32."""
    table = torch.ones((40_000, 512), dtype=torch.bfloat16)
    view = view_of(tmp_path, table, 39_990, "file")
    del table
    tokens = [NewToken(f"t{i}", i, (i, i + 1)) for i in range(20)]
    tracemalloc.start()
    try:
        start(init, view, tokens)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_the_view_shows_known_rows_in_small_blocks(tmp_path: Path) -> None:
    table = values(torch.bfloat16)
    view = view_of(tmp_path, table, KNOWN, "shards")
    assert (view.name, view.shape, view.dtype, view.roles) == (EMBED, (ROWS, WIDTH), "BF16", ("input", "output"))
    blocks = list(view.blocks())
    assert [start for start, _ in blocks] == [0, 256, 512]
    together = np.concatenate([block for _, block in blocks])
    assert together.tobytes() == bits(table[:KNOWN].float())
    assert view.rows([]).shape == (0, WIDTH)
    for bad in ([-1], [1, ROWS]):
        with raises(TokenIndexError, expected=f"0 to {ROWS - 1}", found=bad[-1]):
            view.rows(bad)
    for bad_known in (-1, ROWS + 1):
        with raises(ConfigError, where=EMBED, expected=f"0 to {ROWS}", found=bad_known):
            view_of(tmp_path, table, bad_known)


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    with raises(UnsupportedError, where=EMBED, found="I8"):
        view_of(tmp_path, torch.ones((9, 3), dtype=torch.int8), 9)
    with raises(UnsupportedError, where="lm_head.bias", found="I64"):
        vector_view(torch.ones(9, dtype=torch.int64), 9)


def test_current_is_refused_for_missing_rows(tmp_path: Path) -> None:
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    with raises(ConfigError, what="'current'", where=EMBED, expected=1000, found="'<c>' (1005)", hint="'mean'"):
        start("current", view)


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("mean", "mean", None),
        ("copy:<s>", "copy", "<s>"),
        ("copy::", "copy", ":"),
        ("copy: ", "copy", " "),
        ("description:a: b", "description", "a: b"),
    ],
)
def test_parsing_init(text: str, name: str, argument: str | None) -> None:
    assert parse_init(text, INITS) == (INITS[name], argument)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {"expected": "copy:TOKEN", "found": "''"}),
        (" ", {"expected": "description:TEXT", "found": "' '"}),
        (3, {"found": "3"}),
        (None, {"found": "None"}),
        ("copy", {"what": "'copy'", "where": "'copy'", "expected": "copy:TOKEN"}),
        ("copy:", {"what": "'copy'", "where": "'copy:'", "expected": "copy:TOKEN"}),
        ("mean:3", {"what": "'mean'", "where": "'mean:3'", "expected": "mean"}),
        ("mean:", {"what": "'mean'", "where": "'mean:'", "expected": "mean"}),
        ("maen", {"where": "'maen'", "hint": "'mean'"}),
        ("Mean", {"where": "'Mean'", "hint": "'mean'"}),
        ("subtoken:x", {"where": "'subtoken'", "hint": "'subtokens'"}),
        (":x", {"where": "''", "expected": "current, zeros"}),
        ("xyz", {"where": "'xyz'", "expected": "mine:SIZE", "hint": None}),
        ("min", {"where": "'min'", "hint": "'mine:SIZE'"}),
        ("x\x1b[31m" * 99, {"where": "x1b", "expected": "current, zeros"}),
    ],
)
def test_parsing_an_invalid_init(text: Any, fields: dict[str, Any]) -> None:
    known = {**INITS, "mine": InitializerRecord("mine", INITS["mean"].initializer, "SIZE")}
    with raises(ConfigError, **fields) as caught:
        parse_init(text, known)
    assert len(str(caught.value)) < 400


WORDS = {"[UNK]": 0, "<s>": 1, "big": 2, "cat": 3, "\u0120big": 4}


def encode(text: str) -> list[int]:
    return [WORDS.get(word, 0) for word in text.split()]


def test_parts_of_tokens() -> None:
    tokens = [NewToken("big cat", 5), NewToken("cat", 6)]

    def parts(init: str, unknown: int | None = 0) -> list[tuple[int, ...]]:
        record, argument = parse_init(init, INITS)
        done = add_parts(record, argument, tokens, encode, WORDS.get, unknown)
        assert [(token.content, token.id) for token in done] == [("big cat", 5), ("cat", 6)]
        return [token.parts for token in done]

    assert parts("mean") == parts("zeros") == parts("random") == parts("normal") == parts("current") == [(), ()]
    assert parts("subtokens") == [(2, 3), (3,)]
    assert parts("description:big what cat") == [(2, 3), (2, 3)]
    assert parts("description:big what cat", None) == [(2, 0, 3), (2, 0, 3)]
    assert parts("copy:\u0120big") == parts("copy:\u0120big", None) == [(4,), (4,)]
    assert parts("copy:  big ") == [(2,), (2,)]  # not a token, but the tokenizer encodes it as one
    assert parts("copy:[UNK]") == [(0,), (0,)]
    for init, found in [
        ("copy:nothing", "'nothing'"),
        ("copy:big cat", "'big cat'"),
        ("description: ", "''"),
        ("description:what", "'what'"),
    ]:
        with raises(ConfigError, found=found):
            parts(init)
    tokens[1] = NewToken("dog", 6)
    with raises(ConfigError, what="'subtokens'", where="'dog'", found="'dog'"):
        parts("subtokens")


def test_parts_must_be_known_rows(tmp_path: Path) -> None:
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    for init in ("subtokens", "description:x", "copy:x"):
        with raises(ConfigError, what=repr(init.partition(":")[0]), where="'<a>'", expected=None):
            start(init, view)
        for bad in (-1, KNOWN, ROWS):
            with raises(ConfigError, where=(EMBED, "'<a>'"), expected=f"0 to {KNOWN - 1}", found=bad):
                start(init, view, [NewToken("<a>", 690, (1, bad))])


def test_seeds_must_be_integers_and_no_tokens_give_no_rows(tmp_path: Path) -> None:
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    assert torch.equal(start("random", view, seed=cast(int, np.int64(3))), start("random", view, seed=3))
    for bad in (1.5, "1", None):
        with raises(ConfigError, where="seed", found=repr(bad)):
            start("random", view, seed=cast(int, bad))
    for record in BUILT_IN:
        assert compute_initial_rows(record, "x", view, [], 0) == RawArray("F32", (0, WIDTH), b"")


class Returns(Initializer):
    """Returns a given value as rows."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    "value",
    [
        None,
        [[0.0] * WIDTH] * 3,
        np.zeros((2, WIDTH)),
        np.zeros((3, WIDTH), np.float16),
        np.zeros((3, WIDTH), np.int64),
    ],
)
def test_a_plugin_that_returns_no_rows_is_named(value: Any, tmp_path: Path) -> None:
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    with raises(PluginError, where="wrong", expected="(3, 6)"):
        compute_initial_rows(InitializerRecord("wrong", Returns(value)), None, view, NEW, 0)


def test_rows_that_overflow_are_warned_of(tmp_path: Path) -> None:
    view = view_of(tmp_path, values(torch.float32), KNOWN)
    rows = np.zeros((3, WIDTH))
    rows[1] = 1e300
    with pytest.warns(EmbedSurgeryWarning, match=r"'big'\): 691$"):
        raw = compute_initial_rows(InitializerRecord("big", Returns(rows)), None, view, NEW, 0)
    assert np.isinf(raw.float32()[1]).all()
    rows[1] = 1e-300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_initial_rows(InitializerRecord("small", Returns(rows)), None, view, NEW, 0)


def test_built_in_initialisers_are_listed_with_their_sources() -> None:
    assert list(registry().initializers) == list(INITS)
    assert registry().initializer("normal") is INITS["normal"]
    with raises(ConfigError, where="'normall'", hint="'normal'"):
        registry().initializer("normall")
    assert all("https://" in (type(record.initializer).__doc__ or "") for record in BUILT_IN)
    assert INITS["copy"].initializer.ask(NEW[0], "<s>") == Ask("<s>", single=True)
    run = cli("plugins", "--json")
    assert run.stderr == ""
    listed = json.loads(run.stdout)["initializers"]
    assert {one["name"]: one["argument"] for one in listed} == {name: r.argument for name, r in INITS.items()}
    text = cli("plugins").stdout
    assert all(record.usage in text and record.summary in text for record in BUILT_IN)
