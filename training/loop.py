"""The one training loop: batches in, the best weights by validation NDCG@10 out; needs torch alone."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recsys.batch import Sequences
from recsys.config import Seconds, Settings
from recsys.content import Content
from recsys.embedding import TorchTable
from recsys.errors import DataError, RecipeError, RecsysError, SetupError
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from training.checkpoint import Checkpoints, read_table
from training.data import WINDOWS, EpochBatches, TrainingBatch, mask, recent
from training.losses import LOSSES, LossSettings, Seen, Targets, negatives
from training.optimizer import LEARN, Optimizer, OptimizerSettings, freeze
from training.team import ALONE, Team
from training.validate import validate


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
    validate_users: int = 0
    """Most users who are judged by a validation, evenly chosen; 0: all."""
    windows: str = "last"
    """last: of a history longer than model.length only the newest window is learnt; all: every window; prefixes: one for
    each event, which is its only target."""
    since: Seconds = 0
    """When targets begin: a date, a time, or seconds since 1970; what came before is read, and learnt no more; 0: all are
    targets."""
    learn: str = "all"
    """Which weights learn, where training begins with a run: all; table, the item table's; or new_rows, those of the items
    that the run has not learnt."""
    mask_share: float = 0.2
    """Share of events hidden at once; read by the masked objective."""
    batch_tokens: int = 12_800
    """Padded events in a batch, of all processes together."""
    packed: bool = False
    """Whether histories lie end to end in place of padded (FlexAttention): on a GPU, for the sasrec and ligr blocks."""
    precision: str = "auto"
    """Arithmetic of the forward pass: float32, bfloat16 (autocast), or auto: bfloat16 on a GPU that has it."""
    sharding: str = "auto"
    """How processes hold a table in parts (optimizer.table): table_wise, row_wise, column_wise, or auto: as TorchRec's planner
    finds it fastest."""
    seed: int = 0
    """Decides the initial weights, the order of batches, negatives and dropout."""

    def __post_init__(self) -> None:
        self._at_least(1, "epochs", "patience", "validate_every", "batch_tokens")
        self._at_least(0, "validate_users", "since")
        self._one_of(("auto", "table_wise", "row_wise", "column_wise"), "sharding")
        self._must("be from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, ("seed",))
        self._must("be above 0 and below 1", lambda value: 0 < value < 1, ("mask_share",))
        self._one_of(LEARN, "learn")
        self._one_of(WINDOWS, "windows")
        self._one_of(("auto", "float32", "bfloat16"), "precision")


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


@dataclass
class State(Generic[M]):
    """All that decides the rest of a training; saved as a checkpoint and restored from it."""

    model: M
    optimizer: Optimizer
    generator: torch.Generator
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    epoch_steps: int = 0
    """Steps of this epoch."""
    steps: int = 0
    """Steps done in all."""
    steps_planned: int = 0
    loss_sum: float = 0.0
    targets: int = 0
    best: float = -1.0
    best_epoch: int = 0
    best_steps: int = 0
    """Steps done then: the number of the checkpoint that holds the best table, where it is in parts."""
    since_best: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry a validation: epoch, loss and the validation figures."""

    @property
    def parts(self) -> dict[str, Any]:
        """What processes hold parts of."""
        return {} if self.optimizer.sharded is None else self.optimizer.sharded.parts()

    def weights(self) -> dict[str, torch.Tensor]:
        """Those that every process has."""
        if self.optimizer.sharded is None:
            return self.model.state_dict()
        named = self.model.named_parameters()  # DistributedModelParallel takes others' entries out of a state_dict
        return {name: value.detach() for name, value in named if not name.startswith("table.")}

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set those that every process has."""
        for name, value in self.weights().items():
            value.copy_(weights[name])

    def tree(self) -> dict[str, Any]:
        """All but the parts, for a checkpoint."""
        made = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        return {each.name: getattr(self, each.name) for each in fields(self)} | made | {"model": self.weights()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on where `tree` was made; the parts are there already."""
        self.put(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        for name in saved.keys() - {"model", "optimizer", "generator"}:
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
    start: Callable[[SequenceModel], torch.Tensor] | None = None,
    team: Team = ALONE,
    checkpoints: Checkpoints | None = None,
    observe: Callable[[Observation], None] = lambda observation: None,
    tell: Callable[[str], None] = lambda line: None,
) -> State[SequenceModel]:
    """Train until `epochs` or until patience ends; the returned state's model holds the best validation weights.

    Where nobody can be judged by validation, all epochs are done and the last weights are the best.

    `items` is the count of items with training events, `content` what is known of all items, where model.text reads it;
    `start` changes the weights before the first step, and returns which rows of the table are of items that were not learnt.
    Where there is one of `checkpoints`, training goes on from it and ends with the weights of an undisturbed run; one is
    written after every epoch and about every minute.

    All processes of a `team` call this, each with sequences of its own. Their steps are those of one process with all
    sequences: a loss is the mean over the targets of all, negatives are the same in all, and with dropout, masks and the
    dealing of histories left aside, so are the weights. A table in parts is whole in the first process's model at the end;
    of the others' none is.
    """
    device = team.device
    refuse_settings(model_settings, settings, optimizer_settings, device, begins=start is not None)
    keep_memory()
    if settings.packed:
        torch._dynamo.reset()  # what other settings compiled counts against the recompilations allowed
    vocabulary = (text_settings or TextSettings()).vocabulary
    table = None
    if optimizer_settings.in_parts(model_settings.embedding):
        from training.distributed import ShardedTable

        table = partial(ShardedTable, team=team, kind=optimizer_settings.table, sharding=settings.sharding)
    model = SequenceModel(model_settings, items, content, vocabulary, table)
    model = model.initialise(torch.Generator().manual_seed(settings.seed)).to(device)
    fixed = None if start is None else freeze(model, settings.learn, start(model))
    generator = torch.Generator(device).manual_seed(settings.seed + 1)
    sharded: Any = model.table if model.table.sharded else None
    state = State(model, Optimizer(model, optimizer_settings, sharded), generator)
    learnable = sequences.learnable(items)
    counts_V = team.sum(learnable.training_counts(items).to(device))
    lesson = Lesson(model, settings, loss_settings, counts_V, team, fixed)
    if settings.since:
        learnable = recent(learnable, settings.since, model_settings.length)
        if not int(team.sum(learnable.train_end.sum())):
            raise DataError(
                f"train.since is {settings.since}, and no training event from then on follows another; set it earlier"
            )
    batches = partial(
        EpochBatches,
        learnable,
        model_settings.length,
        settings.batch_tokens,
        settings.seed,
        windows=settings.windows,
        masked=model_settings.objective == "masked",
        packed=settings.packed,
        team=team,
    )
    if sharded is not None:
        tell(sharded.plan)
    if team.size > 1:
        tell(_balance(batches(0).tokens, team))
    run(
        state,
        batches,
        partial(lesson.learn, state),
        lambda: validate(model, sequences, users=settings.validate_users, team=team),
        epochs=settings.epochs,
        patience=settings.patience,
        validate_every=settings.validate_every,
        checkpoints=checkpoints,
        observe=observe,
    )
    return state


