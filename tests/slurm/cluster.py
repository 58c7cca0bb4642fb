"""A real Slurm cluster of virtual nodes on this machine: ready in half a second, gone without a trace outside a folder.

Where the tests run as root and may make namespaces, each node has its own process ids, host name, IP address (behind
a bridge that lives in the controller's namespace) and /dev/shm: nodes can be cut off, frozen and lose their power.
Elsewhere a node is a slurmd on a port of 127.0.0.1, and only the loss of its processes can be played.

A requeued job waits until Slurm's credentials expire (`cred_expire`; 5 s is the least it takes), and a silent node is
declared dead after `SlurmdTimeout`: minutes on real clusters, seconds here, but enough for a node of a busy machine.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.machine import ROOT, TIME_LIMIT, free_port

T = TypeVar("T")
HEAD = "head"  # the node of slurmctld and of the commands
CPUS = 4  # that Slurm believes each node has
SUBNET = "10.77.0"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MAKE_NAMESPACES = (
    "unshare", "--fork", "--kill-child=KILL", "--pid", "--mount-proc", "--mount", "--propagation", "private", "--net",
    "--uts", "--ipc",
)  # fmt: skip
CONFIG = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
TmpFS={root}/tmp/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=1
BatchStartTimeout=60
KillWait=30
UnkillableStepTimeout=180
MinJobAge=3600
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=5
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=off
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
"""


def missing() -> str | None:
    """What keeps a cluster from being started here."""
    programs = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    lacking = [program for program in programs if shutil.which(program, path=PATH) is None]
    return f"Slurm is not installed: no {', '.join(lacking)} (Debian: slurm-wlm)" if lacking else None


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or not all(shutil.which(program, path=PATH) for program in ("unshare", "nsenter", "ip")):
        return False
    attempt = "ip link add br0 type bridge; ip link add v0 type veth peer name v1; mount -t tmpfs none /dev/shm"
    return subprocess.run([*MAKE_NAMESPACES, "sh", "-ec", attempt], capture_output=True).returncode == 0


