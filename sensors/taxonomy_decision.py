"""What a release of the taxonomy needs now, decided from what is seen and nothing else.

No Dagster and no files here: the sensor ``taxonomy_changed`` gathers the situation and does what is
decided. Which runs there were is read from their tags and not remembered, so that a lost cursor
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from offer_assets.instance import FEED_TAG
from offer_assets.policies import TAXONOMY_FINGERPRINT_TAG, TAXONOMY_RELEASE_TAG

ATTEMPTS = 3
"""Runs for one release, before somebody has to look why they fail."""

NO_BASE = "none"
"""Stands for the change before the first."""

FINGERPRINT_TAG = TAXONOMY_FINGERPRINT_TAG
RELEASE_TAG = TAXONOMY_RELEASE_TAG
BASE_TAG = "offer_assets/taxonomy_base"
ATTEMPT_TAG = "offer_assets/taxonomy_attempt"
SUPERSEDED_TAG = "offer_assets/taxonomy_superseded_by"

RunState = Literal["open", "succeeded", "failed", "canceled"]


class Jobs(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the jobs that take a release."""

    adopt: str
    """Takes the release, trains nothing."""
    refresh: str
    """Takes the release and gives the model its names."""
    follow: str
    """Takes the release and trains on."""


class KnownRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run that takes a release, or that trains."""

    run_id: str
    job: str
    state: RunState
    cancelable: bool = False
    """It can be canceled now: neither on its way to that, nor on its way to its worker."""
    fingerprint: str | None = None
    """Of the release that it was started for; None if it was started by hand or for something else."""
    release: str = ""
    base: str = ""
    attempt: int = 1
    superseded: bool = False
    """Canceled because of a newer release, not by a person."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision is made of."""

    jobs: Jobs
    feed: str
    """Whose pointers a run changes."""
    release: str
    """Name of the newest release."""
    fingerprint: str
    """Of the newest release, which is settled and valid."""
    in_force: str | None
    """Fingerprint of the release that the last change led to; None before the first."""
    base: str
    """Version of the last change; ``none`` before the first."""
    base_before: str
    """Version of the change before the last."""
    pointer_in_step: bool = True
    """``catalog_taxonomy`` is the taxonomy that the last change led to."""
    serves: bool
    """There is an endpoint."""
    serves_in_force: bool
    """The model that serves knows the taxonomy in force."""
    only_names: bool
    """The release differs in nothing but names from the taxonomy that the model in service knows."""
    runs: list[KnownRun]
    """Of this feed: those for this release, and every open one that takes a release or trains."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a release needs."""

    job: str
    feed: str
    fingerprint: str
    release: str
    base: str
    """Version of the change that the release comes after: a release that comes back later is new."""
    attempt: int

    @property
    def run_key(self) -> str:
        """Dagster starts one run per key, however often it is asked for."""
        return f"taxonomy:{self.feed}:{self.base}:{self.fingerprint[:16]}:{self.job}:{self.attempt}"

    @property
    def tags(self) -> dict[str, str]:
        """Tags by which the run is found again."""
        return {
            FINGERPRINT_TAG: self.fingerprint,
            RELEASE_TAG: self.release,
            BASE_TAG: self.base,
            ATTEMPT_TAG: str(self.attempt),
            FEED_TAG: self.feed,
        }


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now."""

    action: Literal["nothing", "wait", "cancel", "start", "leave", "give_up"]
    """``nothing``: all is done; ``leave``: a person canceled the run, it is theirs."""
    reason: str
    """One sentence without its full stop."""
    request: Request | None = None
    """Of ``start``; of ``give_up`` the one that would have been next."""
    cancel: list[KnownRun] = []


def decide(situation: Situation) -> Decision:
    """The next step for the newest release; it never leads to two open runs."""
    taken = situation.in_force == situation.fingerprint
    base = situation.base_before if taken else situation.base
    own = [run for run in situation.runs if (run.fingerprint, run.base) == (situation.fingerprint, base)]
    if (waiting := _open_runs(situation)) is not None:
        return waiting
    job = _needed_job(situation, taken, own)
    if job is None:
        return Decision(action="nothing", reason=_in_force(situation))
    attempts = _attempts(run for run in own if run.job == job)
    request = Request(
        job=job,
        feed=situation.feed,
        fingerprint=situation.fingerprint,
        release=situation.release,
        base=base,
        attempt=max(attempts, default=0) + 1,
    )
    if not attempts:
        return Decision(action="start", reason=f"release {situation.release} is new", request=request)
    last = attempts[max(attempts)]
    if last == "canceled":
        return Decision(
            action="leave",
            reason=f"the run of {job} for release {situation.release} was canceled by a person: "
            f"start {job} by hand, or deliver a newer release",
        )
    spent = sum(outcome != "superseded" for outcome in attempts.values())
    if spent >= ATTEMPTS:
        return Decision(
            action="give_up",
            reason=f"gave up on release {situation.release} after {spent} runs of {job}: "
            "see why they failed, then run it by hand",
            request=request,
        )
    return Decision(
        action="start", reason=f"run {max(attempts)} of {job} was {last}: once more", request=request
    )


def _open_runs(situation: Situation) -> Decision | None:
    """What to do about runs under way; None where there are none."""
    runs = [run for run in situation.runs if run.state == "open"]
    older = [run for run in runs if run.fingerprint not in (None, situation.fingerprint)]
    if older:
        names = ", ".join(f"{run.run_id[:8]} (release {run.release})" for run in older)
        return Decision(
            action="cancel",
            reason=f"release {situation.release} came after the one that is being followed: "
            f"waiting for the end of run {names}",
            cancel=[run for run in older if run.cancelable],
        )
    if runs:
        for_it = runs[0].fingerprint is not None
        what = f"release {situation.release} is being followed by" if for_it else "waiting for the end of"
        return Decision(action="wait", reason=f"{what} run {runs[0].run_id[:8]} of {runs[0].job}")
    return None


def _needed_job(situation: Situation, taken: bool, own: Iterable[KnownRun]) -> str | None:
    """The job that brings the newest release into force; None if it is."""
    jobs = situation.jobs
    if not taken:
        # Before the first is taken nothing tells whether the model knows it, as after an upgrade it may.
        if situation.in_force is None or not situation.serves:
            return jobs.adopt
        return jobs.refresh if situation.only_names and situation.serves_in_force else jobs.follow
    # A model that was trained for it and is not in service waits for approval, or was rolled back.
    trained = any(run.state == "succeeded" and run.job in (jobs.refresh, jobs.follow) for run in own)
    if situation.serves and not situation.serves_in_force and not trained:
        return jobs.refresh if situation.only_names else jobs.follow
    return None if situation.pointer_in_step else jobs.adopt


def _attempts(runs: Iterable[KnownRun]) -> dict[int, str]:
    """How each attempt ended. Several runs are of one attempt where Dagster or a person ran it again."""
    by_attempt: dict[int, list[KnownRun]] = {}
    for run in runs:
        by_attempt.setdefault(run.attempt, []).append(run)
    return {attempt: _outcome(same) for attempt, same in sorted(by_attempt.items())}


def _outcome(runs: list[KnownRun]) -> str:
    states = {run.state for run in runs}
    if "succeeded" in states:
        return "in vain"  # the release is not in force all the same: the run took another one
    if any(run.superseded for run in runs):
        return "superseded"
    return "canceled" if "canceled" in states else "failed"


def _in_force(situation: Situation) -> str:
    line = f"release {situation.release} of the taxonomy is in force"
    if situation.serves and not situation.serves_in_force:
        line += "; a model trained for it is not in service: it waits for approval, or was rolled back"
    return line
