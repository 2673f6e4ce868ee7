"""The demo's own model: a tokenizer and a small Llama, trained from nothing on ``corpus.py``, saved in shards.

Also the only file of the demo that loads what transformers saved.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedsurgery.demo import corpus
from embedsurgery.errors import CheckpointError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.models.walking import walk

STEPS = 320
SENTENCES = 2400
BATCH = 32
LEARNING_RATE = 3e-3
WIDTH = 128
LAYERS = 2
SHARD_SIZE = "400KB"
_ROWS_MULTIPLE = 64
"""The table is padded to a multiple of it, as those of many real models are: that is where spare rows come from."""


def require() -> None:
    """Check that what the demo needs is installed.

    Raises:
        UnsupportedError: transformers or tokenizers is missing.
    """
    missing = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            "the demo needs packages that are not installed",
            found=f"no {' and no '.join(missing)}",
            hint='pip install "embedsurgery[demo]"',
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers inside; our own warnings are still shown."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", EmbedSurgeryWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """A seed for torch's global generator inside; outside it goes on as if nothing had happened."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: on a model this small, threads that wait for each other take longer than the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of the corpus, as a ``PreTrainedTokenizerFast``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    start, end = "<s>", "</s>"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[start, end],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(corpus.sentences(1, SENTENCES), trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=start, eos_token=end, pad_token=end)


def make_base(directory: Path) -> tuple[int, float, float, float]:
    """Train the demo's model and save it, with its tokenizer.

    Args:
        directory: Where to; it is made.

    Returns:
        Steps, seconds, and the loss on held-out sentences before and after.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from embedsurgery.demo.training import encode, mean_loss, token_loss

    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=-(-(len(tokenizer) + 1) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    known = corpus.sentences(1, SENTENCES)
    held = sorted(set(corpus.sentences(2, SENTENCES // 20)) - set(known))
    train, test = ([[*ids, end] for ids in encode(tokenizer, lines)] for lines in (known, held))
    first = mean_loss(model, test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    began = time.perf_counter()
    for _ in range(STEPS):
        chosen = torch.randint(len(train), (BATCH,)).tolist()
        loss = token_loss(model, [train[i] for i in chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    model.eval()
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "cannot write the demo's checkpoint",
            where=directory,
            found=error,
            hint="give -o a directory with 20 MB of room",
        ) from error
    return STEPS, seconds, first, mean_loss(model, test)


def load_model(directory: Path) -> Any:
    """A causal language model from a local directory, for inference and for training its rows.

    In the dtype of its files, but fp16 as fp32: gradients in fp16 overflow where nothing scales the loss.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    half = walk(directory).main_input().dtype == "F16"
    model = _loaded(AutoModelForCausalLM.from_pretrained, directory, torch_dtype="float32" if half else "auto")
    return model.eval()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a local directory.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, directory)


def _loaded(load: Callable[..., Any], directory: Path, **options: Any) -> Any:
    try:
        return load(str(directory), local_files_only=True, **options)
    except Exception as error:  # whatever a loader says of a directory that it does not understand
        raise CheckpointError(
            "transformers cannot load this directory",
            where=directory,
            expected="a causal language model with its tokenizer",
            found=f"{type(error).__name__}: {str(error)[:200]}",
        ) from error
