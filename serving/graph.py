"""The sequence model and the ranker as ONNX graphs, which read new events behind the keys and values of earlier ones.

A graph holds what weights alone decide; which positions see which, and tables that grow with the catalogue, are inputs.

B histories · Q positions that are read · P positions before them, whose keys and values are given · T = P + Q
R last positions · L blocks · E width · H heads · D width per head · M tokens that a position may see
N candidates · S events that they look at · W width of the ranker · K tokens of a candidate
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from recsys.attention import UNSEEN
from recsys.blocks import Block, HSTUBlock, LiGRBlock, SASRecBlock
from recsys.fusion import TextAttention
from recsys.model import ModelSettings, SequenceModel
from recsys.ranker import CrossBlock, Ranker
from recsys.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET, IR = 23, 11
"""Versions of the operators, the first with Attention, and of the file."""

SHORTEST = 1e-12
"""Least length that a state is divided by, as in torch.nn.functional.normalize."""


class Graph:
    """A graph while it is written: each call adds a node and names its output."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray[Any, Any]] = {}
        self._inputs: list[Any] = []
        self._numbers = itertools.count()

    def input(self, name: str, kind: str, *shape: int | str) -> str:
        """Of kind float or int."""
        import onnx

        element = {"float": onnx.TensorProto.FLOAT, "int": onnx.TensorProto.INT64}[kind]
        self._inputs.append(onnx.helper.make_tensor_value_info(name, element, shape))
        return name

    def constant(self, value: Tensor | Sequence[int] | int | float) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = f"c{next(self._numbers)}"
        self._constants[name] = np.array(array, np.float32 if array.dtype.kind == "f" else np.int64, order="C")
        return name

    def parts(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """The names of several outputs."""
        import onnx

        names = [f"v{next(self._numbers)}" for _ in range(count)]
        self._nodes.append(onnx.helper.make_node(operator, list(inputs), names, **attributes))
        return names

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.parts(operator, 1, *inputs, **attributes)[0]

    def sum(self, *parts: str) -> str:
        total = parts[0]
        for part in parts[1:]:
            total = self.add("Add", total, part)
        return total

    def linear(self, matrix: str, layer: nn.Linear) -> str:
        weight = self.constant(layer.weight.mT)
        if layer.bias is None:
            return self.add("MatMul", matrix, weight)
        return self.add("Gemm", matrix, weight, self.constant(layer.bias))

    def norm(self, x: str, layer: nn.LayerNorm) -> str:
        scale, bias = self.constant(layer.weight), self.constant(layer.bias)
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=layer.eps)

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def split(self, x: str, *widths: int) -> list[str]:
        """By the last axis."""
        return self.parts("Split", len(widths), x, self.constant(widths), axis=-1)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 takes the rest."""
        return self.add("Reshape", x, self.constant(shape))

    def matrix(self, x: str, width: int) -> str:
        return self.reshape(x, -1, width)

    def last(self, x: str, count: int, axis: int) -> str:
        """The last so many of an axis; all where there are fewer."""
        return self.add("Slice", x, *(self.constant([end]) for end in (-count, 2**31 - 1, axis)))

    def heads(self, matrix: str, batch: str, heads: int, width: int) -> str:
        """B × H × positions × D of a matrix with a line for each position."""
        shape = self.add("Concat", batch, self.constant([-1, heads, width]), axis=0)
        return self.add("Transpose", self.add("Reshape", matrix, shape), perm=[0, 2, 1, 3])

    def joined(self, x_BHQD: str, width: int) -> str:
        """The other way."""
        return self.matrix(self.add("Transpose", x_BHQD, perm=[0, 2, 1, 3]), width)

    def product(self, q_BHQD: str, k_BHTD: str) -> str:
        return self.add("MatMul", q_BHQD, self.add("Transpose", k_BHTD, perm=[0, 1, 3, 2]))

    def finished(self, outputs: dict[str, str]) -> onnx.ModelProto:
        """The model whose outputs are these values, by name."""
        import onnx
        from onnx import helper

        ends = [helper.make_node("Identity", [value], [name]) for name, value in outputs.items()]
        told = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
        kept = [onnx.numpy_helper.from_array(value, name) for name, value in self._constants.items()]
        graph = helper.make_graph([*self._nodes, *ends], "recsys", self._inputs, told, kept)
        about = {"producer_name": "recsys", "producer_version": __version__, "ir_version": IR}
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], **about)


class _Reading:
    """What the blocks of a model share while their graph is written."""

    def __init__(self, model: SequenceModel, tail: int) -> None:
        self.model, self.tail, self.graph = model, tail, Graph()
        self.settings, graph = model.settings, self.graph
        self.size, self.heads = self.settings.embedding_size, self.settings.heads
        self.width, self.blocks = self.size // self.heads, list(model.in_turn())
        self.x = graph.matrix(graph.input("x", "float", "B", "Q", self.size), self.size)
        self.batch = graph.add("Shape", "x", start=0, end=1)
        self.mask = graph.input("mask", "float", "b", 1, "Q", "T")
        relative, timed = self.settings.positions == "relative", self.settings.time in ("relative", "both")
        self.far = graph.input("far", "int", "Q", "T") if relative else ""
        self.buckets = graph.input("buckets", "int", "B", "Q", "T") if timed else ""
        rotary = self.settings.positions == "rotary"
        self.turns = [graph.input(name, "float", "Q", self.width // 2) for name in ("cos", "sin")] if rotary else []
        self.made: list[str] = []
        self.cuts = False
        """Whether only the last positions go on."""

    def cut(self, matrix: str) -> str:
        """Its last positions, where only these go on."""
        if not self.cuts:
            return matrix
        shape = self.graph.add("Concat", self.batch, self.graph.constant([-1, self.size]), axis=0)
        cut = self.graph.last(self.graph.add("Reshape", matrix, shape), self.tail, 1)
        return self.graph.matrix(cut, self.size)

    def attend(self, block: Block, parts: list[str], pointwise: bool = False) -> str:
        """The mixed values of the positions that go on; keys and values of all positions are made."""
        graph, depth = self.graph, len(self.made) // 2
        past = [graph.input(f"{name}_{depth}", "float", "B", self.heads, "P", self.width) for name in ("keys", "values")]
        bias = self._bias(block)
        if pointwise or self.turns:
            q, k, v = (graph.heads(part, self.batch, self.heads, self.width) for part in parts)
            q, k = self._tail(self._turned(q), 2), self._turned(k)
        else:
            shape = graph.add("Concat", self.batch, graph.constant([-1, self.size]), axis=0)
            q, k, v = (graph.add("Reshape", part, shape) for part in parts)
            q = self._tail(q, 1)
        if pointwise:
            k, v = (graph.add("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
            logits = graph.product(graph.add("Mul", q, graph.constant(self.width**-0.5)), k)
            weights = graph.add("Mul", graph.silu(graph.add("Add", logits, bias)), graph.constant(1 / self.settings.length))
            mixed = graph.add("MatMul", weights, v)
        else:
            heads = {} if self.turns else {"q_num_heads": self.heads, "kv_num_heads": self.heads}
            mixed, k, v = graph.parts("Attention", 3, q, k, v, bias, *past, **heads)
        self.made += [k, v]
        return graph.joined(mixed, self.size) if pointwise or self.turns else graph.matrix(mixed, self.size)

    def _bias(self, block: Block) -> str:
        """What is added to the scores."""
        graph, bias, attention = self.graph, self._tail(self.mask, 2), block.attention
        if attention.position_bias is not None:
            table = graph.constant(attention.position_bias)
            bias = graph.add("Add", bias, graph.add("Gather", table, self._tail(self.far, 0), axis=1))
        if attention.time_bias is not None:
            found = graph.add("Gather", graph.constant(attention.time_bias), self._tail(self.buckets, 1), axis=1)
            bias = graph.add("Add", bias, graph.add("Transpose", found, perm=[1, 0, 2, 3]))
        return bias

    def _tail(self, x: str, axis: int) -> str:
        return self.graph.last(x, self.tail, axis) if self.cuts else x

    def _turned(self, x_BHQD: str) -> str:
        """Rotary positions."""
        if not self.turns:
            return x_BHQD
        graph, (cos, sin) = self.graph, self.turns
        left, right = graph.split(x_BHQD, self.width // 2, self.width // 2)
        first = graph.add("Sub", graph.add("Mul", left, cos), graph.add("Mul", right, sin))
        second = graph.add("Add", graph.add("Mul", right, cos), graph.add("Mul", left, sin))
        return graph.add("Concat", first, second, axis=-1)


def _sasrec(reading: _Reading, block: SASRecBlock) -> None:
    graph, size = reading.graph, reading.size
    parts = graph.split(graph.linear(graph.norm(reading.x, block.attention_norm), block.query_key_value), size, size, size)
    mixed = graph.linear(reading.attend(block, parts), block.attention_out)
    reading.x = graph.sum(reading.cut(reading.x), mixed)
    hidden = graph.add("Gelu", graph.linear(graph.norm(reading.x, block.forward_norm), block.forward_in))
    reading.x = graph.sum(reading.x, graph.linear(hidden, block.forward_out))


def _ligr(reading: _Reading, block: LiGRBlock) -> None:
    graph, size, hidden = reading.graph, reading.size, block.forward_out.in_features
    projected = graph.linear(graph.norm(reading.x, block.attention_norm), block.query_key_value_gate)
    *parts, gate = graph.split(projected, *[size] * 4)
    mixed = graph.linear(reading.attend(block, parts), block.attention_out)
    mixed = graph.add("Mul", mixed, graph.add("Sigmoid", reading.cut(gate)))
    reading.x = graph.sum(reading.cut(reading.x), mixed)
    projected = graph.linear(graph.norm(reading.x, block.forward_norm), block.forward_in)
    gate, a, b = graph.split(projected, size, hidden, hidden)
    mixed = graph.linear(graph.add("Mul", graph.silu(a), b), block.forward_out)
    reading.x = graph.sum(reading.x, graph.add("Mul", mixed, graph.add("Sigmoid", gate)))


def _hstu(reading: _Reading, block: HSTUBlock) -> None:
    graph, size = reading.graph, reading.size
    projected = graph.silu(graph.linear(graph.norm(reading.x, block.attention_norm), block.query_key_value_gate))
    *parts, gate = graph.split(projected, *[size] * 4)
    mixed = graph.norm(reading.attend(block, parts, pointwise=True), block.mixed_norm)
    gated = graph.linear(graph.add("Mul", mixed, reading.cut(gate)), block.attention_out)
    reading.x = graph.sum(reading.cut(reading.x), gated)


_BLOCKS: dict[str, Any] = {"sasrec": _sasrec, "ligr": _ligr, "hstu": _hstu}
"""As recsys.blocks.BLOCKS; a test visits both."""


def _text(reading: _Reading, attention: TextAttention) -> None:
    """States attend to the tokens of their own item and of those before it: M of them, the earliest item first."""
    graph, size = reading.graph, reading.size
    tokens, dark = graph.input("tokens", "int", "B", "Q", "M"), graph.input("dark", "float", "B", "Q", "M")
    lit = graph.input("lit", "float", "B", "Q", 1)
    tables = [graph.input(name, "float", "states", size) for name in ("text_keys", "text_values")]
    q = graph.linear(graph.norm(reading.x, attention.query_norm), attention.query)
    q = graph.add("Mul", graph.reshape(q, -1, reading.heads, 1, reading.width), graph.constant(reading.width**-0.5))
    rows = graph.add("Concat", graph.constant([-1]), graph.add("Shape", tokens, start=2), axis=0)
    shape = graph.add("Concat", rows, graph.constant([reading.heads, reading.width]), axis=0)
    places = graph.add("Reshape", tokens, rows)
    k, v = (
        graph.add("Transpose", graph.add("Reshape", graph.add("Gather", table, places, axis=0), shape), perm=[0, 2, 1, 3])
        for table in tables
    )
    back_HS = attention.distance_bias.flip(1)
    each = graph.add("Div", graph.add("Shape", tokens, start=2), graph.constant([attention.span]))
    wide = graph.add("Concat", graph.constant([attention.heads, attention.span]), each, axis=0)
    bias = graph.add("Expand", graph.add("Unsqueeze", graph.constant(back_HS), graph.constant([2])), wide)
    bias = graph.reshape(bias, attention.heads, 1, -1)
    dim = graph.add(
        "Reshape", dark, graph.add("Concat", graph.constant([-1, 1, 1]), graph.add("Shape", tokens, start=2), axis=0)
    )
    weights = graph.add("Softmax", graph.sum(graph.product(q, k), bias, dim), axis=-1)
    mixed = graph.matrix(graph.add("MatMul", weights, v), size)
    drawn = graph.linear(graph.add("Mul", mixed, graph.matrix(lit, 1)), attention.attention_out)
    reading.x = graph.sum(reading.x, graph.add("Mul", drawn, graph.constant(attention.gate)))


def model_graph(model: SequenceModel, tail: int) -> onnx.ModelProto:
    """From embedded events to the states of the last `tail` positions, and the keys and values of all that are read.

    Inputs: x (B × Q × E), mask (B or 1 × 1 × Q × T: 0 or UNSEEN), of each block keys and values of earlier positions (B × H × P
    × D, keys turned); by the settings far (Q × T: distances as position biases are indexed), buckets (B × Q × T: of durations),
    cos and sin (Q × D / 2), tokens, dark, lit (B × Q × M: token states, 0 or UNSEEN; B × Q × 1: whether any is seen), text_keys
    and text_values (a line for each token state). Outputs: states and the same placed (B × R × E), and of each block all_keys
    and all_values (B × H × T × D).
    """
    reading = _Reading(model, tail)
    graph, text = reading.graph, model.text_attention
    for depth, block in enumerate(reading.blocks):
        reading.cuts = depth == len(reading.blocks) - 1 and (depth > 0 or text is None)
        _BLOCKS[model.settings.block](reading, block)
        if depth == 0 and text is not None:
            _text(reading, text)
    x = graph.norm(reading.x, model.norm)
    if not reading.cuts:
        reading.cuts = True
        x = reading.cut(x)
    shape = graph.add("Concat", reading.batch, graph.constant([-1, reading.size]), axis=0)
    states = graph.add("Reshape", x, shape)
    names = [f"all_{name}_{depth}" for depth in range(len(reading.blocks)) for name in ("keys", "values")]
    placed = {"states": states, "placed": _placed(graph, states, model.settings)}
    return graph.finished({**placed, **dict(zip(names, reading.made, strict=True))})


def _placed(graph: Graph, states: str, settings: ModelSettings) -> str:
    """As recsys.scoring.place_users."""
    if settings.similarity == "cosine":
        lengths = graph.add("ReduceL2", states, graph.constant([2]), keepdims=1)
        states = graph.add("Div", states, graph.add("Max", lengths, graph.constant(SHORTEST)))
    return graph.add("Div", states, graph.constant(settings.temperature))


def ranker_graph(ranker: Ranker, depth: int) -> onnx.ModelProto:
    """From candidates and events to the scores after `depth` blocks, shape B × N.

    Inputs: vectors (B × N × E), evidence (B × N × 3), scores (B × N), states and event_vectors (B × S × E), some (B × S: 1
    where there is an event); by the settings ages (B × S: buckets), near (B × N × S), ids (B × N × W) and event_ids
    (B × S × W), tokens (B × N × K), text_keys and text_values (a line for each token state), hidden (B × N: 0 or UNSEEN).
    """
    settings, graph = ranker.settings, Graph()
    width, size = settings.width, ranker.vector_in.in_features
    vectors, evidence = graph.input("vectors", "float", "B", "N", size), graph.input("evidence", "float", "B", "N", 3)
    scores = graph.input("scores", "float", "B", "N")
    states, past = (graph.input(name, "float", "B", settings.span, size) for name in ("states", "event_vectors"))
    some = graph.input("some", "float", "B", settings.span)
    batch = graph.add("Shape", "scores", start=0, end=1)

    def matrix(x: str, layer: nn.Linear) -> str:
        return graph.linear(graph.matrix(x, layer.in_features), layer)

    x = graph.sum(matrix(vectors, ranker.vector_in), matrix(evidence, ranker.evidence_in))
    events = graph.sum(matrix(states, ranker.state_in), matrix(past, ranker.vector_in))
    if ranker.table is not None:
        x = graph.sum(x, graph.matrix(graph.input("ids", "float", "B", "N", width), width))
        events = graph.sum(events, graph.matrix(graph.input("event_ids", "float", "B", settings.span, width), width))
    events = graph.norm(events, ranker.event_norm)
    users = matrix(states, ranker.user_in)  # of every event: a product with one line takes another kernel
    user = graph.add("Slice", graph.reshape(users, -1, settings.span, width), *map(graph.constant, ([0], [1], [1])))
    if ranker.token_in is not None:
        x = graph.sum(x, _drawn_text(graph, user, width))
    near = graph.input("near", "float", "B", "N", settings.span) if settings.companions else ""
    blocks = [block for block in ranker.blocks if isinstance(block, CrossBlock)]
    if any(block.time_bias is not None for block in blocks):
        graph.input("ages", "int", "B", settings.span)
    if settings.among:
        graph.input("hidden", "float", "B", "N")
    lines = graph.add("Concat", batch, graph.constant([1, 1, settings.span]), axis=0)
    seen = graph.add("Reshape", some, lines)
    for block in blocks[:depth]:
        x = _crossed(graph, block, x, events, seen, near, batch)
    rows = graph.add("Concat", batch, graph.constant([-1, width]), axis=0)
    y = graph.add("Reshape", graph.norm(x, ranker.norm), rows)
    by_user = graph.add("Reshape", graph.linear(graph.matrix(y, width), ranker.user_out), rows)
    added = graph.sum(graph.add("Mul", y, graph.constant(ranker.score_weight)), graph.add("Mul", by_user, user))
    score = graph.add("Mul", scores, graph.constant(ranker.retrieval_weight[depth - 1]))
    score = graph.sum(score, graph.add("ReduceSum", added, graph.constant([2]), keepdims=0))
    if near and ranker.companion_weight is not None:
        weighed = graph.add("Mul", near, graph.constant(ranker.companion_weight))
        score = graph.sum(score, graph.add("ReduceSum", weighed, graph.constant([2]), keepdims=0))
    return graph.finished({"ranked": score})


def _crossed(graph: Graph, block: CrossBlock, x: str, events: str, seen: str, near: str, batch: str) -> str:
    """Candidates with what they drew from events, as CrossBlock.forward has it; a line for each."""
    width, heads = block.query.in_features, block.heads
    each = width // heads
    q = graph.heads(graph.linear(graph.norm(x, block.query_norm), block.query), batch, heads, each)
    k, v = graph.split(graph.linear(events, block.key_value), width, width)
    k, v = graph.heads(k, batch, heads, each), graph.heads(v, batch, heads, each)
    logits = graph.product(graph.add("Mul", q, graph.constant(each**-0.5)), k)
    bias = graph.add("Unsqueeze", graph.constant(block.position_bias), graph.constant([1]))
    dark = graph.add("Mul", graph.add("Sub", graph.constant(1.0), seen), graph.constant(float(UNSEEN)))
    logits = graph.sum(logits, graph.add("Add", dark, bias))
    if block.time_bias is not None:
        found = graph.add("Gather", graph.constant(block.time_bias), "ages", axis=1)
        found = graph.add("Transpose", found, perm=[1, 0, 2])
        logits = graph.add("Add", logits, graph.add("Unsqueeze", found, graph.constant([2])))
    beside = graph.add("Unsqueeze", near, graph.constant([1])) if near else ""
    if block.companion_bias is not None:
        per_head = graph.constant(block.companion_bias.view(heads, 1, 1))
        logits = graph.add("Add", logits, graph.add("Mul", beside, per_head))
    weights = graph.add("Mul", graph.add("Softmax", logits, axis=-1), seen)
    drawn = graph.linear(graph.joined(graph.add("MatMul", weights, v), width), block.attention_out)
    if block.companion_value is not None:
        told = graph.add("ReduceSum", graph.add("Mul", weights, beside), graph.constant([3]), keepdims=0)
        told = graph.matrix(graph.add("Transpose", told, perm=[0, 2, 1]), heads)
        drawn = graph.sum(drawn, graph.linear(told, block.companion_value))
    x = graph.sum(x, drawn)
    if block.among is not None and block.among_norm is not None:
        parts = graph.split(graph.linear(graph.norm(x, block.among_norm), block.among), *[width] * 3)
        q, k, v = (graph.heads(part, batch, heads, each) for part in parts)
        logits = graph.product(graph.add("Mul", q, graph.constant(each**-0.5)), k)
        hidden = graph.add("Unsqueeze", "hidden", graph.constant([1, 2]))
        weights = graph.add("Softmax", graph.add("Add", logits, hidden), axis=-1)
        x = graph.sum(x, graph.joined(graph.add("MatMul", weights, v), width))
    a, b = graph.split(graph.linear(graph.norm(x, block.forward_norm), block.forward_in), *[block.forward_out.in_features] * 2)
    return graph.sum(x, graph.linear(graph.add("Mul", graph.silu(a), b), block.forward_out))


def _drawn_text(graph: Graph, user_B1W: str, width: int) -> str:
    """What the user's state draws from the tokens of each candidate, as Ranker has it; a line for each."""
    tokens = graph.input("tokens", "int", "B", "N", "K")
    tables = [graph.input(name, "float", "states", width) for name in ("text_keys", "text_values")]
    k, v = (graph.add("Gather", table, tokens, axis=0) for table in tables)
    user = graph.add("Unsqueeze", user_B1W, graph.constant([1]))
    logits = graph.add("ReduceSum", graph.add("Mul", k, user), graph.constant([3]), keepdims=0)
    some = graph.add("Cast", graph.add("Greater", tokens, graph.constant(0)), to=1)
    dark = graph.add("Mul", graph.add("Sub", graph.constant(1.0), some), graph.constant(float(UNSEEN)))
    logits = graph.add("Add", graph.add("Mul", logits, graph.constant(width**-0.5)), dark)
    weights = graph.add("Mul", graph.add("Softmax", logits, axis=-1), some)
    drawn = graph.add("Mul", graph.add("Unsqueeze", weights, graph.constant([3])), v)
    return graph.matrix(graph.add("ReduceSum", drawn, graph.constant([2]), keepdims=0), width)
