"""Tiny, randomly initialised models of every language-model architecture of the installed transformers.

Builds a small model in evaluation mode from a class name, with its inputs and vocabulary logits, without a download and
without the test suite of transformers. Configs are made small generically: each numeric field of a config class and of
its nested configs is looked up by name in ``zoo_overrides.DIMENSIONS``. Exceptions are in the per-class tables there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support import zoo_overrides as table

UNBUILDABLE: dict[str, str] = table.UNBUILDABLE

FIRST_ORDINARY_ID, LAST_ORDINARY_ID = 12, 60
"""The range of ordinary ids. Every special id is moved out of it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture: its class name, with an optional ``[variant]``, and the kind of its inputs."""

    name: str
    kind: str

    @property
    def class_name(self) -> str:
        return self.name.partition("[")[0]


@functools.cache
def _model_types() -> dict[str, dict[str, str]]:
    """Return class name -> model type, for each mapping of ``modeling_auto`` in ``TASKS``."""
    found: dict[str, dict[str, str]] = {}
    for task in table.TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        found[task] = {}
        for model_type, entry in names.items():
            for name in entry if isinstance(entry, (tuple, list)) else (entry,):
                found[task].setdefault(name, model_type)
    return found


def _kind(name: str, tasks: set[str]) -> str:
    if name in table.KINDS:
        return table.KINDS[name]
    conditional = name.endswith("ForConditionalGeneration")
    if "CAUSAL_LM" in tasks and not conditional:
        return "causal"
    if "MASKED_LM" in tasks and not conditional:
        return "masked"
    if tasks & {"IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"}:
        return "multimodal"
    return "seq2seq"


@functools.cache
def cases() -> tuple[Case, ...]:
    """Return every architecture that can be built, sorted by name. Imports no modelling file."""
    tasks: dict[str, set[str]] = {}
    for task, names in _model_types().items():
        for name in names:
            tasks.setdefault(name, set()).add(task)
    found = [Case(name, _kind(name, of)) for name, of in tasks.items() if name not in UNBUILDABLE]
    kinds = {case.name: case.kind for case in found}
    found += [Case(name, kinds[name.partition("[")[0]]) for name in table.VARIANTS]
    return tuple(sorted(found, key=lambda case: case.name))


def _model_class(case: Case) -> type[torch.nn.Module]:
    for task, names in _model_types().items():
        if case.class_name in names:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
            return mapping._load_attr_from_module(names[case.class_name], case.class_name)
    raise KeyError(case.name)


@functools.cache
def _register_vision_tower() -> None:
    """Register a small vision tower for Gemma 3n: the real one comes from timm, which is not installed."""
    from transformers import Gemma3nVisionConfig

    class VisionTower(PreTrainedModel):
        config_class = Gemma3nVisionConfig

        def __init__(self, config: Gemma3nVisionConfig) -> None:
            super().__init__(config)
            self.projection = torch.nn.Linear(config.hidden_size, config.hidden_size)
            self.post_init()

    AutoModel.register(Gemma3nVisionConfig, VisionTower, exist_ok=True)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _is_id(name: str) -> bool:
    return name.endswith(table.ID_SUFFIXES)


class _Shrinker:
    """Builds the tiny config of one case. Nested configs share special ids by name."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def config(
        self,
        config_class: type[PreTrainedConfig],
        given: dict[str, Any],
        defaults: dict[str, Any] | None = None,
    ) -> PreTrainedConfig:
        """Return the tiny config: ``given`` overrides the tables, and these ``defaults`` and the class."""
        fields = {field.name: _default(field) for field in dataclasses.fields(config_class)} | (defaults or {})
        given = copy.deepcopy({**table.CONFIGS.get(config_class.__name__, {}), **given})
        for field, consequence in table.WITH_FIELD.items():
            if field in fields:
                given = {**consequence, **given}
        kwargs = dict(defaults or {})
        nested = config_class.sub_configs_defaults
        for name, default in fields.items():
            if name not in nested and (value := self.value(name, default)) is not default:
                kwargs[name] = value
        for key, spec in nested.items():
            override = given.pop(key, None if spec.optional else {})
            if isinstance(override, dict):
                override = dict(override)
                model_type = override.pop("model_type", spec.model_type)
                concrete = issubclass(spec.config_class, PreTrainedConfig)
                nested_class = spec.config_class if concrete else CONFIG_MAPPING[model_type]
                inherited = spec.init_kwargs if model_type == spec.model_type else {}
                override = self.config(nested_class, override, inherited)
            kwargs[key] = override
        kwargs.update(given)
        return config_class(**kwargs)

    def value(self, name: str, default: Any) -> Any:
        if isinstance(default, bool):
            return default
        number = isinstance(default, (int, float))
        if number and any(part in name for part in table.NOISE):
            return type(default)(0)
        if name in table.DIMENSIONS and (number or name in table.EVEN_IF_NONE):
            return table.DIMENSIONS[name]
        if _is_id(name):
            return self.identifier(name, default)
        return default

    def identifier(self, name: str, default: Any) -> Any:
        if isinstance(default, (list, tuple)):
            return type(default)(self.identifier(f"{name}.{i}", one) for i, one in enumerate(default))
        if not isinstance(default, int) or default < FIRST_ORDINARY_ID:
            return default
        return self.ids.setdefault(name, table.VOCABULARY - 1 - len(self.ids))


