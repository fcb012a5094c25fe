"""Runs of several ranks that meet faults: killed, stopped, asked to stop, started otherwise, with bad data; and the
programs that share work among ranks."""

import ctypes
import json
import os
import random as rng
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import kills
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import digits
import drawings
import encode
import evaluate
import sample
import train

from mmfunc import checkpoint, data, jit, media, models, shard
from mmfunc.shard import meet, watch
from mmfunc.tasks import language, pictures

RANK = "SLURM_PROCID"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of a few pictures, and an untrained model."""
    root = tmp_path_factory.mktemp("faults")
    digits.main(digits.Args(root, singles=24, pages=12))
    return root


def args(root, out, **more):
    rows = train.Rows(tokens=(28,), patches=(128,), attention=64)
    usual = train.Args(root / "model", root / "data" / "train.jsonl", out, scratch=True, steps=6, batch=4, lr=1e-3, warmup=2,
                       save=2, backend="eager", workers=0, rows=rows, mesh=shard.Mesh(fsdp=2), patience=60.0)
    return replace(usual, **more)


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


@pytest.fixture(scope="module")
def whole(root):
    """Losses of twelve updates by one process."""
    assert train.main(args(root, root / "whole", steps=12, mesh=shard.Mesh())) == 0
    return losses(root / "whole")


def like(found, want, steps=12, close=1e-5):
    assert sorted(found) == list(range(1, steps + 1))
    assert max(abs(x - want[n]) / want[n] for n, x in found.items()) < close


def got_on(out, n):
    """Until so many updates were logged."""
    kills.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("loss") >= n)


def disturbed(a, rank, what, at, how):
    """A training run of which one rank does something else at the n-th call: a batch, a step or showing."""
    if int(os.environ[RANK]) == rank:
        owner, name = {"data": (data.Batches, "__getitem__"), "step": (jit.Jitted, "__call__"), "show": (language, "show")}[what]
        real, calls = getattr(owner, name), []

        def other(*x):
            calls.append(1)
            if len(calls) > at:
                print("disturbed", flush=True)
                how()
            return real(*x)

        setattr(owner, name, other)
    return train.main(a)


def broken():
    raise ValueError("a broken sample")


def sleep():
    time.sleep(100)


def fork(root, out, *more, main=disturbed, ranks=2, **how):
    return kills.Ranks(out, main, args(root, out / "run", **how), *more, world=ranks)


def test_how_ranks_are_started():
    assert meet.started({}) == meet.started({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == meet.Start()
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456",
             "SLURM_STEP_ID": "2", "SLURM_JOB_NODELIST": "gpu[003-007,012],login1"}
    assert meet.started(slurm | torchrun) == meet.Start(3, 4, 1, "a", 7)
    for agent in (True, False):  # torchrun's own store, or one of the first rank
        env = torchrun | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": str(agent)}
        assert meet.started(env).hosts is not agent
    assert meet.started(slurm) == meet.Start(0, 16, 0, "gpu003", 23458) and meet.started(slurm).hosts
    assert meet.started(slurm | {"SLURM_PROCID": "5", "MASTER_PORT": "99"}) == meet.Start(5, 16, 0, "gpu003", 99)
    for hosts, want in (("n1", "n1"), ("n1,n2", "n1"), ("rack[1-2]n[01-04,9]", "rack1n01"), ("a-b[7]", "a-b7")):
        assert meet.first(hosts) == want


def started(tmp_path, both, **env):
    """(exit codes, what each rank said) of two ranks."""
    k = kills.Ranks(tmp_path, train.main, both, **env)
    codes = k.wait(30)
    return codes, [f.read_text() if f.exists() else "" for f in k.said]


def test_ranks_that_do_not_fit_together(root, tmp_path):
    """Told before the first step, by all ranks, with one exit code."""
    more = tmp_path / "data"
    shutil.copytree(root / "data", more)
    (more / "train.jsonl").write_text((more / "train.jsonl").read_text() + "\n")
    good = args(root, tmp_path / "run")
    for name, other, said in (
        ("flags", replace(good, lr=2e-3), r"rank 1 \(.*\) has --lr 0.002, rank 0 \(.*\) has 0.001"),
        ("mesh", replace(good, mesh=shard.Mesh(tp=2)), "has --mesh.fsdp 1, rank 0 .* has --mesh.tp 2, rank 0"),
        ("data", replace(good, data=more / "train.jsonl"), "has a --data of 1 files, .* bytes, hash .*, rank 0"),
    ):
        codes, told = started(tmp_path / name, [good, other])
        assert codes == {0: 3, 1: 3} and all(re.search(said, t) and "error: " in t for t in told), told
    assert not (tmp_path / "run").exists()


def test_a_folder_that_hosts_do_not_share(root, tmp_path, monkeypatch):
    """One name, two folders."""
    hosts = [tmp_path / "0", tmp_path / "1"]
    for host in hosts:
        host.mkdir()

    monkeypatch.setattr(sys.modules["mmfunc.shard.world"], "SEEN", 0.5)

    def main(host):
        os.chdir(host)
        return train.main(args(root, Path("run")))

    k = kills.Ranks(tmp_path, main, hosts)
    assert k.wait(30) == {0: 3, 1: 3}
    assert "rank 1 of 2 cannot see what rank 0 writes to run; it must be a folder that all hosts share" in k.text()


def test_ranks_that_do_not_come(root, tmp_path):
    a = args(root, tmp_path / "run", patience=1.5)
    codes, told = started(tmp_path / "a", a, only=0)
    assert codes == {0: 5} and "rank 1 of 2 did not come within 2 s" in told[0]
    codes, told = started(tmp_path / "b", a, only=1)
    assert codes == {1: 5} and "rank 0 is missing: nobody answers at 127.0.0.1:" in told[1]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        codes, told = started(tmp_path / "c", a, only=0, MASTER_PORT=s.getsockname()[1])
    assert codes == {0: 3} and "set MASTER_PORT to a free one" in told[0]


@pytest.mark.parametrize(("rank", "mesh"), [(0, shard.Mesh(tp=2)), (1, shard.Mesh(fsdp=2, tp=2))])
def test_a_killed_rank_is_named_and_nothing_is_lost(root, whole, tmp_path, rank, mesh):
    """Two ranks go on from where one of two or four was killed."""
    k = fork(root, tmp_path, 9, "step", 0, sleep, ranks=mesh.world, steps=12, mesh=mesh)
    got_on(tmp_path / "run", 5)
    k.send(rank, signal.SIGKILL)
    start = time.time()
    codes = k.wait(20)
    assert codes.pop(rank) == -signal.SIGKILL and set(codes.values()) == {5} and time.time() - start < 10
    assert re.search(rf"rank {rank} \(.*, process {k.pids[rank]}\): it does not answer; its process is gone", k.text())
    k = kills.Ranks(tmp_path, train.main, args(root, tmp_path / "run", steps=12, mesh=shard.Mesh(fsdp=2)))
    assert k.wait(60) == {0: 0, 1: 0}, k.text()
    like(losses(tmp_path / "run"), whole)


@pytest.mark.parametrize("rank", [0, 1])  # the first one holds the store too
def test_a_stopped_rank_is_named(root, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(watch, "ANSWER", 1.0)
    k = fork(root, tmp_path, 2, "step", 9, sleep, steps=500, patience=3)
    got_on(tmp_path / "run", 3)
    k.send(rank, signal.SIGSTOP)
    assert k.wait(20, rank) == {1 - rank: 5}
    assert f"rank {rank} (" in k.text() and f"process {k.pids[rank]}): it does not answer; its process is stopped" in k.text()
    assert rank == 0 or re.search("rank 0 .*: .* its last collective: gloo:.* in group ., unfinished", k.text())
    stacks = (tmp_path / "run" / f"rank-{1 - rank}" / "stacks.txt").read_text()
    assert re.search("in (everyone|wait_tensor|step)", stacks), stacks


def test_a_rank_that_hangs_is_named(root, tmp_path):
    k = fork(root, tmp_path, 1, "step", 3, sleep, patience=3)
    assert k.wait(30) == {0: 5, 1: 5}
    assert "Missing: rank 1." in k.text() and re.search("rank 1 .*: compute after 3 updates", k.text())
    assert "in sleep" in (tmp_path / "run" / "rank-1" / "stacks.txt").read_text()


def test_bad_data_of_one_rank_ends_all(root, tmp_path):
    k = fork(root, tmp_path, 1, "data", 3, broken)
    assert k.wait(30) == {0: 3, 1: 3}
    assert all("error: rank 1: a broken sample" in f.read_text() for f in k.said)


@pytest.mark.parametrize(("what", "rank", "saved"), [("data", 0, 5), ("data", 1, 5), ("show", 0, 2), ("compile", 1, 0)])
def test_sigterm_in_the_midst(root, tmp_path, what, rank, saved):
    """While a rank waits for data, shows samples or compiles for long: what was done is saved, by all at one step."""
    at = {"data": 5, "show": 0, "compile": 0}[what]
    backend = "aot_eager" if what == "compile" else "eager"
    k = fork(root, tmp_path, rank, "step" if what == "compile" else what, at, sleep, backend=backend)
    kills.until(lambda: k.said[rank].exists() and "disturbed" in k.said[rank].read_text())
    start = time.time()
    k.send(1, signal.SIGTERM)
    assert k.wait(25) == {0: 75, 1: 75}, k.text()
    assert time.time() - start < 10
    assert max(checkpoint.steps(tmp_path / "run" / "checkpoints"), default=0) == saved


def test_sigterm_to_all_processes(root, tmp_path):
    """As a scheduler sends it: loader processes too, which must not end before what they belong to is saved."""
    k = fork(root, tmp_path, 9, "step", 0, sleep, steps=500, workers=1)
    got_on(tmp_path / "run", 5)
    loaders = [pid for rank in k.pids.values() for pid in kills.children(rank)]
    assert len(loaders) == 2
    for pid in [*loaders, *k.pids.values()]:
        os.kill(pid, signal.SIGTERM)
    assert k.wait(25) == {0: 75, 1: 75}, k.text()
    assert max(losses(tmp_path / "run")) == max(checkpoint.steps(tmp_path / "run" / "checkpoints"))


def test_sigterm_while_a_later_shape_is_compiled(root, tmp_path):
    """What was done before is saved, though the compilation cannot be broken off."""
    a = args(root, tmp_path / "run", rows=train.Rows(tokens=(24, 28), patches=(128, 128), attention=64), batch=2, steps=20,
             save=99, mesh=shard.Mesh(tp=2))
    batches = language.batches(a, *models.family(a.model))
    at = next(i for i in range(20) if batches[i][0][0]["input_ids"].shape[1] == 24)
    assert at > 2

    def main(a):
        steps = shard.Job.steps
        shard.Job.steps = lambda *x, ahead: steps(*x, ahead=True)  # as if it were compiled
        return disturbed(a, 1, "step", at, sleep)

    k = kills.Ranks(tmp_path, main, a)
    kills.until(lambda: k.said[1].exists() and "disturbed" in k.said[1].read_text())
    k.send(0, signal.SIGTERM)
    assert k.wait(25) == {0: 75, 1: 75} and checkpoint.steps(tmp_path / "run" / "checkpoints") == [at], k.text()


def test_packs_of_equal_flops(root, tmp_path):
    """Two ranks have the losses of one process, each with its packs, and the log says how far apart they are."""
    found, spread = {}, {}
    for mesh in (shard.Mesh(), shard.Mesh(fsdp=2)):
        out = tmp_path / str(mesh)
        rows = train.Rows(tokens=(64,), patches=(512,), attention=64, pack=4)
        k = kills.Ranks(out, train.main, args(root, out / "run", batch=16, steps=4, rows=rows, mesh=mesh), world=mesh.world)
        assert set(k.wait(60).values()) == {0}, k.text()
        found[mesh.world] = losses(out / "run")
        said = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
        spread[mesh.world] = [r["spread"] for r in said if "spread" in r]
    like(found[2], found[1], steps=4)
    assert spread[1] == [] and len(spread[2]) == 4 and max(spread[2]) < 0.1, spread


def test_programs_share_work(root, whole, tmp_path):
    """Questions, encoded parts and samples by two ranks: the files that one writes, to the byte."""
    drawings.main(drawings.Args(tmp_path, pictures=16, clips=1))
    how = pictures.Clips(sizes=("8x8",))
    drawn = args(root, tmp_path / "drawn", model=tmp_path / "flux", data=tmp_path / "drawings", steps=1, clips=how, mesh=shard.Mesh())
    assert train.main(drawn) == 0
    (tmp_path / "prompts").write_text("a seven\na one\na seven\n")
    wanted = {
        evaluate: lambda out: evaluate.Args(root / "whole" / "export", root / "data" / "heldout.jsonl", out, limit=21, batch=4, new=2),
        encode: lambda out: encode.Args(tmp_path / "flux", tmp_path / "drawings", out, part=3, clips=how),
        sample: lambda out: sample.Args(out, tmp_path / "drawn" / "export", prompts=tmp_path / "prompts", size="8x8", steps=2),
    }
    for program, of in wanted.items():
        files = {}
        for ranks in (1, 2):
            out = tmp_path / f"{program.__name__}-{ranks}"
            k = kills.Ranks(out, program.main, of(out / "made"), world=ranks)
            assert set(k.wait(60).values()) == {0}, k.text()
            files[ranks] = {f.name: f.read_bytes() for f in sorted((out / "made").rglob("*")) if f.is_file()}
        assert files[1].keys() == files[2].keys() and len(files[1]) > 2
        assert not [n for n, x in files[1].items() if x != files[2][n]]


# ---- minutes: make deep

@pytest.mark.deep
def test_torchrun_starts_again_what_was_killed(root, whole, tmp_path):
    """One command: a rank is killed, all are started again and go on; then torchrun is asked to stop, and Slurm goes on."""
    said = (f"--model {root}/model --data {root}/data/train.jsonl --out {tmp_path}/run --scratch --steps 12 --batch 4 --lr 1e-3 "
            "--warmup 2 --save 2 --backend eager --workers 0 --rows.tokens 28 --rows.patches 128 --rows.attention 64 --mesh.fsdp 2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    slowly = tmp_path / "slowly.py"  # a step takes a while, so that something can be done to it
    slowly.write_text("import sys, time\nsys.path.insert(0, sys.argv.pop(1))\nimport train\nfrom mmfunc import jit\n"
                      "real = jit.Jitted.__call__\njit.Jitted.__call__ = lambda *x: (time.sleep(0.3), real(*x))[1]\n"
                      "sys.exit(train.main(train.tyro.cli(train.Args)))\n")
    command = [*torchrun, str(slowly), str(Path(train.__file__).parent), *said.split()]
    with (tmp_path / "said").open("w") as f:
        p = subprocess.Popen(command, stdout=f, stderr=f)
    got_on(tmp_path / "run", 3)
    os.kill(next(pid for pid, env in kills.children(p.pid).items() if env.get("RANK") == "1"), signal.SIGKILL)
    kills.until(lambda: "restart" in (tmp_path / "run" / "metrics.jsonl").read_text())
    time.sleep(0.5)
    p.terminate()
    p.wait(40)
    done = max(checkpoint.steps(tmp_path / "run" / "checkpoints"))
    assert max(losses(tmp_path / "run")) == done < 12 and "Missing: rank 1." in (tmp_path / "said").read_text()
    k = kills.Ranks(tmp_path, train.main, args(root, tmp_path / "run", steps=12))
    assert k.wait(60) == {0: 0, 1: 0}, k.text()
    like(losses(tmp_path / "run"), whole)


MESHES = shard.Mesh(fsdp=2, tp=2), shard.Mesh(fsdp=2), shard.Mesh(data=2, fsdp=2), shard.Mesh(tp=2), shard.Mesh(ulysses=2, tp=2)


@pytest.fixture(scope="module")
def long(root):
    """Losses of many updates by one process."""
    assert train.main(args(root, root / "long", steps=400, save=100, lr=2e-5, mesh=shard.Mesh())) == 0
    return losses(root / "long")


def begun(k, n=1):
    """Until the first rank has restored what there was."""
    kills.until(lambda: k.said[0].exists() and k.said[0].read_text().count("\n") >= n)


def adopted():
    """This process becomes the parent of its descendants' orphans."""
    ctypes.CDLL(None).prctl(36, 1)


