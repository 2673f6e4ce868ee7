"""Files of soft prompts: PEFT reads embedsurgery's and embedsurgery PEFT's, with equal logits, losses and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.adapters.manifest import MAIN_INPUT
from embedsurgery.errors import AdapterError, BaseMismatchError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.surgeries.soft_prompt.peft_files import NO_ROWS
from tests.support.errors import raises
from tests.support.prompt_models import CAUSAL, padded, rows, tiny, unpadded
from tests.support.prompted import N, close, prompted, vectors

TASKS = {
    "bert-cls": "SEQ_CLS",
    "bert-mlm": "FEATURE_EXTRACTION",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "bert": "FEATURE_EXTRACTION",
    "roberta-tok": "TOKEN_CLS",
    "bert-qa": "QUESTION_ANS",
}
KINDS = (*CAUSAL, "bert-cls", "bert-mlm", "t5", "bart", "bert-qa")
UNCHECKED = f"ignore:{MAIN_INPUT}:embedsurgery.errors.EmbedSurgeryWarning"
"""The warning of a file that has no fingerprint of its base."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


def save_with_peft(kind: str, folder: Path, **options: Any) -> Any:
    """Return a PEFT model with a soft prompt, which is saved in a folder."""
    task = TASKS.get(kind, "CAUSAL_LM")
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N, **options)
    model = peft.get_peft_model(tiny(kind), config).eval()
    model.save_pretrained(folder)
    return model


