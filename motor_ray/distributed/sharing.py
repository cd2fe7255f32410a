"""Whether all nodes of a cluster see the same files: asked before anything starts.

Otherwise a node would list as missing what lies on another's disk, and leave its results where nobody looks for them.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from motor_ray.distributed.cluster import alive
from motor_ray.errors import RunError
from motor_ray.storage import join, remove, write_bytes


def first_tomogram(manifest: pa.Table) -> str:
    """What must be seen to read the first tomogram of a MANIFEST: a file, or of a stack of slices its folder."""
    uri: str = manifest["uri"][0].as_py()
    return uri.rpartition("/")[0] if "{z" in uri else uri


def require_shared(inputs: Iterable[str], out: str) -> None:
    """Raises RunError unless every node that works sees what this process sees of the `inputs`, and writes to `out`.

    Object storage is the same for all, so that only local paths are asked for, and only of other nodes than this one.
    """
    workers = [node for node in alive() if node["NodeID"] != here() and _works(node)]
    if not workers:
        return
    with token_in(out) as token:
        unseen = unseen_by(workers, [uri for uri in (*inputs, *token) if _is_local(uri) and not _unseen([uri])])
    for node, (path, *_) in unseen:
        raise RunError(
            f"{out if path in token else path}: the node {node} does not see what lies there; on several "
            "nodes data, model and results belong into object storage (s3://...) or onto a disk that all of them share"
        )


def here() -> str:
    """Ray's name of the node of this process."""
    return str(ray.get_runtime_context().get_node_id())


@contextlib.contextmanager
def token_in(folder: str) -> Iterator[list[str]]:
    """A file in a local folder that is there while the block runs; none if the folder is in object storage."""
    if not _is_local(folder):
        yield []
        return
    token = join(folder, f"seen-by-all.{secrets.token_hex(4)}")
    write_bytes(token, b"")
    try:
        yield [token]
    finally:
        remove(token)


def unseen_by(nodes: Sequence[Mapping[str, Any]], uris: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The addresses of nodes for which some of the `uris` are not there, with those."""
    if not uris:
        return []
    look = ray.remote(num_cpus=0)(_unseen)
    there = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes)
    unseen = ray.get([look.options(scheduling_strategy=one).remote(uris) for one in there])
    return [(node["NodeManagerAddress"], paths) for node, paths in zip(nodes, unseen, strict=True) if paths]


def _unseen(uris: Sequence[str]) -> list[str]:
    return [uri for uri in uris if not os.path.exists(uri.removeprefix("file://"))]


def _works(node: Mapping[str, Any]) -> bool:
    """Whether anything of ours may run on a node: a scorer beside a GPU takes no CPU."""
    return any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))


def _is_local(uri: str) -> bool:
    return "://" not in uri.removeprefix("file://")
