"""Soft prompts: vectors before the embedded input are trained, and the model stays frozen.

Lester et al. 2021, https://arxiv.org/abs/2104.08691; the files are those of PEFT's prompt tuning,
https://huggingface.co/docs/peft/package_reference/prompt_tuning. ``runtime/prompts/`` inserts a live prompt before an
input. Starting, baking and describing a prompt is imported when it is done, because every merge imports this file, and
few merge a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.plan import Plan
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.surgeries.soft_prompt.config import NAME, SUBMODULES, TENSOR, SoftPromptConfig, submodules_of
from embedsurgery.surgeries.soft_prompt.peft_files import (
    NO_ROWS,
    P_TUNING,
    heads_for,
    prompt_from_files,
    prompt_from_peft,
    prompt_to_peft,
)
from embedsurgery.surgeries.soft_prompt.peft_files import PEFT_TYPE as PROMPT_TUNING
from embedsurgery.surgeries.surgery import BakeContext, Base, RowOverride, Surgery

__all__ = ["NO_ROWS", "PROMPT_TUNING", "P_TUNING", "PromptOverride", "SoftPrompt", "SoftPromptConfig"]

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of a class's name -> PEFT's name of its task. That of all others is FEATURE_EXTRACTION."""


@dataclass(frozen=True)
class PromptOverride(RowOverride):
    """While the adapter is live, virtual tokens are inserted before the input of the model, or of its submodules.

    Attributes:
        table: Name of the table whose lookup returns the vectors of real tokens.
        tensor: The tensor's name in the adapter, (n x submodules, D).
        indices: Empty, because no row of the table changes.
        count: n.
        submodules: The submodules that get a prompt, in the order of their rows.
        keep: Whether outputs keep the prompt's positions.
    """

    count: int = 0
    submodules: tuple[str, ...] = ("model",)
    keep: bool = False


class SoftPrompt(Surgery):
    """Trains one tensor of virtual tokens. The table in its record only identifies the base that it was made for."""

    name = NAME
    makes_tokens = True

    def start(self, config: SoftPromptConfig, store: Store, base: Base) -> Adapter:
        """Return an adapter with initial virtual tokens.

        Raises:
            TableError: The model has no table of input embeddings.
            UnsupportedError: The table is quantised, or a submodule reads no tokens.
            ConfigError: A text without tokenizer or tokens.
        """
        from embedsurgery.surgeries.soft_prompt.initial_rows import make_initial_rows
        from embedsurgery.surgeries.whole_tables import sampled_rows

        table = store.graph.main_input()
        store.check_editable(table)
        names = _choose_submodules(config, base)
        rows = make_initial_rows(config, config.num_virtual_tokens * len(names), store, table, base)
        sampled = sampled_rows(table)
        record = TableRecord(
            table.name,
            (),
            (),
            table.shape,
            table.dtype,
            sampled=sampled,
            fingerprint=Fingerprint.of(rows_of(store, table, sampled)),
        )
        task = config.task_type or _task_of(base)
        facts = {"submodules": list(names), "task_type": task, "token_dim": table.shape[1], **_model_sizes(base.config)}
        manifest = Manifest(
            self.name,
            self.version,
            config.to_json() | facts,
            (record,),
            base.name,
            base.revision,
            library_version=__version__,
        )
        return Adapter(manifest, {TENSOR: rows} | heads_for(task, base.heads), self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """Return the one override."""
        config = adapter.manifest.config
        (record,) = adapter.manifest.tables
        return (
            PromptOverride(
                table=located[record.name].name,
                tensor=TENSOR,
                indices=(),
                count=int(config["num_virtual_tokens"]),
                submodules=submodules_of(config),
                keep=bool(config.get("keep_prompt", False)),
            ),
        )

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """Refuse: a prompt needs tokens and rows of its own, which only `bake` can plan."""
        raise UnsupportedError(
            "a soft prompt cannot be merged into existing rows",
            where=repr(adapter),
            hint="use embedsurgery.merge or merge_checkpoint, which turn it into tokens",
        )

    def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
        """Plan tokens for the virtual tokens, with rows in every table of the vocabulary."""
        from embedsurgery.surgeries.soft_prompt.baking import plan_prompt

        return plan_prompt(adapter, context)

    def card_lines(self, adapter: Adapter) -> list[str]:
        """Return the lines of a model card about the virtual tokens."""
        from embedsurgery.surgeries.soft_prompt.nearest_tokens import card_lines

        return card_lines(adapter, None)

    def card_lines_beside(self, adapter: Adapter, base: Store) -> list[str]:
        """As `card_lines`, with the nearest tokens of a base."""
        from embedsurgery.surgeries.soft_prompt.nearest_tokens import card_lines

        return card_lines(adapter, base)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return prompt_to_peft(adapter)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return prompt_from_files(files, adapter)

    def from_peft(self, files: PeftFiles) -> Adapter:
        return prompt_from_peft(files, self)


def _choose_submodules(config: SoftPromptConfig, base: Base) -> tuple[str, ...]:
    """Return the submodules that get a prompt.

    Raises:
        UnsupportedError: The model lacks one of them, or it reads no tokens.
    """
    available = base.submodules or ("model",)
    chosen = config.submodules or available[:1]
    missing = [name for name in chosen if name not in available]
    if missing:
        raise UnsupportedError(
            "a soft prompt needs a submodule that reads tokens",
            where=base.architecture or None,
            expected=" or ".join(available),
            found=", ".join(missing),
        )
    return tuple(name for name in SUBMODULES if name in chosen)


def _task_of(base: Base) -> str:
    task = next((task for end, task in _TASKS.items() if base.architecture.endswith(end)), None)
    if task is None and base.architecture.endswith("ForConditionalGeneration"):
        task = "SEQ_2_SEQ_LM" if _config_value(base.config, "is_encoder_decoder") else "CAUSAL_LM"
    return task or "FEATURE_EXTRACTION"


def _model_sizes(config: Any) -> dict[str, Any]:
    """Return the numbers of layers and attention heads, which PEFT's config has."""
    text = _config_value(config, "text_config")
    config = config if text is None else text
    layers = ("num_hidden_layers", "num_layers", "n_layer")
    heads = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    return {
        "num_layers": next((v for v in (_config_value(config, name) for name in layers) if isinstance(v, int)), None),
        "num_attention_heads": next(
            (v for v in (_config_value(config, name) for name in heads) if isinstance(v, int)), None
        ),
    }


def _config_value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
