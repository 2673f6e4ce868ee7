"""Small data sets, attached models and Trainers for the tests of integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import embedsurgery as es
from tests.support.models import VOCABULARY, tiny

INDICES = [5, 7]


def examples(kind: str = "llama-tied", count: int = 12, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences with the trained tokens; for BERT, some labels are masked."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(8, VOCABULARY, (length,), generator=generator)
        ids[[1, 4]] = torch.tensor(INDICES)
        labels = ids.clone()
        if kind == "bert":
            labels[torch.rand(length, generator=generator) < 0.5] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def batch(kind: str = "llama-tied", count: int = 4) -> dict[str, torch.Tensor]:
    """One batch of `examples`."""
    made = examples(kind, count)
    return {name: torch.stack([example[name] for example in made]) for name in made[0]}


def attach_tiny(kind: str = "llama-tied", **options: Any) -> tuple[Any, Any]:
    """Attach `INDICES` of a tiny model. Returns the model and its attachment."""
    model = tiny(kind)
    return model, es.attach(model, es.TrainableTokensConfig(INDICES), **options)


def rows(attachment: Any) -> torch.Tensor:
    """A copy of an attachment's rows; it has one adapter for one table."""
    (parameter,) = attachment.parameters()
    return parameter.detach().clone()


def trainer(model: Any, folder: Path, *, kind: str = "llama-tied", callbacks: Any = (), **options: Any) -> Any:
    """A Trainer with six steps that saves after steps 3 and 6."""
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
