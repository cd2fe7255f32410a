"""``motor-ray <verb>``: parse, build the settings, call one function.

Results go to stdout, one JSON object a verb; progress and messages to stderr. Exit codes: 0 done; 1 finished, but
something was lost or failed; 2 wrong usage or input, before any work was done; 130 stopped by Ctrl-C.
"""

import argparse
import contextlib
import difflib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

import tyro

from motor_ray import __version__
from motor_ray.config import RunSettings, Settings
from motor_ray.config_values import read_tree
from motor_ray.errors import LOST_CODE, ConfigError, MotorRayError, OutageError, UnfinishedError
from motor_ray.verbs.archives import Figure, Manifest, Simulate
from motor_ray.verbs.detection import Detect, Evaluate, Export, LabelCare
from motor_ray.verbs.flags import Verb
from motor_ray.verbs.mixing import Soup
from motor_ray.verbs.planning import Plan
from motor_ray.verbs.refining import Calibrate, Rescore
from motor_ray.verbs.serving import Serve
from motor_ray.verbs.showing import Bench, Demo
from motor_ray.verbs.submitting import Submit
from motor_ray.verbs.training import Ablate, Pretrain, PseudoLabel, Train, Tune

VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "simulate": Simulate,
    "manifest": Manifest,
    "train": Train,
    "plan": Plan,
    "detect": Detect,
    "evaluate": Evaluate,
    "export": Export,
    "calibrate": Calibrate,
    "rescore": Rescore,
    "figure": Figure,
    "label-care": LabelCare,
    "serve": Serve,
    "ablate": Ablate,
    "tune": Tune,
    "soup": Soup,
    "pretrain": Pretrain,
    "pseudo-label": PseudoLabel,
    "submit": Submit,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or the given arguments in its place; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("motor_ray").setLevel(logging.INFO)
    try:
        words = sys.argv[1:] if arguments is None else arguments
        with reader_may_leave(0 if not words or {"-h", "--help", "--version"} & {*words} else 2):
            asked = parse(words)
        # Ray, too, prints to stdout, which is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result, code = asked.run()
    except MotorRayError as error:
        print(f"motor-ray: {error}", file=sys.stderr)
        return 1 if isinstance(error, UnfinishedError | OutageError) else 2
    except KeyboardInterrupt:
        print("motor-ray: stopped", file=sys.stderr)
        return 130
    code = int(code and os.environ.get(LOST_CODE, code))
    with reader_may_leave(code):
        print(json.dumps(result, indent=2))
    return code


@contextlib.contextmanager
def reader_may_leave(code: int) -> Iterator[None]:
    """A reader of stdout who has read enough, as `head` has, ends it without complaint: SystemExit with the `code`."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None if it was closed from the start
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        raise SystemExit(code) from None


def parse(arguments: Sequence[str]) -> Verb:
    """The verb that `arguments` ask for, its settings complete. Raises ConfigError or SystemExit for wrong usage."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(f"motor-ray {__version__}" if name == "--version" else overview())
        raise SystemExit(0)
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb {name!r}; {hint}")
    refuse_repeats(arguments)
    verb = VERBS[name]
    asked: Verb = tyro.cli(verb, args=arguments[1:], default=defaults(verb, arguments), prog=f"motor-ray {name}")
    return asked


def overview() -> str:
    """What ``motor-ray --help`` says."""
    lines = [f"  {name:12} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: motor-ray VERB [OPTIONS]",
            "",
            "Finds bacterial flagellar motors in cryo-electron tomograms.",
            "",
            *lines,
            "",
            "motor-ray VERB --help lists the options of a verb.",
        ]
    )


def refuse_repeats(arguments: Sequence[str]) -> None:
    """Raises ConfigError if an option is given twice: one of the two values would be dropped in silence."""
    options = [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    # --a.no-b is the opposite of --a.b, and an underscore stands for a dash.
    counts = Counter(option.replace("_", "-").replace(".no-", ".") for option in options)
    twice = [option for option, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(f"{', '.join(twice)}: given more than once; give it once")


def defaults(verb: type[Verb], arguments: Sequence[str]) -> Any:
    """An instance of `verb` as it is if no flag is given: the defaults, or the values of the --config file."""
    values = {one.name: one.default if one.default is not MISSING else tyro.MISSING for one in fields(verb)}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}; give the YAML file of settings") from None
    if path and "settings" in values:
        flags = type(values["settings"])
        values["settings"] = part_of(read_tree(path, getattr(verb, "tree", RunSettings)), flags)
    return verb(**values)


def part_of(settings: Settings, flags: type[Settings]) -> Settings:
    """The groups of `settings` that `flags` has."""
    return flags(**{name: getattr(settings, name) for name in flags.model_fields})


if __name__ == "__main__":
    raise SystemExit(main())
