"""Jobs on a Ray cluster that is reached over HTTP: handed in, watched, and started again if they die."""

import asyncio
import contextlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import requests
import yaml
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import motor_ray
from motor_ray.distributed.job_file import SETTINGS, Job, entrypoint, submission_id
from motor_ray.errors import LOST_CODE, ConfigError, MotorRayError, RunError, UnfinishedError

USAGE_ERROR = 2
"""Exit code of a command that cannot be right another time."""

DONE_WITH_LOSSES = 3
"""Exit code that jobs are asked for if they end, but something could not be read: not 1, with which Python dies."""

LOSSES = "SUCCEEDED, but something could not be read; see its log"

POLL_SECONDS = 1.0

START_SECONDS = 120.0
"""What a cluster that has just started gets until it must take jobs."""

SILENCE_SECONDS = 300.0
"""A cluster that does not answer for so long is given up; the job goes on without us."""

TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that would tell every upload of a small file."""

log = logging.getLogger(__name__)


def submit(job: Job, address: str, *, wait: bool) -> dict[str, Any]:
    """Run a job on the cluster at `address`, showing what it says; returns its id, status and attempts.

    A job that is there already, from an earlier call, is not started again but watched; one that died is started anew,
    up to ``job.attempts`` times in all. Without `wait` it is left alone once it is there. Raises ConfigError for
    variables that are not set, RunError if the cluster does not answer or the job's input was wrong, UnfinishedError if
    it died too often.
    """
    client = connect(address)
    with answering(address):
        return see_through(client, job, wait=wait)


def see_through(client: JobSubmissionClient, job: Job, *, wait: bool) -> dict[str, Any]:
    """The same, on a cluster that answered."""
    name = submission_id(job)
    ours = 0
    while True:
        attempts = attempts_of(client, name)
        current = attempts[-1] if attempts else None
        if current is None or is_worth_another(current, ours, job):
            start(client, job, f"{name}-{number_of(current) + 1}")
        elif current.status in (JobStatus.PENDING, JobStatus.RUNNING):
            log.info("%s is there already", current.submission_id)
        else:
            return outcome(current, len(attempts))
        ours += 1
        current = attempts_of(client, name)[-1]
        if not wait:
            return {"job": current.submission_id, "status": current.status.value}
        with left_alone(str(current.submission_id)):
            watch(client, str(current.submission_id))


def stop(job: Job, address: str) -> dict[str, Any]:
    """Stop a job; what it has done stays. Raises RunError if it is not there."""
    client = connect(address)
    with answering(address):
        attempts = attempts_of(client, submission_id(job))
        if not attempts:
            raise RunError(f"{address}: has no job {submission_id(job)}")
        client.stop_job(str(attempts[-1].submission_id))
    return {"job": attempts[-1].submission_id, "status": "STOPPED"}


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's jobs. Raises ConfigError for what is no address, RunError if it does not answer."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: give the address of the cluster's dashboard, such as http://head:8265")
    with answering(address):
        client = JobSubmissionClient(address)
    for talkative in TALKATIVE:
        logging.getLogger(talkative).setLevel(logging.WARNING)
    return client


@contextlib.contextmanager
def answering(address: str) -> Iterator[None]:
    """RunError if the cluster does not answer while the block runs, or does not let us in."""
    try:
        yield
    except AuthenticationError:
        raise RunError(
            f"{address}: the cluster asks for a token that we do not have, or takes ours for wrong; set RAY_AUTH_MODE="
            "token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
        ) from None
    except MotorRayError:
        raise
    except (RayError, requests.RequestException, ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{address}: no Ray cluster answers ({' '.join(str(error).split())}); give the address of its dashboard, "
            "such as http://head:8265"
        ) from None


def attempts_of(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """All that was ever started of a job, in order."""
    numbered = re.compile(re.escape(name) + r"-(\d+)")
    found = [(match, one) for one in client.list_jobs() if (match := numbered.fullmatch(one.submission_id or ""))]
    return [one for _, one in sorted(found, key=lambda pair: int(pair[0][1]))]


def number_of(attempt: JobDetails | None) -> int:
    """Which attempt it is; 0 for none."""
    return int(str(attempt.submission_id).rsplit("-", 1)[1]) if attempt else 0


def is_worth_another(last: JobDetails, ours: int, job: Job) -> bool:
    """Whether a job whose `last` attempt ended badly is tried again, `ours` being those of this call.

    What ended before this call says nothing: the input may have been put right meanwhile.
    """
    if last.status not in (JobStatus.FAILED, JobStatus.STOPPED):
        return False
    ended = last.driver_exit_code in (USAGE_ERROR, DONE_WITH_LOSSES)
    return ours == 0 or (last.status == JobStatus.FAILED and not ended and ours < job.attempts)


def start(client: JobSubmissionClient, job: Job, name: str) -> None:
    """Hand in one attempt; of the files of this machine only the settings go along, or motor_ray itself if asked."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, SETTINGS).write_text(yaml.safe_dump(job.settings))
        runtime: dict[str, Any] = {"working_dir": folder, "env_vars": variables(job)}
        if job.code:
            runtime["py_modules"] = [str(Path(motor_ray.__file__).parent)]
        hand_in(
            client,
            entrypoint=entrypoint(job),
            submission_id=name,
            runtime_env=runtime,
            entrypoint_num_cpus=job.cpus,
            entrypoint_label_selector=dict(job.where) or None,
        )
    log.info("%s: %s", name, entrypoint(job))


