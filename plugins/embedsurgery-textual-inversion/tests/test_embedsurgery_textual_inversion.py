"""Learned embeddings: read, attached to CLIP, baked into pipelines with one and two encoders; and the test kit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embedsurgery_textual_inversion as plugin
import pytest
import torch
import transformers as tr
from click.testing import CliRunner
from embedsurgery_textual_inversion import attach_embedding, bake, expand_prompt, read_embedding
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.errors import AdapterError, CheckpointError, ConfigError, EmbedSurgeryWarning, OutputExistsError
from embedsurgery.plugins.current import registry
from embedsurgery.testing import InitializerContract, bits, contents, installed
from embedsurgery.testing.models import WIDTH, state_bits

WORDS = ("<|startoftext|>", "<|endoftext|>", "a", "c", "t", "o", "a</w>", "t</w>", "o</w>", "ca", "cat</w>")
MERGES = ("c a", "ca t</w>")
KINDS = (tr.CLIPTextModel, tr.CLIPTextModelWithProjection)


@pytest.fixture(autouse=True)
def _plugin() -> Any:
    with installed(plugin):
        yield


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(width: int, seed: int = 0) -> Any:
    """Return a text encoder; with a seed other than 0, SDXL's second one, which has a projection."""
    torch.manual_seed(seed)
    config = tr.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=width,
    )
    return KINDS[min(seed, 1)](config).eval()


def write_tokenizer(folder: Path, *, fast: bool) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *MERGES)) + "\n")
    roles = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    body = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "model_max_length": 16, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(body))
    if fast:
        tr.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def write_pipeline(folder: Path, *widths: int, fast: bool = True) -> Path:
    folder.mkdir()
    for number, width in enumerate(widths):
        suffix = f"_{number + 1}" if number else ""
        clip(width, number).save_pretrained(folder / f"text_encoder{suffix}")
        write_tokenizer(folder / f"tokenizer{suffix}", fast=fast)
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


@pytest.mark.parametrize(
    ("name", "tensors", "token", "shape"),
    [
        ("learned_embeds", {"<cat-toy>": vectors(8)}, "<cat-toy>", (1, 8)),
        ("learned_embeds", {"<cat-toy>": vectors(3, 8)}, "<cat-toy>", (3, 8)),
        ("moody", {"emb_params": vectors(2, 8)}, "moody", (2, 8)),
        ("both", {"clip_l": vectors(2, 8), "clip_g": vectors(2, 12)}, "both", (2, 8)),
        ("half", {"emb_params": vectors(2, 8).half()}, "half", (2, 8)),
    ],
)
def test_files(name: str, tensors: dict[str, torch.Tensor], token: str, shape: Any, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / f"{name}.safetensors")
    for path in [tmp_path / f"{name}.safetensors", *([tmp_path] if name == "learned_embeds" else [])]:
        found = read_embedding(path)
        assert found.token == token
        first = found.of_width(shape[1])
        assert first is not None
        assert first.shape == shape
        assert first.data == bits(next(iter(tensors.values())))
        assert found.of_width(7) is None
    assert read_embedding(tmp_path / f"{name}.safetensors", "x").tokens == ("x", "x_1", "x_2")[: shape[0]]


