"""The online API against its own document: what the document allows is answered as it says, what it forbids is refused.

RECSYS_FUZZ is how many right and how many wrong cases each operation gets; `python -m tests.benchmarks.api_fuzz` runs many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from tests.serving.online import made

CASES = int(os.environ.get("RECSYS_FUZZ", "7"))
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409", "422"]
negative_data_rejection.expected-statuses = ["400", "404", "405", "409", "413", "415", "422"]
"""
"""What is of the right form may still name an item that is not there; a list that is too long may make the body too large."""


@pytest.fixture(scope="module")
def schema(shop_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    import shutil

    bundle = tmp_path_factory.mktemp("fuzzed") / "bundle"
    shutil.copytree(shop_bundles["exact"], bundle)
    online = made(bundle, record_every=7)
    yield schemathesis.openapi.from_asgi("/openapi.json", online, config=SchemathesisConfig.from_str(CONFIG))
    online.service.store.close()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_every_operation_does_what_the_document_says(schema: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not (operation.body or operation.path_parameters or operation.query):
            continue  # there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        def hold(case: schemathesis.Case) -> None:
            nonlocal asked
            asked += 1
            case.call_and_validate()

        hold()
    assert asked > CASES