def run(
    state: State[M],
    batches_of: Callable[[int], EpochBatches],
    learn: Callable[[TrainingBatch], tuple[float, int]],
    judge: Callable[[], dict[str, float]],
    *,
    epochs: int,
    patience: int,
    validate_every: int = 1,
    checkpoints: Checkpoints | None = None,
    observe: Callable[[Observation], None] = lambda observation: None,
    part: str = "model",
) -> None:
    """Learn epoch after epoch, from the checkpoint on where there is one; at the end the model holds its best weights.

    `learn` makes a step's gradients, and tells the sum of its losses and over how many targets; `judge` gives the figures of
    validation, of which ndcg@10 decides; where it gives none, the last weights are the best.
    """
    if checkpoints is not None and (newest := checkpoints.newest) >= 0:
        state.restore(checkpoints.load(newest, state.parts))
    started = time.monotonic()

    def save(due: bool) -> None:
        if checkpoints is not None and (due or checkpoints.are_due()):
            checkpoints.save(state.steps, state.tree(), state.parts, {state.best_steps} if state.parts else ())

    def tell(validation: dict[str, float] | None = None, best: bool = False) -> None:
        mean, rate, seconds = state.loss_sum / max(1, state.targets), state.optimizer.rate, time.monotonic() - started
        observe(Observation(state.epoch + 1, state.step, state.epoch_steps, mean, rate, seconds, validation, best, part))

    while state.epoch < epochs and state.since_best < patience:
        batches = batches_of(state.epoch)
        if not len(batches):
            raise DataError(
                "no user has two training events, so there is nothing to learn; give more events or another [split]"
            )
        state.steps_planned = state.steps_planned or len(batches) * epochs
        if state.step and state.epoch_steps != len(batches):  # begun by another number of processes: as far as they came
            state.step = state.step * len(batches) // state.epoch_steps
        state.epoch_steps = len(batches)
        started = time.monotonic()
        for batch in batches.starting_at(state.step):
            state.optimizer.begin(state.steps, state.steps_planned)
            total, targets = learn(batch.to(state.generator.device))
            state.optimizer.step(state.steps, state.steps_planned)
            state.loss_sum, state.targets = state.loss_sum + total, state.targets + targets
            state.step, state.steps = state.step + 1, state.steps + 1
            tell()
            save(due=False)
        if (state.epoch + 1) % validate_every == 0 or state.epoch + 1 == epochs:
            with state.optimizer.averaged():
                figures = judge()
                better = not figures or figures["ndcg@10"] > state.best
                if better:
                    state.best, state.best_epoch = figures.get("ndcg@10", 0.0), state.epoch + 1
                    state.best_steps = state.steps
                    state.best_weights = {name: value.detach().clone() for name, value in state.weights().items()}
            state.since_best = 0 if better else state.since_best + 1
            state.curve.append({"epoch": state.epoch + 1, "loss": state.loss_sum / max(1, state.targets), **figures})
            tell(figures, better)
        state.epoch, state.step, state.loss_sum, state.targets = state.epoch + 1, 0, 0.0, 0
        save(due=True)
    if checkpoints is not None:
        checkpoints.finish()
        checkpoints.team.wait()
    state.put(state.best_weights)
    if state.optimizer.sharded is not None and checkpoints is not None:
        state.optimizer.sharded = None
        state.model.table = TorchTable(0, 0)  # the parts go before the whole comes
        if not checkpoints.team.rank:
            state.model.table = TorchTable.of(read_table(checkpoints.path(state.best_steps)).to(state.generator.device))
        checkpoints.team.wait()