def check_pickle(error: AdapterError, path: Path) -> None:
    """Check that an error refuses a pickle and says how to convert it."""
    assert (str(error.where), error.expected) == (str(path), "a safetensors file")
    assert "weights_only=True" in str(error.hint)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.pt", "b.bin", "c.CKPT"):
        (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
        with pytest.raises(AdapterError) as caught:
            read_embedding(tmp_path / name)
        check_pickle(caught.value, tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "learned_embeds.bin").write_bytes(b"")
    with pytest.raises(AdapterError) as caught:
        read_embedding(tmp_path / "folder")
    check_pickle(caught.value, tmp_path / "folder")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    save_file({"x": vectors(2), "y": vectors(3)}, tmp_path / "two.safetensors")
    save_file({"clip_l": vectors(2, 8), "clip_g": vectors(3, 12)}, tmp_path / "uneven.safetensors")
    save_file({"x": torch.ones(2, 2, dtype=torch.int64)}, tmp_path / "numbers.safetensors")
    save_file({"x": torch.tensor([[1.0, float("nan")]])}, tmp_path / "nan.safetensors")
    torch.save({"string_to_param": {"*": vectors(2, 8)}}, tmp_path / "renamed.safetensors")
    for name in ("junk", "two", "uneven", "numbers", "nothing", "nan", "renamed"):
        with pytest.raises(AdapterError) as caught:
            read_embedding(tmp_path / f"{name}.safetensors")
        assert name in str(caught.value.where)


def test_prompts(tmp_path: Path) -> None:
    save_file({"emb_params": vectors(3, 8)}, tmp_path / "moody.safetensors")
    found = read_embedding(tmp_path / "moody.safetensors")
    assert expand_prompt("a moody cat, moodyish", found) == "a moody moody_1 moody_2 cat, moodyish"


@pytest.mark.parametrize("encoder", [0, 1], ids=["clip_l", "clip_g"])
def test_attached_to_clip(encoder: int, tmp_path: Path) -> None:
    """Live rows are the file's, the saved adapter carries the tokens, and both can be removed."""
    path = tmp_path if encoder == 0 else tmp_path / "<cat-toy>.safetensors"
    save_file({"<cat-toy>": vectors(2, 8)}, tmp_path / "learned_embeds.safetensors")
    save_file({"clip_l": vectors(2, 6), "clip_g": vectors(2, 8)}, tmp_path / "<cat-toy>.safetensors")
    tokenizer = tr.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer", fast=True))
    model = clip(8, encoder)
    before, size = state_bits(model), len(tokenizer)
    prompt = expand_prompt("a <cat-toy> cat", read_embedding(path))
    attachment, ids = attach_embedding(model, tokenizer, path)
    encoded = tokenizer(prompt, return_tensors="pt")
    assert list(ids) == [11, 12]
    assert [i for i in encoded["input_ids"][0].tolist() if i in ids] == [11, 12]
    torch.testing.assert_close(model.get_input_embeddings()(torch.tensor(list(ids))), vectors(2, 8))
    out = model(**encoded).last_hidden_state
    out.sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())
    attachment.save(tmp_path / "adapter")
    attachment.detach()
    ids.undo()
    assert (state_bits(model), len(tokenizer)) == (before, size)
    es.merge(model, es.load(tmp_path / "adapter"), tokenizer)
    torch.testing.assert_close(model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state, out)
    with pytest.raises(ConfigError) as caught:
        attach_embedding(model, tokenizer, path)
    assert caught.value.found == "<cat-toy>, <cat-toy>_1"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_baked_into_a_pipeline(fast: bool, tmp_path: Path) -> None:
    """Two encoders and several vectors: transformers loads the result, and every other file is unchanged."""
    base = write_pipeline(tmp_path / "base", 8, 12, fast=fast)
    save_file({"clip_l": vectors(2, 8), "clip_g": vectors(2, 12, seed=1)}, tmp_path / "style.safetensors")
    save_file({"<toy>": vectors(8, seed=2)}, tmp_path / "toy.safetensors")
    before = contents(base)
    with pytest.warns(EmbedSurgeryWarning, match=r"toy\.safetensors.*\b12\b.*<toy>"):
        report = bake(base, [tmp_path / "style.safetensors", tmp_path / "toy.safetensors"], tmp_path / "out")
    assert contents(base) == before
    assert report.tokens == {
        "text_encoder": {"style": 11, "style_1": 12, "<toy>": 13},
        "text_encoder_2": {"style": 11, "style_1": 12},
    }
    after = contents(tmp_path / "out")
    touched = {path for path in before if before[path] != after[path]}
    new = after.keys() - before.keys()
    assert {path.split("/")[0] for path in touched | new} == {
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    }
    assert not any(".embedsurgery" in path for path in after)
    for number, (suffix, width) in enumerate((("", 8), ("_2", 12))):
        tokenizer = tr.AutoTokenizer.from_pretrained(tmp_path / "out" / f"tokenizer{suffix}")
        assert tokenizer.convert_tokens_to_ids(["style", "style_1"]) == [11, 12]
        assert tokenizer("a style style_1 cat")["input_ids"] == [0, 6, 11, 12, 10, 1]
        model = KINDS[number].from_pretrained(tmp_path / "out" / f"text_encoder{suffix}")
        table = model.get_input_embeddings().weight.detach()
        assert table.shape == (14 - number, width)
        assert model.config.vocab_size == 14 - number
        torch.testing.assert_close(table[11:13], vectors(2, width, seed=number), rtol=0, atol=0)
        old = load_file(base / f"text_encoder{suffix}" / "model.safetensors")
        now = load_file(tmp_path / "out" / f"text_encoder{suffix}" / "model.safetensors")
        assert all(bits(now[name])[: len(bits(old[name]))] == bits(old[name]) for name in old)


