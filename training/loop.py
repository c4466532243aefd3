"""The one training loop: batches in, the best weights by validation NDCG@10 out; needs torch alone."""

from __future__ import annotations

import ctypes
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn

from recsys.batch import Sequences
from recsys.bundle import write_file
from recsys.config import Settings
from recsys.content import Content
from recsys.errors import DataError, RecipeError, RecsysError, SetupError
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from training.data import WINDOWS, EpochBatches, TrainingBatch, mask
from training.losses import LOSSES, LossSettings, Seen
from training.optimizer import Optimizer, OptimizerSettings
from training.validate import validate

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How the weights are learnt."""

    section: ClassVar[str] = "train"

    epochs: int = 50
    """Most passes over the training histories; the learning rate falls to a hundredth by the last."""
    patience: int = 5
    """Validations without a better NDCG@10 after which training stops."""
    validate_every: int = 1
    """Epochs between validations."""
    windows: str = "last"
    """last: of a history longer than model.length only the newest window is learnt; all: every window; prefixes: one for
    each event, which is its only target."""
    mask_share: float = 0.2
    """Share of events hidden at once; read by the masked objective."""
    batch_tokens: int = 12_800
    """Padded events in a batch."""
    packed: bool = False
    """Whether histories lie end to end in place of padded (FlexAttention): on a GPU, for the sasrec and ligr blocks."""
    precision: str = "auto"
    """Arithmetic of the forward pass: float32, bfloat16 (autocast), or auto: bfloat16 on a GPU that has it."""
    seed: int = 0
    """Decides the initial weights, the order of batches, negatives and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "validate_every", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, found {self.seed}")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share must be above 0 and below 1, found {self.mask_share}")
        if self.windows not in WINDOWS:
            raise ValueError(f"windows must be one of {', '.join(WINDOWS)}, found {self.windows!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}")


@dataclass(frozen=True)
class Observation:
    """What the loop tells its observer: after every step, and once more when an epoch is judged."""

    epoch: int
    step: int
    """Steps done in this epoch."""
    steps: int
    """Steps of this epoch."""
    loss: float
    """Mean over the epoch's targets so far."""
    learning_rate: float
    seconds: float
    """Spent in this epoch's steps by this process."""
    validation: dict[str, float] | None = None
    """None after a step; empty where no user can be judged."""
    best: bool = False
    part: str = "model"
    """What is learnt: model, or ranker."""


M = TypeVar("M", bound=nn.Module)
B_co = TypeVar("B_co", covariant=True)


class Epoch(Protocol[B_co]):
    """The batches of one pass over the data, in their order."""

    def __len__(self) -> int: ...

    def starting_at(self, step: int) -> Iterator[B_co]:
        """What is left of it from `step` on."""
        ...


