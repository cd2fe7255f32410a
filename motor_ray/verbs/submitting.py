"""The verb that hands jobs to a cluster."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from motor_ray.verbs.flags import Result


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Run a job on a Ray cluster, show what it says, and start it again if it dies."""

    job: Annotated[str, tyro.conf.Positional]
    """YAML file of the job, such as jobs/train.yaml."""

    address: str
    """Where the cluster's dashboard is, such as http://head:8265."""

    wait: bool = True
    """Stay until it has ended. The same command again looks after a job that is running."""

    stop: bool = False
    """Stop the job instead."""

    def run(self) -> Result:
        """Submit."""
        from motor_ray.distributed import submit
        from motor_ray.distributed.job_file import read_job

        job = read_job(self.job)
        if self.stop:
            return submit.stop(job, self.address), 0
        said = submit.submit(job, self.address, wait=self.wait)
        return said, said["status"] == submit.LOSSES
