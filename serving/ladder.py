"""The ladder: each list by the best rung that its time is enough for, and what a thread of its own makes without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from recsys.batch import Batch
from recsys.errors import RequestError
from serving import explain, fallback, messages
from serving.admission import Clock, OnlineSettings
from serving.engine import Recommender
from serving.fallback import UserLists
from serving.history import Event
from serving.live import Arm, Arms
from serving.messages import Refusal
from serving.pasts import Past, Pasts
from serving.telemetry import LOG, Call, Metrics, about
from serving.views import View, categories_of

EXPLAINED = 20
"""Most items that are explained at once; each costs a list."""
MANY = 100
"""Places of a list, or items to put in order, beyond which a rung has a cost of its own; and beyond which a diverse list, whose
places are chosen one after the other, is made beside the others."""
AT_ONCE = 32
"""Users of a batch whose lists are made at once, so that memory does not grow with the batch."""

encode = msgspec.json.Encoder().encode

Listed = Sequence[tuple[int | str, float]]
"""Item ids and scores, best first."""


class Ladder:
    """Makes the lists of the arms' bundles."""

    def __init__(
        self,
        arms: Arms,
        pasts: Pasts,
        settings: OnlineSettings,
        lists: UserLists | None,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self.arms, self.pasts, self.settings, self.lists = arms, pasts, settings, lists
        self.metrics, self.clock = metrics, clock
        self._views: dict[str, View] = {}
        self._answered = 0

    def view(self, arm: Arm) -> View:
        """Of the bundle that the arm serves now."""
        view, recommender = self._views.get(arm.name), arm.recommender
        if view is None or view.recommender is not recommender:
            view = self._views[arm.name] = View(recommender)
        return view

    def swapped(self, arm: Arm) -> None:
        """The arm serves another bundle: let go of what was made of the old one, and make the champion's of the new."""
        view = View(arm.recommender)
        self._views[arm.name] = view.complete() if arm is self.arms.champion else view

    def long(self, question: messages.Recommend, arm: Arm) -> bool:
        """Whether a list takes so long that others are not to wait for it."""
        bundles = arm.recommender.serving.diversity
        return question.k > MANY and (bundles if question.diversity is None else question.diversity) > 0

    def recommended(
        self, question: messages.Recommend, arm: Arm, call: Call, past: Past | None, alone: bool = False
    ) -> bytes | Callable[[Listed], bytes]:
        """A list; or what makes it of last night's, where that is needed and has to be asked for over a network.

        `alone`: in a thread of its own, beside others, so that its seconds are no measure.
        """
        self._on_time(call)
        view = self.view(arm)
        past = past if self.pasts.remote else self.pasts.of(question, call)

        def rung(recommender: Recommender, took: dict[str, float]) -> dict[str, Any]:
            assert past is not None
            return _answer(recommender, question, past, question.now, took)

        answer, why = None, "store"
        if past is not None:
            what = "recommend" if question.k <= MANY else "recommend many"
            answer, why = self._climb(what, view, call, rung, measured=not alone)
            self._record(past, question.k)
        if answer is not None:
            return self._told(answer, call, why, question.k)
        lower = partial(self._lower, view.recommender, question, call, past, why)
        if self.lists is None or question.user_id is None:
            return lower([])
        return lower if self.lists.remote else lower(self.lists.of(str(question.user_id)))

    def ranked(self, question: messages.Rank, arm: Arm, call: Call, past: Past | None, alone: bool = False) -> bytes:
        """Given items in order; `alone` as for a list."""
        self._on_time(call)
        view = self.view(arm)
        past = past if self.pasts.remote else self.pasts.of(question, call)
        if past is None:
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)

        def rung(recommender: Recommender, took: dict[str, float]) -> dict[str, Any]:
            unknown: list[int | str] = []
            catalogue, ignored = recommender.catalogue, unknown if question.ignore_unknown else None
            words = catalogue.rows(past.words, past.find(catalogue), unknown if past.kept else ignored)
            items = catalogue.rows(question.items, catalogue.by_id, ignored)
            batch, now = recommender.request(words, past.times, question.now)
            wanted = list(dict.fromkeys(row for row in items if row is not None))
            found: list[tuple[int, float]] = []
            source = "ranked"
            if wanted:
                lists = recommender.recommend(batch, len(wanted), now, False, (), wanted, diversity=0.0, popularity=0.0)
                found, source = list(zip(lists.rows[0].tolist(), lists.scores[0].tolist(), strict=True)), lists.sources[0]
            return {"bundle": recommender.id, "source": source, "unknown": unknown, "items": catalogue.places(found)}

        what = "rank" if len(question.items) <= MANY else "rank many"
        answer, why = self._climb(what, view, call, rung, measured=not alone)
        if answer is None:
            raise Refusal(503, "there is too little time to put the items in order; ask again", retry_after=1)
        return self._told(answer, call, why)

    def alike(self, question: messages.Similar, arm: Arm, call: Call) -> bytes:
        """Items like an item."""
        self._on_time(call)
        recommender = arm.recommender  # once: another may go live meanwhile
        catalogue = recommender.catalogue
        row = catalogue.denied_and_allowed([question.item_id], None)[0][0]
        deny, allow = catalogue.denied_and_allowed(question.deny, question.allow)
        found = recommender.similar(row, question.k, deny, allow, question.where or None)
        call.bundle = recommender.id
        item = {"item_id": catalogue.item_id(row), "title": catalogue.title(row)}
        return encode({"bundle": recommender.id, "arm": call.arm, **item, "items": catalogue.places(found)})

    def explained(self, question: messages.Recommend, arm: Arm, call: Call, past: Past | None) -> bytes:
        """A list with the reasons of each item."""
        self._on_time(call)
        if past is None:
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)
        recommender = arm.recommender  # once: another may go live meanwhile
        catalogue = recommender.catalogue
        unknown: list[int | str] | None = [] if question.ignore_unknown or past.kept else None
        batch, now = recommender.request(catalogue.rows(past.words, past.find(catalogue), unknown), past.times, question.now)
        asked = question.now if past.times is None or not recommender.reads_now else now
        answer = _answer(recommender, question, past, asked)
        popular = answer["source"] == "popularity"
        listed = [row for item in answer["items"] if (row := catalogue.by_id(item["item_id"])) is not None]
        told = [[] for _ in listed] if popular else explain.reasons(recommender, batch, listed, now)
        for item, carried, categories in zip(answer["items"], told, categories_of(recommender, listed), strict=True):
            item["reasons"], item["categories"] = carried, categories
        answer["attention"] = [] if popular else explain.attention(recommender, batch, now)
        return self._told(answer, call, "", question.k)

    def batched(self, question: messages.Batch) -> list[dict[str, Any]]:
        """A list for each user. Raises StoreError: the store does not answer."""
        self.pasts.admit()
        users = [str(user) for user in question.users]
        found = [self.pasts.read(user) for user in users]
        answers: list[dict[str, Any]] = [{} for _ in users]
        for arm in self.arms.all:
            mine = [place for place, user in enumerate(users) if (question.arm or self.arms.of(user).name) == arm.name]
            if mine:
                told = self._lists(question, arm, [found[place] for place in mine])
                for place, answer in zip(mine, told, strict=True):
                    answers[place] = answer
        return answers

    def _lists(self, question: messages.Batch, arm: Arm, found: Sequence[Sequence[Event]]) -> list[dict[str, Any]]:
        recommender = arm.recommender  # once: another may go live meanwhile
        catalogue = recommender.catalogue
        deny, allow = catalogue.denied_and_allowed(question.deny, question.allow)
        now = int(time.time()) if recommender.reads_now else None
        answers = []
        for start in range(0, len(found), AT_ONCE):
            part = found[start : start + AT_ONCE]
            unknown: list[list[int | str]] = [[] for _ in part]
            rows, times = [], []
            for events, missing in zip(part, unknown, strict=True):
                known = catalogue.rows([event.item_id for event in events], catalogue.by_id, missing)
                pairs = [(row, event.time) for row, event in zip(known, events, strict=True) if row is not None]
                rows.append([row for row, _ in pairs])
                times.append([second for _, second in pairs])
            lists = recommender.recommend(
                Batch.of(rows, times),
                question.k,
                now,
                question.filter_seen,
                deny,
                allow,
                question.where,
                question.diversity,
                question.popularity,
                question.probabilities,
            )
            for place, (missing, source) in enumerate(zip(unknown, lists.sources, strict=True)):
                listed = zip(lists.rows[place].tolist(), lists.scores[place].tolist(), strict=True)
                certain = None if source == "popularity" else lists.probabilities
                chances = None if certain is None else certain[place].tolist()
                answers.append(
                    {
                        "bundle": recommender.id,
                        "arm": arm.name,
                        "source": source,
                        "fallback": None,
                        "unknown": missing,
                        "items": catalogue.places(listed, chances),
                    }
                )
        return answers

    def _on_time(self, call: Call) -> None:
        if self.clock() >= call.deadline:
            raise late()

    def _climb(
        self,
        what: str,
        view: View,
        call: Call,
        work: Callable[[Recommender, dict[str, float]], dict[str, Any]],
        measured: bool,
    ) -> tuple[dict[str, Any] | None, str]:
        """The answer of the best rung that the time is enough for, or None, and why it is not the first."""
        why = ""
        for name, recommender in view.rungs:
            cost, started = view.cost(what, name), self.clock()
            if call.deadline - started < cost.seconds:
                waited = call.stages.get("wait", 0.0)
                why = why or ("overload" if call.deadline - started + waited >= cost.seconds else "deadline")
                before = started - call.read - waited
                if measured and self.settings.deadline_ms / 1000 - before < cost.seconds:  # else who waits less will try it
                    cost.skip()
                continue
            took: dict[str, float] = {}
            try:
                answer = work(recommender, took)
            except (RequestError, Refusal):
                raise
            except Exception:
                LOG.exception("rung", extra=about(request_id=call.id, route=call.route, arm=call.arm, source=name))
                why = why or "error"
                continue
            if measured:
                cost.add(self.clock() - started)
            call.stages |= took
            if answer["source"] != "popularity":
                answer["source"] = name
            return answer, why
        return None, why

    def _lower(
        self,
        recommender: Recommender,
        question: messages.Recommend,
        call: Call,
        past: Past | None,
        why: str,
        listed: Listed,
    ) -> bytes:
        """Last night's list, filled with the most popular items, or these alone, with the same filters."""
        catalogue, unknown = recommender.catalogue, list[int | str]()
        ignored: list[int | str] | None = unknown if question.ignore_unknown else None
        seen: set[int] = set()
        if past is not None:
            rows = catalogue.rows(past.words, past.find(catalogue), unknown if past.kept else ignored)
            recommender.request(rows, past.times, question.now)
            seen = {row for row in rows if row is not None} if question.filter_seen else seen
        allowed_V = recommender.allowed(*catalogue.denied_and_allowed(question.deny, question.allow, ignored), question.where)
        found = fallback.nightly(recommender, listed, question.k, allowed_V, seen)
        source = "nightly" if found else "popularity"
        if len(found) < question.k:
            taken = seen | {row for row, _ in found}
            found += fallback.popular(recommender, question.k - len(found), allowed_V, taken)
        answer = {"bundle": recommender.id, "source": source, "unknown": unknown, "items": catalogue.places(found)}
        return self._told(answer, call, why, question.k)

    def _told(self, answer: dict[str, Any], call: Call, why: str, k: int = 0) -> bytes:
        if len(answer["items"]) < k:
            self.metrics.underfilled.inc()
        call.bundle, call.source, call.fallback = answer["bundle"], answer["source"], why
        started = self.clock()
        told = encode({"bundle": answer["bundle"], "arm": call.arm, "fallback": why or None, **answer})
        call.stages["write"] = self.clock() - started
        return told

    def _record(self, past: Past, k: int) -> None:
        self._answered += 1
        if self.settings.record_every and self._answered % self.settings.record_every == 0:
            self.arms.requests.record(past.words, past.times, k)


def late() -> Refusal:
    """A turn came after its deadline, or will."""
    return Refusal(503, "the deadline passed before the turn came; ask again later", retry_after=1)


def _answer(
    recommender: Recommender,
    question: messages.Recommend,
    past: Past,
    now: int | None,
    took: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The recommender's answer to a question; in a kept history may stand what it does not know. Raises RequestError: as it."""
    if past.kept and not question.ignore_unknown:
        recommender.catalogue.denied_and_allowed(question.deny, question.allow)
    return recommender.answer(
        past.words,
        question.k,
        times=past.times,
        now=now,
        filter_seen=question.filter_seen,
        deny=question.deny,
        allow=question.allow,
        where=question.where,
        diversity=question.diversity,
        popularity=question.popularity,
        probabilities=question.probabilities,
        ignore_unknown=question.ignore_unknown or past.kept,
        find=past.find(recommender.catalogue),
        took=took,
    )
