"""The trials of a study on Ray Tune: as many at a time as the cluster holds, and no longer than they are promising.

    study -> Ray Tune: one process a trial -> train -> record of the study

Ray Tune pickles a state of its own; it stays in a temporary folder of the driver, for a pickle in a bucket could be
anybody's. Nothing is restored from it.
"""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from motor_ray.config import RunSettings
from motor_ray.distributed.cluster import alive, connected, gpus, holds, root_cause
from motor_ray.distributed.ledger import alone, storage_watched
from motor_ray.distributed.node_disks import clear_frames
from motor_ray.distributed.progress import Board
from motor_ray.distributed.study import GOAL, Record, Study, Trial, changed
from motor_ray.distributed.team import require_team, slots_for, worker_resources
from motor_ray.distributed.training import read_metrics, train
from motor_ray.errors import MotorRayError, UnfinishedError
from motor_ray.progress import progress_bar
from motor_ray.storage import exists, join

EPOCHS, REASON = "epochs", "reason"

REDUCTION = 3
"""Of the trials that get that far the best third goes on, after a ninth and after a third of the epochs."""

QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths are relative to where motor-ray was started
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial's metrics.jsonl and TensorBoard files say the same
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C stops at once; the record is as good then as later
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # what failed has no score to report
}
"""What keeps Ray Tune from printing, writing and catching what is ours to."""


def run_trials(study: Study, trials: Sequence[Trial], *, halving: bool) -> list[Trial]:
    """Train all trials that are not done; what came of them all, in the same order. The record is kept up to date.

    With `halving`, those that are worse than others were at the same epoch are stopped, others of before included.
    Raises RunError if the cluster cannot hold a trial.
    """
    todo = [trial.name for trial in trials if trial.status == "waiting"]
    told = [trial.name for trial in trials if trial.status != "waiting"] if halving else []
    if not todo:
        return list(trials)
    with connected(slots_for(study.workers[1], study.settings)):
        require_team(study.workers, study.settings)
        show_trials = progress_bar(study.kind, len(trials), "trials")
        with alone(study.uri), storage_watched(study.uri), show_trials as show:
            record = Record(study, trials, show)
            record.save()
            _run_on_tune(study, record, [*told, *todo], halving=halving)
        clear_frames(study.frames, study.settings)
    return list(record.trials.values())


def _run_on_tune(study: Study, record: Record, names: list[str], *, halving: bool) -> None:
    nodes = [node["Resources"] for node in alive()]
    # On this node, because the others may come and go; and of the CPUs, which are for the workers, nothing.
    here = {f"node:{ray.util.get_node_ip_address()}": 1e-3}  # type: ignore[no-untyped-call]
    room = at_a_time(nodes, worker_resources(study.settings), study.workers[1], study.settings)
    halted = Board()
    scheduler = Halving(halted, study.settings.train.epochs) if halving else None
    function = tune.with_parameters(run_trial, study=study, trials=record.trials, halted=halted)
    with tempfile.TemporaryDirectory(prefix="motor-ray-tune-") as folder, quiet():
        tuner = tune.Tuner(
            tune.with_resources(function, here),
            param_space={"trial": tune.grid_search(names)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=room),
            run_config=tune.RunConfig(name="trials", storage_path=folder, callbacks=[Watcher(record)], verbose=0),
        )
        try:
            results = tuner.fit()
        except tune.TuneError as error:
            # It holds a traceback as text, of which the last line is what we raised.
            reason = str(error).strip().splitlines()[-1].split("Error: ", 1)[-1]
            raise UnfinishedError(f"{study.uri}: stopped: {reason}; --resume goes on") from error
        for result in map(results.__getitem__, range(len(results))):
            if result.error is not None and result.config is not None:
                record.fail(result.config["trial"], root_cause(result.error))


