"""The contract of a surgery: what a technique implements, and what it gets and returns.

A surgery makes an adapter from a config, says what the runtime overrides while the adapter is live, and plans the edits
that bake it in. It returns data, and writes to no file, model or store. ``checked.py`` calls it and checks what it
returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.carried_tokens import BaseState, NewTokens
from embedsurgery.graph import Table
from embedsurgery.plan import Plan
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that surgeries use."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str]:
        """Return the tokens' texts."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter is made for, apart from its tables.

    Attributes:
        name: Name or path.
        revision: Its revision.
        tokenizer: Its tokenizer, to record the tokens' texts.
        architecture: Name of the model's class.
        config: The model's config, an object or a mapping; None if it has none.
        submodules: The parts that read token ids: "model", or those of "encoder" and "decoder" that do.
        heads: Parameter name -> values of the heads for classes and answers, which are trained anew for each task.
        new_tokens: The tokens that `add_tokens` added, one entry for each call.
    """

    name: str | None = None
    revision: str | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    architecture: str = ""
    config: Any = field(default=None, repr=False)
    submodules: tuple[str, ...] = ()
    heads: Mapping[str, RawArray] = field(default_factory=dict, repr=False)
    new_tokens: tuple[NewTokens, ...] = ()


@dataclass(frozen=True)
class BakeContext:
    """What an adapter is baked into.

    Attributes:
        store: The base.
        located: Table record's name -> table of the store.
        state: The base's tokens and sizes, after the edits that are planned so far. Planning updates it.
        tokens: Returns the tokens of the base's tokenizer; None if there is no tokenizer.
        label: The adapter's name.
        alone: Whether no other adapter of its surgery is baked in with it.
        options: The user's options, for surgeries that have some; None for the defaults.
    """

    store: Store
    located: Mapping[str, Table]
    state: BaseState
    tokens: Callable[[], KnownTokens] | None = None
    label: str = "adapter"
    alone: bool = True
    options: Any = None


@dataclass(frozen=True)
class RowOverride:
    """While the adapter is live, a trainable tensor replaces some rows of a table, at every site of the table.

    Attributes:
        table: The table's name in the model's graph.
        tensor: The tensor's name in the adapter, (K, D).
        indices: The rows of the table, (K,), in the tensor's order.
    """

    table: str
    tensor: str
    indices: tuple[int, ...]


class Surgery(ABC):
    """A technique. It has no state: one instance serves every adapter of its kind."""

    name: str
    version: int = 1
    makes_tokens: bool = False
    """Whether its adapters become tokens when they are baked in."""

    @abstractmethod
    def start(self, config: Any, store: Store, base: Base) -> Adapter:
        """Return the adapter that training starts from.

        Args:
            config: An instance of the registered config class.
            store: The model's tables.
            base: The model, apart from its tables.

        Raises:
            EmbedSurgeryError: The config does not fit the model.
        """

    @abstractmethod
    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """Return what the runtime overrides while the adapter is live.

        Args:
            adapter: The adapter.
            located: Table record's name -> table of the model.
        """

    @abstractmethod
    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """Return the edits that bake the adapter in.

        Args:
            adapter: The adapter.
            located: Table record's name -> table of the store.
        """

    def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
        """As `plan`, for a surgery that needs more of the base than its tables."""
        return self.plan(adapter, context.located)

    @abstractmethod
    def to_peft(self, adapter: Adapter) -> PeftFiles:
        """Return the content of the files that PEFT reads."""

    @abstractmethod
    def from_peft(self, files: PeftFiles) -> Adapter:
        """Return an adapter from files without embedsurgery's manifest.

        Raises:
            AdapterError: The files contradict themselves.
        """

    @abstractmethod
    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        """Return an adapter with the tensors of its files.

        Args:
            files: The content of its files.
            adapter: The adapter with its manifest and no tensors.

        Raises:
            AdapterError: The tensors are not those of the manifest.
        """


@dataclass(frozen=True)
class SurgeryRecord:
    """Registers a surgery.

    Attributes:
        name: Its name, unique among all plugins.
        config_class: The frozen dataclass that asks for it.
        surgery: The technique.
        peft_type: ``peft_type`` in adapter_config.json.
        shares_model_with: Names of the surgeries whose adapters can be live on one model together with its own; its own
            name is among them if several of its adapters can.
        also_reads: Further values of ``peft_type`` whose files it reads, or refuses with a reason.
    """

    name: str
    config_class: type
    surgery: Surgery
    peft_type: str
    shares_model_with: frozenset[str] = frozenset()
    also_reads: frozenset[str] = frozenset()
