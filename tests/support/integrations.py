"""Small data sets and Trainers, shared by the tests of integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import embedsurgery as es
from tests.support.models import VOCABULARY, tiny

INDICES = [5, 7]


def examples(kind: str = "llama-tied", count: int = 12, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences that hold the trained tokens; for BERT some labels are masked out."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(8, VOCABULARY, (length,), generator=generator)
        ids[[1, 4]] = torch.tensor(INDICES)
        labels = ids.clone()
        if kind == "bert":
            labels[torch.rand(length, generator=generator) < 0.5] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def batch(kind: str = "llama-tied", count: int = 4) -> dict[str, torch.Tensor]:
    """One batch of `examples`."""
    found = examples(kind, count)
    return {name: torch.stack([example[name] for example in found]) for name in found[0]}


def attached(kind: str = "llama-tied", **options: Any) -> tuple[Any, Any]:
    """A tiny model and its attachment."""
    model = tiny(kind)
    return model, es.attach(model, es.TrainableTokensConfig(INDICES), **options)


def rows(attachment: Any) -> torch.Tensor:
    """A copy of the rows of an attachment with one adapter of one table."""
    (parameter,) = attachment.parameters()
    return parameter.detach().clone()


def trainer(model: Any, folder: Path, *, kind: str = "llama-tied", callbacks: Any = (), **options: Any) -> Any:
    """A Trainer of six steps that saves after the third and the sixth."""
    import transformers as tr

    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    } | options
    return tr.Trainer(
        model=model,
        args=tr.TrainingArguments(**settings),
        train_dataset=examples(kind),
        eval_dataset=examples(kind, 4),
        callbacks=list(callbacks),
    )


def losses(trained: Any) -> list[float]:
    """The training loss of each logged step."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