def _balance(tokens_S: torch.Tensor, team: Team) -> str:
    """How evenly the tokens of each step are dealt, in words; of the first epoch."""
    slowest_S, all_S = tokens_S.clone(), team.sum(tokens_S.clone())
    torch.distributed.all_reduce(slowest_S, torch.distributed.ReduceOp.MAX)
    ratio = float((slowest_S * team.size / all_S.clamp(min=1)).mean())
    return f"{team.size} processes, {len(tokens_S)} steps an epoch; the slowest of a step has {ratio:.3f} of the mean's tokens"


def refuse_settings(
    model: ModelSettings, train: TrainSettings, optimizer: OptimizerSettings, device: torch.device, begins: bool = True
) -> None:
    """Raises RecipeError: settings of two sections that do not go together, or not on this device; or not but where training
    `begins` with a run."""
    if optimizer.table == "adam" and (model.embedding != "torchrec" or device.type == "cpu"):
        raise RecipeError('optimizer.table "adam" is TorchRec\'s on a GPU; take rowwise_adagrad, or same')
    if optimizer.in_parts(model.embedding) and not model.ids:
        raise RecipeError("a table in parts needs ids, and model.ids is false; set optimizer.table to same")
    if optimizer.in_parts(model.embedding) and model.embedding_size % 4:
        raise RecipeError(f"a table in parts needs model.embedding_size in fours, found {model.embedding_size}")
    if train.packed and (device.type == "cpu" or model.block == "hstu" or model.embedding_size // model.heads < 16):
        raise RecipeError("train.packed needs a GPU, a sasrec or ligr block, and heads at least 16 wide; set it to false")
    if train.windows == "prefixes" and model.objective == "masked":
        raise RecipeError('train.windows "prefixes" has one target at the end, the masked objective has many; take "all"')
    if train.since and (train.windows == "prefixes" or model.objective == "masked"):
        raise RecipeError('train.since needs causal windows with many targets; set train.windows to "all", or since to 0')
    if train.learn != "all" and not begins:
        raise RecipeError(
            f'train.learn is "{train.learn}", which needs learnt weights; begin with a run (--start), or set it to "all"'
        )
    if train.learn != "all" and not model.ids:
        raise RecipeError(f'train.learn is "{train.learn}", and without model.ids there is no item table; set it to "all"')
    if train.learn == "new_rows" and optimizer.in_parts(model.embedding):
        raise RecipeError('train.learn "new_rows" needs a table in one piece; set optimizer.table to same, or learn to "table"')


class Lesson(nn.Module):
    """A batch in, its loss out: what a step differentiates, and what DDP wraps where several processes learn together."""

    def __init__(
        self,
        model: SequenceModel,
        settings: TrainSettings,
        loss: LossSettings,
        counts_V: torch.Tensor,
        team: Team = ALONE,
        fixed: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.loss, self.team = model, settings, loss, team
        self.counts_V, self.fixed = counts_V, fixed
        self._together: nn.Module | None = None
        if team.size > 1 and settings.learn == "all":
            apart = [f"model.{name}" for name, _ in model.named_parameters() if name.startswith("table.")]
            ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self, apart)
            self.__dict__["_together"] = DistributedDataParallel(self, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def forward(self, batch: TrainingBatch, own: torch.Generator, alike: torch.Generator) -> torch.Tensor:
        """Mean over the batch's targets; negatives are drawn by `alike`, all else by `own`."""
        model, settings = self.model, self.settings
        line = None
        if settings.packed:  # few lengths, each compiled once
            line = -(-len(batch.history.values) // settings.batch_tokens) * settings.batch_tokens
        in_batch = self.loss.sampling == "in_batch" and self.loss.kind != "softmax"
        others = self.team.every(batch.targets) if in_batch else batch.targets
        drawn = negatives(self.loss, self.counts_V, others, alike)
        seen = _seen(batch, model.settings.objective == "masked") if self.loss.filter_seen else None
        targets = Targets(batch.targets, drawn, seen)
        with model.table.at_hand(torch.cat([batch.history.values, batch.targets, drawn.rows_S])):
            with _precision(settings.precision, batch.targets.device):
                exits = model(batch.history, own, asked=batch.asked, positions=line, packed=settings.packed)
            places = batch.places if settings.packed else batch.history.places(exits[-1].shape[1])[batch.places]
            states = [states_BTE.flatten(0, 1).index_select(0, places).float() for states_BTE in exits]
            losses = [
                LOSSES[self.loss.kind](model, states_NE, targets, self.loss, own)
                for states_NE in states[-model.settings.blocks :]
            ]
        return torch.stack(losses).mean()

    def learn(self, state: State[SequenceModel], batch: TrainingBatch) -> tuple[float, int]:
        """Make the gradients of a step; returns the sum of its losses and the count of its targets, of all processes."""
        own, alike = self.team.generators(state.generator, self.settings.seed, state.steps)
        if self.settings.since and batch.asked is not None:
            new = batch.asked[batch.places] >= self.settings.since
            batch = replace(batch, places=batch.places[new], targets=batch.targets[new])
        if self.model.settings.objective == "masked":
            batch = mask(batch, self.settings.mask_share, own)
        loss = (self._together or self)(batch, own, alike)
        count = len(batch.targets) if batch.counts else 0
        told = self.team.sum(torch.tensor([loss.item() * count, count], dtype=torch.float64))
        total, targets = float(told[0]), int(told[1])
        if not math.isfinite(total):
            rates = {name: rate for name, rate in state.optimizer.settings.as_dict().items() if name.endswith("learning_rate")}
            raise RecsysError(f"the loss became {total} in step {state.steps}; lower optimizer.learning_rate ({rates})")
        share = count * self.team.size / max(1, targets)  # gradients are averaged over processes, losses over targets
        (loss * share if self.team.size > 1 else loss).backward()
        if self.team.size > 1 and not self.model.table.sharded and self.model.table.weight.grad is not None:
            self.team.sum(self.model.table.weight.grad.div_(self.team.size))
        if self.fixed is not None and self.model.table.weight.grad is not None:
            self.model.table.weight.grad[self.fixed] = 0  # of none of the optimisers does a row move without a gradient
        return total, targets


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
