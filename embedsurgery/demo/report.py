"""What each step of the demo found, as frozen data. The command line prints it; ``--json`` is all of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How the model takes to the word, on held-out lines that were never trained on.

    Attributes:
        lines: How many there are; in each, the place where the word comes last is looked at.
        probability: Mean probability of the word there.
        rank: Median rank of the word among all tokens there; 1 is the model's first choice.
        first: In how many lines it is the first choice.
        loss: Mean cross entropy of all tokens of the lines, in nats.
    """

    lines: int
    probability: float
    rank: int
    first: int
    loss: float


@dataclass(frozen=True)
class BaseStep:
    """The model that everything starts from.

    Attributes:
        directory: The checkpoint.
        made: Whether the demo trained it, rather than being given it.
        parameters: How many numbers it has.
        dtype: Of its input table, safetensors' string.
        files: Files that hold weights.
        bytes: Their size.
        steps: Steps of training, None for a given model; so too for what follows.
        seconds: That the training took.
        first_loss: Cross entropy on held-out sentences before, in nats a token.
        last_loss: The same after.
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
    """The word, its row, and how little the model knows of it.

    Attributes:
        word: As it is written in a text.
        token: As it is in the tokenizer, with the space before it.
        row: Its row in every table of ``tables``.
        rows: Rows of the table in all.
        spare: Rows that no token of the base's tokenizer uses.
        tables: The tables that are trained: one where input and output are tied.
        tied: Whether they are.
        tokenizer: Directory of the tokenizer with the word.
        train_lines: Lines that use the word, to be trained on.
        before: Held-out lines before any training.
        prompt: The beginning of a held-out line, up to the word.
        completion: How the model goes on.
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
    """The training of the row, and what came of it.

    Attributes:
        trained: How many numbers were trained.
        steps: How many steps.
        seconds: How long they took.
        first_loss: Mean cross entropy of the training lines before, in nats a token.
        last_loss: The same after.
        after: Held-out lines, as in `WordStep.before`.
        others_before: Cross entropy of held-out lines without the word, before the training.
        others_after: The same after: the word takes a share of what is likely.
        columns: Columns of the logits that differ from the base's on these lines, at any place.
        completion: How the model now goes on after the prompt of `WordStep`.
        reading_prompt: A beginning that ends in the word.
        reading: How the model goes on after it.
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
    """The adapter as files: directory, their bytes, and those of the model's weights."""

    directory: str
    bytes: int
    model_bytes: int


@dataclass(frozen=True)
class MergeStep:
    """The merged checkpoint, compared with the base byte by byte.

    Attributes:
        directory: The checkpoint.
        rows: Stored tensor -> how many of its rows differ from the base's.
        changed_files: Files of the base that differ.
        same_files: How many files of the base are the same bytes.
        new_files: Files that the base does not have: the record that unmerging needs.
        tensors: Tensors in the changed files, `rows` included.
        checks: Checks of `verify_checkpoint`, all of which were passed.
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
    """The merged checkpoint, loaded by transformers as any other.

    Attributes:
        logits: How many logits were compared with those of the attached model.
        max_difference: The largest difference between them.
        completion: How it goes on after the prompt of `WordStep`.
        same_text: Whether that is what the attached model said.
    """

    logits: int
    max_difference: float
    completion: str
    same_text: bool


@dataclass(frozen=True)
class Hashes:
    """Sha256 of a weight file that was changed: in the base, merged, and unmerged."""

    file: str
    base: str
    merged: str
    unmerged: str


@dataclass(frozen=True)
class UnmergeStep:
    """The checkpoint without the merge.

    Attributes:
        directory: The checkpoint.
        hashes: Of the weight files that the merge changed.
        files: How many files there are: the base's, each the same bytes, and no other.
    """

    directory: str
    hashes: tuple[Hashes, ...]
    files: int


@dataclass(frozen=True)
class DemoReport:
    """Every step, how long all took, and commands to go on with."""

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
