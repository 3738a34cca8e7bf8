"""Stage ``hyperparameter_search``: better parameters for teacher, student or fast model.

A tree-structured Parzen estimator proposes (Bergstra et al., 2011), a training tells how good that is, and
one that is worse than half of those before it at the same point of its way is given up (median rule, Golovin
et al., 2017). Good means the weighted F1 on the training sample's validation offers, mean over the levels;
the evaluation set has no part in it. The first trial has the parameters as they are set.

The trials are kept in Optuna's journal among the checkpoints. A search that was killed keeps what was
finished, marks the interrupted trial as failed and tries the same parameters again, from the checkpoint of
that training. What is proposed depends on the seed and the trials before, so the kill changes nothing else.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from optuna import TrialPruned
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from ml.errors import InputError
from ml.learning.choice_plots import history_plot, importance_plot, slice_plot
from ml.learning.held_out import held_out_scores
from ml.learning.inner_training import train_inside
from ml.learning.search_space import STAGE_OF, Choice, Range, space_of
from ml.learning.training_data import read_labelled
from ml.progress import Progress
from ml.runner import StageContext, parameters_of
from ml.stages import STAGES, HyperparameterSearchParameters, Parameters, Stage
from ml.taxonomy import Taxonomy

if TYPE_CHECKING:
    from ml.learning.encoder import Classifier
    from ml.learning.ensemble import Teacher
    from ml.serving.fast_model import FastModel

_WATCHED = "validation_weighted_f1"
"""The figure of a learning curve by which a trial is given up."""
_JOURNAL = "optuna.journal"
_REASON, _SECONDS, _FIGURES = "reason", "seconds", "figures"
_LEAST_TRIALS_FOR_IMPORTANCE = 5

optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchedTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial that came to an end."""

    number: int
    """Counted without those that were interrupted."""
    state: str
    """``finished``, ``pruned`` (given up early) or ``refused``."""
    parameters: dict[str, float | int]
    mean_weighted_f1: float | None = None
    macro_f1: float | None = None
    accuracy: float | None = None
    last_weighted_f1: float | None = None
    """Of the lowest level, after its last epoch; None for a model without epochs."""
    curve: list[tuple[int, float]] = []
    """Percent of the training, and weighted F1 of the lowest level then."""
    seconds: float = 0.0
    reason: str = ""
    """Why the training refused the parameters."""


def search_hyperparameters(
    context: StageContext, parameters: HyperparameterSearchParameters
) -> dict[str, Any]:
    """Run the trials that are due, write trials, best parameters and plots; returns the metrics.

    Raises:
        InputError: an input or a parameter is wrong, or every trial was refused.
    """
    search = _Search(context, parameters)
    while (reason := search.over()) is None:
        search.run_trial()
    context.progress.say(f"search over: {reason}")
    trials = search.trials()
    best = _best(trials)
    if best is None:
        reasons = dict.fromkeys(trial.reason for trial in trials if trial.reason)
        raise InputError(f"no trial was finished: {'; '.join(reasons) or 'raise trials or budget_seconds'}")
    return _write(context.output, search, trials, best, reason or "")


class _TrialProgress(Progress):
    """Reports of a trial's training: its figures decide whether it goes on."""

    def __init__(self, outer: Progress, trial: Trial, epochs: int, name: str) -> None:
        super().__init__(name)
        self._is_terminal = False
        self._outer = outer
        self._trial = trial
        self._epochs = epochs
        self._name = name
        self._is_trained = False

    def say(self, message: str) -> None:
        """One line, marked with the trial."""
        self._outer.say(f"{self._name}: {message}")

    def figures(self, point: Mapping[str, int | float]) -> None:
        """Note what an epoch brought.

        The step is the share of the training, in percent: trainings of different length are at the same
        point of their learning rate there.

        Raises:
            TrialPruned: at this share of the way, half of the trials before were better.
        """
        if _WATCHED not in point or self._is_trained:  # a second training, on guesses, is not watched
            return
        percent = round(100 * point["epoch"] / self._epochs)
        self._is_trained = percent >= 100
        self._trial.report(float(point[_WATCHED]), percent)
        if percent < 100 and self._trial.should_prune():
            raise TrialPruned


