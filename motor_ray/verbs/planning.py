"""The verb that says what a detection would take of a cluster."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from motor_ray.errors import ConfigError
from motor_ray.verbs.flags import DetectFlags, Result, Unprefixed, all_settings

if TYPE_CHECKING:
    from motor_ray.planning import Asked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what detection in an archive would take of a cluster: hours, bottleneck, balance, cost."""

    archive: str | None = None
    """Folder or s3:// prefix that holds the tomograms; or give --manifest, or --tomograms."""

    manifest: str | None = None
    """Table made by `motor-ray manifest`."""

    tomograms: int | None = None
    """So many tomograms, all alike, that need not be there."""

    slices: int = 300
    """Slices of each of these."""

    shape: tuple[int, int] = (960, 928)
    """Voxels of their slices, along y and x."""

    spacing: float | None = None
    """Their voxel spacing in angstrom; it says every how-manieth slice a first look takes."""

    model: tuple[str, ...] = ()
    """Checkpoint folder, or several. With an archive, half a minute of it is loaded and scored, here or on the cluster
    of RAY_ADDRESS, and rates that are not given are taken from that."""

    gpus: int | None = None
    """GPUs of the cluster; those of the one that was measured, or none, when not given."""

    cpus: int | None = None
    """CPU cores of the cluster, those of GPU nodes among them; those of the one that was measured when not given."""

    memory_gigabytes: float | None = None
    """Memory of all nodes; 4 for each CPU when not given."""

    jobs: int = 1
    """Parts of the archive, each detected in by a job of its own at the same time: a job has one driver."""

    gpu_rate: float | None = None
    """Slices a second that a GPU looks at."""

    cpu_rate: float | None = None
    """Slices a second that a CPU core prepares, what Ray costs included."""

    second_look: float | None = None
    """Slices of the second look for each of the first; as sampled, or 1.1, when not given."""

    slice_bytes: float | None = None
    """Bytes fetched for a slice; as sampled, or those of a JPEG, when not given."""

    gets_per_slice: float | None = None
    """Requests for a slice; as sampled, or 1, when not given."""

    get_seconds: float = 0.05
    """From a request to its answer's end, if none is sampled."""

    variation: float | None = None
    """Standard deviation of the time that slabs take, over its mean; as sampled, or 0.3, when not given."""

    start_seconds: float | None = None
    """Until the actors of a look are there; as sampled, or 60, when not given."""

    gets_per_second: float | None = None
    """The most that the storage answers, if it has a limit; S3's is 5500 for each prefix."""

    network_gigabit: float | None = None
    """Gigabits a second at which each scorer can be given frames, if loaders are on other nodes."""

    driver_rate: float = 120.0
    """Slabs a second that the driver can hand on: 8.6 ms of a core each were measured."""

    driver_tomogram_seconds: float = 0.0035
    """In which the driver plans a tomogram, checks it and links its motors: 3.2 ms of a core were measured."""

    gpu_price: float = 0.0
    """Of a GPU for an hour, in any currency."""

    cpu_price: float = 0.0
    """Of a CPU core for an hour; 0 if GPUs come with theirs."""

    price_per_1000_gets: float = 0.0
    """Of a thousand requests."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[DetectFlags, Unprefixed] = DetectFlags()

    def run(self) -> Result:
        """Plan."""
        from motor_ray.archive.manifest import check_usable, find_tomograms, read_manifest
        from motor_ray.planning import Alike, plan_alike, plan_archive

        self._refuse_contradictions()
        settings = all_settings(self)
        if self.tomograms is not None:
            archive = Alike(self.tomograms, self.slices, self.shape, self.spacing)
            return plan_alike(archive, self._asked(), settings), 0
        if self.manifest:
            return plan_archive(read_manifest(self.manifest), self.model, self._asked(), settings), 0
        manifest, unusable = find_tomograms(str(self.archive), settings.archive)
        check_usable(manifest, unusable)
        said = plan_archive(manifest, self.model, self._asked(), settings)
        return said | {"unusable": unusable["error"].to_pylist()}, len(unusable) > 0

    def _asked(self) -> "Asked":
        from motor_ray.planning import Asked

        return Asked(**{name: getattr(self, name) for name in Asked._fields})

    def _refuse_contradictions(self) -> None:
        given = [one is not None for one in (self.archive, self.manifest, self.tomograms)]
        if sum(given) != 1:
            raise ConfigError("give one of --archive, --manifest and --tomograms: what there is to look at")
        if self.model and self.tomograms is not None:
            raise ConfigError("--model is measured on tomograms that are there; give --archive or --manifest with it")