def _config(case: Case, model_class: type[torch.nn.Module]) -> PreTrainedConfig:
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        raise TypeError(f"{case.name} has no config_class")
    given = dict(table.VARIANTS.get(case.name, {}))
    fields = {field.name for field in dataclasses.fields(config_class)}
    if "is_decoder" in fields:
        given.setdefault("is_decoder", case.kind == "causal")
    return _Shrinker().config(config_class, given)


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for key in config.sub_configs_defaults:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _nested(inner)


def _set_tie(config: PreTrainedConfig, tie: bool) -> None:
    """Set the tie flag at the top and in every nested config with a vocabulary."""
    config.tie_word_embeddings = tie
    for inner in _nested(config):
        if hasattr(inner, "tie_word_embeddings") and getattr(inner, "vocab_size", None) is not None:
            inner.tie_word_embeddings = tie


def build(case: Case, *, seed: int = 0, tie: bool | None = None) -> torch.nn.Module:
    """Build a tiny fp32 model of the case in evaluation mode, with every weight and bias randomised by the seed."""
    model_class = _model_class(case)
    if case.class_name in table.NEEDS_TIMM:
        _register_vision_tower()
    config = _config(case, model_class)
    if tie is not None:
        _set_tie(config, tie)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
    _randomise(model, seed)
    return model


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Randomise every parameter in place. Ties stay tied, sinusoids and most buffers stay unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * std

    done: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            sinusoid = "Sinusoid" in type(module).__name__ or ("position" in module_name and not tensor.requires_grad)
            if sinusoid or not tensor.is_floating_point():
                continue
            if isinstance(module, torch.nn.Embedding):
                tensor.copy_(noise(tensor, 0.4))
            elif tensor.ndim < 2 or leaf in table.NEAR_INITIAL:
                tensor.add_(noise(tensor, 0.1))
            else:
                tensor.copy_(noise(tensor, min(0.2, 1 / math.sqrt(tensor[0].numel()))))
        for leaf, tensor in module.named_buffers(recurse=False):
            if leaf in table.RANDOM_BUFFERS and tensor.is_floating_point():
                tensor.add_(noise(tensor, 0.1))
            elif leaf in table.SCALAR_BUFFERS and tensor.numel() == 1:
                tensor.fill_(table.SCALAR_BUFFERS[leaf])


def inputs(case: Case, model: torch.nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return keyword arguments for one forward: ordinary ids only, in two different samples."""
    generator = torch.Generator().manual_seed(seed + 1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(FIRST_ORDINARY_ID, LAST_ORDINARY_ID, (2, length), generator=generator)

    made = {"input_ids": ids(7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if case.kind == "seq2seq":
        made["decoder_input_ids"] = ids(5)
    for name, value in table.INPUTS.get(case.class_name, {}).items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, int):
            made[name] = ids(value)
        elif callable(value):
            made[name] = value(generator)
        else:
            made[name] = torch.randn(value, generator=generator)
    accepted = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        made = {name: value for name, value in made.items() if name in accepted}
    return made


def logits(output: Any) -> torch.Tensor:
    """Return the vocabulary logits of a model output."""
    for name in table.LOGIT_NAMES:
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError(f"{type(output).__name__} has no vocabulary logits")