class Cluster:
    """Nodes n1, n2, ... and a controller, from `with` to its end."""

    def __init__(self, root: Path, nodes: int = 3) -> None:
        self.root = root
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.namespaces = can_make_namespaces()
        self.parents: dict[str, subprocess.Popen[str]] = {}  # of each node's processes
        self.first_process: dict[str, int] = {}  # node.py of each node, by its process id on this machine
        unwanted = ("SLURM_", "SBATCH_", "SRUN_", "PMI", "OMPI_")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self._write_files()
        try:
            self._start_parent(HEAD)
            self._order(HEAD, "slurmctld", "-D")
            for name in self.names:
                self._start_node(name)
            self.wait_until(self._all_idle, "all nodes are idle")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def run(self, *command: str | Path, on: str = HEAD, **environment: Any) -> str:
        """The standard output of a command that succeeds; on a node, or beside the controller."""
        env = self.env | {name: str(value) for name, value in environment.items()}
        full = [*self._enter(on), *map(str, command)]
        ended = subprocess.run(
            full, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        if ended.returncode:
            raise RuntimeError(f"{' '.join(full)}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return ended.stdout

    def submit(self, *arguments: str | Path, **environment: str | Path) -> str:
        """sbatch; the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, on=HEAD, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        line = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def nodes_of(self, number: str) -> list[str]:
        """The first of them runs the batch script, and rank 0."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def wait(self, number: str, states: Iterable[str] = ("COMPLETED", "FAILED", "CANCELLED")) -> str:
        """Wait until the job is in one of the states; which."""

        def state() -> str | None:
            found = self.job(number)["JobState"]
            return found if found in states else None

        return self.wait_until(state, f"job {number} is {states}")

    def wait_until(self, condition: Callable[[], T | None], what: str, seconds: float = TIME_LIMIT) -> T:
        """The condition's value, once it is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"not after {seconds} s: {what}\n{self.run('squeue')}{self.logs()}")
            time.sleep(0.05)
        return value

    def restart(self, number: str, times: int = 1) -> None:
        """Wait until a job is requeued so many times, and shorten the pause that Slurm makes before it starts."""

        def requeued() -> bool:
            job = self.job(number)
            return int(job["Restarts"]) >= times and job["JobState"] != "COMPLETING"

        self.wait_until(requeued, f"job {number} is requeued")
        try:  # not at once: in the very second of its end a node would refuse it
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")
        except RuntimeError as error:
            if "Job is no longer pending" not in str(error):  # it has started meanwhile
                raise

    def power_off(self, name: str, notice: bool = True) -> None:
        """Everything on a node vanishes at once, in namespaces without a farewell on the network.

        Args:
            notice: whether Slurm is told; else it finds out when the node has been silent for SlurmdTimeout.
        """
        if self.namespaces:
            self.run("ip", "link", "delete", f"v-{name}")
        parent = self.parents.pop(name)
        _end(parent)
        if notice:
            self.declare_down(name)

    def declare_down(self, name: str) -> None:
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def drain(self, name: str) -> None:
        """Give a node no more jobs; one that is declared down comes back by itself."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")

    def resume(self, name: str) -> None:
        """Give a drained node jobs again, once it has answered (`idle*` until then)."""
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait_until(lambda: self._states()[name] == "idle", f"{name} is idle")

    def cut(self, name: str, link: str = "down") -> None:
        """Pull the network cable of a node, or put it back (`up`)."""
        self.run("ip", "link", "set", f"v-{name}", link)

    def signal_all(self, name: str, signal: str) -> None:
        """Freeze (STOP) or go on with (CONT) all processes of a node but its parent."""
        self.run("sh", "-c", f"kill -{signal} -1", on=name)

    def reset(self) -> None:
        """No jobs, and all nodes back and idle."""
        self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        for name in self.names:
            if name not in self.parents:
                self._start_node(name)
        queue = ("squeue", "--noheader", "--states=RUNNING,COMPLETING,PENDING")
        self.wait_until(lambda: not self.run(*queue).strip(), "the queue is empty")
        self.wait_until(self._all_resumed, "all nodes are idle")

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((self.root / "log").iterdir()))

    def _states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=main").splitlines()
        return dict(line.split() for line in lines)

    def _all_resumed(self) -> bool:
        for name, state in self._states().items():
            if state.startswith(("down", "drain")):
                try:
                    self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
                except RuntimeError as error:
                    if "Invalid node state" not in str(error):  # it has come back by itself since it was asked
                        raise
        return self._all_idle()

    def _all_idle(self) -> bool:
        try:
            return set(self._states().values()) == {"idle"}
        except RuntimeError:  # the controller is not up yet
            return False

    def _address(self, name: str) -> str:
        return f"{SUBNET}.{1 if name == HEAD else 10 + self.names.index(name)}"

    def _write_files(self) -> None:
        for folder in ("state", "log", *(f"{kind}/{name}" for kind in ("spool", "tmp") for name in self.names)):
            (self.root / folder).mkdir(parents=True)
        if self.namespaces:
            controller, port = f"{HEAD}({self._address(HEAD)})", 6817
            places = [f"NodeAddr={self._address(name)} Port=6818" for name in self.names]
        else:
            controller, port = "localhost(127.0.0.1)", free_port()
            places = [f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()}" for _ in self.names]
        nodes = [
            f"NodeName={name} {place} CPUs={CPUS} RealMemory=16000 State=UNKNOWN"
            for name, place in zip(self.names, places, strict=True)
        ]
        user = pwd.getpwuid(os.getuid()).pw_name
        config = CONFIG.format(controller=controller, port=port, user=user, root=self.root, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(config)
        names = "".join(f"{self._address(name)} {name}\n" for name in (HEAD, *self.names))
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no name server there

    def _start_node(self, name: str) -> None:
        self._start_parent(name)
        self._order(name, "slurmd", "-D", "-N", name)

    def _start_parent(self, name: str) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("node.py"))]
        if self.namespaces:  # a node's namespaces lie in the controller's, and end with them
            command = [*(() if name == HEAD else self._enter(HEAD)), *MAKE_NAMESPACES, *command]
        parent = subprocess.Popen(
            command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.parents[name] = parent
        assert parent.stdout is not None
        if parent.stdout.readline() != "up\n":
            raise RuntimeError(f"node {name} did not start")
        pid = parent.pid  # of nsenter or unshare; the last of their line is node.py, which has no children yet
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])
        self.first_process[name] = pid
        if self.namespaces:
            self._connect(name)

    def _connect(self, name: str) -> None:
        """The host name and network of a new namespace."""
        shell = f"hostname {name}; ip link set lo up; mount -t tmpfs -o mode=1777 none /dev/shm"
        for file in ("hosts", "nsswitch.conf"):
            shell += f"; mount --bind {self.root}/{file} /etc/{file}"
        if name == HEAD:
            bridge = "ip link add br0 type bridge; ip link set br0 up"
            self.run("sh", "-ec", f"{shell}; {bridge}; ip address add {self._address(HEAD)}/24 dev br0")
            return
        # The bridge is in the controller's network, but only this machine's process ids name the node's.
        link = f"ip link add v-{name} type veth peer name eth0 netns {self.first_process[name]}"
        link += f"; ip link set v-{name} master br0 up"
        head = str(self.first_process[HEAD])
        subprocess.run(["nsenter", "-t", head, "-n", "sh", "-ec", link], env=self.env, check=True)
        shell += f"; ip address add {self._address(name)}/24 dev eth0; ip link set eth0 up"
        self.run("sh", "-ec", shell, on=name)

    def _enter(self, name: str) -> list[str]:
        if not self.namespaces:
            return []
        pid = str(self.first_process[name])
        return ["nsenter", "-t", pid, "-m", "-n", "-u", "-i", "-p", "--", "env", f"--chdir={ROOT}"]

    def _order(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=PATH)
        order = {"command": [program, *command[1:]], "log": str(self.root / "log" / f"{command[0]}.{name}.out")}
        stdin = self.parents[name].stdin
        assert stdin is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()

    def _stop(self) -> None:
        _end(*self.parents.values())


def _end(*parents: subprocess.Popen[str]) -> None:
    for parent in parents:
        assert parent.stdin is not None
        parent.stdin.close()
    for parent in parents:
        parent.wait(timeout=TIME_LIMIT)