def run_trial(config: dict[str, Any], *, study: Study, trials: dict[str, Trial], halted: Board) -> None:
    """What Ray Tune runs for each trial: report the epochs that are done, then train until all are, or it is halted."""
    trial = trials[config["trial"]]
    run_uri, best = join(study.uri, trial.name), 0.0
    for line in read_metrics(run_uri) if exists(join(run_uri, "metrics.jsonl")) else []:
        best = max(best, line[GOAL] or 0.0)
        tune.report({EPOCHS: line["epoch"] + 1, GOAL: best})
    if trial.status != "waiting" or is_halted(trial.name, halted):
        return
    settings = settings_of(study, trial)
    try:
        # The bar of each trial would be drawn over the study's.
        with contextlib.redirect_stderr(io.StringIO()):
            run = train(
                study.manifest,
                study.labels,
                settings,
                study.uri,
                trial.name,
                workers=study.workers,
                resume=exists(join(run_uri, "run.json")),
                frames=study.frames,
                callbacks=[ReportEpochs(trial.name, settings.train.epochs, best, halted)],
            )
    except MotorRayError as error:
        if not is_halted(trial.name, halted):
            tune.report({REASON: str(error)})
    else:
        tune.report({EPOCHS: run["epochs"], GOAL: run["best"][GOAL] or 0.0})


def settings_of(study: Study, trial: Trial) -> RunSettings:
    """The settings of a trial; its look at whole tomograms must leave GPUs to the others."""
    detect = study.settings.detect
    scorers = detect.scorers or (study.workers[1] if gpus() else None)
    return changed(study.settings, {**trial.changes, "detect": {"scorers": scorers}})


def is_halted(name: str, halted: Board) -> bool:
    """Whether a trial was told to end."""
    return name in halted.read().counts


class Halving(ASHAScheduler):
    """Tells trials to end that are worse than others were at the same epoch (ASHA, arXiv 1810.05934).

    Ray Tune would kill them, and their workers would hold their CPUs and GPUs until the driver ends: Ray Train frees
    them only where there is a dashboard to learn from that its controller is dead.
    """

    def __init__(self, halted: Board, epochs: int) -> None:
        least = max(1, epochs // REDUCTION**2)
        super().__init__(EPOCHS, GOAL, "max", max_t=epochs, grace_period=least, reduction_factor=REDUCTION)
        self.halted = halted

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Called by Ray Tune; the answer is always to go on."""
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self.halted.count(trial.config["trial"], 1)
        return TrialScheduler.CONTINUE


class HaltedError(Exception):
    """Ends the Ray Train run of a trial that was told to end, in good order."""


class ReportEpochs(TuneReportCallback):
    """Tells Ray Tune the best score so far after each validation, and ends the run if it was told to.

    The last epoch is told when all is done: a trial that gets there has nothing to gain from being halted.
    """

    def __init__(self, name: str, epochs: int, best: float, halted: Board) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.epochs, self.best, self.halted = name, epochs, best, halted

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        """Called by Ray Train for every report; those without scores only keep a checkpoint."""
        line = metrics[0]
        if GOAL not in line or line["epoch"] + 1 == self.epochs:
            return
        self.best = max(self.best, line[GOAL] or 0.0)
        super().after_report(run_context, [{EPOCHS: line["epoch"] + 1, GOAL: self.best}], None)
        if is_halted(self.name, self.halted):
            raise HaltedError(f"{self.name}: others were better after as many epochs")


class Watcher(tune.Callback):
    """Hands on to the record what Ray Tune tells."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune pickles its callbacks to restore them some time, which is not done here."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:  # noqa: ARG002
        """A trial got its process."""
        self.record.started(trial.config["trial"])

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[TuneTrial],  # noqa: ARG002
        trial: TuneTrial,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """A trial reported an epoch, or why it failed."""
        if REASON in result:
            self.record.fail(trial.config["trial"], result[REASON])
        else:
            self.record.reported(trial.config["trial"], result[GOAL])

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:  # noqa: ARG002
        """A trial ended, or the scheduler stopped it."""
        if REASON not in (trial.last_result or {}):
            self.record.ended(trial.config["trial"])


def at_a_time(
    nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], workers: int, settings: RunSettings
) -> int:
    """How many trials of so many workers nodes with such resources hold beside one another; one at least."""
    cpus = sum(node.get("CPU", 0) for node in nodes)
    beside = settings.train.tomograms == "during" and "GPU" in worker  # looks at tomograms while training goes on
    teams = holds(nodes, worker) // (workers + beside)
    return max(1, min(teams, int(cpus // slots_for(workers, settings))))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray Tune says nothing in the block: what it has to say, we say."""
    before = {name: os.environ.get(name) for name in QUIET}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(QUIET)
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints even where it is told not to
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