def test_a_failed_bake_leaves_nothing(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 8)
    save_file({"x": vectors(2, 9)}, tmp_path / "wide.safetensors")
    save_file({"cat</w>": vectors(2, 8)}, tmp_path / "known.safetensors")
    save_file({"y": vectors(2, 8)}, tmp_path / "good.safetensors")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for files, found in ((["wide"], "x [2, 9]"), (["good", "wide"], "x [2, 9]"), (["known"], "cat</w>")):
        with pytest.raises(ConfigError) as refused:
            bake(base, [tmp_path / f"{name}.safetensors" for name in files], out)
        assert refused.value.found == found
    with pytest.raises(CheckpointError) as caught:
        bake(tmp_path / "empty", [tmp_path / "good.safetensors"], out)
    assert (caught.value.where, caught.value.expected) == (tmp_path / "empty", "text_encoder and tokenizer")
    with pytest.raises(OutputExistsError):
        bake(base, [tmp_path / "good.safetensors"], tmp_path / "empty")
    for inside in (base / "out", base, base / "unet" / "out"):
        with pytest.raises((ConfigError, OutputExistsError)):
            bake(base, [tmp_path / "good.safetensors"], inside)
    with pytest.raises(ConfigError) as refused:
        bake(base, [], out)
    assert refused.value.where == "embeddings"
    with pytest.raises(ConfigError) as refused:
        bake(base, [tmp_path / "good.safetensors"] * 2, out)
    assert "'y'" in str(refused.value)
    with pytest.raises(AdapterError) as pickled:
        bake(base, [tmp_path / "good.pt"], out)
    check_pickle(pickled.value, tmp_path / "good.pt")
    assert sorted(p.name for p in base.iterdir()) == ["model_index.json", "text_encoder", "tokenizer", "unet"]
    variant = base / "text_encoder" / "model.fp16.safetensors"
    variant.write_bytes((base / "text_encoder" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        bake(base, [tmp_path / "good.safetensors"], out)
    assert caught.value.found == "model.fp16.safetensors, model.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["base", "empty"]


def test_a_pipeline_of_one_variant_and_an_embedding_for_two_encoders(tmp_path: Path) -> None:
    """Half-precision weights under their variant's name; vectors that fit no encoder are left out with a warning."""
    base = write_pipeline(tmp_path / "base", 8)
    model = clip(8).half()
    model.save_pretrained(base / "text_encoder", variant="fp16")
    (base / "text_encoder" / "model.safetensors").unlink()
    save_file({"clip_l": vectors(2, 8), "clip_g": vectors(2, 12)}, tmp_path / "style.safetensors")
    with pytest.warns(EmbedSurgeryWarning, match="clip_g"):
        bake(base, [tmp_path / "style.safetensors"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "text_encoder" / "model.fp16.safetensors")
    (name,) = (name for name in merged if "token_embedding" in name)
    assert torch.equal(merged[name][11:], vectors(2, 8).half())
    read = tr.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder", variant="fp16")
    assert read.get_input_embeddings().weight.shape == (13, 8)


def test_old_clip_configs_are_warned_of(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 8)
    config = base / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": 2'))
    save_file({"y": vectors(2, 8)}, tmp_path / "good.safetensors")
    with pytest.warns(EmbedSurgeryWarning, match="eos_token_id"):
        bake(base, [tmp_path / "good.safetensors"], tmp_path / "out")


def test_as_a_command(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 8)
    save_file({"emb_params": vectors(2, 8)}, tmp_path / "moody.safetensors")
    command = registry().commands["textual-inversion"].load()
    arguments = [str(base), str(tmp_path / "moody.safetensors"), "-o"]
    run = CliRunner().invoke(command, [*arguments, str(tmp_path / "one")], catch_exceptions=False)
    assert "moody as 11, moody_1 as 12" in run.output
    run = CliRunner().invoke(command, [*arguments, str(tmp_path / "two"), "--token", "m", "--json"])
    assert json.loads(run.stdout)["tokens"] == {"text_encoder": {"m": 11, "m_1": 12}}


class TestVector(InitializerContract):
    plugin = plugin

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        save_file({"emb_params": vectors(2, WIDTH)}, tmp_path / "moody.safetensors")
        type(self).init = f"textual-inversion:{tmp_path / 'moody.safetensors'}#1"