def hand_in(client: JobSubmissionClient, **job: Any) -> None:
    """Submit, again and again while a cluster that has just started says that it cannot yet. Raises RunError."""
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            client.submit_job(**job)
        except RuntimeError as error:
            if "already exists" in str(error):
                return  # who else watches it was faster
            if "try again later" not in str(error) or time.monotonic() > ends:
                raise RunError(f"{job['submission_id']}: the cluster does not take it: {error}") from None
            time.sleep(POLL_SECONDS)
        else:
            return


def variables(job: Job) -> dict[str, str]:
    """The environment that goes along, all of it from here but for LOST_CODE.

    Raises ConfigError if a variable is not set here.
    """
    missing = [name for name in job.environment if name not in os.environ]
    if missing:
        raise ConfigError(f"environment: {', '.join(missing)} not set here; set it, or leave it to the cluster's nodes")
    return {name: os.environ[name] for name in job.environment} | {LOST_CODE: str(DONE_WITH_LOSSES)}


def watch(client: JobSubmissionClient, name: str) -> None:
    """Show what a job says, on stderr, until it has ended, however often the connection breaks."""
    shown, silent_since = 0, None
    while True:
        try:
            shown += asyncio.run(show_log(client, name, shown))
            if client.get_job_status(name).is_terminal():
                return
            silent_since = None
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENCE_SECONDS:
                raise RunError(
                    f"{name}: the cluster has not answered for {SILENCE_SECONDS:.0f} s ({error}); the job may go on; "
                    "the same command looks after it again"
                ) from None
        time.sleep(POLL_SECONDS)


async def show_log(client: JobSubmissionClient, name: str, shown: int) -> int:
    """Show what a job has said and says, but for the characters `shown` before; returns how many were new."""
    seen = 0
    async for text in client.tail_job_logs(name):
        new = text[max(shown - seen, 0) :]
        seen += len(text)
        sys.stderr.write(new)
        sys.stderr.flush()
    return max(seen - shown, 0)


def outcome(last: JobDetails, attempts: int) -> dict[str, Any]:
    """What became of a job that has ended. Raises RunError if its input was wrong, UnfinishedError if it died."""
    if last.status == JobStatus.SUCCEEDED:
        return {"job": last.submission_id, "status": last.status.value, "attempts": attempts}
    if last.driver_exit_code == DONE_WITH_LOSSES:
        return {"job": last.submission_id, "status": LOSSES, "attempts": attempts}
    why = " ".join((last.message or "").split())
    if last.driver_exit_code == USAGE_ERROR:
        raise RunError(f"{last.submission_id}: its command or its input is wrong, as its log says above")
    raise UnfinishedError(f"{last.submission_id}: {last.status.value.lower()} after {attempts} attempts: {why}")


@contextlib.contextmanager
def left_alone(name: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        log.info("%s goes on; the same command looks after it again, --stop ends it", name)
        raise
