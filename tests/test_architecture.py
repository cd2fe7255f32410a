"""Imports go one way, modules do nothing when imported, and only `distributed` knows Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import motor_ray

ROOT = Path(motor_ray.__file__).parent
BASE = {"config", "config_values", "errors", "machine", "tables", "storage"}
ALLOWED = {
    "archive": BASE,
    "slices": BASE,
    "detector": BASE | {"slices"},
    "motors": BASE,
    "service": BASE | {"archive", "motors"},
    "distributed": BASE
    | {"archive", "slices", "detector", "motors", "results", "tracking", "progress", "service"}
    | {"slab_plan"},
    "results": BASE | {"archive", "slices", "motors", "views"},
    "refining": BASE | {"archive", "detector", "motors", "results"},
    "views": BASE | {"archive", "slices", "motors"},
    "slab_plan": BASE | {"archive", "slices"},
    "tracking": BASE,
    "progress": set(),
    "config": set(),
    "config_values": {"config", "errors"},
    "storage": {"config", "errors", "retry", "sources", "s3", "buckets"},
    "retry": {"errors"},
    "sources": {"errors", "retry"},
    "s3": {"errors", "retry", "sources"},
    "buckets": {"retry", "sources", "s3"},
    "client": {"errors"},
    "capacity": BASE | {"archive", "slices", "slab_plan"},
    "planning": BASE | {"archive", "capacity", "detector", "distributed", "slab_plan"},
    "errors": set(),
    "machine": set(),
    "tables": set(),
    "bench": BASE
    | {"archive", "slices", "detector", "motors", "service", "client", "distributed", "progress", "results", "demo"}
    | {"capacity"}  # to compare what it foretells with what is measured
    | {"views"}  # how large a true box is, to score slices of its own choice
    | {"slab_plan"}
    | {"refining"},  # what can be learned of a trained detector is compared as well
    "demo": BASE | {"archive", "distributed", "results", "progress"},
    "verbs": BASE
    | {"archive", "distributed", "results", "progress", "demo", "bench", "service", "planning", "refining"},
    "cli": BASE | {"verbs"},
}
"""Which rooms, or modules at the top, each may import beside itself."""

MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> set[str]:
    """The dotted names of all that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module):
    room = module.parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imports(ROOT / module) if name.startswith("motor_ray.")}
    assert ours - {room, "__version__"} <= ALLOWED[room]


def test_the_detector_takes_nothing_of_slices_but_the_frame():
    for path in (ROOT / "detector").glob("*.py"):
        taken = {name for name in imports(path) if name.startswith("motor_ray.slices")}
        assert all(name.startswith("motor_ray.slices.frame") for name in taken), path.name


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_distributed_imports_ray(module):
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(ROOT / module))
    assert not uses_ray or module.parts[0] == "distributed"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_a_benchmark_imports_what_is_under_the_agpl(module):
    """And not at its top, so that the benchmark can be imported without it."""
    uses = any(name.split(".")[0] == "ultralytics" for name in imports(ROOT / module))
    assert not uses or module.parts[0] == "bench"
    code = f"import sys; sys.modules['ultralytics'] = None; import motor_ray.{'.'.join(module.with_suffix('').parts)}"
    assert not uses or subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stages_samples_and_learner_run_without_ray():
    names = ("loading", "scoring", "samples", "frame_store", "learner")
    modules = ", ".join(f"motor_ray.distributed.{name}" for name in names)
    code = f"import sys; import {modules}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_starts_a_detection_waits_for_no_torch():
    code = "import sys, motor_ray.distributed.detect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_needs_neither_torch_nor_ray():
    code = "import sys, motor_ray.cli; sys.exit(bool({'torch', 'ray', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_everything_does_nothing_but_define():
    code = """
import importlib, logging, os, pkgutil, sys, threading
import motor_ray
handlers, threads, files = len(logging.getLogger().handlers), threading.active_count(), sorted(os.listdir('.'))
for module in pkgutil.walk_packages(motor_ray.__path__, 'motor_ray.'):
    importlib.import_module(module.name)
import ray, torch
assert not ray.is_initialized()
assert not torch.cuda.is_initialized()
assert len(logging.getLogger().handlers) == handlers
assert sorted(os.listdir('.')) == files
"""
    subprocess.run([sys.executable, "-c", code], check=True)
