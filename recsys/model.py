"""The sequence model: a user is their history, and the state after the last event meets the items by inner product.

B histories · N events · T positions · E embedding size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, embedding, normalize, pad

from recsys.attention import PATTERNS, POSITIONS, TIME_BUCKETS, TIMES, View, time_bucket
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch
from recsys.blocks import BLOCKS, Block
from recsys.bundle import Directory
from recsys.config import Settings
from recsys.content import CHUNK, CONTENT, Content
from recsys.dropout import dropout
from recsys.embedding import TABLES, Table
from recsys.errors import BundleError
from recsys.fusion import Fusion, ItemContent, TextAttention
from recsys.scoring import SIMILARITIES, place_items, place_users
from recsys.text import TextSettings

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What the weights mean; serving reads it from the bundle only."""

    section: ClassVar[str] = "model"

    objective: str = "causal"
    """What a state is learnt to name: causal: the next item (SASRec); masked: an item hidden among all others (BERT4Rec)."""
    embedding_size: int = 64
    """Width of item vectors and states."""
    block: str = "sasrec"
    """Kind of block: sasrec, ligr or hstu."""
    blocks: int = 2
    """Blocks that a state goes through."""
    distinct_blocks: int = 0
    """Blocks with weights of their own, used in turn; 0: all."""
    heads: int = 1
    """Attention heads; must divide the embedding size."""
    hidden_size: int = 256
    """Width inside a block's feed-forward layer; hstu has none."""
    attention: str = "full"
    """Which events an event sees: full, local (the nearest) or block_sparse (its block, and the ends of the others)."""
    span: int = 64
    """Events that local attention reaches back, and in a block of block_sparse."""
    positions: str = "learned"
    """Where an event stands: learned (a vector each), rotary, relative (a bias for each distance) or none."""
    time: str = "none"
    """Log-bucketed durations: gaps (since the event before, a vector), relative (between two events, a bias), both, none."""
    request_time: bool = False
    """Whether the model reads when it is asked: durations then run up to the next event or the request."""
    length: int = 200
    """Events of a history that the model reads, counted from the last."""
    dropout: float = 0.2
    """Share of elements dropped while training; a multiple of 1/256 is used."""
    early_exit: bool = False
    """Whether the states after every block are learnt, so that serving may leave before the last."""
    similarity: str = "dot"
    """How a state meets an item: dot or cosine."""
    temperature: float = 1.0
    """Scores are divided by it."""
    embedding: str = "torch"
    """Backend of the item table: torch or torchrec."""
    text: str = "none"
    """How items are described: pooled (their vectors hold text, categories and numbers), cross (states attend to the
    tokens of their text), both, or none."""
    text_span: int = 4
    """Items, from its own backwards, whose tokens a state attends to."""
    ids: bool = True
    """Whether items have embeddings of their own; without, their description is all that is known of them."""
    id_dropout: float = 0.0
    """Share of the ids of described items that is dropped while training, so that the description alone carries them."""

    def __post_init__(self) -> None:
        self._at_least(1, "embedding_size", "blocks", "heads", "hidden_size", "length", "span", "text_span")
        for name, known in CHOICES.items():
            self._one_of(known, name)
        if self.embedding_size % self.heads:
            raise ValueError(f"heads must divide embedding_size, found {self.heads} and {self.embedding_size}")
        if self.positions == "rotary" and self.embedding_size // self.heads % 2:
            raise ValueError(f"rotary positions need an even width per head, found {self.embedding_size // self.heads}")
        if not 0 <= self.distinct_blocks <= self.blocks:
            raise ValueError(f"distinct_blocks must be from 0 to blocks, found {self.distinct_blocks} and {self.blocks}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) <= 0.99:
                raise ValueError(f"{name} must be from 0 to .99, found {getattr(self, name)}")
        if not self.described and (self.id_dropout or not self.ids):
            raise ValueError(f"without ids, text must be pooled or both, found {self.text!r}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if self.early_exit and self.blocks < 2:
            raise ValueError(f"early_exit needs at least 2 blocks, found {self.blocks}")
        if self.request_time and self.time == "none":
            raise ValueError("request_time needs durations to read: set time to gaps, relative or both")
        if self.objective == "masked" and self.time != "none" and not self.request_time:
            raise ValueError("a masked item's durations tell when it happens: set request_time, or time to none")
        if self.objective == "masked" and self.length < 2:
            raise ValueError("length must be at least 2 where the last place is the mask's, found 1")

    @property
    def described(self) -> bool:
        """Whether item vectors hold descriptions."""
        return self.text in ("pooled", "both")

    @property
    def attends_to_text(self) -> bool:
        return self.text in ("cross", "both")


CHOICES = {
    "objective": ("causal", "masked"),
    "block": tuple(BLOCKS),
    "attention": tuple(PATTERNS),
    "positions": POSITIONS,
    "time": TIMES,
    "similarity": SIMILARITIES,
    "embedding": tuple(TABLES),
    "text": ("none", "pooled", "cross", "both"),
}


class SequenceModel(nn.Module):
    """SASRec, BERT4Rec or HSTU, by its settings, over `items` items, whose rows start at FIRST_ITEM.

    `content` describes these items and, behind them, further ones that no event was learnt of; `vocabulary` is how many token
    states are learnt where it has none; `table` makes the item table (default: as the settings say). Without a generator
    nothing is random: dropout acts only where one is given. The mask of the masked objective is the row UNKNOWN: an event whose
    item is not known.
    """

    def __init__(
        self,
        settings: ModelSettings,
        items: int,
        content: Content | None = None,
        vocabulary: int = 0,
        table: Callable[[int, int], Table] | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.items = settings, items
        size = settings.embedding_size
        self.ids = items if settings.ids else 0
        self.table = (table or TABLES[settings.embedding])(FIRST_ITEM + self.ids, size)
        if settings.text != "none" and content is None:
            raise ValueError(f"model.text is {settings.text!r}, and no content of the items is given")
        self.content = ItemContent(content, vocabulary) if settings.text != "none" and content is not None else None
        self.fusion = Fusion(settings, self.content) if settings.described and self.content else None
        self.text_attention = TextAttention(settings, self.content) if settings.attends_to_text and self.content else None
        self.positions = nn.Parameter(torch.empty(settings.length, size)) if settings.positions == "learned" else None
        timed = settings.time in ("gaps", "both")
        self.gaps = nn.Parameter(torch.empty(TIME_BUCKETS + 1, size)) if timed else None
        asked = timed and settings.request_time and settings.objective == "causal"
        self.asked_gaps = nn.Parameter(torch.empty(TIME_BUCKETS, size)) if asked else None
        distinct = settings.distinct_blocks or settings.blocks
        self.blocks = nn.ModuleList(BLOCKS[settings.block](settings) for _ in range(distinct))
        self.norm = nn.LayerNorm(size)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> SequenceModel:
        """Draw all weights anew: matrices normal with deviation .02, token states with 1, norms 1, biases, gates and rows that
        are not learnt 0.
        """
        unlearnt = UNKNOWN if self.settings.objective == "masked" else FIRST_ITEM
        for name, parameter in self.named_parameters():
            if name.startswith("table."):
                self.table.draw(FIRST_ITEM + self.ids, self.settings.embedding_size, unlearnt, generator)
            elif parameter.ndim > 1:
                parameter.normal_(0, 1.0 if name == "content.states_WP" else 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        asked: Tensor | None = None,
        positions: int | None = None,
        packed: bool = False,
    ) -> list[Tensor]:
        """Placed states after every event of each history of at most `length` events, padded on the right, shape B × T × E:
        before the first block and after each, blocks + 1 of them; without `early_exit`, after the last alone.

        `asked` is when each state is asked for, seconds, shape N: read, and needed, by a causal model of request times.
        `positions` is the padded length T (default: the longest history); with `packed`, all histories lie end to end in
        one line (B = 1) of that length (default: as long as they are).
        """
        x_BTE, view = self._embed(batch, generator, asked, positions, packed)
        states = [x_BTE]
        for depth, block in enumerate(self.in_turn()):
            states.append(self._through(depth, block, states[-1], view, generator))
        return [self.place(self.norm(x_BTE)) for x_BTE in (states if self.settings.early_exit else states[-1:])]

    def encode(self, batch: Batch, now: Tensor | None = None, *, leave: Sequence[float] = ()) -> Tensor:
        """Placed state of each history, shape B × E; an empty history's state is 0. As `read`."""
        x_BTE, view = self.read(batch, now, leave=leave)
        return self.place(x_BTE[view.last])

    def read(
        self, batch: Batch, now: Tensor | None = None, *, positions: int | None = None, leave: Sequence[float] = ()
    ) -> tuple[Tensor, View]:
        """States behind every event that is read, not yet placed, shape B × T × E; those of an empty history are 0.

        `now` is when each is asked for, seconds, shape B; without it, at the time of its last event. `leave` spends fewer
        blocks (a saturated state is final, as in CALM, Schuster et al. 2022): a history leaves after the first block
        whose output has at least that cosine with its input, one number a block but the last.
        """
        x_BTE, view = self.read_all(*self.asked(batch, now), positions=positions, leave=leave)
        return x_BTE * (batch.lengths > 0)[:, None, None], view

    def read_all(
        self, batch: Batch, asked: Tensor | None, *, positions: int | None = None, leave: Sequence[float] = ()
    ) -> tuple[Tensor, View]:
        """`read` where each state is asked for at its own time, seconds, shape N, as in training."""
        x_BTE, whole = self._embed(batch, None, asked, positions)
        view, out_BTE, going_B = whole, torch.zeros_like(x_BTE), whole.last[0]
        for depth, block in enumerate(self.in_turn()):
            before_BTE, x_BTE = x_BTE, self._through(depth, block, x_BTE, view)
            if depth >= len(leave):
                continue
            left_B = self._alike(before_BTE, x_BTE, view) >= leave[depth]
            out_BTE[going_B[left_B]] = self.norm(x_BTE[left_B])
            going_B, x_BTE, view = going_B[~left_B], x_BTE[~left_B], view.take(~left_B)
            if not len(going_B):
                break
        out_BTE[going_B] = self.norm(x_BTE)
        return out_BTE, whole

    def readable(self, batch: Batch) -> Batch:
        """The last events that the model reads of each history."""
        return batch.last(self.readable_events)

    @property
    def readable_events(self) -> int:
        """How many events the model reads of a history, at most."""
        return self.settings.length - (self.settings.objective == "masked")

    @property
    def lines(self) -> int:
        """Items that have a vector: those that were learnt and, where vectors hold descriptions, all that are described."""
        return self.content.items if self.fusion is not None and self.content is not None else self.items

    def reads(self, rows: Tensor) -> Tensor:
        """Whether the model knows anything of item rows: their id, or a description that it reads; bool, same shape."""
        learnt = (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + self.ids)
        return learnt if self.content is None else learnt | self.content.some_R[self.content.known(rows)]

    @property
    def known_V(self) -> Tensor:
        """`reads` of the items that have a vector, shape `lines`."""
        return self.reads(torch.arange(FIRST_ITEM, FIRST_ITEM + self.lines, device=self.table.device))

    def vectors(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Placed vectors of item rows; a further axis of width E. With a generator, ids are dropped as in training."""
        return place_items(self.fused(rows, generator), self.settings.similarity)

    def candidates(self, generator: torch.Generator) -> Tensor:
        """Placed vectors of the learnt items, as training meets them, shape items × E; line i is row FIRST_ITEM + i."""
        if self.fusion is None:
            return place_items(self.table.whole()[FIRST_ITEM:], self.settings.similarity)
        rows = torch.arange(FIRST_ITEM, FIRST_ITEM + self.items, device=self.table.device)
        return self.vectors(rows, generator)

    def item_vectors(self, lines: Tensor | None = None) -> Tensor:
        """Placed vectors of the catalogue, as lists are made by, shape items × E; line i is row FIRST_ITEM + i.

        Of `lines` alone where they are given. Where content names neighbours, they are added by their nearness.
        """
        if lines is None and self.fusion is None:
            return place_items(self.table.whole()[FIRST_ITEM:], self.settings.similarity)
        rows = torch.arange(self.lines, device=self.table.device) if lines is None else lines
        rows = rows + FIRST_ITEM
        if self.content is None or self.fusion is None or (self.table.sharded and not self.reads_neighbours):
            return self.vectors(rows)
        vectors_VE = self.vectors(torch.arange(FIRST_ITEM, FIRST_ITEM + self.lines, device=self.table.device))
        if not self.reads_neighbours:
            return vectors_VE[rows - FIRST_ITEM]
        out = []
        for rows_N in torch.split(rows, CHUNK):
            near_NKE = embedding(self.content.neighbours_RK[rows_N], vectors_VE)
            out.append(self._beside(vectors_VE[rows_N - FIRST_ITEM], near_NKE, self.content.nearness_RK[rows_N]))
        return torch.cat(out)

    @property
    def reads_neighbours(self) -> bool:
        """Whether an item's vector takes in those of its neighbours, so that it needs those of all."""
        return self.fusion is not None and self.content is not None and bool(self.content.nearness_RK.shape[1])

    def described_as(self, row: int, content: Content) -> Tensor:
        """Placed vectors of one item, as lists are made by, were its description each line of `content`; shape lines × E.

        Its id and its neighbours stay. Of a model whose item vectors hold descriptions alone.
        """
        assert self.fusion is not None and self.content is not None
        device, learnt = self.table.device, row < FIRST_ITEM + self.ids
        other = ItemContent(content, 0).to(device)
        if not len(content.states_WP):  # the model learns them
            other.states_WP = self.content.states_WP
        rows_N = torch.arange(FIRST_ITEM, FIRST_ITEM + len(content), device=device)
        id_1E = self.table(torch.tensor([row if learnt else UNKNOWN], device=device)) * learnt
        own_NE = place_items(id_1E + self.fusion(rows_N, other), self.settings.similarity)
        nearness_1K = self.content.nearness_RK[row][None]
        if not nearness_1K.shape[1]:
            return own_NE
        return self._beside(own_NE, self.vectors(self.content.neighbours_RK[row][None] + FIRST_ITEM), nearness_1K)

    def _beside(self, own_NE: Tensor, near_NKE: Tensor, nearness_NK: Tensor) -> Tensor:
        """Placed vectors of items with those of their neighbours."""
        near_NE, share_N1 = (near_NKE * nearness_NK[..., None]).sum(1), nearness_NK.sum(1, keepdim=True)
        if self.settings.similarity == "cosine":
            near_NE = normalize(near_NE, dim=1) * share_N1
        return place_items((own_NE + near_NE) / (1 + share_N1), self.settings.similarity)

    def weights(self) -> dict[str, Tensor]:
        """All weights on the CPU, named as with the plain torch table, so that serving needs no other."""
        named = {name: value for name, value in self.state_dict().items() if not name.startswith("table.")}
        return {name: value.detach().cpu().contiguous() for name, value in {**named, "table.weight": self.table.weight}.items()}

    def attention(self, batch: Batch, now: Tensor | None = None, leave: Sequence[float] = ()) -> list[Tensor]:
        """Attention weights of each block, shape B × heads × T × T; for the masked objective, a mask is the last event.

        As `read`: those of blocks that a history left before are 0.
        """
        batch, asked = self.asked(batch, now)
        x_BTE, view = self._embed(batch, None, asked, None)
        going_B = torch.ones_like(view.lengths_B, dtype=torch.bool)
        out: list[Tensor] = []
        for depth, block in enumerate(self.in_turn()):
            out.append(block.attention_weights(x_BTE, view) * going_B[:, None, None, None])
            before_BTE, x_BTE = x_BTE, self._through(depth, block, x_BTE, view)
            if depth < len(leave):
                going_B &= self._alike(before_BTE, x_BTE, view) < leave[depth]
        return out

    def attention_to_text(self, batch: Batch, now: Tensor | None = None) -> Tensor | None:
        """How each history's last state attends to the tokens of its last items, shape B × heads × items × tokens.

        None where the model does not. Tokens are those of its content; a masked item has none.
        """
        if self.text_attention is None or self.content is None:
            return None
        batch, asked = self.asked(batch, now)
        x_BTE, view = self._embed(batch, None, asked, None)
        x_BE = next(self.in_turn())(x_BTE, view)[view.last]
        rows_BT = view.rows_BT.new_zeros(len(batch), self.settings.text_span + view.positions)
        back_U = torch.arange(1 - self.settings.text_span, 1, device=x_BTE.device)
        rows_BT[:, self.settings.text_span :] = view.rows_BT
        rows_BU = rows_BT.gather(1, (view.last[1][:, None] + self.settings.text_span + back_U))
        return self.text_attention.weights(x_BE, rows_BU, self.content)

    def _alike(self, before_BTE: Tensor, x_BTE: Tensor, view: View) -> Tensor:
        """Cosines of the last states before a block and behind it, shape B."""
        return cosine_similarity(self.norm(before_BTE[view.last]), self.norm(x_BTE[view.last]))

    def _through(self, depth: int, block: Block, x_BTE: Tensor, view: View, generator: torch.Generator | None = None) -> Tensor:
        """States after a block; behind the first one they attend to text, so that later blocks read what was found."""
        x_BTE = block(x_BTE, view, generator)
        if depth == 0 and self.text_attention is not None and self.content is not None:
            x_BTE = self.text_attention(x_BTE, view, self.content, generator)
        return x_BTE

    def fused(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Id embedding and description of item rows; an id that was not learnt is UNKNOWN's, or 0 where items are described."""
        learnt = rows < FIRST_ITEM + self.ids
        vectors: Tensor = self.table(torch.where(learnt, rows, UNKNOWN))
        if self.fusion is None or self.content is None:
            return vectors
        own = self.content.known(rows)
        if generator is not None and self.settings.id_dropout:
            kept = torch.rand(rows.shape, generator=generator, device=rows.device) >= self.settings.id_dropout
            learnt = learnt & (kept | ~self.content.some_R[own])
        fused: Tensor = vectors * learnt[..., None] + self.fusion(own, self.content)
        return fused

    def in_turn(self) -> Iterator[Block]:
        """The blocks that a state goes through; one may come again."""
        for depth in range(self.settings.blocks):
            block = self.blocks[depth % len(self.blocks)]
            assert isinstance(block, Block)
            yield block

    def asked(self, batch: Batch, now: Tensor | None) -> tuple[Batch, Tensor | None]:
        """What the model reads when it is asked at `now`, and when each state is asked for."""
        batch = self.readable(batch)
        some_B, ends_B = batch.lengths > 0, batch.offsets[1:] - 1
        if now is None:
            now = torch.zeros_like(ends_B)
            now[some_B] = batch.times[ends_B[some_B]]
        if self.settings.objective == "masked":
            return _with_mask(batch, now), None
        if not self.settings.request_time:
            return batch, None
        asked = batch.times.roll(-1)
        asked[ends_B[some_B]] = now[some_B]
        return batch, asked

    def place(self, states: Tensor) -> Tensor:
        """Such that a state's score of an item is their inner product; shape kept."""
        return place_users(states, self.settings.similarity, self.settings.temperature)

    def _embed(
        self, batch: Batch, generator: torch.Generator | None, asked: Tensor | None, positions: int | None, packed: bool = False
    ) -> tuple[Tensor, View]:
        if not self.settings.request_time or self.settings.objective == "masked":
            asked = batch.times
        elif asked is None:
            raise ValueError("the model reads request times, and none are given")
        line = Batch(batch.values, batch.offsets[[0, -1]], batch.times) if packed else batch
        rows_BT = line.padded(positions or max(1, int(line.lengths.max())))
        mask_BT = line.mask(rows_BT.shape[1])
        times_BT, asked_BT = (torch.zeros_like(rows_BT).masked_scatter_(mask_BT, times) for times in (batch.times, asked))
        at_T, owners_T = torch.arange(rows_BT.shape[1], device=rows_BT.device), None
        if packed:
            owners_T = torch.full_like(at_T, -1).masked_scatter_(mask_BT[0], batch.owners)
            at_T = at_T - pad(batch.offsets[:-1], (1, 0))[owners_T + 1]
        x_BTE = self.fused(rows_BT, generator) * self.settings.embedding_size**0.5
        if self.positions is not None:  # serving pads beyond the longest history
            x_BTE = x_BTE + embedding(at_T.clamp(max=self.settings.length - 1), self.positions)
        if self.gaps is not None:
            gaps_BT = time_bucket(times_BT.diff(dim=1, prepend=times_BT[:, :1]))
            x_BTE = x_BTE + embedding(torch.where(at_T > 0, gaps_BT, TIME_BUCKETS), self.gaps)
        if self.asked_gaps is not None:
            x_BTE = x_BTE + embedding(time_bucket(asked_BT - times_BT), self.asked_gaps)
        mask = None if owners_T is None else next(self.in_turn()).attention.block_mask(owners_T, at_T)
        view = View(batch.lengths, rows_BT, at_T, times_BT, asked_BT, owners_T, mask)
        return dropout(x_BTE, self.settings.dropout, generator), view


def _with_mask(batch: Batch, now_B: Tensor) -> Batch:
    """Each history with a masked event at its end."""
    starts = torch.arange(len(batch) + 1, device=batch.offsets.device)
    ends = batch.offsets[1:] + starts[:-1]
    kept = torch.ones(len(batch.values) + len(batch), dtype=torch.bool, device=ends.device)
    kept[ends] = False
    values, times = ends.new_empty(len(kept)), ends.new_empty(len(kept))
    values[kept], times[kept] = batch.values, batch.times
    values[ends], times[ends] = UNKNOWN, now_B
    return Batch(values, batch.offsets + starts, times)


def put_weights(module: nn.Module, path: Path, device: str, assign: bool = False) -> None:
    """Give a module the weights of a file. Raises BundleError: they are not those of its settings."""
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path, device=device), assign=assign)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise BundleError(f"{path}: not the weights of its settings ({line}); export it again") from None


def model_from(directory: Directory, device: str = "cpu", content: Content | None = None) -> SequenceModel:
    """The trained model of a run's model directory or of a bundle; `content` stands in the place of its own.

    Raises BundleError: the weights are not those of the settings in the manifest.
    """
    settings = replace(ModelSettings(**directory.manifest["recipe"][ModelSettings.section]), embedding="torch")
    text = TextSettings(**directory.manifest["recipe"].get(TextSettings.section, {}))
    if content is None and settings.text != "none":
        content = Content.load(directory.path / CONTENT)
    with torch.device("meta"):  # weights are where the file lies in memory, not copied
        model = SequenceModel(settings, directory.manifest["items"], content, text.vocabulary)
    put_weights(model, directory.path / WEIGHTS, device, assign=True)
    return model.to(device)
