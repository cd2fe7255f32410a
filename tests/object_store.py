"""What tests ask of their S3 server beside what the package asks of it."""

import json
from dataclasses import dataclass, field
from itertools import count

from motor_ray.bench.object_store import ObjectServer


@dataclass(frozen=True)
class ObjectStore:
    """A server with one bucket for all tests, each of which takes folders of its own."""

    server: ObjectServer
    _numbers: "count[int]" = field(default_factory=count, repr=False)

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def folder(self) -> str:
        """The URI of a folder that nobody else has."""
        return f"s3://{self.server.bucket}/folder{next(self._numbers)}"

    def open_to_all(self, uri: str) -> None:
        """Let anybody read what is in the folder `uri`, and nothing else."""
        bucket, folder = uri.removeprefix("s3://").split("/", 1)
        read = {"Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/{folder}/*"}
        seen = {
            "Action": "s3:ListBucket",
            "Resource": f"arn:aws:s3:::{bucket}",
        }
        statements = [{"Effect": "Allow", "Principal": "*", **one} for one in (read, seen)]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self.server.client().put_bucket_policy(Bucket=bucket, Policy=policy)
