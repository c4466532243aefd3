"""Trainings of the ring by the processes that torchrun started; the first one writes what they came to.

python -m torch.distributed.run --nproc-per-node 2 -m tests.training.together FOLDER NAME …
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

import training.checkpoint
from recsys.batch import Sequences, deal, gather
from recsys.model import ModelSettings
from tests.training.conftest import RING, ring_sequences
from training.checkpoint import Checkpoints
from training.loop import Observation, TrainSettings, fit
from training.losses import LossSettings
from training.optimizer import OptimizerSettings
from training.team import Team, joined

MODEL = ModelSettings(embedding_size=16, blocks=1, heads=2, hidden_size=23, length=11, dropout=0.0)
TRAIN = TrainSettings(epochs=3, batch_tokens=10**6, patience=100)  # one step an epoch, of all histories
LOSS = LossSettings(negatives=13)
SGD = OptimizerSettings(kind="sgd", learning_rate=0.3, embedding_learning_rate=2.0, warmup_steps=1)
IN_PARTS = dataclasses.replace(MODEL, embedding="torchrec")
ADAGRAD = OptimizerSettings(learning_rate=1e-2, warmup_steps=1, table="rowwise_adagrad", embedding_learning_rate=0.1)
STEPS = dataclasses.replace(TRAIN, batch_tokens=307)

ROWS = 101

WAYS: dict[str, list[Any]] = {
    "plain": [MODEL, TRAIN, LOSS, SGD],
    **{
        f"torchrec {kind}": [
            IN_PARTS,
            dataclasses.replace(TRAIN, sharding=kind),
            LOSS,
            dataclasses.replace(SGD, table="sgd"),
        ]
        for kind in ("row_wise", "table_wise", "column_wise", "auto")
    },
    "plain softmax": [MODEL, TRAIN, dataclasses.replace(LOSS, kind="softmax"), SGD],
    "torchrec softmax": [IN_PARTS, TRAIN, dataclasses.replace(LOSS, kind="softmax"), dataclasses.replace(SGD, table="sgd")],
    "plain in batch": [MODEL, TRAIN, dataclasses.replace(LOSS, sampling="in_batch", filter_seen=True), SGD],
    "plain adagrad": [MODEL, TRAIN, LOSS, ADAGRAD],
    "torchrec adagrad": [IN_PARTS, dataclasses.replace(TRAIN, sharding="row_wise"), LOSS, ADAGRAD],
    "steps": [dataclasses.replace(IN_PARTS, dropout=0.1), dataclasses.replace(STEPS, epochs=4), LOSS, ADAGRAD],
    "muon": [dataclasses.replace(MODEL, dropout=0.1), STEPS, LOSS, OptimizerSettings(kind="muon", ema=0.9, warmup_steps=5)],
}


def share(sequences: Sequences, team: Team) -> Sequences:
    """The users of one process."""
    if team.size == 1:
        return sequences
    own = (deal(sequences.train_end, team.size) == team.rank).nonzero().flatten()
    batch = gather(sequences.items, sequences.times, sequences.offsets[:-1][own], sequences.offsets[1:][own])
    ends = sequences.train_end[own], sequences.validation_end[own]
    return Sequences(batch.values.int(), batch.times, batch.offsets, *ends)


class Cut(Exception):
    pass


def train(name: str, team: Team, folder: Path, cut: int = 0) -> dict[str, Any]:
    """One training; after `cut` observations it is cut off."""
    seen = 0

    def observe(_: Observation) -> None:
        nonlocal seen
        seen += 1
        if seen == cut:
            raise Cut

    training.checkpoint.SECONDS = 0 if cut else 60
    model, settings, loss, optimizer = WAYS[name]
    told: list[str] = []
    state = fit(
        share(ring_sequences(), team),
        RING,
        model,
        settings,
        loss,
        optimizer,
        team=team,
        checkpoints=Checkpoints(folder / name, "k", team),
        observe=observe,
        tell=told.append,
    )
    weights = state.model.weights() if not team.rank else {}
    return {"weights": weights, "curve": state.curve, "best": state.best, "steps": state.steps, "told": told}


def carry_on(team: Team, folder: Path, sharding: str, updates: int) -> None:
    """Read the table that was saved last, where there is one, change some of its rows so often, and save it."""
    from training.distributed import ShardedTable

    table = ShardedTable(ROWS, 16, team, "rowwise_adagrad", sharding)
    checkpoints = Checkpoints(folder / "parts", "k", team)
    done = max(0, checkpoints.newest)
    if done:
        assert checkpoints.load(done, table.parts()) == {"done": done}
    else:
        table.draw(ROWS, 16, 2, torch.Generator().manual_seed(0))
    for step in range(done, done + updates):
        rows = torch.arange(2, ROWS)[step % 3 :: 3]
        table.set_rate(0.1 / (1 + step))
        (table(rows) * torch.arange(1.0, 17.0)).square().mean().backward()  # the same in every process
    checkpoints.save(done + updates, {"done": done + updates}, table.parts())
    checkpoints.finish()
    team.wait()


def main(folder: Path, names: list[str]) -> None:
    """A name may end in :N, after how many observations the training is cut off; `parts SHARDING N` calls `carry_on`."""
    with joined(torch.device("cpu"), together=True) as team:
        for word in names:
            if word.startswith("parts "):
                _, sharding, updates = word.split()
                carry_on(team, folder, sharding, int(updates))
                continue
            name, _, cut = word.partition(":")
            try:
                made: dict[str, Any] | None = train(name, team, folder, int(cut or 0))
            except Cut:
                made = None
            if not team.rank and made is not None:
                torch.save(made, folder / f"{name} {team.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