@dataclass
class State(Generic[M]):
    """All that decides the rest of a training; saved as a checkpoint and restored from it."""

    model: M
    optimizer: Optimizer
    generator: torch.Generator
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    steps: int = 0
    """Steps done in all."""
    steps_planned: int = 0
    loss_sum: float = 0.0
    targets: int = 0
    best: float = -1.0
    best_epoch: int = 0
    since_best: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry a validation: epoch, loss and the validation figures."""

    _PLAIN: ClassVar = (
        "epoch",
        "step",
        "steps",
        "steps_planned",
        "loss_sum",
        "targets",
        "best",
        "best_epoch",
        "since_best",
        "curve",
    )

    def save(self, path: Path, key: str) -> None:
        """Write a checkpoint atomically; `key` names the recipe and data that it belongs to."""
        content = io.BytesIO()
        torch.save(
            {
                "key": key,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "best_weights": self.best_weights,
                **{name: getattr(self, name) for name in self._PLAIN},
            },
            content,
        )
        write_file(path, content.getvalue())

    def restore(self, path: Path, key: str) -> None:
        """Go on where a checkpoint stood. Raises RecsysError: it belongs to another recipe or data set, or is broken."""
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds; all mean the same to the user
            raise RecsysError(f"{path}: cannot be read ({type(error).__name__}); delete it to train from the start") from None
        if saved["key"] != key:
            raise RecsysError(
                f"{path}: belongs to another recipe, data set or device; give another run directory or delete this one"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.best_weights = saved["best_weights"]
        for name in self._PLAIN:
            setattr(self, name, saved[name])


def fit(
    sequences: Sequences,
    items: int,
    model_settings: ModelSettings,
    settings: TrainSettings,
    loss_settings: LossSettings,
    optimizer_settings: OptimizerSettings,
    text_settings: TextSettings | None = None,
    *,
    content: Content | None = None,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    checkpoint_seconds: float = 60.0,
    observe: Callable[[Observation], None] = lambda observation: None,
) -> State[SequenceModel]:
    """Train until `epochs` or until patience ends; the returned state's model holds the best validation weights.

    Where nobody can be judged by validation, all epochs are done and the last weights are the best.

    `items` is the count of items with training events, `content` what is known of all items, where model.text reads it. Where
    `checkpoint` exists, training goes on from it and ends with the weights of an undisturbed run; it is written after every
    epoch and about every `checkpoint_seconds`.
    """
    device = device or torch.device("cpu")
    _refuse(model_settings, settings, device)
    keep_memory()
    if settings.packed:
        torch._dynamo.reset()  # what other settings compiled counts against the recompilations allowed
    vocabulary = (text_settings or TextSettings()).vocabulary
    model = SequenceModel(model_settings, items, content, vocabulary)
    model = model.initialise(torch.Generator().manual_seed(settings.seed)).to(device)
    generator = torch.Generator(device).manual_seed(settings.seed + 1)
    state = State(model, Optimizer(model, optimizer_settings), generator)
    learnable = sequences.learnable(items)
    counts_V = learnable.training_counts(items).to(device)

    def batches(epoch: int) -> EpochBatches:
        masked = model_settings.objective == "masked"
        shape = (model_settings.length, settings.batch_tokens)
        return EpochBatches(learnable, *shape, settings.seed, epoch, settings.windows, masked=masked, packed=settings.packed)

    run(
        state,
        Schedule(settings.epochs, settings.patience, settings.validate_every),
        batches,
        lambda batch: learn(state, batch.to(device), settings, loss_settings, counts_V),
        lambda: validate(state.model, sequences),
        checkpoint=checkpoint,
        key=key,
        checkpoint_seconds=checkpoint_seconds,
        observe=observe,
    )
    return state


@dataclass(frozen=True)
class Schedule:
    """How long is learnt."""

    epochs: int
    patience: int
    validate_every: int = 1


def run(
    state: State[M],
    schedule: Schedule,
    batches_of: Callable[[int], Epoch[B_co]],
    learn: Callable[[B_co], None],
    judge: Callable[[], dict[str, float]],
    *,
    checkpoint: Path | None = None,
    key: str = "",
    checkpoint_seconds: float = 60.0,
    observe: Callable[[Observation], None] = lambda observation: None,
    part: str = "model",
) -> None:
    """Learn epoch after epoch, from the checkpoint on where there is one; at the end the model holds its best weights.

    `learn` does one step and counts it, `judge` gives the figures of validation, of which ndcg@10 decides; where it gives
    none, the last weights are the best.
    """
    if checkpoint is not None and checkpoint.exists():
        state.restore(checkpoint, key)
    saved_at = time.monotonic()

    def save(due: bool) -> None:
        nonlocal saved_at
        if checkpoint is not None and (due or time.monotonic() - saved_at >= checkpoint_seconds):
            state.save(checkpoint, key)
            saved_at = time.monotonic()

    while state.epoch < schedule.epochs and state.since_best < schedule.patience:
        batches = batches_of(state.epoch)
        if not len(batches):
            raise DataError(
                "no user has two training events, so there is nothing to learn; give more events or another [split]"
            )
        state.steps_planned = state.steps_planned or len(batches) * schedule.epochs
        started = time.monotonic()

        def tell(
            validation: dict[str, float] | None, best: bool, batches: Epoch[B_co] = batches, started: float = started
        ) -> None:
            mean, seconds = state.loss_sum / max(1, state.targets), time.monotonic() - started
            rate = state.optimizer.rate
            observe(Observation(state.epoch + 1, state.step, len(batches), mean, rate, seconds, validation, best, part))

        for batch in batches.starting_at(state.step):
            learn(batch)
            tell(None, False)
            save(due=False)
        if (state.epoch + 1) % schedule.validate_every == 0 or state.epoch + 1 == schedule.epochs:
            with state.optimizer.averaged():
                figures = judge()
                better = not figures or figures["ndcg@10"] > state.best
                if better:
                    state.best, state.best_epoch = figures.get("ndcg@10", 0.0), state.epoch + 1
                    state.best_weights = {name: value.detach().clone() for name, value in state.model.state_dict().items()}
            state.since_best = 0 if better else state.since_best + 1
            state.curve.append({"epoch": state.epoch + 1, "loss": state.loss_sum / max(1, state.targets), **figures})
            tell(figures, better)
        state.epoch, state.step, state.loss_sum, state.targets = state.epoch + 1, 0, 0.0, 0
        save(due=True)
    state.model.load_state_dict(state.best_weights)


def _refuse(model: ModelSettings, train: TrainSettings, device: torch.device) -> None:
    """Raises RecipeError: settings of two sections that do not go together, or not on this device."""
    if train.packed and (device.type == "cpu" or model.block == "hstu" or model.embedding_size // model.heads < 16):
        raise RecipeError("train.packed needs a GPU, a sasrec or ligr block, and heads at least 16 wide; set it to false")
    if train.windows == "prefixes" and model.objective == "masked":
        raise RecipeError('train.windows "prefixes" has one target at the end, the masked objective has many; take "all"')


def learn(
    state: State[SequenceModel],
    batch: TrainingBatch,
    settings: TrainSettings,
    loss_settings: LossSettings,
    counts_V: torch.Tensor,
) -> None:
    """One step: a batch's loss, its gradient, and the change of the weights."""
    model, loss_of = state.model, LOSSES[loss_settings.kind]
    masked = model.settings.objective == "masked"
    if masked:
        batch = mask(batch, settings.mask_share, state.generator)
    line = None
    if settings.packed:  # few lengths, each compiled once
        line = -(-len(batch.history.values) // settings.batch_tokens) * settings.batch_tokens
    with _precision(settings.precision, batch.targets.device):
        exits = model.exits(batch.history, state.generator, asked=batch.asked, positions=line, packed=settings.packed)
    places = batch.places if settings.packed else batch.history.places(exits[-1].shape[1])[batch.places]
    seen = _seen(batch, masked) if loss_settings.filter_seen else None
    losses = [
        loss_of(
            model,
            states_BTE.flatten(0, 1).index_select(0, places).float(),
            batch.targets,
            loss_settings,
            counts_V,
            state.generator,
            seen,
        )
        for states_BTE in exits[-model.settings.blocks :]
    ]
    loss = torch.stack(losses).mean()
    if not torch.isfinite(loss):
        rates = {name: value for name, value in state.optimizer.settings.as_dict().items() if name.endswith("learning_rate")}
        raise RecsysError(f"the loss became {loss.item()} in step {state.steps}; lower optimizer.learning_rate ({rates})")
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step(state.steps, state.steps_planned)
    count = len(batch.targets)
    state.loss_sum, state.targets = state.loss_sum + loss.item() * count, state.targets + count
    state.step, state.steps = state.step + 1, state.steps + 1


def _seen(batch: TrainingBatch, masked: bool) -> Seen:
    """What each judged state has read: the events up to its own, or all of the history that are not hidden."""
    history, owners_P = batch.history, batch.history.owners[batch.places]
    ends_P = history.offsets[1:][owners_P] if masked else batch.places + 1
    return Seen(history.values, history.offsets[:-1][owners_P], ends_P)


def _precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def keep_memory() -> None:
    """Let glibc keep what torch frees: the pages of fresh tensors were a quarter of a step of training on the CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**26)  # M_MMAP_THRESHOLD, bytes: what is larger goes back at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises SetupError: the named device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise SetupError(f"device {name!r} is not there; use cpu or auto, or run `recsys doctor`") from None
    return torch.device(name)
