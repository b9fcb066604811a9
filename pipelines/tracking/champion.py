"""The champion: the alias of a model that moves to a better version, among versions whose scores compare."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.runs.scores import WHOLE, score_text
from pipelines.tracking import registry
from pipelines.tracking.client import connect, locked, one_sentence
from pipelines.tracking.record import Record, of_tags
from simclr.errors import UserError

ALIAS = "champion"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the alias moved, and why, in one sentence."""

    moved: bool
    said: str
    before: float | None = None
    """Score of the version that held it, if it has one in the same metric."""


def promote(uri: str, name: str, version: int, metric: str, force: bool = False, no_score: str = "") -> Verdict:
    """Move the alias to `version` if its score in `metric` is of a whole evaluation and higher than that of the version that holds it, and
    if the two compare: the same data, metric and protocol. `force` moves it also where they do not, but not for some images' scores.
    `no_score`: why `metric` says little of this version's method, in words, or "".

    Raises UserError if the version has no such score.
    """
    what = f"{name}/{version}"
    with one_sentence(uri):
        client = connect(uri)
        ours = of_tags(registry.find(client, uri, name, None, version).tags)
        if metric not in ours.scores:
            raise UserError(f"{what} has no score {metric!r}; its scores: {', '.join(ours.scores) or 'none'}")
        with locked(uri):  # so that no other job promotes a better version between comparing and moving
            number = client.get_registered_model(name).aliases.get(ALIAS)
            held = of_tags(client.get_model_version(name, str(number)).tags) if number is not None else None
            # A version that holds the alias without any score was given it by hand, and is no measure.
            held = held if held is not None and held.scores else None
            verdict = _verdict(what, ours, f"{name}/{number}", held, metric, force, no_score)
            if verdict.moved:
                client.set_registered_model_alias(name, ALIAS, str(version))
        return verdict


def _verdict(what: str, ours: Record, holder: str, held: Record | None, metric: str, force: bool, no_score: str) -> Verdict:
    own, before = ours.scores[metric], held.scores.get(metric) if held is not None else None
    if ours.measured.limit and not ours.measured.whole:
        again = "evaluate the run without --limit and publish it again"
        return Verdict(False, f"{what} is registered and cannot be champion: its scores are of {ours.measured.limit}; {again}", before)
    doubts = [no_score] * bool(no_score) + differences(ours, held, metric)
    if doubts and not force:
        stays = f"{holder} stays champion" if held is not None else "it is not champion"
        return Verdict(False, f"{what} is registered, and {stays}: {'; '.join(doubts)}; --force moves the alias all the same", before)
    said = f"{what} is champion with {ours.told(metric)}"
    if doubts:
        taken = f"took the alias from {holder}" if held is not None else "gave it the alias"
        return Verdict(True, f"{said}; --force {taken}, although {'; '.join(doubts)}", before)
    if held is None or before is None:
        return Verdict(True, said)
    if own <= before:
        equal = ", no less" if own == before else ""
        return Verdict(False, f"{what} is registered; {holder} stays champion with {held.told(metric)}{equal}", before)
    return Verdict(True, f"{said} (before: {holder} with {score_text(metric, before)}{_overlap(ours, held, metric)})", before)


def differences(ours: Record, held: Record | None, metric: str) -> list[str]:
    """Why the scores of two versions do not compare in `metric`, each in words; of one version alone, what is not known of it."""
    if not ours.measured.limit:
        return ["an earlier version evaluated the run and did not record on which images; evaluate it again"]
    if held is None:
        return []
    there, here = held.measured, ours.measured
    if not there.shards_sha256 or not held.metric:
        of = f" (its scores: {', '.join(f'{k} {score_text(k, v)}' for k, v in sorted(held.scores.items()))})"
        return [f"an earlier version registered it and did not record data, metric and images{of}, so nothing says whether they compare"]
    found = []
    if there.shards_sha256 != here.shards_sha256:
        found.append(f"its scores are on {_data(held)}, these on {_data(ours)}")
    if held.metric != metric:
        found.append(
            f"it is champion by {held.metric} {score_text(held.metric, held.scores.get(held.metric, float('nan')))}, not by {metric}"
        )
    if there.limit != WHOLE:
        found.append(f"its scores are of {there.limit}")
    if there.split != here.split:
        found.append(f"it was scored on {there.split}, this on {here.split}")
    one, other = there.protocols.get(metric, "unknown"), here.protocols.get(metric, "unknown")
    if metric in held.scores and one != other:
        found.append(f"its {metric} is {one}, this one's {other}")
    return found


def _data(record: Record) -> str:
    return f"{record.measured.data or 'data without a name'} (sha256 {record.measured.shards_sha256[:12]}…)"


def _overlap(ours: Record, held: Record, metric: str) -> str:
    one, other = (record.measured.intervals.get(metric) for record in (ours, held))
    if one is None or other is None:
        return ""
    overlapping = one[0] <= other[1] and other[0] <= one[1]
    return "; their 95 % intervals overlap, so chance may explain the difference" if overlapping else ""
