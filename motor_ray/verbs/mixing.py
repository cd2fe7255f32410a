"""The verb that makes one detector of several."""

from dataclasses import dataclass
from typing import Annotated

from motor_ray.verbs.flags import ArchiveFlags, Result, Unprefixed, all_settings


@dataclass(frozen=True, kw_only=True)
class Soup:
    """Average the weights of several checkpoints of one network into another that is no slower than one of them."""

    models: tuple[str, ...]
    """Checkpoint folders, of snapshots of a run or of runs that began alike; STORAGE/NAME/snapshots stands for all in
    it."""

    out: str
    """Folder or s3:// prefix for the new checkpoint."""

    archive: str | None = None
    """Folder or s3:// prefix of tomograms whose slices batch normalisation takes its statistics from; without it those
    of the checkpoints are averaged."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[ArchiveFlags, Unprefixed] = ArchiveFlags()

    def run(self) -> Result:
        """Average."""
        from motor_ray.archive.manifest import check_usable, find_tomograms
        from motor_ray.distributed.soup import make_soup

        archive, manifest, lost = all_settings(self).archive, None, []
        if self.archive:
            manifest, unusable = find_tomograms(self.archive, archive)
            check_usable(manifest, unusable)
            lost = unusable["error"].to_pylist()
        return make_soup(self.models, self.out, manifest, archive) | {"unusable": lost}, bool(lost)