class _Search:
    """The study, and how one trial of it is run."""

    def __init__(self, context: StageContext, parameters: HyperparameterSearchParameters) -> None:
        self._context = context
        self._parameters = parameters
        self.stage: Stage = STAGES[STAGE_OF[parameters.model]]
        if missing := [name for name in self.stage.inputs if context.optional_input(name) is None]:
            raise InputError(
                f"a search of the {parameters.model} needs {', '.join(missing)} as input as well"
            )
        self._taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))
        self._validation = read_labelled(context.input("training_sample"), "validation")
        self.fixed = self._fixed()
        self._start = parameters_of(self.stage, self.fixed)
        self.space = space_of(parameters.model, parameters.searched, self._start)
        self._study = self._opened_study()

    def _fixed(self) -> dict[str, Any]:
        """Parameters of the stage that are the same in all trials, and those that trials may change."""
        fields = {field.name for field in msgspec.structs.fields(self.stage.parameters)}
        named = {"encoder": self._parameters.encoder, "encoder_digest": self._parameters.encoder_digest}
        return self._parameters.fixed | {name: value for name, value in named.items() if name in fields}

    def _opened_study(self) -> optuna.Study:
        """The study as it was left; a trial that was interrupted is marked as failed."""
        path = self._context.checkpoints / _JOURNAL
        _mend(path)
        backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=self._parameters.model,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=self._parameters.startup_trials),
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._context.progress.say("a trial was interrupted, its parameters are tried again")
            study.tell(trial.number, state=TrialState.FAIL)
        return study

    def trials(self) -> list[SearchedTrial]:
        """All that came to an end, in order."""
        return [_searched(trial, number) for number, trial in enumerate(self._ended())]

    def over(self) -> str | None:
        """Why no further trial begins; None if one does."""
        ended = self._ended()
        if len(ended) >= self._parameters.trials:
            return f"{len(ended)} trials"
        seconds = sum(float(trial.user_attrs[_SECONDS]) for trial in ended)
        if self._parameters.budget_seconds and seconds >= self._parameters.budget_seconds:
            return (
                f"{len(ended)} of {self._parameters.trials} trials in {seconds:,.0f} s, the budget is used up"
            )
        return None

    def run_trial(self) -> None:
        """Run the next trial to its end, whatever that is.

        Raises:
            InputError: the parameters as they are set are refused: so would all others be.
        """
        number = len(self._ended())
        # A sampler for each trial: what it draws must not depend on how often the search was interrupted.
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._parameters.startup_trials,
            seed=_seed(self._parameters.seed, number),
        )
        if number == 0 and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self._study.enqueue_trial({name: getattr(self._start, name) for name in self.space})
        trial = self._study.ask({name: _distribution(candidate) for name, candidate in self.space.items()})
        name = f"trial {number + 1} of {self._parameters.trials}"
        self._context.progress.say(f"{name}: {_in_words(trial.params)}{self._outlook()}")
        started_at = time.monotonic()
        try:
            figures = self._figures_of(trial, name)
        except TrialPruned:
            self._end(trial, TrialState.PRUNED, started_at)
            self._context.progress.say(f"{name}: given up, half of the others were better by then")
        except InputError as error:
            if number == 0:
                raise
            self._end(trial, TrialState.FAIL, started_at, reason=str(error))
            self._context.progress.say(f"{name}: refused ({error})")
        else:
            trial.set_user_attr(_FIGURES, figures)
            self._end(trial, TrialState.COMPLETE, started_at, figures["mean_weighted_f1"])
            self._context.progress.say(f"{name}: mean weighted F1 {figures['mean_weighted_f1']:.4f}")

    def stage_parameters(self, chosen: Mapping[str, Any]) -> Parameters:
        """Parameters of the stage for a trial that chose these values."""
        return parameters_of(self.stage, self.fixed | dict(chosen))

    def importances(self) -> dict[str, float]:
        """Share of the differences that each parameter explains; empty where too few trials say so."""
        values = {trial.value for trial in self._ended() if trial.state == TrialState.COMPLETE}
        if len(values) < _LEAST_TRIALS_FOR_IMPORTANCE or len(self.space) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._parameters.seed)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    def _figures_of(self, trial: Trial, name: str) -> dict[str, float]:
        """Train as the trial says, and look at the validation offers."""
        parameters = self.stage_parameters(trial.params)
        progress = _TrialProgress(self._context.progress, trial, getattr(parameters, "epochs", 1), name)
        place = hashlib.sha256(msgspec.json.encode(trial.params, order="sorted")).hexdigest()[:16]
        self._forget_other_trainings(place)
        try:
            trained = train_inside(self._context, self.stage, parameters, place, progress)
        except TrialPruned:
            shutil.rmtree(self._context.checkpoints / f"training-{place}", ignore_errors=True)
            raise
        model = _loaded(self._parameters.model, trained.folder)
        figures = held_out_scores(
            model.predict_logits(self._validation.texts),
            model.labels,
            self._validation.categories,
            self._taxonomy,
        )
        trained.forget()
        return figures

    def _forget_other_trainings(self, place: str) -> None:
        """Checkpoints of trials that came to an end in the moment before a kill."""
        for folder in self._context.checkpoints.glob("training-*"):
            if folder.name != f"training-{place}":
                shutil.rmtree(folder, ignore_errors=True)

    def _end(
        self,
        trial: Trial,
        state: TrialState,
        started_at: float,
        value: float | None = None,
        reason: str = "",
    ) -> None:
        trial.set_user_attr(_SECONDS, time.monotonic() - started_at)
        if reason:
            trial.set_user_attr(_REASON, reason)
        self._study.tell(trial, value, state=state)

    def _ended(self) -> list[FrozenTrial]:
        """Trials that came to an end by themselves."""
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            or (trial.state == TrialState.FAIL and _REASON in trial.user_attrs)
        ]

    def _outlook(self) -> str:
        """How long the rest may take, once there is something to go by."""
        ended = self._ended()
        if not ended:
            return ""
        seconds = sum(float(trial.user_attrs[_SECONDS]) for trial in ended)
        left = seconds / len(ended) * (self._parameters.trials - len(ended))
        if self._parameters.budget_seconds:
            left = min(left, self._parameters.budget_seconds - seconds)
        best = max(
            (
                trial.user_attrs[_FIGURES]["mean_weighted_f1"]
                for trial in ended
                if _FIGURES in trial.user_attrs
            ),
            default=math.nan,
        )
        return f" (best so far {best:.4f}, about {left / 60:.0f} minutes left)"