def left(but=()):
    """Processes that a fault left running."""
    return [pid for pid in kills.children(os.getpid()) if pid not in but and meet.process(socket.gethostname(), pid) != "gone"]


@pytest.mark.deep
def test_20_kills(root, long, tmp_path):
    """A random rank of two or four at random times, on one mesh after the other: the others end in 10 s and name it, no
    process is left, and nothing is lost."""
    adopted()
    before, r, slowest = left(), rng.Random(0), 0.0
    for trial in range(20):
        mesh = MESHES[trial % len(MESHES)]
        a = args(root, tmp_path / "run", steps=400, save=3, lr=2e-5, mesh=mesh, workers=trial % 2)
        k = kills.Ranks(tmp_path / str(trial), train.main, a, world=mesh.world)
        begun(k)
        time.sleep(r.uniform(0, 2.5))
        victim, start = r.randrange(mesh.world), time.time()
        k.send(victim, signal.SIGKILL)
        codes = k.wait(30)
        kills.until(lambda: not left(before), 10)
        slowest = max(slowest, time.time() - start)
        assert codes.pop(victim) == -9 and set(codes.values()) == {5}, (codes, k.text())
        assert re.search(rf"rank {victim} \(.*, process {k.pids[victim]}\): it does not answer; its process is gone", k.text())
    print(f"\n20 kills: the slowest end after {slowest:.1f} s")
    assert slowest < 10
    assert set(kills.Ranks(tmp_path / "end", train.main, replace(a, mesh=shard.Mesh(fsdp=2))).wait(120).values()) == {0}
    like(losses(tmp_path / "run"), long, 400, 1e-4)