def check_same_outputs(kind: str, model: Any, peft_model: Any) -> None:
    """Compare outputs where PEFT's are right: without padding, and with padding on the right."""
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, "right")
    more = {"decoder_input_ids": torch.tensor([[2, 5, 6]] * 3)} if TASKS.get(kind) == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **more)
        wanted = peft_model(input_ids=ids, attention_mask=mask, **more)
    fields = ("start_logits", "end_logits") if kind == "bert-qa" else ("logits",)
    for field in fields:
        if kind in ("bert-cls", "t5", "bart"):
            close(found[field], wanted[field])
            continue
        pairs = zip(unpadded(found[field], samples, "right"), wanted[field], samples, strict=True)
        for one, other, sample in pairs:
            close(one, other[N : N + len(sample)])
    if kind in CAUSAL:
        labels = ids.masked_fill(mask == 0, -100)
        close(
            model(ids, attention_mask=mask, labels=labels).loss,
            peft_model(ids, attention_mask=mask, labels=labels).loss,
        )
    if kind in (*CAUSAL, "t5", "bart"):
        right = {"use_cache": False}  # PEFT 0.21.2 under transformers 5.24 inserts its prompt again before each token
        for options in ({}, {"num_beams": 2}):
            given = {"input_ids": samples[0][None], "attention_mask": mask[:1], "max_new_tokens": 6, **options}
            found = model.generate(**given, do_sample=False)
            assert torch.equal(found, peft_model.generate(**given, **right, do_sample=False))
        torch.manual_seed(1)
        drawn = model.generate(**given, do_sample=True, top_k=5)
        torch.manual_seed(1)
        assert torch.equal(drawn, peft_model.generate(**given, **right, do_sample=True, top_k=5))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_files_of_embedsurgery(kind: str, tmp_path: Path) -> None:
    model, att = prompted(kind, task_type="SEQ_CLS" if kind == "bert-cls" else None)
    att.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS.get(kind, "CAUSAL_LM")
    assert set(config) <= set(peft.PromptTuningConfig(num_virtual_tokens=1).to_dict()) | {"peft_version"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    heads = {
        "bert-cls": {"base_model.classifier.weight", "base_model.classifier.bias"},
        "bert-qa": {"base_model.qa_outputs.weight", "base_model.qa_outputs.bias"},
    }.get(kind, set())
    assert tensors.keys() == {"prompt_embeddings", *heads}
    assert tensors["prompt_embeddings"].shape == (N, 16)
    assert tensors["prompt_embeddings"].dtype == torch.float32
    check_same_outputs(kind, model, peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval())
    again = es.load(tmp_path)
    assert again.manifest == att.adapter().manifest
    assert again.raw == att.adapter().raw


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(UNCHECKED)
def test_files_of_peft_are_read(kind: str, tmp_path: Path) -> None:
    peft_model = save_with_peft(kind, tmp_path)
    model = tiny(kind)
    att = es.attach(model, es.load(tmp_path))
    check_same_outputs(kind, model, peft_model)
    att.adapter().save(tmp_path / "again")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again"))
    for name in ("peft_version", "modules_to_save"):
        before.pop(name, None)
    assert after == before


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.filterwarnings(UNCHECKED)
def test_saved_p_tuning_is_a_soft_prompt(kind: str, tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=8, encoder_reparameterization_type=kind
    )
    torch.manual_seed(2)
    peft_model = peft.get_peft_model(tiny("llama"), config).eval()
    peft_model.save_pretrained(tmp_path)
    model = tiny("llama")
    es.attach(model, es.load(tmp_path))
    check_same_outputs("llama", model, peft_model)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_other_methods_of_peft_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make = {
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
        "CPT": peft.CPTConfig,
    }[kind]
    more = {
        "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
        "CPT": {"cpt_token_ids": [0, 1, 2, 3], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    }.get(kind, {})
    if kind != "CPT":
        more["num_virtual_tokens"] = N
    peft.get_peft_model(tiny("llama"), make(task_type="CAUSAL_LM", **more)).save_pretrained(tmp_path)
    with raises(UnsupportedError, where="adapter_config.json", expected="PROMPT_TUNING", found=kind):
        es.load(tmp_path)


def test_the_reason_for_refusing_prefix_tuning(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    with raises(UnsupportedError, found=NO_ROWS["PREFIX_TUNING"]):
        es.load(tmp_path)


@pytest.mark.filterwarnings(UNCHECKED)
def test_a_head_that_was_trained_with_the_prompt_must_be_in_the_model(tmp_path: Path) -> None:
    peft_model = save_with_peft("bert-cls", tmp_path)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    peft_model.save_pretrained(tmp_path)
    model, adapter = tiny("bert-cls"), es.load(tmp_path)
    with raises(BaseMismatchError, where="classifier.weight", hint="adapter.tensors"):
        es.attach(model, adapter)
    assert es.get_attachment(model) is None
    head = {n.removeprefix("base_model."): t for n, t in adapter.tensors.items() if n.startswith("base_model.")}
    assert model.load_state_dict(head, strict=False).unexpected_keys == []
    es.attach(model, adapter)
    check_same_outputs("bert-cls", model, peft_model)


def test_prompts_of_both_submodules_are_loaded(tmp_path: Path) -> None:
    _, att = prompted("t5", submodules=("encoder", "decoder"))
    att.save(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (2 * N, 16)
    again = es.attach(tiny("t5"), es.load(tmp_path))
    assert torch.equal(vectors(again), vectors(att))
    assert again.adapter().manifest.config["submodules"] == ["encoder", "decoder"]


@pytest.mark.filterwarnings(UNCHECKED)
def test_another_base_is_refused(tmp_path: Path) -> None:
    import transformers as tr

    _, att = prompted("llama")
    att.save(tmp_path)
    with raises(BaseMismatchError, where=("model.embed_tokens.weight", "rows"), expected="sha256"):
        es.attach(tiny("llama", seed=9), es.load(tmp_path))
    save_with_peft("llama", tmp_path / "peft")
    wide = tr.LlamaForCausalLM(
        tr.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    for folder in (tmp_path, tmp_path / "peft"):
        with raises(BaseMismatchError, expected=16, found=32):
            es.attach(wide, es.load(folder))


def test_a_model_that_reads_no_tokens_is_refused() -> None:
    import transformers as tr

    vision = tr.ViTModel(
        tr.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    with pytest.raises(es.errors.TableError):
        es.attach(vision, es.SoftPromptConfig(N))
    bag = torch.nn.Sequential(torch.nn.Embedding(9, 3))
    with pytest.raises((es.errors.TableError, UnsupportedError)):
        es.attach(bag, es.SoftPromptConfig(N))


def spoil(folder: Path, what: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if what == "count":
        config["num_virtual_tokens"] = 3
    elif what == "no count":
        config["num_virtual_tokens"] = "4"
    elif what == "no tensor":
        tensors = {}
    elif what == "strangers":
        tensors["other"] = torch.zeros(2)
    elif what == "dtype":
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"].long()
    else:
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"].reshape(-1)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("count", {"where": "prompt_embeddings", "expected": 3, "found": "(4, 16)"}),
        ("no count", {"where": "adapter_config.json", "found": "'4'"}),
        ("no tensor", {"where": "adapter_model.safetensors", "found": "no tensor"}),
        ("strangers", {"where": "adapter_model.safetensors", "expected": "prompt_embeddings", "found": "other"}),
        ("dtype", {"where": "prompt_embeddings", "found": "I64"}),
        ("shape", {"where": "prompt_embeddings", "found": "(64,)"}),
    ],
)
def test_files_that_contradict_themselves(what: str, fields: dict[str, Any], tmp_path: Path) -> None:
    save_with_peft("llama", tmp_path)
    spoil(tmp_path, what)
    with raises(AdapterError, **fields):
        es.load(tmp_path)


def test_a_file_of_peft_does_not_identify_its_base(tmp_path: Path) -> None:
    save_with_peft("llama", tmp_path)
    with pytest.warns(EmbedSurgeryWarning, match=MAIN_INPUT):
        es.attach(tiny("llama"), es.load(tmp_path))
