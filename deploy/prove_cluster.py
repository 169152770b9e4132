"""Prove `ray_cluster.yaml`: a cluster of small hosts on one machine, started, used, cut and stopped as a user would.

    sudo .venv/bin/python deploy/prove_cluster.py --log deploy/prove_cluster.txt

Each host has network, mount, process and host-name namespaces of its own, a home, a /tmp and a real sshd. Addresses
and user are those that stand in `ray_cluster.yaml`, which is used as it is. One more host is the desk that a person
types at; hosts hang on a bridge in the desk's network. They share this machine's file system otherwise, and one
folder, /mnt/shared, in place of a file server.

Nothing is downloaded on a host: its Python environment finds the packages of the one that runs this script, but for
Retrellis, which `ray up` copies there and installs. To build that, this script downloads hatchling once.

Needs root, Linux, ip, ssh, sshd and rsync. Leaves the machine as it was: all is below one temporary folder and in
namespaces that end with this script.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL.Image
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]
from machine import machine  # noqa: E402

CONFIG = YAML(typ="safe", pure=True).load((ROOT / "ray_cluster.yaml").read_text())
HEAD, WORKERS = CONFIG["provider"]["head_ip"], CONFIG["provider"]["worker_ips"]
DESK = HEAD.rpartition(".")[0] + ".1"
USER, UID = CONFIG["auth"]["ssh_user"], 1500
HOME, SHARED = f"/home/{USER}", "/mnt/shared"
RAY = "ray::|packages/ray/"  # in the command lines of its processes
JOBS = "http://127.0.0.1:8265"
ENV = ". ~/retrellis/ray-env;"  # on a host
VARIABLES = "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"  # at the desk
RUN = f"retrellis run {SHARED}/hosts.yaml --workspace {SHARED}/workspace"
THIS = {  # what the hosts' environments are made of
    "python": f"{sys.base_prefix}/bin/python3",
    "version": "python{}.{}".format(*sys.version_info),
    "packages": sysconfig.get_path("purelib"),
    "shared": SHARED,
}
SEEN = [sys.base_prefix, sys.prefix]  # of what a host's own folders hide

Found = TypeVar("Found")

EXPERIMENT = """
name: hosts
train: {images: images, N: 8, M: 12, lmbda: 0.013, steps: 20, batch: 2, crop: 64, precision: float32}
quantizers:
  tcq: {kind: tcq, trellis: vvc4}
arms:
  base: {}
  paper: {parts: decoder, steps: 5, batch: 2, crop: 96, precision: float32}
evaluate: {images: test}
resources:
  train: {num_cpus: 1}
  finetune: {num_cpus: 1}