@pytest.mark.deep
def test_30_sigterms(root, long, tmp_path):
    """At random times to a random rank: all leave with 75, and what was logged was saved."""
    r, slowest, went = rng.Random(1), 0.0, []
    for trial in range(30):
        mesh = MESHES[trial % len(MESHES)]
        a = args(root, tmp_path / "run", steps=400, save=50, lr=2e-5, mesh=mesh, workers=trial % 2)
        k = kills.Ranks(tmp_path / str(trial), train.main, a, world=mesh.world)
        begun(k)
        time.sleep(r.uniform(0, 1.2))
        start = time.time()
        k.send(r.randrange(mesh.world), signal.SIGTERM)
        codes = k.wait(30)
        slowest = max(slowest, time.time() - start)
        went.append(max(losses(tmp_path / "run"), default=0))
        assert set(codes.values()) == {75} and went[-1] == max(checkpoint.steps(tmp_path / "run" / "checkpoints"), default=0), k.text()
    print(f"\n30 SIGTERMs: the slowest end after {slowest:.1f} s, after updates {went}")
    assert slowest < 25 and went == sorted(went) and went[-1] < 400
    assert set(kills.Ranks(tmp_path / "end", train.main, replace(a, mesh=shard.Mesh(fsdp=2))).wait(120).values()) == {0}
    like(losses(tmp_path / "run"), long, 400, 1e-4)


