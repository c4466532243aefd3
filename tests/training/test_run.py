"""A run directory: what is in it, whose it is, and that kill -9 changes nothing of it."""

import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, write
from recsys.bundle import Directory, open_directory
from recsys.config import Recipe
from recsys.content import Content, ContentEncoder
from recsys.errors import BundleError, RecipeError, RecsysError
from recsys.model import WEIGHTS, ModelSettings, SequenceModel, model_from
from recsys.ranker import COMPANIONS, RANKER, Known, RankerSettings, ranker_from
from recsys.text import TextSettings, words_of
from recsys.tracking import OFF, Tracking, TrackingSettings
from training.loop import Observation
from training.ranking import RankingSettings, ranker_curve
from training.run import CHECKPOINT, DECISIVE, RANKER_CHECKPOINT, read_content, run_key, train
from training.validate import validate

SETTINGS = [
    "model.embedding_size=8",
    "model.blocks=1",
    "model.hidden_size=11",
    "model.length=13",
    "train.epochs=6",
    "train.batch_tokens=173",
    "train.patience=6",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("world")
    write(SyntheticSettings(users=211, items=101, events_per_user=13), folder / "raw")
    build(folder / "raw", Recipe("small", {"data": {"now": 1_800_000_000}}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def recipe(embedding="torch", text="none", encoder="lsa", neighbours=0.0, **train_settings):
    model = {"embedding_size": 8, "blocks": 1, "hidden_size": 11, "length": 13, "embedding": embedding, "text": text}
    chosen = {"epochs": 2, "batch_tokens": 173, **train_settings}
    read = {"encoder": encoder, "size": 7, "tokens": 3, "vocabulary": 97, "neighbours": neighbours}
    small = Recipe("small", {"model": model, "train": chosen, "text": read})
    return {owner.section: small.read(owner).as_dict() for owner in DECISIVE}


def run(dataset, out, tracking=None, **train_settings):
    tracking = tracking or Tracking(TrackingSettings(uri=OFF))
    return train(dataset, recipe(**train_settings), out, name="small", device=torch.device("cpu"), tracking=tracking)


def test_the_published_model_is_the_one_that_was_judged_best(dataset, tmp_path):
    model = run(dataset, tmp_path / "run")
    found = validate(model_from(open_directory(model.path)), dataset.sequences)
    assert found == model.manifest["quality"]["validation"]
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert max(line["ndcg@10"] for line in curve) == found["ndcg@10"]


@pytest.mark.parametrize("text", ["pooled", "cross", "both"])
@pytest.mark.parametrize("encoder", ["lsa", "tokens"])
def test_a_model_of_text_comes_back_with_its_content_and_its_encoder(dataset, tmp_path, text, encoder):
    published = run(dataset, tmp_path / "run", text=text, encoder=encoder)
    again = open_directory(published.path)
    model, content = model_from(again), Content.load(published.path / "content.safetensors")
    assert validate(model, dataset.sequences) == published.manifest["quality"]["validation"]
    read = ContentEncoder.load(published.path / "encoder.safetensors").encode(dataset.described)
    for field in dataclasses.fields(Content):
        assert torch.equal(getattr(read, field.name), getattr(content, field.name))
    assert len(content) == len(dataset.items)
    assert published.manifest["items_without_text"] == sum(title is None for title in dataset.items["title"])
    assert torch.equal(model.item_vectors(), model_from(again, content=read).item_vectors())
    assert (text == "cross") == torch.equal(model.item_vectors(), model.table.weight[2:])


def test_neighbours_count_as_many_events_in_the_published_vectors(dataset, tmp_path):
    alone, near = (
        run(dataset, tmp_path / name, text="pooled", neighbours=n).path for name, n in (("alone", 0.0), ("near", 3.0))
    )
    vectors = [model_from(open_directory(path)).item_vectors() for path in (alone, near)]
    assert not torch.allclose(*vectors, atol=1e-3)
    content, events = Content.load(near / "content.safetensors"), torch.tensor(dataset.items["events"].to_list())
    known = content.pooled_VP.any(1)
    assert torch.allclose(content.nearness_VK.sum(1)[known], 3 / (3 + events[known]), atol=1e-5)


def test_the_encoder_is_fitted_on_the_items_with_training_events(dataset):
    settings = TextSettings(size=7, tokens=3)
    fewer = Dataset(dataset.path, dataset.manifest | {"warm_items": 3})
    encoder, content = read_content(fewer, settings)
    assert len(content) == len(dataset.items)
    assert set(encoder.text.terms) == {word for title in fewer.titles[:3] for word in words_of(title)}


def test_a_model_without_text_publishes_neither_content_nor_encoder(dataset, tmp_path):
    published = run(dataset, tmp_path / "run")
    assert {file.name for file in published.path.iterdir()} == {"items.parquet", "manifest.json", "weights.safetensors"}


def test_content_of_another_width_is_refused(dataset, tmp_path):
    published = run(dataset, tmp_path / "run", text="pooled")
    _, content = read_content(dataset, TextSettings(size=5))
    with pytest.raises(BundleError, match="not the weights of its settings"):
        model_from(published, content=content)


def test_content_whose_last_category_is_gone_is_that_of_the_same_model(dataset, tmp_path):
    """As where the one item of a category is described anew."""
    content = Content.load(run(dataset, tmp_path / "known", text="pooled").path / "content.safetensors")
    categories = torch.arange(len(content), dtype=torch.int32)[:, None] % 5
    content = dataclasses.replace(content, categories_VC=categories)
    settings = ModelSettings(**recipe(text="pooled")["model"])
    model = SequenceModel(settings, dataset.manifest["warm_items"], content).initialise(torch.Generator().manual_seed(0))
    save_file(model.weights(), tmp_path / WEIGHTS)
    manifest = {"recipe": {"model": settings.as_dict()}, "items": model.items}
    fewer = dataclasses.replace(content, categories_VC=categories.clamp(max=3))
    again = model_from(Directory(tmp_path, manifest), content=fewer)
    same = categories[:, 0] < 4
    assert torch.equal(again.item_vectors()[same], model.item_vectors()[same])


@pytest.mark.torchrec
def test_a_model_trained_with_torchrec_is_the_one_trained_without_and_serves_without(dataset, tmp_path):
    plain = run(dataset, tmp_path / "plain")
    sharded = run(dataset, tmp_path / "torchrec", embedding="torchrec")
    first, second = (load_file(model.path / "weights.safetensors") for model in (plain, sharded))
    assert first.keys() == second.keys()
    for name, weights in first.items():  # equal but for the order in which a row's gradients are added
        torch.testing.assert_close(second[name], weights, rtol=0, atol=1e-7)
    assert type(model_from(open_directory(sharded.path)).table).__name__ == "TorchTable"


@pytest.mark.parametrize("text", ["none", "both"])
def test_same_data_recipe_and_seed_give_the_same_bytes(dataset, tmp_path, text):
    first, again = (run(dataset, tmp_path / name, text=text) for name in ("a", "b"))
    other = run(dataset, tmp_path / "c", text=text, seed=1)
    assert first.manifest["hash"] == again.manifest["hash"] != other.manifest["hash"]
    differing = {key for key in first.manifest if first.manifest[key] != again.manifest[key]}
    assert differing <= {"clock"}


def test_a_finished_run_is_opened_and_not_trained_again(dataset, tmp_path):
    first = run(dataset, tmp_path / "run")
    assert run(dataset, tmp_path / "run").manifest == first.manifest


def test_another_recipe_does_not_overwrite_a_run(dataset, tmp_path):
    run(dataset, tmp_path / "run")
    with pytest.raises(RecsysError, match="another recipe or data set"):
        run(dataset, tmp_path / "run", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RecsysError, match="holds other files"):
        run(dataset, tmp_path / "mine")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "text", "cross"),
        ("model", "text_span", 7),
        ("model", "id_dropout", 0.25),
        ("model", "ids", False),
        ("text", "encoder", "tokens"),
        ("text", "size", 5),
        ("text", "tokens", 5),
        ("text", "vocabulary", 31),
        ("text", "neighbours", 2.0),
    ],
)
def test_every_setting_of_text_decides_whose_a_run_is(section, key, value):
    settings = recipe(text="both")
    changed = settings | {section: settings[section] | {key: value}}
    assert run_key(settings, "digest") == run_key(recipe(text="both"), "digest") != run_key(changed, "digest")


