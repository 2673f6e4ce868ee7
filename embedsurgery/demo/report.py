"""The results of the demo's steps as frozen data. ``cli/demo.py`` prints them, or with ``--json`` dumps them whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How well the model predicts the word on held-out lines, at the word's last position in each.

    Attributes:
        lines: Number of lines.
        probability: Mean probability of the word.
        rank: Median rank of the word among all tokens; 1 is the most likely.
        first: Number of lines in which the word is the most likely token.
        loss: Mean cross entropy of all tokens of the lines, in nats.
    """

    lines: int
    probability: float
    rank: int
    first: int
    loss: float


@dataclass(frozen=True)
class BaseStep:
    """The base model.

    Attributes:
        directory: The checkpoint.
        made: Whether the demo trained it; False for the user's model.
        parameters: Number of parameters.
        dtype: Dtype of the input table, as safetensors writes it.
        files: Weight files.
        bytes: Size of the weight files.
        steps: Training steps; like all that follow, None for the user's model.
        seconds: Duration of the training.
        first_loss: Cross entropy on held-out sentences before the training, in nats per token.
        last_loss: The same after the training.
    """

    directory: str
    made: bool
    parameters: int
    dtype: str
    files: tuple[str, ...]
    bytes: int
    steps: int | None = None
    seconds: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None


@dataclass(frozen=True)
class WordStep:
    """The word, its row, and the model's predictions before training.

    Attributes:
        word: The word as in a text.
        token: The word as in the tokenizer, with the space before it.
        row: The row's number in each of ``tables``.
        rows: Number of rows of the table.
        spare: Number of rows that no token of the base's tokenizer uses.
        tables: Tables to train: one if input and output are tied.
        tied: Whether input and output are tied.
        tokenizer: Directory of the tokenizer with the word.
        train_lines: Number of training lines with the word.
        before: Measured on held-out lines before training.
        prompt: Beginning of a held-out line, up to the word.
        completion: The model's continuation of ``prompt``.
    """

    word: str
    token: str
    row: int
    rows: int
    spare: int
    tables: tuple[str, ...]
    tied: bool
    tokenizer: str
    train_lines: int
    before: Measure
    prompt: str
    completion: str


@dataclass(frozen=True)
class TrainStep:
    """The training of the row.

    Attributes:
        trained: Number of trained parameters.
        steps: Training steps.
        seconds: Duration of the training.
        first_loss: Mean cross entropy of the training lines before, in nats per token.
        last_loss: The same after.
        after: Measured on held-out lines after training, as `WordStep.before`.
        others_before: Cross entropy of held-out lines without the word before training, in nats per token.
        others_after: The same after; it rises a little, because the word takes some of the probability.
        columns: Columns of the logits that differ from the base's at any position of the lines without the word.
        completion: The model's continuation of `WordStep.prompt`.
        reading_prompt: A prompt that ends in the word.
        reading: The model's continuation of ``reading_prompt``.
    """

    trained: int
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    after: Measure
    others_before: float
    others_after: float
    columns: tuple[int, ...]
    completion: str
    reading_prompt: str
    reading: str


@dataclass(frozen=True)
class SaveStep:
    """The saved adapter: its directory, its size in bytes, and the size of the model's weight files."""

    directory: str
    bytes: int
    model_bytes: int


@dataclass(frozen=True)
class MergeStep:
    """The merged checkpoint, compared with the base byte by byte.

    Attributes:
        directory: The checkpoint.
        rows: Stored tensor -> number of rows that differ from the base's.
        changed_files: The base's files that differ.
        same_files: Number of the base's files with equal bytes.
        new_files: Files that the base does not have: the record for unmerging.
        tensors: Number of tensors in the changed files, those of ``rows`` included.
        checks: Names of the checks of `verify_checkpoint`, all passed.
    """

    directory: str
    rows: dict[str, int]
    changed_files: tuple[str, ...]
    same_files: int
    new_files: tuple[str, ...]
    tensors: int
    checks: tuple[str, ...]


@dataclass(frozen=True)
class ReloadStep:
    """The merged checkpoint, loaded by transformers alone.

    Attributes:
        logits: Number of logits compared with the attached model's.
        max_difference: Largest absolute difference between them.
        completion: The continuation of `WordStep.prompt`.
        same_text: Whether the attached model gave the same continuation.
    """

    logits: int
    max_difference: float
    completion: str
    same_text: bool


@dataclass(frozen=True)
class Hashes:
    """sha256 of a changed weight file: in the base, merged, and unmerged."""

    file: str
    base: str
    merged: str
    unmerged: str


@dataclass(frozen=True)
class UnmergeStep:
    """The unmerged checkpoint.

    Attributes:
        directory: The checkpoint.
        hashes: Hashes of the weight files that the merge changed.
        files: Number of files; they are the base's files with equal bytes, and no others.
    """

    directory: str
    hashes: tuple[Hashes, ...]
    files: int


@dataclass(frozen=True)
class DemoReport:
    """All steps, the total duration in seconds, and commands to try next."""

    output: str
    base: BaseStep
    word: WordStep
    train: TrainStep
    save: SaveStep
    merge: MergeStep
    reload: ReloadStep
    unmerge: UnmergeStep
    seconds: float
    commands: tuple[str, ...]


Step = BaseStep | WordStep | TrainStep | SaveStep | MergeStep | ReloadStep | UnmergeStep
