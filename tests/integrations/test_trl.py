"""TRL's SFTTrainer and DPOTrainer.

SFTTrainer patches the model's forward with a fused loss that reads the head's weight directly.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tr
import trl

import embedsurgery as es
from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError
from embedsurgery.integrations import EmbedSurgeryCallback
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, losses, rows
from tests.support.models import tiny, write_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning"),
]


def sft(model: Any, folder: Path, more: dict[str, Any] | None = None, **options: Any) -> Any:
    """An SFTTrainer of four steps on texts that hold the trained tokens."""
    write_tokenizer(folder)
    tokenizer = tr.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="t0", eos_token="t2"
    )
    texts = [" ".join(f"t{i}" for i in (8 + n, 5, 9 + n, 10, 7, 11 + n)) for n in range(12)]
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 3,
        "max_length": 16,
        "dataset_num_proc": None,
    } | (more or {})
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        callbacks=[EmbedSurgeryCallback()],
        **options,
    )


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
def test_sft_trains_the_rows_and_resumes(kind: str, tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        model = tiny(kind)
        attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
        before, start = state_bits(model), rows(attachment)
        trained = sft(model, tmp_path)
        trained.train(resume_from_checkpoint=resume)
        assert state_bits(model) == before
        assert ((rows(attachment) - start).abs().amax(dim=1) > 0.02).all()
        runs.append((rows(attachment), losses(trained)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert len(runs[0][1]) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "compiled"), [("llama-tied", False), ("llama-untied", False), ("llama-tied", True), ("llama-untied", True)]
)
def test_the_numbers_match_a_hand_written_loop_on_the_dense_model(kind: str, compiled: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = tiny(kind)
    targets = ["embed_tokens"] if kind == "llama-tied" else ["embed_tokens", "lm_head"]
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES, target_modules=targets))
    dense = tiny(kind).train()
    weights = [dense.model.embed_tokens.weight, dense.lm_head.weight][: len(targets)]
    with torch.no_grad():
        for part, weight in zip(attachment.parameters(), weights, strict=True):
            part.normal_(std=0.3)
            weight[INDICES] = part
    more = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    trained = sft(model, tmp_path, {"optim": "sgd", "lr_scheduler_type": "constant", **more})
    seen: list[dict[str, torch.Tensor]] = []
    collate = trained.data_collator
    trained.data_collator = lambda items: seen.append(collate(items)) or seen[-1]
    trained.train()
    found = []
    for inputs in seen[:4]:
        value = dense(**{name: tensor for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}).loss
        gradients = [gradient[INDICES] for gradient in torch.autograd.grad(value, weights)]
        norm = torch.cat(gradients).norm()
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight[INDICES] -= 3e-2 * gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        found.append(value.item())
    assert losses(trained) == pytest.approx(found, abs=1e-5)
    for part, weight in zip(attachment.parameters(), weights, strict=True):
        torch.testing.assert_close(part.detach(), weight.detach()[INDICES], rtol=0, atol=2e-6)


def test_sft_with_lora_trains_both(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny("llama-tied"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES), freeze=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    sft(model, tmp_path).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora" in name or "embedsurgery" in name}
    saved = es.load(tmp_path / "out/checkpoint-4/embedsurgery/default")
    assert torch.equal(saved.tensors["model.embed_tokens.weight"], rows(attachment))
    assert (tmp_path / "out/checkpoint-4/adapter_model.safetensors").exists()


def test_sft_that_wraps_an_attached_model_freezes_the_rows_and_warns(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
    start = rows(attachment)
    trained = sft(model, tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.unfreeze\(\)"):
        trained.train()
    assert torch.equal(rows(attachment), start)
    trained = sft(trained.model, tmp_path)
    attachment.unfreeze()
    trained.train()
    assert ((rows(attachment) - start).abs().amax(dim=1) > 0.02).all()


def test_hashing_a_model_with_live_rows_is_refused() -> None:
    """TRL uses the hash as the cache key of a reference's log-probabilities (``precompute_ref_log_probs``)."""
    from trl.trainer.utils import hash_module

    model = tiny("llama-tied")
    base = hash_module(model)
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
    with raises(UnsupportedError, where="precompute_ref_log_probs", found="default"):
        hash_module(model)
    with attachment.disabled():
        assert hash_module(model) == base
    attachment.merge()
    hash_module(model)


def dpo(model: Any, folder: Path, **options: Any) -> Any:
    """A DPOTrainer of three steps on pairs that hold the trained tokens."""
    write_tokenizer(folder)
    tokenizer = tr.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="t0", eos_token="t2"
    )
    pairs = {"prompt": ["t8 t5 t9"] * 8, "chosen": ["t7 t5 t10"] * 8, "rejected": ["t11 t12 t5"] * 8}
    args = trl.DPOConfig(
        output_dir=str(folder / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
        seed=3,
        save_strategy="no",
        max_length=16,
        gradient_checkpointing=False,
    )
    return trl.DPOTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(pairs), **options
    )


def test_the_reference_of_dpo_has_no_rows(tmp_path: Path) -> None:
    """With LoRA from peft_config= the reference is the base, as with ref_model= a copy of it."""
    found = []
    for how in ("a copy", "LoRA by the trainer"):
        model = tiny("llama-tied")
        attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
        more: dict[str, Any] = {"ref_model": copy.deepcopy(model)}
        if how == "LoRA by the trainer":
            more = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
        trained = dpo(model, tmp_path, **more)
        attachment.unfreeze()
        for name, parameter in trained.model.named_parameters():
            parameter.requires_grad_("embedsurgery" in name)  # policy and reference differ in the rows alone
        trained.train()
        found.append([(log["loss"], log["rewards/margins"]) for log in trained.state.log_history if "loss" in log])
    assert found[0] == found[1]
    assert found[0][0][1] == 0.0
    assert found[0][-1][1] > 0.01


def test_a_reference_with_live_rows_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tiny("llama-tied"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES), freeze=False)
    start = rows(attachment)
    with raises(UnsupportedError, where="'ref'", found="default", hint="ref_model=copy.deepcopy(model)"):
        dpo(model, tmp_path).train()
    assert torch.equal(rows(attachment), start)
