"""Does what must be refused; writes the error of each rank."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import embedsurgery as es
from embedsurgery.errors import EmbedSurgeryError
from tests.support.distributed.cases import ROWS, attached, batch, blocks, loss_of, wrap
from tests.support.distributed.described import Described, describe
from tests.support.distributed.workers import leave
from tests.support.models import tiny


class Functional(nn.Module):
    """A lookup whose module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Embedding(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.memory.weight)


CASES: dict[str, Callable[[Path], Any]] = {}


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


def config() -> es.TrainableTokensConfig:
    return es.TrainableTokensConfig(ROWS)


def step(model: nn.Module) -> None:
    loss_of(model, batch(0)).backward()


@case
def attached_after_sharding(out: Path) -> None:
    model = wrap(tiny("llama-tied"), "fsdp-layers")
    attachment = es.attach(model, config())
    with torch.no_grad():
        loss_of(model, batch(0))  # inference is correct
    assert not any(hasattr(p, "_local_tensor") for p in attachment.parameters())
    step(model)


@case
def attached_after_sharding_while_the_root_is_gathered(out: Path) -> None:
    model = wrap(tiny("llama-tied"), "fsdp-root")
    with torch.no_grad():
        loss_of(model, batch(0))
    assert not any(hasattr(p, "_local_tensor") for p in model.parameters())
    es.attach(model, config())
    step(model)


@case
def attached_to_a_part_of_what_was_sharded(out: Path) -> None:
    model = nn.Sequential(tiny("llama-tied"))
    fully_shard(model)
    es.attach(model[0], config())
    model(batch(0)).logits.sum().backward()


@case
def ignored_by_fully_shard(out: Path) -> None:
    model = attached("llama-tied")
    fully_shard(model, ignored_params=set(es.get_attachment(model).parameters()))
    step(model)


@case
def only_the_blocks_are_sharded(out: Path) -> None:
    model = attached("llama-tied")
    for block in blocks(model):
        fully_shard(block)
    step(model)


@case
def attached_to_ddp(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(tiny("llama-tied"))
    es.attach(model, config())
    step(model)


@case
def a_prompt_attached_to_ddp(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(tiny("llama-tied"))
    es.attach(model, es.SoftPromptConfig(num_virtual_tokens=2))
    step(model)


@case
def a_prompt_attached_after_sharding(out: Path) -> None:
    model = wrap(tiny("llama-tied"), "fsdp-layers")
    es.attach(model, es.SoftPromptConfig(num_virtual_tokens=2))
    step(model)


@case
def a_table_that_only_functions_read_attached_to_ddp(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(Functional())
    es.attach(model, es.TrainableTokensConfig([1], target_modules=["memory"]), materialize=True)
    model(torch.tensor([[1, 2]])).sum().backward()


@case
def attached_inside_ddp(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(tiny("llama-tied"))
    es.attach(model.module, config(), freeze=False)
    step(model)


@case
def attached_to_ddp_and_compiled(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(tiny("llama-tied"))
    es.attach(model, config())
    step(torch.compile(model, backend="eager"))


@case
def attached_after_sharding_and_compiled(out: Path) -> None:
    model = wrap(tiny("llama-tied"), "fsdp-layers")
    es.attach(model, config())
    model.compile(backend="eager")
    step(model)


@case
def attached_again_under_the_name_of_a_removed_adapter(out: Path) -> None:
    model = attached("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig([9]), name="second")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    step(wrapped)
    attachment.remove("second")
    es.attach(model, es.TrainableTokensConfig([9]), name="second")
    step(wrapped)


@case
def frozen_while_ddp_was_made(out: Path) -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, config(), freeze=False)
    for parameter in attachment.parameters():
        parameter.requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(model)
    attachment.unfreeze()
    step(model)


@case
def under_the_old_fsdp(out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(attached("llama-tied"), use_orig_params=True, device_id=torch.device("cpu"))
        step(model)


@case
def ranks_that_start_differently(out: Path) -> None:
    model = tiny("llama-tied")
    torch.manual_seed(dist.get_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        es.attach(model, es.TrainableTokensConfig(ROWS, init_weights=False))
    step(wrap(model, "fsdp-layers"))


@case
def without_the_root(out: Path) -> None:
    model = wrap(attached("llama-untied"), "fsdp-own")
    model.get_input_embeddings()(batch(0))


@case
def a_full_copy_of_a_table_of_its_own_group(out: Path) -> None:
    model = tiny("llama-tied")
    es.attach(model, config(), materialize=True)
    step(wrap(model, "fsdp-own"))


@case
def merged_by_the_attachment(out: Path) -> None:
    es.get_attachment(wrap(attached("llama-tied"), "fsdp-layers")).merge()


@case
def merged_while_the_root_is_gathered(out: Path) -> None:
    model = wrap(attached("llama-tied"), "fsdp-layers")
    with torch.no_grad():
        loss_of(model, batch(0))
    assert not hasattr(model.lm_head.weight, "_local_tensor")
    es.get_attachment(model).merge()


@case
def merged_from_outside(out: Path) -> None:
    adapter = es.get_attachment(attached("llama-tied")).adapter()
    es.merge(wrap(tiny("llama-tied"), "fsdp-root"), adapter)


@case
def saved_after_drifting(out: Path) -> None:
    model = nn.parallel.DistributedDataParallel(attached("llama-tied"))
    attachment = es.get_attachment(model)
    with torch.no_grad():
        next(iter(attachment.parameters())).add_(dist.get_rank())
    attachment.save(out / "drifted")


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    results: dict[str, Described] = {}
    for name, function in CASES.items():
        try:
            function(out)
        except EmbedSurgeryError as error:
            results[name] = describe(error)
        else:
            results[name] = {"type": "nothing"}
        dist.barrier()
    torch.save(results, out / f"refusals-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
