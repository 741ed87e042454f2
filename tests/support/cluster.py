"""A real SLURM cluster of two nodes on this machine, in a temporary directory.

Debian's packages slurm-wlm and munge; slurmd takes the name of its node (-N), and each node claims
two CPUs whatever the machine has. Node names do not resolve, as on some real clusters.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.ranks import free_port

PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")
SYSTEM = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where the daemons are

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    return [name for name in DAEMONS if shutil.which(name, path=SYSTEM) is None]


def install() -> str | None:
    """Install the packages where they are missing. None, or why that failed."""
    if not missing():
        return None
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, timeout=600,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return done.stderr.strip()[-500:]
    return f"{', '.join(missing())} missing after the installation" if missing() else None


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start the daemons, wait for both nodes; the environment in which its commands work."""
    with TemporaryDirectory(prefix="slurm") as name:
        directory = Path(name)
        environment = os.environ | {"PATH": SYSTEM, "SLURM_CONF": f"{name}/slurm.conf"}
        daemons: list[subprocess.Popen] = []
        try:
            _configure(directory)
            _start(directory, environment, daemons)
            yield environment
        finally:
            _stop(environment, daemons)


def _configure(directory: Path) -> None:
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    controller, first, second = (free_port() for _ in range(3))
    text = CONFIG.format(
        directory=directory, host=socket.gethostname().split(".")[0], user=getpass.getuser(),
        controller=controller, first=first, second=second,
    )  # fmt: skip
    (directory / "slurm.conf").write_text(text)


def _start(directory: Path, environment: dict[str, str], daemons: list[subprocess.Popen]) -> None:
    munge = [
        "munged", "--foreground", "--force", f"--socket={directory}/munge.socket",
        f"--key-file={directory}/munge.key", f"--pid-file={directory}/munge.pid",
        f"--log-file={directory}/munge.log", f"--seed-file={directory}/munge.seed",
    ]  # fmt: skip
    nodes = [["slurmd", "-D", "-N", node] for node in ("n1", "n2")]
    for number, words in enumerate([munge, ["slurmctld", "-D"], *nodes]):
        dying = ["setpriv", "--pdeathsig", "KILL", *words]  # with this process, however it ends
        with (directory / f"{number}.out").open("w") as log:
            daemon = subprocess.Popen(
                dying, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        daemons.append(daemon)
        if words is munge:
            until((directory / "munge.socket").exists, 30, "munged made no socket")

    def idle() -> bool:
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not ended, (ended, [log.read_text() for log in directory.glob("*.out")])
        return query(environment, "sinfo", "--noheader", "--Node", "--format=%N %t").split() == [
            "n1", "idle", "n2", "idle",
        ]  # fmt: skip

    until(idle, 90, "the nodes did not come up")


def query(environment: dict[str, str], *words: str) -> str:
    """Standard output of a SLURM command, empty where it fails."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def until(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:.0f} s"
        time.sleep(0.1)


def _stop(environment: dict[str, str], daemons: list[subprocess.Popen]) -> None:
    """End jobs, daemons, and whatever else was started with this cluster's configuration."""
    with suppress(Exception):
        query(environment, "scancel", "--signal=KILL", "--full", "--me")
        query(environment, "scancel", "--me")
    for daemon in reversed(daemons):
        daemon.kill()
        daemon.wait()
    ours = f"SLURM_CONF={environment['SLURM_CONF']}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if ours in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