def mixed(root, n=400):
    """Records with words only, a picture or a video."""
    r, out = np.random.default_rng(0), root / "mixed"
    out.mkdir()
    lines = []
    for i in range(n):
        kind, digit = r.choice(["text", "image", "video"]), int(r.integers(10))
        x = np.full((4, 32, 32, 3), 20 * digit, np.uint8)
        if kind == "image":
            Image.fromarray(x[0]).save(out / f"{i}.png")
        if kind == "video":
            media.write_video(out / f"{i}.mp4", x, 2)
        place = {"text": "", "image": "<image>", "video": "<video>"}[kind]
        said = [{"role": "user", "content": f"{place}which digit is this ?"}, {"role": "assistant", "content": str(digit)}]
        files = {"image": {"images": [f"{i}.png"]}, "video": {"videos": [f"{i}.mp4"]}}.get(kind, {})
        lines.append(json.dumps({"messages": said} | files))
    (out / "train.jsonl").write_text("\n".join(lines) + "\n")
    return out / "train.jsonl"


@pytest.mark.deep
def test_200_steps_of_random_modalities(root, tmp_path):
    """Four ranks with words only, pictures or videos as it comes: no hang, and the losses of one rank."""
    how = {"data": mixed(tmp_path), "rows": train.Rows(tokens=(32,), patches=(256,), attention=64), "steps": 200, "save": 200,
           "lr": 1e-4}
    found = {}
    for name, mesh in (("one", shard.Mesh()), ("data", shard.Mesh(data=4)), ("both", shard.Mesh(fsdp=2, tp=2))):
        k = kills.Ranks(tmp_path / name, train.main, args(root, tmp_path / name / "run", mesh=mesh, **how), world=mesh.world)
        assert set(k.wait(250).values()) == {0}, k.text()
        found[name] = losses(tmp_path / name / "run")
    apart = {n: max(abs(x - found["one"][i]) / found["one"][i] for i, x in f.items()) for n, f in found.items()}
    print(f"\n200 steps: losses from {found['one'][1]:.3f} to {found['one'][200]:.3f}, apart by {apart}")
    assert all(len(f) == 200 for f in found.values()) and max(apart.values()) < 1e-4
