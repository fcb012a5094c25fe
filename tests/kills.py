"""A training program stopped again and again: by -9, by SIGTERM, at random times; what it ends in is compared."""

import json
import random as rng
import signal
import subprocess
import time

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