"""

# As root, in new namespaces. $1 name, $2 address, $3 its folder, $4 the shared folder, $5 … what else it sees.
BOOT = f"""
set -e
name=$1 address=$2 folder=$3 shared=$4; shift 4
hostname "$name"
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir -p /mnt/host {SHARED}; mount --bind "$folder" /mnt/host; mount --bind "$shared" {SHARED}
for path; do mkdir -p "/mnt/seen$path"; mount --bind "$path" "/mnt/seen$path"; done
for file in passwd group shadow hosts; do mount --bind "/mnt/host/etc/$file" "/etc/$file"; done
for place in /root /home /run; do mount -t tmpfs -o mode=755 tmpfs $place; done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir {HOME} /run/sshd; mount --bind /mnt/host/home {HOME}; mount --bind /mnt/host/tmp /tmp
for path; do [ -e "$path" ] || {{ mkdir -p "$path"; mount --bind "/mnt/seen$path" "$path"; }}; done
until ip -4 -o addr | grep -qF " $address/"; do sleep 0.1; done
/usr/sbin/sshd -D -e -f /mnt/host/etc/sshd_config 2> /mnt/host/sshd.log &
wait
"""
SSHD = """
ListenAddress {address}
HostKey /mnt/host/etc/host_key
PidFile none
UseDNS no
UsePAM no
PasswordAuthentication no
"""
# On a host, as its user: an environment whose packages are this machine's, but for Retrellis.
ENVIRONMENT = """
set -e
{python} -m venv --without-pip ~/retrellis/.venv
cd ~/retrellis/.venv
echo {packages} > lib/{version}/site-packages/this_machine.pth
for tool in pip:pip._internal.cli.main ray:ray.scripts.scripts; do
    printf '#!%s\nfrom %s import main\nmain()\n' ~/retrellis/.venv/bin/python ${{tool#*:}} > bin/${{tool%:*}}
    chmod +x bin/${{tool%:*}}
done
mkdir -p ~/.config/pip
printf '[global]\\nno-index = true\\nfind-links = {shared}/wheels\\n' > ~/.config/pip/pip.conf
"""


@dataclass
class Host:
    """One small host: its name, address, and its first process as this machine counts."""

    name: str
    address: str
    pid: int

    def on(self, *command: str) -> list[str]:
        """A command of root in its network."""
        return ["nsenter", "-t", str(self.pid), "-n", *command]

    def shell(self, command: str) -> list[str]:
        """A shell command of its user, without ssh."""
        user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--reset-env"]
        spaces = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i"]
        return [*spaces, *user, "bash", "-c", f"cd; {command}"]


class Log:
    """What happens, to the terminal and a file, with nothing in it that only this machine knows."""

    def __init__(self, file: Path | None, private: dict[str, str]) -> None:
        self.file = file.open("w") if file else None
        self.private, self.clock = private, time.monotonic()

    def __call__(self, text: str = "") -> None:
        for path, name in self.private.items():
            text = text.replace(path, name)
        text = plain(text)
        for file in filter(None, (sys.stdout, self.file)):
            print(text, file=file, flush=True)

    def title(self, text: str) -> None:
        self(f"\n== {text} [{time.monotonic() - self.clock:.0f} s]\n")


class Cluster:
    """The desk, the hosts, and what is typed at the desk."""

    def __init__(self, state: Path, log: Log) -> None:
        self.state, self.log = state, log
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Hosts, cables, and an environment on each."""
        self.desk = self._start("desk", DESK)
        ip("link", "add", "bridge", "type", "bridge", on=self.desk)
        ip("link", "set", "lo", "up", on=self.desk)
        ip("addr", "add", f"{DESK}/24", "dev", "bridge", on=self.desk)
        ip("link", "set", "bridge", "up", on=self.desk)
        names = {HEAD: "head"} | {address: f"worker-{n}" for n, address in enumerate(WORKERS, 1)}
        self.hosts = [self._start(name, address) for address, name in names.items()]
        for host in self.hosts:
            self._connect(host)
            run(host.shell(ENVIRONMENT.format(**THIS)))

    def _start(self, name: str, address: str) -> Host:
        """Namespaces, home and sshd of a host."""
        folder = self.state / name
        shutil.copytree(self.state / "template", folder)
        (folder / "etc/hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        (folder / "etc/sshd_config").write_text(SSHD.format(address=address))
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "etc/host_key")])
        run(["chown", "-R", f"{UID}:{UID}", str(folder / "home")])
        spaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        boot = ["bash", "-c", BOOT, "boot", name, address, str(folder), str(self.state / "shared"), *SEEN]
        # whatever ends this script ends the host
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *boot])
        self._processes.append(process)
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(first.read_text, "first process")
        return Host(name, address, int(first.read_text()))

    def _connect(self, host: Host) -> None:
        """A cable from a host to the bridge at the desk, and a default route, as any host has one."""
        cable = f"to-{host.name}"
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid), on=self.desk)
        ip("link", "set", cable, "master", "bridge", "up", on=self.desk)
        ip("addr", "add", f"{host.address}/24", "dev", "eth0", on=host)
        ip("link", "set", "eth0", "up", on=host)
        ip("link", "set", "lo", "up", on=host)
        ip("route", "add", "default", "via", DESK, on=host)

    def link(self, host: Host, state: str) -> None:
        """Its cable "up" or "down"."""
        ip("link", "set", f"to-{host.name}", state, on=self.desk)

    def shell(self, command: str) -> list[str]:
        """A shell command at the desk, in the project's folder."""
        return self.desk.shell(f"cd project; export PATH={sys.prefix}/bin:$PATH {VARIABLES}; {command}")

    def quiet(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run it."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(self.shell(command), text=True, check=False, **streams)

    def type(self, command: str, *, fails: bool = False, show: Callable[[str], str] = str) -> str:
        """Run it; what is typed and what comes are logged."""
        self.log(f"$ {command}")
        done = self.quiet(command)
        self.log(show(done.stdout.rstrip("\n")))
        if (done.returncode != 0) != fails:
            raise RuntimeError(f"exit code {done.returncode} of: {command}\n{done.stdout}")
        return done.stdout

    def stop(self) -> None:
        """End all hosts, with all that runs on them."""
        for process in self._processes:
            process.kill()
            process.wait()


def ip(*arguments: str, on: Host) -> None:
    run(on.on("ip", *arguments))


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def wait_for(condition: Callable[[], Found], what: str, timeout_s: float = 120) -> Found:
    """Ask until the answer is true; the answer."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {timeout_s:g} s")
        time.sleep(0.5)
    return found


def prepare(state: Path) -> None:
    """What all hosts begin with: a home with a key to each other, and the shared folder."""
    for place, mode in (("home/.ssh", 0o700), ("tmp", 0o1777), ("etc", 0o755)):
        folder = state / "template" / place
        folder.mkdir(parents=True)
        folder.chmod(mode)
    for file in Path("/etc/skel").iterdir():
        shutil.copy(file, state / "template/home")
    ssh = state / "template/home/.ssh"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "id_ed25519")])
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    (ssh / "config").write_text("StrictHostKeyChecking accept-new\nLogLevel ERROR\n")
    us, root = f"{USER}:x:{UID}:", "root:x:0:"
    accounts = {
        "passwd": [
            f"{root}0::/root:/bin/bash",
            "sshd:x:102:65534::/run/sshd:",
            f"{us}{UID}::{HOME}:/bin/bash",
        ],
        "group": [root, us],
        "shadow": ["root:*:1::::::", f"{USER}:*:1::::::"],
    }
    for file, lines in accounts.items():
        (state / "template/etc" / file).write_text("\n".join(lines) + "\n")
    shared = state / "shared"
    for name, count in (("images", 12), ("more", 240), ("test", 2)):
        write_images(shared / name, count)
    (shared / "hosts.yaml").write_text(EXPERIMENT)
    project = state / "template/home/project"
    project.mkdir()
    for name in ["ray_cluster.yaml", *CONFIG["file_mounts"].values()]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not name.startswith("~"):
            shutil.copy(ROOT / name, project)
    wheels = ["-d", str(shared / "wheels"), "hatchling==1.27.0", "editables"]
    run([sys.executable, "-m", "pip", "download", "-q", *wheels])
    run(["chown", "-R", f"{UID}:{UID}", str(shared)])


def write_images(folder: Path, count: int) -> None:
    """Smooth noise of 192 × 192 pixels, the same each time."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(folder.name))
    for number in range(count):
        small = PIL.Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
        small.resize((192, 192), PIL.Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")


def prove(cluster: Cluster, log: Log) -> None:
    """What a person does, from `ray up` to `ray down`."""
    log.title("the hosts, as the desk sees them")
    for host in cluster.hosts:
        cluster.type(f"ssh {host.address} 'hostname; hostname -I; id -un; ls -A retrellis'")

    log.title("a token, and `ray up` with ray_cluster.yaml as it is")
    mark = uuid.uuid4().hex
    cluster.type("(umask 077; ray get-auth-token --generate > /dev/null); ls -l ~/.ray/auth_token")
    cluster.type(f"echo 'MARK = \"{mark}\"' >> jobs/__init__.py  # to know the copies of this folder again")
    cluster.type("ray up ray_cluster.yaml --no-config-cache --yes", show=brief)
    start = time.monotonic()
    wait_for(lambda: nodes(cluster) == len(cluster.hosts), "all nodes", 900)
    log(f"all {len(cluster.hosts)} nodes there, {time.monotonic() - start:.0f} s after `ray up` had ended")
    cluster.type(f"ssh {HEAD} '{ENV} ray status'")

    log.title("the copied code is what runs, on every host")
    for host in cluster.hosts:
        cluster.type(f"ssh {host.address} '{ENV} python -c \"import jobs; print(jobs.MARK, jobs.__file__)\"'")

    log.title("what listens")
    for host in cluster.hosts[:2]:
        cluster.type(f"ssh {host.address} \"ss -Hltn | awk '{{print \\$4}}' | sort -V | tr '\\n' ' '\"")

    log.title("a run on the head, over all hosts")
    cluster.type(f"ssh {HEAD} '{ENV} {RUN} --address auto'")

    log.title(
        "a host whose code is not up to date, and a workspace that the others do not see: nothing is computed"
    )
    last = cluster.hosts[-1]
    cluster.type(f"ssh {last.address} 'echo \"# old\" >> retrellis/jobs/train.py'")
    cluster.type(f"ssh {HEAD} '{ENV} {RUN} --set train.steps=30 --retrain --address auto'", fails=True)
    cluster.type(f"ssh {last.address} 'sed -i \"/^# old$/d\" retrellis/jobs/train.py'")
    cluster.type(f"ssh {HEAD} '{ENV} {RUN} --workspace elsewhere --address auto'", fails=True)

    log.title("detach: `ray job submit --no-wait`, and a host is cut off in the middle")
    forward = subprocess.Popen(
        cluster.shell("ray dashboard ray_cluster.yaml"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        detach(cluster, log)
    finally:
        forward.kill()

    log.title("`ray down`")
    cluster.type("ray down ray_cluster.yaml --yes", show=brief)
    start = time.monotonic()
    for host in cluster.hosts:
        wait_for(lambda host=host: not count(host, "raylet/raylet"), "end of Ray", 600)
        left = count(host, RAY)
        log(
            f"{host.name}: a node no more {time.monotonic() - start:.0f} s later; {left} processes of Ray are left"
        )
    cluster.type(f"for host in {' '.join(WORKERS)}; do ssh $host '{ENV} ray stop'; done", show=brief)
    log(f"processes of Ray now: {', '.join(f'{count(host, RAY)} on {host.name}' for host in cluster.hosts)}")


def detach(cluster: Cluster, log: Log) -> None:
    """A job that loses a host."""
    log("$ ray dashboard ray_cluster.yaml &")
    wait_for(lambda: "8265" in cluster.quiet("ss -Hltn").stdout, "forwarded port")
    more = f"--set latents.images={SHARED}/more --set quantizers.tcq.effort=20"
    before = parts(cluster)
    words = cluster.type(f"ray job submit --address {JOBS} --no-wait -- {RUN} {more}", show=brief)
    (job,) = set(re.findall(r"raysubmit_\w+", words))
    logs = f"ray job logs --address {JOBS} {job}"
    workers = cluster.hosts[1:]
    victim, tasks = wait_for(lambda: parts(cluster) > before and at_work(workers), "part and task", 900)
    cluster.link(victim, "down")
    log(
        f"{parts(cluster) - before} parts recorded, {tasks} tasks at work on {victim.name}: its link goes down"
    )
    start = time.monotonic()
    wait_for(lambda: nodes(cluster) < len(cluster.hosts), "news that the host is gone", 300)
    log(f"Ray has given the host up after {time.monotonic() - start:.0f} s")
    cluster.type(f"ssh {HEAD} '{ENV} retrellis status --workspace {SHARED}/workspace' | tail -9")
    wait_for(
        lambda: "succeeded" in cluster.quiet(f"ray job status --address {JOBS} {job}").stdout,
        "end of the job",
        1200,
    )
    log(f"the job has ended {time.monotonic() - start:.0f} s after the cut")
    cluster.type(logs)
    cluster.type(f"ssh {HEAD} '{ENV} retrellis latents verify --workspace {SHARED}/workspace'")
    cluster.link(victim, "up")
    start = time.monotonic()
    wait_for(lambda: nodes(cluster) == len(cluster.hosts), "return of the host", 600)
    log(f"the link is up again, and Ray has the host back after {time.monotonic() - start:.0f} s")


def nodes(cluster: Cluster) -> int:
    """How many nodes Ray has."""
    found = re.search(
        r"^ (\d+) local\.cluster\.node", cluster.quiet(f"ssh {HEAD} '{ENV} ray status'").stdout, re.M
    )
    return int(found[1]) if found else 0


def parts(cluster: Cluster) -> int:
    """How many parts of latent sets are recorded."""
    return len(list((cluster.state / "shared/workspace/records/latents").glob("*/parts/*/*.json")))


def at_work(hosts: list[Host]) -> tuple[Host, int] | None:
    """A host that quantizes just now, and in how many tasks."""
    return next(((host, tasks) for host in hosts if (tasks := count(host, "^ray::quantize_part"))), None)


def count(host: Host, pattern: str) -> int:
    """Processes of a host whose command line matches."""
    processes = subprocess.run(host.shell("ps -eo args"), capture_output=True, text=True, check=True).stdout
    return sum(bool(re.search(pattern, line)) for line in processes.splitlines())


def brief(text: str) -> str:
    """What `ray` says without the command lines it logs."""
    lines = [re.sub(r"^[\d-]+ [\d:,]+\s+[A-Z]+ \S+ -- ", "", plain(line)) for line in text.splitlines()]
    loud = (
        "Send term|Attempted|Running `|Full command|rsync`ed|ClusterState|docker|File Mount|use a directory"
    )
    loud += r"|^sen[dt]|total size|^\S*$"
    return "\n".join(line for line in lines if not re.search(loud, line))


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, help="write what happens to this file, too")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("expected root, which makes network namespaces, found another user")
    with tempfile.TemporaryDirectory(prefix="retrellis-hosts-") as folder:
        state = Path(folder)
        state.chmod(0o755)
        log = Log(
            arguments.log, {sys.prefix: "<environment>", sys.base_prefix: "<python>", folder: "<state>"}
        )
        log(machine("ray", "torch", "zarr"))
        prepare(state)
        cluster = Cluster(state, log)
        try:
            cluster.start()
            prove(cluster, log)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
