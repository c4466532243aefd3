"""The two scenarios in which items are known by their text alone, beside the plain ways to do the same.

usage: python -m tests.benchmarks.texts_alone {service|news|alarms} --dataset DATASET --run RUN …

service: the right answer among all answers for each test message of `customer-service`, by the model, by the nearest learnt
message and the nearest answer in TF-IDF, and by logistic regression on TF-IDF, whose C is chosen on validation.
news: each test day's headlines of `financial-news` in the order of each desk; and the sentiment of headlines of the test days,
by logistic regression on the model's text vectors, on its item vectors and on TF-IDF, C being chosen on validation's days.
alarms: how soon a planted rise of negative headlines rings, and how often an alarm is false, by predicted sentiment.
A line a run, then mean ± deviation.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from features.dataset import ATTRIBUTE, Dataset
from features.split import DAY, SplitSettings
from recsys.batch import FIRST_ITEM, Batch, gather
from recsys.metrics import MISSED, measure
from serving.alarms import alarms
from serving.engine import Recommender

CS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse strengths of regularisation that are tried."""
STREAMS, DAYS, SHIFT, A_DAY = 2000, 60, 30, 10
"""Made-up streams, their days, the day from which on more is negative, and headlines a day."""
RISES = (1.0, 2.0, 3.0)
"""How many times as many headlines are negative from then on."""
Array = np.ndarray[Any, Any]


