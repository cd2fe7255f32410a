"""Verbs that show what motor_ray can do, and how fast."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro

from motor_ray.errors import ConfigError
from motor_ray.verbs.flags import Result

Part = TypeVar("Part", bound=str)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Simulate, train, detect, evaluate and draw: the whole story in a few minutes on two cores."""

    out: str = "motor-ray-demo"
    """Folder for everything the demo makes; made anew each time."""

    def run(self) -> Result:
        """Run the demo."""
        from motor_ray.demo import demo

        return demo(self.out), 0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast this machine is, as ratios within one run, or how good the detectors are."""

    what: tyro.conf.Positional[Literal["model", "detect", "looks", "train", "serve", "plan", "accuracy"]]
    """What to measure: the network; the pipeline that feeds it from object storage; what looking twice saves; how
    training uses the machine; the endpoint; whether `motor-ray plan` foretells how long the pipeline takes; how good
    our detectors and others' are on simulated tomograms."""

    parts: tuple[str, ...] = ()
    """Parts of `bench detect` (device, peers, growth, model), of `bench train` (loop, workers, restart, precision) or
    of `bench serve` (latency, throughput, device, overload, kill, memory), or rows of `bench accuracy` (plain,
    retinanet, fcos, yolo, seed and others); all of them when not given."""

    model: tuple[str, ...] = ()
    """Checkpoint for `bench looks`, or several; the demo's is trained when not given."""

    work: str | None = None
    """Folder of `bench accuracy` for its tomograms, models and results, to go on from; motor-ray-accuracy here when not
    given."""

    seeds: int | None = None
    """Of `bench accuracy`: how often each detector is trained; 3 when not given."""

    processes: int | None = None
    """Of `bench accuracy`: trainings at a time, each on one thread; 1 when not given."""

    out: str | None = None
    """JSON file to write, beside stdout."""

    def run(self) -> Result:
        """Measure."""
        from motor_ray.storage import write_json

        result = self._measure()
        if self.out:
            write_json(self.out, result)
        return result, 0

    def _parts(self, known: tuple[Part, ...]) -> tuple[Part, ...]:
        """Those of the `known` parts that are asked for."""
        if unknown := set(self.parts) - set(known):
            raise ConfigError(f"--parts {min(unknown)}: bench {self.what} has the parts {', '.join(known)}")
        return tuple(part for part in known if part in self.parts or not self.parts)

    def _measure(self) -> dict[str, Any]:
        if self.parts and self.what not in ("detect", "train", "serve", "accuracy"):
            raise ConfigError(
                "--parts chooses among the parts of `bench detect`, `train`, `serve` and `accuracy`; leave it out here"
            )
        if self.what != "accuracy" and (self.work, self.seeds, self.processes) != (None, None, None):
            raise ConfigError("--work, --seeds and --processes are for `motor-ray bench accuracy`; leave them out here")
        if self.model and self.what != "looks":
            raise ConfigError("--model is the detector of `motor-ray bench looks`; leave it out here")
        if self.what == "detect":
            from motor_ray.bench.detect import PARTS, bench_detect

            return bench_detect(self._parts(PARTS))
        if self.what == "train":
            from motor_ray.bench.train import PARTS as TRAIN_PARTS
            from motor_ray.bench.train import bench_train

            return bench_train(self._parts(TRAIN_PARTS))
        if self.what == "serve":
            from motor_ray.bench.serve import PARTS as SERVE_PARTS
            from motor_ray.bench.serve import bench_serve

            return bench_serve(self._parts(SERVE_PARTS))
        if self.what == "plan":
            from motor_ray.bench.plan import bench_plan

            return bench_plan()
        if self.what == "accuracy":
            from motor_ray.bench.accuracy import bench_accuracy

            return bench_accuracy(
                self.parts,
                self.work or "motor-ray-accuracy",
                seeds=3 if self.seeds is None else self.seeds,
                processes=1 if self.processes is None else self.processes,
            )
        if self.what == "looks":
            from motor_ray.bench.looks import bench_looks

            return bench_looks(self.model)
        from motor_ray.bench.model import bench_model

        return bench_model()
