"""Item vectors: in blocks as in one go, mapped as in memory, and without copies of the model's own table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from recsys.batch import FIRST_ITEM
from recsys.model import WEIGHTS
from serving.directions import Directions
from serving.engine import Recommender
from serving.export import export
from serving.index import IndexSettings, Scan
from serving.retrieval import find
from serving.vectors import LONGEST, VECTORS, item_vectors, read_vectors, write_vectors

ITEMS, WIDTH = 997, 23


def drawn(items: int = ITEMS) -> torch.Tensor:
    return torch.randn(items, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("which", ["run", "shop_run"])
def test_vectors_made_in_blocks_are_those_made_in_one_go(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Recommender.load(request.getfixturevalue(which)).model
    whole = model.item_vectors()
    for block in (16, 48, 10**6):
        monkeypatch.setattr("serving.vectors.BLOCK", block)
        assert torch.equal(item_vectors(model), whole)


def test_a_file_of_vectors_is_a_safetensors_file_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (7, 10**6):
        monkeypatch.setattr("serving.vectors.BLOCK", block)
        write_vectors(drawn(), tmp_path / VECTORS)
        assert torch.equal(load_file(tmp_path / VECTORS)["vectors"], drawn())
        assert torch.equal(read_vectors(tmp_path), drawn())
        assert read_vectors(tmp_path).data_ptr() % 16 == 0


def test_a_bundle_holds_its_table_once_and_answers_as_with_a_copy(bundles: dict[str, Path], run: Path) -> None:
    recommender = Recommender.load(bundles["exact"])
    table = recommender.model.table.weight
    assert recommender.reader is not None
    for other in (recommender.scan.vectors_VE, torch.from_numpy(recommender.reader._events)):
        assert table.untyped_storage().data_ptr() <= other.data_ptr()
        assert other.data_ptr() < table.untyped_storage().data_ptr() + table.untyped_storage().nbytes()
    assert VECTORS not in recommender.manifest["files"]
    assert torch.equal(table, load_file(run / "model" / WEIGHTS)["table.weight"])
    assert recommender.manifest[LONGEST] == pytest.approx(float(table[FIRST_ITEM:].double().norm(dim=1).max()))


def test_no_weight_is_left_without_numbers(bundles: dict[str, Path], shop_bundles: dict[str, Path]) -> None:
    for bundle in (bundles["exact"], shop_bundles["ivf"]):
        model = Recommender.load(bundle).model
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_vectors_that_are_no_table_have_a_file(shop_run: Path, tmp_path: Path) -> None:
    manifest = export(shop_run, tmp_path / "bundle", IndexSettings())
    assert torch.equal(read_vectors(tmp_path / "bundle"), Recommender.load(shop_run).scan.vectors_VE)
    assert manifest[LONGEST] == pytest.approx(1)


def test_directions_are_the_vectors_at_length_1() -> None:
    vectors_VE = drawn() * torch.linspace(0.1, 3, ITEMS)[:, None]
    ways, units = Directions(vectors_VE), Scan(normalize(vectors_VE, dim=1))
    lines = np.array([3, 5, 3, 101])
    np.testing.assert_array_equal(ways.at(lines), units.at(lines))
    states_BE = units.vectors_VE[7:9]
    for allowed_V in (None, torch.arange(ITEMS) % 2 == 0, torch.arange(ITEMS) % 31 == 0):
        found, wanted = (find(scan, scan, states_BE, 13, None, allowed_V) for scan in (ways, units))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