def _mend(journal: Path) -> None:
    """Take off what was being written when the process was killed: a line without its end."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        partial = journal.with_suffix(".partial")
        partial.write_bytes(whole)
        partial.rename(journal)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


def _distribution(candidate: Range | Choice) -> BaseDistribution:
    if isinstance(candidate, Choice):
        return CategoricalDistribution(candidate.values)
    if isinstance(candidate.low, int) and isinstance(candidate.high, int):
        return IntDistribution(candidate.low, candidate.high, log=candidate.logarithmic)
    return FloatDistribution(candidate.low, candidate.high, log=candidate.logarithmic)


def _loaded(model: str, folder: Path) -> Teacher | Classifier | FastModel:
    if model == "fast":
        from ml.serving.fast_model import FastModel

        return FastModel.load(folder)
    if model == "student":
        from ml.learning.encoder import Classifier

        return Classifier.load(folder)
    from ml.learning.ensemble import Teacher

    return Teacher.load(folder)


def _searched(trial: FrozenTrial, number: int) -> SearchedTrial:
    figures = trial.user_attrs.get(_FIGURES, {})
    curve = sorted(trial.intermediate_values.items())
    states = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
    return SearchedTrial(
        number=number,
        state=states.get(trial.state, "refused"),
        parameters=dict(trial.params),
        mean_weighted_f1=figures.get("mean_weighted_f1"),
        macro_f1=figures.get("macro_f1"),
        accuracy=figures.get("accuracy"),
        last_weighted_f1=curve[-1][1] if curve else None,
        curve=curve,
        seconds=round(trial.user_attrs[_SECONDS], 2),
        reason=trial.user_attrs.get(_REASON, ""),
    )


def _best(trials: list[SearchedTrial]) -> SearchedTrial | None:
    """The first of the best: another must be better than what is set."""
    finished = [trial for trial in trials if trial.mean_weighted_f1 is not None]
    return max(finished, key=lambda trial: trial.mean_weighted_f1 or 0.0, default=None)


def _in_words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in parameters.items())


def _write(
    folder: Path, search: _Search, trials: list[SearchedTrial], best: SearchedTrial, reason: str
) -> dict[str, Any]:
    """Tables, best parameters and plots; returns the metrics."""
    rows = msgspec.to_builtins(trials)
    (folder / "trials.json").write_bytes(msgspec.json.format(msgspec.json.encode(trials), indent=2))
    pq.write_table(_table(trials, list(search.space)), folder / "trials.parquet")
    importances = search.importances()
    chosen = {name: _plain(value) for name, value in best.parameters.items()}
    (folder / "best_parameters.json").write_bytes(
        msgspec.json.format(
            msgspec.json.encode(
                {
                    "stage": search.stage.name,
                    "trial": best.number,
                    "mean_weighted_f1": best.mean_weighted_f1,
                    "searched": best.parameters,
                    "parameters": msgspec.to_builtins(search.stage_parameters(best.parameters)),
                    "importances": importances,
                }
            ),
            indent=2,
        )
    )
    (folder / "history.png").write_bytes(history_plot(rows))
    axes = {name: candidate.logarithmic for name, candidate in search.space.items()}
    (folder / "parameters.png").write_bytes(slice_plot(rows, axes, best.number))
    if importances:
        (folder / "importances.png").write_bytes(importance_plot(importances))
    first, of_best = trials[0].mean_weighted_f1, best.mean_weighted_f1
    states = [trial.state for trial in trials]
    gained = None if first is None or of_best is None else of_best - first
    return {
        "sentence": _sentence(best, gained),
        "trials": len(trials),
        **{state: states.count(state) for state in ("finished", "pruned", "refused")},
        "ended_by": reason,
        "best_trial": best.number,
        "best_mean_weighted_f1": of_best,
        "set_mean_weighted_f1": first,
        **{f"best/{name}": value for name, value in chosen.items()},
        "trial_seconds": round(sum(trial.seconds for trial in trials), 1),
    }


def _sentence(best: SearchedTrial, gained: float | None) -> str:
    if best.number == 0 or gained is None:
        return f"nothing better than what is set was found ({best.mean_weighted_f1:.4f})"
    return (
        f"{best.mean_weighted_f1:.4f} with {_in_words(best.parameters)}: {gained * 100:.2f} points more than "
        "with what is set, on the validation offers that chose it"
    )


def _plain(value: Any) -> Any:
    """A number as a person would type it: four digits are more than a search can tell apart."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _table(trials: list[SearchedTrial], names: list[str]) -> pa.Table:
    """One row per trial, each parameter a column of its own."""
    columns: dict[str, Any] = {
        name: [getattr(trial, name) for trial in trials]
        for name in (
            "number",
            "state",
            "mean_weighted_f1",
            "macro_f1",
            "accuracy",
            "last_weighted_f1",
            "seconds",
            "reason",
        )
    }
    columns |= {f"parameter/{name}": [trial.parameters[name] for trial in trials] for name in names}
    return pa.table(columns)
