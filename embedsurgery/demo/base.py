"""The demo's model: a tokenizer and a small Llama, trained from scratch on ``corpus.py`` and saved in shards.

Also loads models and tokenizers with transformers; ``training.py`` computes with them. transformers and tokenizers are
imported inside functions, because they may be missing: `check_packages` says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from embedsurgery.demo import corpus
from embedsurgery.demo.training import encode_lines, mean_loss, token_loss
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
"""The vocabulary size is padded to a multiple of this, as in many real models. The padding gives the spare rows."""


def check_packages() -> None:
    """Check that the demo's packages are installed.

    Raises:
        UnsupportedError: transformers or tokenizers is missing.
    """
    missing = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            "packages of the demo are not installed",
            expected=" and ".join(missing),
            hint='pip install "embedsurgery[demo]"',
        )


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, log lines and warnings; embedsurgery's warnings are still shown."""
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
def seed_torch(seed: int = 0) -> Iterator[None]:
    """Seed torch's global generator, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Run torch on one thread: on a model this small, synchronising threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer on the corpus. Returns a ``PreTrainedTokenizerFast``."""
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
    core.train_from_iterator(corpus.draw_sentences(1, SENTENCES), trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=start, eos_token=end, pad_token=end)


def make_base(directory: Path) -> tuple[int, float, float, float]:
    """Train the demo's model and save it with its tokenizer.

    Args:
        directory: The new checkpoint directory.

    Returns:
        Steps, seconds, and the mean loss in nats per token on held-out sentences before and after the training.

    Raises:
        CheckpointError: The directory cannot be written.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-(len(tokenizer) + 1) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    known = corpus.draw_sentences(1, SENTENCES)
    held_out = sorted(set(corpus.draw_sentences(2, SENTENCES // 20)) - set(known))
    train, test = (
        [[*ids, tokenizer.eos_token_id] for ids in encode_lines(tokenizer, lines)] for lines in (known, held_out)
    )
    first = mean_loss(model, test)
    seconds = _train_model(model, train)
    _save_base(model, tokenizer, directory)
    return STEPS, seconds, first, mean_loss(model, test)


def _train_model(model: Any, lines: list[list[int]]) -> float:
    """Train every parameter on random batches of lines. Returns the seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    began = time.perf_counter()
    for _ in range(STEPS):
        numbers = torch.randint(len(lines), (BATCH,)).tolist()
        loss = token_loss(model, [lines[i] for i in numbers])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()
    return time.perf_counter() - began


def _save_base(model: Any, tokenizer: Any, directory: Path) -> None:
    try:
        model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "cannot write the demo's checkpoint",
            where=directory,
            found=error,
            hint="give -o a directory with 20 MB of free space",
        ) from error


def load_model(directory: Path) -> Any:
    """Load a causal language model from a local directory, to train its rows and for inference.

    The dtype is that of the files, except that fp16 becomes fp32: without loss scaling, fp16 gradients overflow.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    half = walk(directory).main_input().dtype == "F16"
    model = _load_with_transformers(
        AutoModelForCausalLM.from_pretrained, directory, torch_dtype="float32" if half else "auto"
    )
    return model.eval()


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a local directory.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    return _load_with_transformers(AutoTokenizer.from_pretrained, directory)


def _load_with_transformers(load: Callable[..., Any], directory: Path, **options: Any) -> Any:
    try:
        return load(str(directory), local_files_only=True, **options)
    except Exception as error:  # a loader raises anything on a directory that it cannot read
        raise CheckpointError(
            "transformers cannot load this directory",
            where=directory,
            expected="a causal language model with its tokenizer",
            found=f"{type(error).__name__}: {str(error)[:200]}",
        ) from error