def ranks_of(rows_BK: torch.Tensor, owners_P: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """Rank from 1 of each target in its owner's list, MISSED where it is not there."""
    found_PK = rows_BK[owners_P] == targets_P[:, None]
    return torch.where(found_PK.any(1), found_PK.int().argmax(1) + 1, MISSED)


def recalls(scores_BA: Array, right_B: Array) -> dict[str, float]:
    """Recall at 1 and 5 of the right column."""
    best_BA = np.argsort(-scores_BA, axis=1, kind="stable")
    return {f"recall@{k}": float((best_BA[:, :k] == right_B[:, None]).any(1).mean()) for k in (1, 5)}


def service(dataset: Dataset, runs: list[Path]) -> dict[str, list[dict[str, float]]]:
    sequences, titles = dataset.sequences, dataset.items["title"].to_list()
    answers = dataset.items.filter(pl.col("categories").list.contains("answer"))["row"].to_list()
    column = {row: place for place, row in enumerate(answers)}
    pairs = {}
    for split in ("train", "validation", "test"):
        start, cut, end = sequences.windows(split)
        cut = cut - 1 if split == "train" else cut
        some = (cut > start) & (end > cut)
        pairs[split] = (
            sequences.items[start[some]].tolist(),
            np.array([column[row] for row in sequences.items[cut[some]].tolist()]),
        )
    said = {split: [titles[row - FIRST_ITEM] for row in rows] for split, (rows, _) in pairs.items()}
    right = {split: answer for split, (_, answer) in pairs.items()}
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit([*said["train"], *(titles[row - FIRST_ITEM] for row in answers)])
    read = {split: vectorizer.transform(texts) for split, texts in said.items()}
    near = (read["test"] @ read["train"].T).toarray()
    nearest = np.stack([near[:, right["train"] == place].max(1) for place in range(len(answers))], 1)
    texts = (read["test"] @ vectorizer.transform([titles[row - FIRST_ITEM] for row in answers]).T).toarray()
    first = [int((right["train"] == place).argmax()) for place in range(len(answers))]
    fits = [LogisticRegression(C=strength, max_iter=1000).fit(read["train"], right["train"]) for strength in CS]
    best = max(fits, key=lambda fit: float((fit.predict(read["validation"]) == right["validation"]).mean()))
    out = {
        "nearest learnt message, TF-IDF": [recalls(nearest, right["test"])],
        "nearest answer, TF-IDF": [recalls(texts, right["test"])],
        "nearest of one message an answer, TF-IDF": [recalls(near[:, first], right["test"])],
        f"logistic regression on TF-IDF, C = {best.C:g}": [recalls(best.predict_proba(read["test"]), right["test"])],
    }
    rows_P = torch.tensor(pairs["test"][0])
    histories = Batch(rows_P, torch.arange(len(rows_P) + 1), torch.zeros_like(rows_P))
    targets_P = torch.tensor([answers[place] for place in right["test"]])
    for run in runs:
        recommender = Recommender.load(run)
        lists = recommender.recommend(histories, 5, where={"categories": "answer"})
        owners_P = torch.arange(len(rows_P))
        figures = measure(ranks_of(lists.rows, owners_P, targets_P), owners_P, len(rows_P), (1, 5))
        first_P = recommender.recommend(histories, 1).rows[:, 0]
        figures["messages in the first place, no filter"] = float((~torch.isin(first_P, torch.tensor(answers))).float().mean())
        out.setdefault("the model", []).append(figures)
    return out


def news(dataset: Dataset, runs: list[Path]) -> dict[str, list[dict[str, float]]]:
    sequences, items = dataset.sequences, dataset.items
    published = items[f"{ATTRIBUTE}published"].to_numpy().astype(np.int64)
    begin = int(dataset.manifest["settings"]["split"]["test_start"])
    assert dataset.users is not None
    trade, follows = items[f"{ATTRIBUTE}trade"].to_numpy(), dataset.users["follows"].to_numpy()
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(items.filter(pl.Series(published < begin))["title"].to_list())
    texts = vectorizer.transform(items["title"].to_list())
    out: dict[str, list[dict[str, float]]] = {}
    recommenders = [Recommender.load(run) for run in runs]
    names = ["best possible", "nearest to the mean text, TF-IDF", "by chance", *(str(run) for run in runs)]
    ranks: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    owners: list[torch.Tensor] = []
    users = len(sequences.offsets) - 1
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    times_N, of_N = sequences.times.numpy(), np.repeat(np.arange(users), (ends - starts).numpy())
    rng = np.random.default_rng(0)
    for day in range(begin, int(published.max()), DAY):
        fresh = np.flatnonzero((published >= day) & (published < day + DAY))
        past = torch.from_numpy(np.searchsorted(of_N * 2**40 + times_N, np.arange(users) * 2**40 + day))
        histories = gather(sequences.items, sequences.times, starts, past)
        read_N = np.isin(sequences.items.numpy() - FIRST_ITEM, fresh) & (times_N >= day)
        targets_P, owners_P = sequences.items[torch.from_numpy(read_N)].long(), torch.from_numpy(of_N[read_N])
        mean_U = [texts[histories.values[histories.owners == user].numpy() - FIRST_ITEM].sum(0) for user in range(users)]
        scores = {
            "best possible": (trade[fresh] == follows[:, None]).astype(float),
            "nearest to the mean text, TF-IDF": np.asarray(np.concatenate(mean_U)) @ texts[fresh].T.toarray(),
            "by chance": rng.random((users, len(fresh))),
        }
        for name, scores_UF in scores.items():
            listed = torch.from_numpy(fresh[np.argsort(-scores_UF, axis=1, kind="stable")[:, :10]]) + FIRST_ITEM
            ranks[name].append(ranks_of(listed, owners_P, targets_P))
        where = {"published": {"min": day, "max": day + DAY - 1}}
        for run, recommender in zip(runs, recommenders, strict=True):
            ranks[str(run)].append(ranks_of(recommender.recommend(histories, 10, where=where).rows, owners_P, targets_P))
        owners.append(owners_P + users * len(owners))
    for name, parts in ranks.items():
        figures = measure(torch.cat(parts), torch.cat(owners), users * len(owners), (5,))
        out.setdefault("the model" if name not in names[:3] else name, []).append(figures)
    for label, told in sentiment(dataset, recommenders).items():
        out[f"sentiment, {label}"] = [{"macro F1": f1} for f1, _ in told]
    return out


def sentiment(dataset: Dataset, recommenders: list[Recommender]) -> dict[str, list[tuple[float, Array]]]:
    """Macro F1 on headlines of the test days, and which of these are said to be negative, by the way to tell."""
    items = dataset.items
    published, labels = items[f"{ATTRIBUTE}published"].to_numpy(), items[f"{ATTRIBUTE}sentiment"].to_numpy()
    split = SplitSettings(**dataset.manifest["settings"]["split"])
    known, learnt = published < split.test_start, published < split.validation_start
    chosen, titles = known & ~learnt, items["title"].to_list()
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit([titles[place] for place in np.flatnonzero(known)])
    ways: dict[str, list[Any]] = {"TF-IDF": [vectorizer.transform(titles)]}
    for recommender in recommenders:
        assert recommender.encoder is not None
        pooled = recommender.encoder.encode(dataset.described).pooled_VP.numpy()
        ways.setdefault("text vectors", [pooled])  # of the data set alone: the same for all runs
        ways.setdefault("item vectors", []).append(recommender.scan.vectors_VE.numpy())
    out: dict[str, list[tuple[float, Array]]] = {}
    for name, tables in ways.items():
        for table in tables:
            found = []
            for strength in CS:
                fit = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")
                said = fit.fit(table[learnt], labels[learnt]).predict(table[chosen])
                found.append((f1_score(labels[chosen], said, average="macro"), -strength, fit))
            said = max(found)[2].fit(table[known], labels[known]).predict(table[~known])
            out.setdefault(name, []).append((float(f1_score(labels[~known], said, average="macro")), said == "negative"))
    return out


def rung(dataset: Dataset, runs: list[Path]) -> dict[str, list[dict[str, float]]]:
    items = dataset.items
    fresh = items.filter(pl.col(f"{ATTRIBUTE}published") >= dataset.manifest["settings"]["split"]["test_start"])
    negative = (fresh[f"{ATTRIBUTE}sentiment"] == "negative").to_numpy()
    told = sentiment(dataset, [Recommender.load(run) for run in runs])
    ways = {"labels": negative, **{name: figures[0][1] for name, figures in told.items()}}
    out: dict[str, list[dict[str, float]]] = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for rise in RISES:
            share_D = np.where(np.arange(DAYS) < SHIFT, 1.0, rise) * negative.mean()
            bad_SDN = rng.random((STREAMS, DAYS, A_DAY)) < share_D[:, None]
            drawn = [rng.choice(np.flatnonzero(negative == kind), bad_SDN.shape) for kind in (False, True)]
            shown_SDN = np.where(bad_SDN, drawn[1], drawn[0])
            for name, marked in ways.items():
                rung_SD = alarms(marked[shown_SDN].sum(2), np.full((STREAMS, DAYS), A_DAY))
                after_SD = rung_SD[:, SHIFT:]
                hit_S = after_SD.any(1)
                figures = {"false alarms in 1,000 days": float(rung_SD[:, :SHIFT].mean() * 1000)}
                if rise > 1:
                    figures |= {
                        "rung within 10 days": float(after_SD[:, :10].any(1).mean()),
                        "rung at all": float(hit_S.mean()),
                    }
                    if hit_S.mean() > 0.5:
                        figures["median days to it"] = float(np.median(np.where(hit_S, after_SD.argmax(1) + 1, DAYS)))
                else:
                    figures["streams with a false alarm in 60 days"] = float(rung_SD.any(1).mean())
                out.setdefault(f"{rise:g} times as many, by {name}", []).append(figures)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["service", "news", "alarms"])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    scenario = {"service": service, "news": news, "alarms": rung}[args.scenario]
    for name, figures in scenario(Dataset.open(args.dataset), args.run).items():
        print(f"{name}: {json.dumps([{key: round(value, 4) for key, value in line.items()} for line in figures])}")
        for key in figures[0] if len(figures) > 1 else ():
            values = [line[key] for line in figures if key in line]
            print(f"    {key} {mean(values):.4f} ± {stdev(values):.4f}")


if __name__ == "__main__":
    main()