def test_mlflow_has_the_settings_the_curve_the_data_and_the_model(dataset, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    model = run(dataset, tmp_path / "run", tracking)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(tracking.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.epochs"] == "2"
    assert found.data.tags["dataset.sha256"] == dataset.manifest["hash"]
    assert found.inputs.dataset_inputs[0].dataset.digest == dataset.manifest["hash"][:36]
    curve = client.get_metric_history(tracking.run_id, "validation_ndcg_at_10")
    assert [point.step for point in curve] == [1, 2]
    assert max(point.value for point in curve) == model.manifest["quality"]["validation"]["ndcg@10"]
    assert {file.path for file in client.list_artifacts(tracking.run_id)} == {"curve.jsonl", "manifest.json"}


def test_a_run_goes_on_in_its_own_store_with_other_settings_that_do_not_decide(dataset, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    first = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    settings = recipe() | {"index": {"kind": "exact"}}
    arguments = {"name": "small", "device": torch.device("cpu")}

    def cut(seen):
        if seen.validation is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, settings, tmp_path / "run", tracking=first, observe=cut, **arguments)
    elsewhere = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/other.db"))
    train(dataset, settings | {"index": {"kind": "hnsw"}}, tmp_path / "run", tracking=elsewhere, **arguments)
    assert elsewhere.address == first.address
    assert mlflow.MlflowClient(first.uri).get_run(first.run_id).info.status == "FINISHED"
    assert not (tmp_path / "other.db").exists()


def command(dataset: Dataset, out: Path) -> list[str]:
    changes = [part for setting in (*SETTINGS, "tracking.uri=off") for part in ("--set", setting)]
    return ["recsys", "train", "tiny", "--dataset", str(dataset.path), "--out", str(out), *changes]


def test_kill_9_and_the_same_command_again_end_with_the_weights_of_an_undisturbed_run(dataset, forked, tmp_path):
    subprocess.run(command(dataset, tmp_path / "calm"), check=True, env=forked)
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command(dataset, tmp_path / "killed"), env=forked)
        checkpoint, before = tmp_path / "killed" / CHECKPOINT, None
        if checkpoint.exists():
            before = checkpoint.stat().st_mtime_ns
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    subprocess.run(command(dataset, tmp_path / "killed"), check=True, env=forked)
    calm, resumed = (load_file(tmp_path / name / "model" / "weights.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(calm[name], resumed[name]) for name in calm)
    assert (tmp_path / "calm" / "curve.jsonl").read_bytes() == (tmp_path / "killed" / "curve.jsonl").read_bytes()


RANKER_SETTINGS = RankerSettings(blocks=1, width=14, heads=2, hidden_size=19, span=16, companions=7, candidates=41)
RANKING_SETTINGS = RankingSettings(epochs=2, requests=3, hard=11, uniform=5)


def ranked_recipe(**changes):
    """The recipe above with a ranker, but for changes of its sections."""
    sections = recipe() | {"ranker": RANKER_SETTINGS.as_dict(), "ranking": RANKING_SETTINGS.as_dict()}
    return sections | {section: sections.get(section, {}) | values for section, values in changes.items()}


def run_ranked(dataset, out, base=None, observe=lambda observation: None, **changes):
    tracking = Tracking(TrackingSettings(uri=OFF))
    arguments = {"name": "small", "device": torch.device("cpu"), "tracking": tracking, "base": base, "observe": observe}
    return train(dataset, ranked_recipe(**changes), out, **arguments)


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> Path:
    """A finished run without a ranker."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(dataset, out)
    return out


@pytest.fixture(scope="module")
def ranked(dataset, tmp_path_factory) -> Path:
    """A finished run with one."""
    out = tmp_path_factory.mktemp("ranked") / "run"
    run_ranked(dataset, out)
    return out


def test_a_run_with_a_ranker_publishes_it_beside_the_model_of_a_run_without(dataset, alone, ranked):
    plain, directory = open_directory(alone / "model"), open_directory(ranked / "model")
    assert set(directory.manifest["files"]) == {*plain.manifest["files"], RANKER, COMPANIONS}
    assert directory.manifest["files"][WEIGHTS] == plain.manifest["files"][WEIGHTS]
    assert directory.manifest["quality"] == plain.manifest["quality"]
    assert {file.name for file in ranked.iterdir()} == {"model", "run.json", "curve.jsonl"}
    model = model_from(directory)
    ranker, told = ranker_from(directory, model), directory.manifest["ranker"]
    assert told["parameters"] == sum(weight.numel() for weight in ranker.parameters())
    known = Known(model.item_vectors(), torch.tensor(dataset.items["events"].to_numpy()).float().log1p(), model.items)
    assert told["curve"] == ranker_curve(model, ranker, known, dataset.sequences)
    assert [line["blocks"] for line in told["curve"]] == [0, 1]
    lines = [json.loads(line) for line in (ranked / "curve.jsonl").read_text().splitlines()]
    assert [line.get("part", "model") for line in lines] == ["model"] * 2 + ["ranker"] * 2
    own = [line for line in lines if "part" in line]
    assert own[told["best_epoch"] - 1]["ndcg@10"] == max(line["ndcg@10"] for line in own) == told["curve"][-1]["ndcg@10"]
    assert ranker_from(plain, model) is None
    assert "ranker" not in plain.manifest


def test_a_ranker_without_companions_publishes_none(dataset, alone, tmp_path):
    published = run_ranked(dataset, tmp_path / "run", alone, ranker={"companions": 0})
    assert RANKER in published.manifest["files"]
    assert COMPANIONS not in published.manifest["files"]
    assert ranker_from(published, model_from(published)).companion_weight is None


def test_a_run_cut_off_in_its_ranker_ends_with_the_files_of_an_undisturbed_one(dataset, ranked, tmp_path):
    def cut(observation: Observation) -> None:
        if observation.part == "ranker" and observation.validation is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranked(dataset, tmp_path / "run", observe=cut)
    assert {CHECKPOINT, "run.json"} == {file.name for file in (tmp_path / "run").iterdir()} - {RANKER_CHECKPOINT}
    again = run_ranked(dataset, tmp_path / "run")
    assert again.manifest["hash"] == open_directory(ranked / "model").manifest["hash"]
    assert (tmp_path / "run" / "curve.jsonl").read_bytes() == (ranked / "curve.jsonl").read_bytes()


@pytest.mark.parametrize("section", ["ranker", "ranking"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_the_settings_of_a_ranker_decide_a_run_that_has_one(section, blocks):
    settings = RANKER_SETTINGS if section == "ranker" else RANKING_SETTINGS
    one = ranked_recipe(ranker={"blocks": blocks})
    names = [field.name for field in dataclasses.fields(settings) if field.name != "blocks"]
    for name in names:
        other = one | {section: one[section] | {name: "changed"}}
        assert (run_key(one, "digest") == run_key(other, "digest")) == (blocks == 0)
    assert run_key(one, "digest") != run_key(one, "another")
    assert (run_key(one, "digest") == run_key(recipe(), "digest")) == (blocks == 0)


def test_the_model_of_a_finished_run_is_taken_byte_for_byte_and_gets_the_ranker_of_its_own_run(
    dataset, alone, ranked, tmp_path
):
    base, whole = open_directory(alone / "model"), open_directory(ranked / "model")
    taken = run_ranked(dataset, tmp_path / "run", alone)
    assert taken.manifest["files"][WEIGHTS] == base.manifest["files"][WEIGHTS]
    assert taken.manifest["hash"] == whole.manifest["hash"]
    for name in ("items", "parameters", "best_epoch", "quality", "ranker"):
        assert taken.manifest[name] == whole.manifest[name]
    again = run_ranked(dataset, tmp_path / "again", tmp_path / "run", ranking={"hard": 7})
    assert again.manifest["files"][WEIGHTS] == base.manifest["files"][WEIGHTS]
    assert again.manifest["files"][RANKER] != taken.manifest["files"][RANKER]


def test_the_content_of_a_model_that_is_taken_comes_with_it(dataset, tmp_path):
    base = run(dataset, tmp_path / "base", text="both")
    text = {"model": recipe(text="both")["model"], "text": recipe(text="both")["text"]}
    taken = run_ranked(dataset, tmp_path / "run", tmp_path / "base", **text, ranker={"text": True})
    for file in (WEIGHTS, "content.safetensors", "encoder.safetensors"):
        assert taken.manifest["files"][file] == base.manifest["files"][file]
    assert taken.manifest["items_without_text"] == base.manifest["items_without_text"]
    assert ranker_from(taken, model_from(taken)).token_in is not None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"hidden_size": 13}}, "model.hidden_size is 11 there and 13 here"),
        ({"train": {"seed": 1}}, "train.seed is 0 there and 1 here"),
        ({"loss": {"negatives": 3}}, "loss.negatives is"),
    ],
    ids=str,
)
def test_a_model_of_other_settings_is_not_taken_and_the_mended_command_goes_on(dataset, alone, tmp_path, changes, says):
    with pytest.raises(RecsysError, match=says) as error:
        run_ranked(dataset, tmp_path / "run", alone, **changes)
    assert "\n" not in str(error.value)
    assert str(alone) in str(error.value)
    assert run_ranked(dataset, tmp_path / "run", alone).manifest["ranker"]["best_epoch"]


def test_a_model_of_another_data_set_or_none_is_not_taken(dataset, alone, tmp_path):
    other = Dataset(dataset.path, dataset.manifest | {"hash": "another"})
    with pytest.raises(RecsysError, match="another data set") as error:
        run_ranked(other, tmp_path / "run", alone)
    assert "\n" not in str(error.value)
    with pytest.raises(BundleError, match=r"no manifest\.json there") as error:
        run_ranked(dataset, tmp_path / "run", tmp_path / "nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"model": {"objective": "masked"}}, "model.objective"), ({"ranker": {"text": True}}, "model.text is none")],
    ids=["masked", "text"],
)
def test_a_ranker_that_cannot_be_is_refused_before_anything_is_learnt(dataset, tmp_path, changes, says):
    with pytest.raises(RecipeError, match=says):
        run_ranked(dataset, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_command_learns_a_ranker_for_a_finished_run(world, run, tmp_path, capsys):
    sizes = ("ranker.blocks=1", "ranker.width=14", "ranker.span=16", "ranker.candidates=41", "ranking.epochs=1")
    changes = [part for setting in sizes for part in ("--set", setting)]
    words = ["train", world / "small.toml", "--dataset", world / "dataset", "--model", world / "run", *changes]
    capsys.readouterr()
    assert run(*words, "--out", tmp_path / "ranked") == 0
    made, base = (open_directory(path / "model").manifest for path in (tmp_path / "ranked", world / "run"))
    out = capsys.readouterr().out
    assert f"with the ranker {made['ranker']['curve'][-1]['ndcg@10']:.4f}" in out
    assert made["files"][WEIGHTS] == base["files"][WEIGHTS]
    assert RANKER in made["files"]
    assert run(*words, "--out", tmp_path / "other", "--set", "model.hidden_size=13") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"recsys: {world / 'run'}: model.hidden_size is 11 there and 13 here")
    assert error.count("\n") == 1


def test_a_taken_model_without_a_ranker_to_learn_is_refused(dataset, alone, tmp_path):
    with pytest.raises(RecipeError, match=r"ranker\.blocks is 0"):
        run_ranked(dataset, tmp_path / "run", base=alone, ranker={"blocks": 0})
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_a_ranker_of_another_model(dataset, alone, ranked):
    assert run_key(ranked_recipe(), "data", "another") != run_key(ranked_recipe(), "data")
    with pytest.raises(RecsysError, match="another recipe or data set"):
        run_ranked(dataset, ranked, base=alone)
