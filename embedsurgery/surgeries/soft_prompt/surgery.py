"""Soft prompts: vectors that stand before the embedded input are trained, the model staying as it is.

Lester et al. 2021, https://arxiv.org/abs/2104.08691; the files are those of PEFT's prompt tuning,
https://huggingface.co/docs/peft/package_reference/prompt_tuning. How a prompt comes before an input is
``runtime/prompts.py``'s. What starting, baking and describing one takes is imported when it is done: every merge looks
at this file, few are of a prompt.
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
from embedsurgery.surgeries.soft_prompt.peft_files import NO_ROWS, P_TUNING, from_files, from_peft, heads_for, to_peft
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
"""End of a class's name -> what PEFT calls its task; all others extract features."""


@dataclass(frozen=True)
class PromptOverride(RowOverride):
    """While the adapter is live, virtual tokens stand before what the model, or a submodule of it, is given.

    Attributes:
        table: Name of the table whose lookup gives the vectors of real tokens.
        tensor: The tensor's name in the adapter, (n x submodules, D).
        indices: Empty: no row of the table changes.
        count: n.
        submodules: What the prompts stand in front of, in the order of their rows.
        keep: Whether outputs keep the prompt's positions.
    """

    count: int = 0
    submodules: tuple[str, ...] = ("model",)
    keep: bool = False


class SoftPrompt(Surgery):
    """One tensor of virtual tokens; the table it is recorded with only tells which base it was made for."""

    name = NAME
    makes_tokens = True

    def start(self, config: SoftPromptConfig, store: Store, base: Base) -> Adapter:
        """Virtual tokens as they begin.

        Raises:
            TableError: The model has no table of input embeddings.
            UnsupportedError: A table whose rows are no plain numbers; a submodule that reads no tokens.
            ConfigError: No tokenizer for a text, or a text without tokens.
        """
        from embedsurgery.surgeries.soft_prompt.initial_rows import first_rows
        from embedsurgery.surgeries.whole_tables import sampled_rows

        table = store.graph.main_input()
        store.check_editable(table)
        names = _chosen(config, base)
        rows = first_rows(config, config.num_virtual_tokens * len(names), store, table, base)
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
        task = config.task_type or _task(base)
        facts = {"submodules": list(names), "task_type": task, "token_dim": table.shape[1], **_sizes(base.config)}
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
        """The one override."""
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
        """A prompt needs rows and tokens of its own, which the base has to be asked for."""
        raise UnsupportedError(
            "a soft prompt is no change to rows that are there",
            where=repr(adapter),
            hint="embedsurgery.merge or merge_checkpoint makes tokens of it",
        )

    def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
        """Tokens for the virtual tokens, with rows in every table of the vocabulary."""
        from embedsurgery.surgeries.soft_prompt.baking import plan_prompt

        return plan_prompt(adapter, context)

    def card_lines(self, adapter: Adapter) -> list[str]:
        """What a model card says of the virtual tokens."""
        from embedsurgery.surgeries.soft_prompt.nearest_tokens import card_lines

        return card_lines(adapter, None)

    def card_lines_beside(self, adapter: Adapter, base: Store) -> list[str]:
        """As `card_lines`, with the nearest words of a base that is at hand."""
        from embedsurgery.surgeries.soft_prompt.nearest_tokens import card_lines

        return card_lines(adapter, base)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return to_peft(adapter)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return from_files(files, adapter)

    def from_peft(self, files: PeftFiles) -> Adapter:
        return from_peft(files, self)


def _chosen(config: SoftPromptConfig, base: Base) -> tuple[str, ...]:
    """What gets a prompt of its own.

    Raises:
        UnsupportedError: The model has no such submodule, or it reads no tokens.
    """
    there = base.submodules or ("model",)
    asked = config.submodules or there[:1]
    missing = [name for name in asked if name not in there]
    if missing:
        raise UnsupportedError(
            "a soft prompt stands before tokens, and these read none here",
            where=base.architecture or None,
            found=", ".join(missing),
            expected=f"submodules of {', '.join(there)}",
        )
    return tuple(name for name in SUBMODULES if name in asked)


def _task(base: Base) -> str:
    task = next((task for end, task in _TASKS.items() if base.architecture.endswith(end)), None)
    if task is None and base.architecture.endswith("ForConditionalGeneration"):
        task = "SEQ_2_SEQ_LM" if _get(base.config, "is_encoder_decoder") else "CAUSAL_LM"
    return task or "FEATURE_EXTRACTION"


def _sizes(config: Any) -> dict[str, Any]:
    """Layers and heads, which PEFT's files name beside the prompt."""
    text = _get(config, "text_config")
    config = config if text is None else text
    layers = ("num_hidden_layers", "num_layers", "n_layer")
    heads = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    return {
        "num_layers": next((v for v in (_get(config, name) for name in layers) if isinstance(v, int)), None),
        "num_attention_heads": next((v for v in (_get(config, name) for name in heads) if isinstance(v, int)), None),
    }


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
