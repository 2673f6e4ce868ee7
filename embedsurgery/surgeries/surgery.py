"""What a surgery is: the contract between a technique and everything that serves it.

A surgery turns a config into an adapter, says what the runtime must override while the adapter is live, and plans the
edits that bake it in. It touches no file, no tensor of a model and no site: it returns data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.carried_tokens import NewTokens, State
from embedsurgery.graph import Table
from embedsurgery.plan import Plan
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens


class Tokenizer(Protocol):
    """What is asked of a tokenizer, as transformers names it."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str]:
        """The tokens' texts."""


@dataclass(frozen=True)
class Base:
    """What is known of the model that an adapter is made for, beside its tables.

    Attributes:
        name: Name or path.
        revision: Its revision.
        tokenizer: To record the tokens' texts.
        architecture: The model's class.
        config: The model's config, an object or a mapping; None where it has none.
        submodules: What of the model reads token ids: "model", or "encoder" and "decoder" as far as they do.
        heads: Parameter's name -> its values, of the heads for classes and answers, which begin anew for each task.
        new_tokens: What `add_tokens` gave it, call by call.
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
        state: What the base has, and after this adapter will have: planning brings it up to date.
        tokens: Gives what the base's tokenizer knows; None where no tokenizer is at hand.
        label: What the adapter is called.
        alone: Whether no other adapter of its surgery is baked in together with it.
        options: What a user asks of the baking, for surgeries that can be asked; None for nothing.
    """

    store: Store
    located: Mapping[str, Table]
    state: State
    tokens: Callable[[], KnownTokens] | None = None
    label: str = "adapter"
    alone: bool = True
    options: Any = None


@dataclass(frozen=True)
class RowOverride:
    """While the adapter is live, rows of a table are those of a trainable tensor, at every site of the table.

    Attributes:
        table: The table's name in the model's graph.
        tensor: The tensor's name in the adapter, (K, D).
        indices: The rows of the table, (K,), in the tensor's order.
    """

    table: str
    tensor: str
    indices: tuple[int, ...]


class Surgery(ABC):
    """A technique. Stateless: one instance serves every adapter of its kind."""

    name: str
    version: int = 1
    makes_tokens: bool = False
    """Whether an adapter of it becomes tokens when it is baked in."""

    @abstractmethod
    def start(self, config: Any, store: Store, base: Base) -> Adapter:
        """The adapter as training begins.

        Args:
            config: An instance of the registered config class.
            store: The model's tables.
            base: What else is known of the model.

        Raises:
            EmbedSurgeryError: The config does not fit the model.
        """

    @abstractmethod
    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """What the runtime overrides. ``located``: table record's name -> table of the model."""

    @abstractmethod
    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """The edits that bake the adapter in. ``located``: table record's name -> table of the store."""

    def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
        """As `plan`, for a surgery that has to know more of the base than where its tables are."""
        return self.plan(adapter, context.located)

    @abstractmethod
    def to_peft(self, adapter: Adapter) -> PeftFiles:
        """The content of the files that PEFT reads."""

    @abstractmethod
    def from_peft(self, files: PeftFiles) -> Adapter:
        """An adapter from files without our manifest.

        Raises:
            AdapterError: The files contradict themselves.
        """

    @abstractmethod
    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        """Fill an adapter that has our manifest and no tensors yet, from its files.

        Raises:
            AdapterError: The tensors are not those of the manifest.
        """


@dataclass(frozen=True)
class SurgeryRecord:
    """What the registry holds of a surgery.

    Attributes:
        name: Its name, once among all plugins.
        config_class: The frozen dataclass that asks for it.
        surgery: The technique.
        peft_type: ``peft_type`` in adapter_config.json.
        shares_model_with: Names of the surgeries that it can be live beside on one model, its own included where
            several adapters of it can.
        also_reads: Further values of ``peft_type`` whose files it reads, or refuses with a word on why.
    """

    name: str
    config_class: type
    surgery: Surgery
    peft_type: str
    shares_model_with: frozenset[str] = frozenset()
    also_reads: frozenset[str] = frozenset()
