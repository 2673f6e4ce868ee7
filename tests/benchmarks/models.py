"""The model of a case in one of its variants, and the work that is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.cases import Case


def build(case: Case, variant: str, device: torch.device) -> nn.Module:
    """A Llama of the case's shape, its rows made trainable in the variant's way.

    In every variant, the base's too, the embedding's output requires a gradient, so that each backward runs through
    the whole model down to the lookup.
    """
    model = _llama(case, device)
    model.requires_grad_(False)
    wrapped: nn.Module = model
    if case.work.startswith("prompt"):
        wrapped = _prompted(case, variant, model)
    elif variant == "embedsurgery":
        import embedsurgery as es

        es.attach(model, es.TrainableTokensConfig(token_indices=token_indices(case)))
    elif variant == "peft":
        import peft

        wrapped = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=token_indices(case)))
    elif variant == "floor":
        _put_floor(case, model)
    elif variant == "full":
        model.get_input_embeddings().weight.requires_grad_(True)
    if case.work.endswith("generate"):
        return wrapped.eval()
    model.get_input_embeddings().register_forward_hook(_require_grad)
    return wrapped.train()


def _put_floor(case: Case, model: Any) -> None:
    """A plain parameter of K rows beside a base that has the rows in its table already.

    What K trainable rows cost however they are reached: their gradient, by one product of the head's shape (where it
    is tied) and one sum over the lookup's tokens, and the optimizer's step. Nothing of this library has a part in it.
    """
    indices = torch.tensor(token_indices(case), device=model.device)
    rows = nn.Parameter(model.get_input_embeddings().weight.detach()[indices].float())
    model.register_parameter("floor", rows)

    def add_lookup(ids: torch.Tensor, gradient: torch.Tensor) -> None:
        ours = torch.isin(ids, indices)
        place = torch.searchsorted(indices, ids[ours])
        if rows.grad is None:
            rows.grad = torch.zeros_like(rows)
        rows.grad.index_add_(0, place, gradient[ours].to(rows.dtype))

    def set_head(hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        columns = gradient.flatten(0, -2).index_select(-1, indices)
        rows.grad = (columns.t() @ hidden.detach().flatten(0, -2)).to(rows.dtype)

    def watch_lookup(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True).register_hook(partial(add_lookup, args[0]))

    def watch_head(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(partial(set_head, args[0]))

    model.get_input_embeddings().register_forward_hook(watch_lookup)
    if case.tied and case.work == "train":
        model.get_output_embeddings().register_forward_hook(watch_head)


def _prompted(case: Case, variant: str, model: nn.Module) -> nn.Module:
    """The model with a soft prompt, the same in either library."""
    wrapped: nn.Module = model
    if variant == "embedsurgery":
        import embedsurgery as es

        es.attach(model, es.SoftPromptConfig(case.rows))
    elif variant == "peft":
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.rows)
        wrapped = peft.get_peft_model(model, config)
    values = torch.randn(case.rows, case.width, generator=torch.Generator().manual_seed(3)) * 0.02
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(values)
    return wrapped


def token_indices(case: Case) -> list[int]:
    """The K rows, spread over the vocabulary or its last, the same in each process."""
    if case.consecutive:
        return list(range(case.vocabulary - case.rows, case.vocabulary))
    order = torch.randperm(case.vocabulary, generator=torch.Generator().manual_seed(1))
    return sorted(order[: case.rows].tolist())


def work(case: Case, model: nn.Module, device: torch.device) -> Callable[[], float]:
    """The step that is timed: it returns its loss, or something else that shows that the variants compute the same."""
    ids = _batch(case).to(device)
    if case.work.endswith("generate"):
        return _generation(case, model, ids[:, :8])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    if case.work == "lookup":
        return _lookup(model, ids, optimizer)
    keep = case.keep or ids.shape[1]

    def train() -> float:
        kept = {} if case.work == "prompt" else {"logits_to_keep": keep}  # a prompt is before all that is kept
        loss = model(input_ids=ids, labels=ids[:, -keep:], use_cache=False, **kept).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return train


def state_bytes(case: Case, model: nn.Module) -> int:
    """What AdamW keeps for the trained parameters: two tensors of each one's size."""
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    return 2 * sum(sizes) if case.work in ("train", "prompt") else 0


def _generation(case: Case, model: nn.Module, prompt: torch.Tensor) -> Callable[[], float]:
    count = case.batch[1]
    generate: Any = model.generate

    def step() -> float:
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            tokens = generate(
                input_ids=prompt,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return float(tokens.sum())

    return step


def _lookup(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> Callable[[], float]:
    """The embedding alone, forward and backward, without the optimizer's step."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    gradient = torch.ones(())

    def step() -> float:
        out = embedding(ids)
        out.backward(gradient.to(out).expand_as(out))
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        return float(out.detach().sum())

    return step


def _batch(case: Case) -> torch.Tensor:
    """Token ids (samples, length), a quarter of them among the K."""
    samples, length = case.batch
    shape = (samples, max(length, 16))
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(case.vocabulary, shape, generator=generator)
    ours = torch.tensor(token_indices(case))[torch.randint(case.rows, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.25, ours, ids)


def _llama(case: Case, device: torch.device) -> LlamaForCausalLM:
    """Built on the meta device and filled by hand: the library's initialisation takes longer than the measurement."""
    head = 64 if case.width >= 256 else 16
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.width * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // head,
        num_key_value_heads=case.width // head // 4,
        tie_word_embeddings=case.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(getattr(torch, case.dtype)).to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1)
            continue
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
    return model


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
