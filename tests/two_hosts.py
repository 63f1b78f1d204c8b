"""Two network namespaces of this machine that stand for two hosts, joined by a cable that can be pulled."""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def why_not():
    """Why namespaces cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "there is no program ip (iproute2)"
    made = subprocess.run(["ip", "netns", "add", f"muse-try-{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"muse-try-{os.getpid()}"], check=True)
    return None


class TwoHosts:
    """A context manager; leaving it ends what runs on the hosts and removes them."""

    addresses = ("10.213.7.1", "10.213.7.2")

    def __init__(self, folder):
        """`folder` is for the file of host names: host0 and host1 resolve as they would on real hosts."""
        self.table = folder / "hosts"
        self.table.write_text("127.0.0.1 localhost\n" + "".join(
            f"{address} host{i}\n" for i, address in enumerate(self.addresses)))

    def __enter__(self):
        self.names = [f"muse-{os.getpid()}-{i}" for i in range(2)]
        self.processes = []
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", "cable0", "netns", self.names[0], "type", "veth", "peer", "cable1", "netns", self.names[1])
        for i, name in enumerate(self.names):
            _ip("-n", name, "address", "add", f"{self.addresses[i]}/24", "dev", f"cable{i}")
            for device in ("lo", f"cable{i}"):
                _ip("-n", name, "link", "set", device, "up")
        self._wait_for_link()
        return self

    def __exit__(self, *_):
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, inside):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait(30)
        for name in self.names:
            _ip("netns", "delete", name)

    def pull(self):
        """Nothing gets through any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", "cable0", "down")

    def plug(self):
        """The cable is back."""
        _ip("-n", self.names[0], "link", "set", "cable0", "up")
        self._wait_for_link()
        for i, name in enumerate(self.names):  # a search for the other host that began without a link still fails
            _ip("-n", name, "neighbour", "flush", "dev", f"cable{i}")

    def _wait_for_link(self):
        """The kernel takes a moment to see that both ends are up; until then programs leave the device out."""
        def up():
            return all("state UP" in _ip("-n", name, "link", "show", f"cable{i}") for i, name in enumerate(self.names))

        wait_until(up, 10, lambda: "the link")

    def enter(self, host):
        """The command line before one that is to run on a host, with a host name and a table of names of its own.

        `ip netns exec` has mounts of its own too: nobody else sees the other /etc/hosts.
        """
        return ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c",
                f'hostname host{host} && mount --bind {self.table} /etc/hosts && exec "$@"', "sh"]

    def start(self, host, command, output):
        """Start a command on a host; its output goes to a file."""
        environment = {key: value for key, value in os.environ.items()
                       if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{environment['PATH']}"}
        with open(output, "w") as file:
            process = subprocess.Popen([*self.enter(host), *map(str, command)], cwd=ROOT, env=environment, stdout=file,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self.processes.append(process)
        return process


def wait_until(done, seconds, what):
    """Poll slowly: ranks need the cores. `what()` is what did not come to pass."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what()}"
        time.sleep(0.1)


def _ip(*arguments):
    """What the program `ip` prints."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
