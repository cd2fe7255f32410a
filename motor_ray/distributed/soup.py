"""One network from several checkpoints: their weights averaged, and written as a checkpoint. Needs no Ray."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from motor_ray.config import ArchiveSettings, DetectSettings, RunSettings
from motor_ray.detector.checkpoint import load_checkpoint, save_checkpoint
from motor_ray.detector.description import (
    DESCRIPTION,
    Ensemble,
    Models,
    check_compatible,
    describe_checkpoint,
    find_checkpoints,
)
from motor_ray.detector.soup import average_weights, take_statistics
from motor_ray.distributed.loading import LoadSlab
from motor_ray.distributed.scoring import images_of
from motor_ray.errors import CheckpointError, RunError
from motor_ray.slab_plan import first_look
from motor_ray.slices.frame import frames_of
from motor_ray.storage import absolute, exists, join

SLICES = 256
"""That batch statistics are taken of."""

NEAR = 4
"""Of a slab, since neighbours look alike."""

BATCH = 8

log = logging.getLogger(__name__)


def make_soup(models: Models, out: str, manifest: pa.Table | None, archive: ArchiveSettings) -> dict[str, Any]:
    """Write the average of the checkpoints that `models` names to the folder `out`; returns what was made of what.

    With the MANIFEST of an archive, statistics of batch normalisation are those of SLICES of its slices; else they are
    averaged, too. `archive` says how it is read. Raises CheckpointError if the checkpoints are not of one
    network or fewer than two, RunError if `out` is there already or no slice can be read.
    """
    out, uris = absolute(out), find_checkpoints(models)
    if len(uris) < 2:
        raise CheckpointError(f"{uris[0]}: alone is its own average; give --models two or more")
    soup = Ensemble(uris, [describe_checkpoint(uri) for uri in uris])
    check_compatible(soup.uris, soup.members, weights=True)
    if exists(join(out, DESCRIPTION)):
        raise RunError(f"{out}: holds a checkpoint already, and nothing is overwritten; give --out another folder")
    settings = soup.settings.model_copy(update={"archive": archive, "detect": DetectSettings()})
    frames = sample_frames(manifest, settings) if manifest is not None else None
    model = load_checkpoint(uris[0])
    model.load_state_dict(average_weights(load_checkpoint(uri).state_dict() for uri in uris))
    if frames is not None:
        log.info("taking batch statistics of %d slices", len(frames))
        take_statistics(model, torch.from_numpy(frames), BATCH)
    statistics = "averaged" if frames is None else f"of {len(frames)} images"
    metrics = {"soup": soup.told(), "batch_statistics": statistics}
    return {"out": out, "sha256": save_checkpoint(out, model, soup.settings, metrics), **metrics}


def sample_frames(manifest: pa.Table, settings: RunSettings) -> NDArray[np.uint8]:
    """Images ``(n, channels, size, size)`` of some SLICES slices here and there in an archive, in no order.

    Raises RunError if hardly one can be read.
    """
    random = np.random.default_rng(0)
    chosen = manifest.take(pa.array(random.permutation(len(manifest))[:SLICES]))
    slabs = pa.concat_tables(first_look(chosen, settings)).to_pylist()
    loader, images, count = LoadSlab(settings), [], 0
    for place in random.permutation(len(slabs)):
        images.append(_images(slabs[place], loader, settings))
        count += len(images[-1])
        if count >= SLICES:
            break
    frames = np.concatenate(images)
    if len(frames) < 2:
        raise RunError("of the archive's slices hardly one can be read; leave --archive out, or give another one")
    return frames[random.permutation(len(frames))]


def _images(slab: dict[str, Any], loader: LoadSlab, settings: RunSettings) -> NDArray[np.uint8]:
    row = loader.load(slab | {"zs": slab["zs"][:NEAR]})
    if not len(row["frames"]):
        size = settings.frame.size
        return np.empty((0, settings.model.in_slices, size, size), np.uint8)
    placement = frames_of((row["size_y"], row["size_x"]), row["voxel_spacing_angstrom"], settings.frame)
    return images_of(row, row["frames"], len(placement), settings)
