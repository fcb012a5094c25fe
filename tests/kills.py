"""A training program stopped again and again: by -9, by SIGTERM, at random times; what it ends in is compared."""

import json
import os
import random as rng
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmfunc import checkpoint


def final(out, step=4):
    """The bits at the end of a run."""
    return load_file(checkpoint.place(out / "checkpoints", step) / "state-0.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def start(command):
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stopped(command, out, hows=(signal.SIGKILL, signal.SIGTERM)):
    """Once by each signal, when it has got on by a checkpoint; then to its end."""
    for how in hows:
        was, p, until = len(checkpoint.steps(out / "checkpoints")), start(command), time.time() + 60
        while len(checkpoint.steps(out / "checkpoints")) <= was and p.poll() is None and time.time() < until:
            time.sleep(0.002)
        p.send_signal(how)
        assert p.wait(60) in (-signal.SIGKILL, 75, 0)
    assert start(command).wait() == 0


def often(command, out, steps, kills=25):
    """Killed by -9 at random times after it has got on, in the midst of saving too; then to its end, and its log."""
    r, told = rng.Random(0), 0
    for _ in range(kills):
        p, until = start(command), time.time() + 90
        while not (found := checkpoint.steps(out / "checkpoints")) or found[-1] <= told:  # it has got on
            assert p.poll() is None and time.time() < until
            time.sleep(0.01)
        time.sleep(r.uniform(0, 0.4))
        p.kill()
        assert p.wait() == -signal.SIGKILL
        newest = checkpoint.steps(out / "checkpoints")[-1]
        checkpoint.verify(checkpoint.place(out / "checkpoints", newest))
        assert newest >= told
        told = newest
    assert start(command).wait() == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("event") == "restart" for row in rows) == kills
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, steps + 1))


class Ranks:
    """A program's main as ranks forked from this process, which Slurm's variables describe; what they say is kept."""

    def __init__(self, folder, main, *args, world=2, **env):
        """args: what main takes, or a list of as many for each rank."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = env.pop("MASTER_PORT", s.getsockname()[1])
        self.said = [folder / f"said-{r}" for r in range(world)]
        folder.mkdir(parents=True, exist_ok=True)
        self.begun = [r for r in range(world) if env.get("only", r) == r]
        env = {"SLURM_NTASKS": str(world), "SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": str(self.port),
               "GLOO_SOCKET_IFNAME": "lo"}
        self.pids = {r: self._fork(r, env | {"SLURM_PROCID": str(r)}, main, [a[r] if isinstance(a, list) else a for a in args])
                     for r in self.begun}
        self.codes = {}

    def _fork(self, rank, env, main, args):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.environ |= env
            out = os.open(self.said[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # not the tests'
            torch.set_num_threads(1)
            code = main(*args)
        except (ValueError, FileNotFoundError) as e:
            print(f"error: {e}", file=sys.stderr)
            code = 3
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)

    def send(self, rank, how):
        os.kill(self.pids[rank], how)

    def poll(self):
        """Exit codes of those that have ended, negative by signal."""
        for r in set(self.pids) - set(self.codes):
            pid, status = os.waitpid(self.pids[r], os.WNOHANG)
            if pid:
                self.codes[r] = os.waitstatus_to_exitcode(status)
        return self.codes

    def wait(self, seconds, *but):
        """The exit codes of all, but of some, within some seconds; those that are left over are killed."""
        end = time.time() + seconds
        while len([r for r in self.poll() if r not in but]) < len(self.pids) - len(but) and time.time() < end:
            time.sleep(0.02)
        found = dict(self.poll())
        for r in set(self.pids) - set(found):
            os.kill(self.pids[r], signal.SIGKILL)
            os.waitpid(self.pids[r], 0)
        return found

    def text(self):
        return "\n".join(f.read_text() for f in self.said if f.exists())


def until(true, seconds=60):
    """Until something is true."""
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it never came to it"
        time.sleep(0.01)


def children(pid):
    """Processes that a process has started, by number; each with its environment."""
    out = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                told = (stat.parent / "environ").read_bytes().split(b"\0")
                out[int(stat.parent.name)] = dict(x.decode().split("=", 1) for x in told if b"=" in x)
        except OSError:
            continue
    return out
