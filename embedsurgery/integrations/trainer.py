"""transformers' Trainer: the rows are saved in each checkpoint, and restored on resume and with the best model.

A Trainer's checkpoint holds the base's state dict and the optimizer's state. Resumed without this callback, AdamW
would go on with the moments of rows that are not there: the first optimizer step refuses that, and also where there
are no moments (SGD without momentum, ``save_only_model=True``), for the Trainer is seen to load a checkpoint.
"""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from embedsurgery.errors import AttachmentError, CheckpointError, EmbedSurgeryWarning
from embedsurgery.files.json_reading import read_json
from embedsurgery.integrations.beside import DIRECTORY, restore_rows, save_rows
from embedsurgery.runtime.attachment import Attachment, find
from embedsurgery.runtime.calls import frame_at, of_library

_RUN = "run.json"


class EmbedSurgeryCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Saves every attached adapter in each checkpoint, as ``checkpoint-N/embedsurgery/NAME``, and restores it.

    The rows' Parameters stay the same objects, so the optimizer's state stays theirs. The Trainer does not tell its
    callbacks which checkpoint it resumes from: the rows are looked for in ``output_dir`` and beside the best
    checkpoint, and a mark in ``trainer_state.json`` says which are the right ones.

    Args:
        resume_from_checkpoint: The checkpoint that ``train`` resumes from, where it lies elsewhere.

    Training with it raises:
        AttachmentError: Nothing is attached, or it is merged; or the checkpoint's rows are not found, or are of other
            adapters.
    """

    restores_rows = True
    """Says so to what sees the Trainer load a state dict."""

    def __init__(self, resume_from_checkpoint: str | None = None) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint
        self.run = ""

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` says of it: which run's rows lie in the checkpoint."""
        return {"args": {"resume_from_checkpoint": None}, "attributes": {"run": self.run}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores the rows when training resumes."""
        attachment = _attachment(kwargs["model"])
        if attachment.merged:
            raise AttachmentError(
                "the rows are merged into the weights, so that none can be trained",
                where="trainer.train()",
                hint="attachment.unmerge() first",
            )
        attachment.saved_beside = of_library(frame_at(1))
        if state.global_step > 0:
            restore_rows(attachment, self._resumed(args, state))
        self.run = uuid.uuid4().hex
        if not any(parameter.requires_grad for parameter in attachment.parameters()):
            warnings.warn(
                "every row is frozen, so that none will be trained: call the attachment's unfreeze() before "
                "the Trainer makes its optimizer",
                EmbedSurgeryWarning,
                stacklevel=2,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the rows in the checkpoint that was just written."""
        folder = self._written(args, state) / DIRECTORY
        save_rows(_attachment(kwargs["model"]), folder)
        if state.is_world_process_zero:  # last, so that it says that the rows are all there
            mark = {"run": self.run, "step": state.global_step}
            (folder / _RUN).write_text(json.dumps(mark) + "\n", encoding="utf-8")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores the best rows, after the Trainer has loaded the best checkpoint."""
        attachment = _attachment(kwargs["model"])
        attachment.saved_beside = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            restore_rows(attachment, Path(state.best_model_checkpoint) / DIRECTORY)

    def _written(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that the Trainer has just written."""
        name = f"checkpoint-{state.global_step}"
        if state.is_hyper_param_search:  # below a directory for the trial, whose name the Trainer keeps to itself
            for place in Path(args.output_dir).glob(f"*/{name}"):
                written = TrainerState.load_from_json(str(place / "trainer_state.json"))
                if self.run in self._runs(written):
                    return place
        return Path(args.output_dir) / name

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Where the rows lie of the checkpoint whose state the Trainer has loaded."""
        runs = self._runs(state)
        if not runs:
            raise AttachmentError(
                "the checkpoint holds no rows",
                where=f"step {state.global_step}",
                found="a checkpoint that was saved without EmbedSurgeryCallback",
                hint="start again, or attach an adapter and train without resuming",
            )
        name = f"checkpoint-{state.global_step}"
        places = [
            Path(given)
            for given in (self.resume_from_checkpoint, args.resume_from_checkpoint)
            if isinstance(given, str)
        ]
        places.append(Path(args.output_dir) / name)
        if state.best_model_checkpoint is not None:
            places.append(Path(state.best_model_checkpoint).parent / name)
        for place in places:
            if any(_marked(place / DIRECTORY, run, state.global_step) for run in runs):
                return place / DIRECTORY
        raise AttachmentError(
            "the rows of the checkpoint are not found",
            where=", ".join(dict.fromkeys(map(str, places))),
            expected=f"{DIRECTORY}/{_RUN} of run {' or '.join(sorted(runs))}, step {state.global_step}",
            hint="EmbedSurgeryCallback(resume_from_checkpoint=...) takes the directory that train() resumes from",
        )

    def _runs(self, state: TrainerState) -> set[str]:
        """Whose rows lie beside a checkpoint, as its state says: more than one where a callback is there twice."""
        saved = state.stateful_callbacks.get(type(self).__name__, [])
        return {entry["attributes"]["run"] for entry in (saved if isinstance(saved, list) else [saved])}


def _attachment(model: Any) -> Attachment:
    attachment = find(model)
    if attachment is None:
        raise AttachmentError(
            "nothing is attached to the Trainer's model",
            where=type(model).__name__,
            hint="embedsurgery.attach(model, config) before trainer.train()",
        )
    return attachment


def _marked(folder: Path, run: str, step: int) -> bool:
    try:
        return read_json(folder / _RUN) == {"run": run, "step": step}
    except CheckpointError:
        return False
