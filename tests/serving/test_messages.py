"""What the online API takes and what its document says."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import RequestError
from serving.document import OPERATIONS, document
from serving.messages import Batch, Events, NewItems, Rank, Recommend, Similar, decode

KINDS = [Recommend, Batch, Similar, Rank, Events, NewItems]
LEAST: dict[Any, dict[str, Any]] = {
    Recommend: {},
    Batch: {"users": [1]},
    Similar: {"item_id": 1},
    Rank: {"items": [1]},
    Events: {"events": [{"user_id": 1, "item_id": 1}]},
    NewItems: {"items": [{"item_id": 1}]},
}


def read(kind: Any, **fields: Any) -> Any:
    return decode(kind, json.dumps({**LEAST[kind], **fields}).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_named_and_refused(kind: Any) -> None:
    read(kind)
    with pytest.raises(RequestError, match="histroy"):
        read(kind, histroy=[1])


@pytest.mark.parametrize(
    ("kind", "field", "last", "first"),
    [
        (Recommend, "k", 1000, 1001),
        (Recommend, "k", 1, 0),
        (Recommend, "history", [1] * 10_000, [1] * 10_001),
        (Recommend, "history", ["x" * 500], ["x" * 501]),
        (Recommend, "history", [2**63 - 1, -(2**63)], [2**63]),
        (Recommend, "titles", ["x" * 500] * 10_000, ["x"] * 10_001),
        (Recommend, "times", [0, 2**40 - 1], [2**40]),
        (Recommend, "times", [0], [-1]),
        (Recommend, "deny", [1] * 10_000, [1] * 10_001),
        (Recommend, "allow", [1] * 10_000, [1] * 10_001),
        (Recommend, "where", {f"n{number}": 1 for number in range(50)}, {f"n{number}": 1 for number in range(51)}),
        (Recommend, "where", {"x" * 500: 1}, {"x" * 501: 1}),
        (Recommend, "diversity", 1, 1.01),
        (Recommend, "popularity", -100, 100.5),
        (Recommend, "deadline_ms", 60_000, 60_001),
        (Recommend, "deadline_ms", 1, 0),
        (Recommend, "arm", "challenger", "third"),
        (Recommend, "user_id", "x" * 500, "x" * 501),
        (Recommend, "user_id", "x", ""),
        (Recommend, "user_id", -1, 1.5),
        (Recommend, "user_id", None, True),
        (Batch, "users", [1] * 1000, [1] * 1001),
        (Batch, "users", ["x"], []),
        (Rank, "items", [1] * 10_000, [1] * 10_001),
        (Rank, "items", [1], []),
        (Events, "events", [{"user_id": 1, "item_id": 1}] * 10_000, [{"user_id": 1, "item_id": 1}] * 10_001),
        (Events, "events", [{"user_id": 1, "item_id": 1, "time": 0}], [{"user_id": 1, "item_id": 1, "time": "now"}]),
        (Events, "events", [{"user_id": 1, "item_id": 1, "event_id": "x" * 100}], [{"user_id": 1}]),
        (NewItems, "items", [{"a": 1}] * 1000, [{"a": 1}] * 1001),
        (NewItems, "items", [{"a": [1, "x", None, True]}], [{"a": {"b": 1}}]),
        (NewItems, "items", [{"a": 1.5}], [{}]),
    ],
)
def test_the_last_value_is_taken_and_the_next_refused(kind: Any, field: str, last: Any, first: Any) -> None:
    assert getattr(read(kind, **{field: last}), field) is not msgspec.UNSET
    with pytest.raises(RequestError, match=field.removesuffix("s")) as refused:
        read(kind, **{field: first})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("wrong", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_what_is_no_number_is_refused(wrong: str) -> None:
    for body in (f'{{"diversity": {wrong}}}', f'{{"where": {{"price": {{"min": {wrong}}}}}}}', f'{{"history": [{wrong}]}}'):
        with pytest.raises(RequestError):
            decode(Recommend, body.encode())


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_a_message_or_one_line(body: bytes) -> None:
    for kind in KINDS:
        try:
            decode(kind, body)
        except RequestError as error:
            assert "\n" not in str(error)


def test_every_limit_of_the_structs_stands_in_the_document() -> None:
    said = document("1.2.3")
    fields = said["components"]["schemas"]["Recommend"]["properties"]
    assert (fields["k"]["minimum"], fields["k"]["maximum"], fields["k"]["default"]) == (1, 1000, 10)
    assert fields["history"]["maxItems"] == 10_000
    assert fields["history"]["items"]["anyOf"][1]["maxLength"] == 500
    for each in OPERATIONS:
        if each.asks is not None:
            schema = said["components"]["schemas"][each.asks.__name__]
            assert schema["additionalProperties"] is False
            assert set(schema["properties"]) == set(each.asks.__struct_fields__)
            assert schema["examples"]
            for example in schema["examples"]:
                msgspec.json.decode(json.dumps(example), type=each.asks)


def test_every_reference_and_operation_of_the_document_is_whole() -> None:
    said = document("1.2.3")
    for name in set(json.dumps(said).split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in said["components"]["schemas"]
    told = {(method.upper(), path) for path, methods in said["paths"].items() for method in methods}
    assert told == {(each.method, each.path) for each in OPERATIONS}
    names = [methods[method]["operationId"] for methods in said["paths"].values() for method in methods]
    assert len(names) == len(set(names))
