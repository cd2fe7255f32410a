"""The work of the detection pipeline as users of other libraries would write it. Nothing else imports them.

They decode and prepare slices with our functions and hand frames to the same scorer, so that what differs is who moves
the data and keeps both ends busy.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from motor_ray.config import RunSettings
from motor_ray.storage import write_table

if TYPE_CHECKING:
    from motor_ray.bench.devices import StandIn

SLABS_AHEAD = 4
"""Slabs that each process of the DataLoader has prepared in advance."""

DAFT_CONNECTIONS = 64
"""Downloads of Daft's at a time."""

DAFT_BATCH = 48
"""Slices that Daft downloads and prepares together; it was faster so than with 12, 24 or 96."""


def torch_data_loader(plan: pa.Table, settings: RunSettings, device: "StandIn", out: str) -> dict[str, Any]:
    """Score every slab of the PLAN: processes of a torch DataLoader load slabs ahead, this one scores them.

    What is found goes to the file `out`.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset

    from motor_ray.distributed.loading import LoadSlab
    from motor_ray.machine import cores
    from motor_ray.tables import SLABS

    class Slabs(Dataset[dict[str, Any]]):
        rows = plan.to_pylist()
        loader: LoadSlab | None = None

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> dict[str, Any]:
            self.loader = self.loader or LoadSlab(settings)
            row = self.loader.load(self.rows[number])
            return row | {"frames": torch.from_numpy(row["frames"])}

    ahead: Any = DataLoader(
        Slabs(),
        batch_size=None,
        num_workers=cores(),
        prefetch_factor=SLABS_AHEAD,
        multiprocessing_context="fork",  # nothing has been read yet whose threads would be missing in the children
    )
    scored = [device.score(row, row["frames"].numpy().reshape(-1)) for row in ahead]
    write_table(pa.Table.from_pylist(scored, schema=SLABS), out)
    return {"processes": cores(), "torch": torch.__version__}


def daft(plan: pa.Table, settings: RunSettings, device: "Callable[[], StandIn]", out: str) -> dict[str, Any]:
    """Score every slice of the PLAN, whose tomograms are JPEG stacks of one shape, with Daft on this machine.

    What is found goes to parquet files in the folder `out`. Its functions run on its threads: OpenCV lets go of
    Python's lock, and a process of its own for each was no faster.
    """
    import cv2
    import daft
    from daft.functions import download

    cv2.setNumThreads(1)
    daft.set_runner_native()
    first = plan.slice(0, 1).to_pylist()[0]
    shape, spacing = (first["size_y"], first["size_x"]), first["voxel_spacing_angstrom"]
    make, score = _daft_functions(settings, shape, spacing, device)
    col = daft.col
    (
        daft.from_arrow(slices_of(plan))
        .with_column("jpeg", download(col("uri"), max_connections=DAFT_CONNECTIONS, io_config=_daft_storage()))
        .with_column("frame", make(col("uri"), col("jpeg")))
        .exclude("jpeg")
        .with_column("presence", score(col("frame")))
        .exclude("frame")
        .write_parquet(out)
    )
    return {"daft": daft.__version__}


def slices_of(plan: pa.Table) -> pa.Table:
    """The URI of every slice of a PLAN of JPEG stacks: one row each, as other libraries want it."""
    stacks = zip(plan["uri"].to_pylist(), plan["zs"].to_pylist(), strict=True)
    return pa.table({"uri": [uri.format(z=z) for uri, zs in stacks for z in zs]})


def _daft_functions(
    settings: RunSettings, shape: tuple[int, int], spacing: float | None, device: "Callable[[], StandIn]"
) -> tuple[Any, Any]:
    """Functions of Daft columns: of URIs and JPEG files, which gives frames; and of frames, which gives presences."""
    import numpy as np
    from daft import DataType, Series, cls, func, method

    from motor_ray.archive.jpeg_stack import decode_image
    from motor_ray.slices.frame import frames_of
    from motor_ray.slices.preprocess import make_frames
    from motor_ray.slices.repair import find_repair, repaired

    size = settings.frame.size
    placement = frames_of(shape, spacing, settings.frame)

    def make(uris: Series, jpegs: Series) -> Any:
        pairs = zip(uris.to_pylist(), jpegs.to_pylist(), strict=True)
        images = [decode_image(jpeg, uri, shape) for uri, jpeg in pairs]
        fault = find_repair(images, settings.preprocess)
        return np.concatenate([make_frames(repaired(image, fault), placement, settings.preprocess) for image in images])

    class Score:
        def __init__(self) -> None:
            self.device = device()

        def score(self, frames: Series) -> Any:
            pixels = frames.to_arrow().storage.flatten().to_numpy()
            looks = self.device.look(pixels.reshape(-1, 1, size, size))
            return pa.array([look.presence for look in looks], pa.float32())

        __call__ = method.batch(return_dtype=DataType.float32(), batch_size=settings.detect.slab_slices)(score)

    frame = DataType.tensor(DataType.uint8(), (size, size))
    return (
        func.batch(return_dtype=frame, batch_size=DAFT_BATCH, use_process=False)(make),
        cls(Score, max_concurrency=1, use_process=False)(),
    )


def _daft_storage() -> Any:
    from daft.io import IOConfig, S3Config

    return IOConfig(
        s3=S3Config(
            endpoint_url=os.environ["AWS_ENDPOINT_URL"],
            key_id=os.environ["AWS_ACCESS_KEY_ID"],
            access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=os.environ["AWS_DEFAULT_REGION"],
            use_ssl=False,
        )
    )
