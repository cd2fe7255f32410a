"""Several machines made of one, as far as the network is concerned: network namespaces, joined by a bridge."""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

DEVICE = "cable"
"""What each machine calls its end of the network."""

SECONDS_TO_END = 30


class Machine(NamedTuple):
    """A network namespace of that name, with an address that the others and this process reach."""

    name: str
    address: str

    def on(self, *command: str) -> list[str]:
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        """Nothing gets in or out any more; who is connected is not told."""
        subprocess.run(["ip", "-n", self.name, "link", "set", DEVICE, "down"], check=True)

    def processes(self) -> list[int]:
        said = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in said.stdout.split()]

    def crash(self) -> None:
        """All that runs there ends at once; returns when it has."""
        ends = time.monotonic() + SECONDS_TO_END
        while there := self.processes():
            assert time.monotonic() < ends, f"{self.name}: {there} do not end"
            for pid in there:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


@contextmanager
def machines(names: list[str], network: str) -> Iterator[list[Machine]]:
    """Machines of these names, 10.77.6.1 and so on in the network 10.77.6, where this process is 10.77.6.254.

    What runs on them ends with the block. Skips the test where that is not possible.
    """
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("takes root, and ip of the package iproute2, to make several machines of one")
    made = [Machine(name, f"{network}.{number}") for number, name in enumerate(names, 1)]
    bridge = f"mr-{secrets.token_hex(4)}"  # each time another: the kernel takes its time to remove the last ones
    try:
        for command in _plan(made, network, bridge):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield made
    finally:
        for machine in made:
            machine.crash()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _plan(machines: list[Machine], network: str, bridge: str) -> Iterator[str]:
    yield f"ip link add {bridge} type bridge"
    yield f"ip addr add {network}.254/24 dev {bridge}"
    yield f"ip link set {bridge} up"
    for number, machine in enumerate(machines):
        plug = f"{bridge}-{number}"
        yield f"ip netns add {machine.name}"
        yield f"ip link add {plug} type veth peer name {DEVICE} netns {machine.name}"
        yield f"ip link set {plug} master {bridge} up"
        yield f"ip -n {machine.name} addr add {machine.address}/24 dev {DEVICE}"
        yield f"ip -n {machine.name} link set {DEVICE} up"
        yield f"ip -n {machine.name} link set lo up"
