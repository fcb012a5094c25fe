"""Where ranks meet before they have groups: who was started, who is missing, who was told something else, and what is
known of a process."""

import faulthandler
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

FAULT = 5  # exit code where ranks are missing
ENDS = 1 << 16  # bytes that are looked at of a file's beginning and end
FILES = 1000  # of a folder whose bytes are looked at


class Agreed(ValueError):
    """An error that all ranks raise."""


@dataclass(frozen=True)
class Start:
    """A rank as it was started."""

    rank: int = 0
    world: int = 1
    local: int = 0  # its number on its host
    host: str = "localhost"  # of the store
    port: int = 0
    agent: bool = False  # the store lives in a launcher's process, and not in the first rank's

    @property
    def hosts(self) -> bool:
        """Whether the store lives in this process."""
        return self.rank == 0 and not self.agent


def started(env: Mapping[str, str] = os.environ) -> Start:
    """This rank, from the variables of torchrun or else of Slurm; without both the only one.

    Under Slurm the store is on the first host, at MASTER_PORT or else port 20000 + (job + step) % 10000.
    """
    if "RANK" in env:
        return Start(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), env["MASTER_ADDR"],
                     int(env["MASTER_PORT"]), env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    if "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", "1")) == 1:
        return Start()
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    turn = sum(int(env.get(n, "0")) for n in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Start(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0")),
                 env.get("MASTER_ADDR") or first(hosts), int(env.get("MASTER_PORT") or 20000 + turn % 10000))


def first(hosts: str) -> str:
    """The first host of a Slurm list, such as gpu[003-007,012],login1."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head)


def opened(at: Start, seconds: float) -> dist.Store:
    """The store of all ranks."""
    if at.world == 1:
        return dist.HashStore()
    try:
        return dist.TCPStore(at.host, at.port, at.world, at.hosts, timedelta(seconds=seconds), wait_for_workers=False)
    except dist.DistNetworkError as e:
        if at.hosts:
            raise ValueError(f"port {at.port} of {at.host} cannot be had, where the ranks were to meet; set "
                             f"MASTER_PORT to a free one, the same for all ranks: {e}") from e
        raise missing(f"rank 0 is missing: nobody answers at {at.host}:{at.port} within {seconds:.0f} s") from e


def missing(said: str) -> SystemExit:
    """The end of a rank that misses others."""
    print(f"{said}. Were all started, and can {socket.gethostname()} reach the others? (Under Slurm: by srun.)",
          file=sys.stderr)
    return SystemExit(FAULT)


def shown(ranks: list[int]) -> str:
    """Ranks in words."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"


def absent(store: dist.Store, keys: list[str], seconds: float, lost: Callable[[int], bool] = lambda _: False
           ) -> list[int]:
    """Which of the keys are not in the store after some seconds; lost ones are not waited for."""
    end, left = time.monotonic() + seconds, list(range(len(keys)))
    while wanted := [i for i in left if not lost(i)]:
        if store.check([keys[i] for i in wanted]):  # a wait would write a warning each time
            return [i for i in left if i not in wanted]
        if time.monotonic() > end:
            break
        time.sleep(0.05)
        left = [i for i in left if not store.check([keys[i]])] if len(left) < 64 else left
    return [i for i in left if not store.check([keys[i]])]


def process(host: str, pid: int) -> str:
    """What becomes of a process of this host: "gone", "stopped", or "" where it runs or is not known."""
    if host != socket.gethostname() or not Path("/proc/self").exists():
        return ""
    try:
        kind = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(kind, "")


def named(people: list[tuple[str, int]], r: int) -> str:
    """A rank with its host and process."""
    return f"rank {r} ({people[r][0]}, process {people[r][1]})"


def fault(said: str, people: list[tuple[str, int]], who: list[int], told: dict[int, dict]) -> str:
    """A fault for people to read: who is missing, what was seen of it, and where some of the others are."""
    lines = [(f"Missing: {shown(who)}. " if len(who) < len(people) else "No rank goes on. ") + f"Seen: {said}"]
    for r in [*who[:8], *[r for r in told if r not in who][:3]]:
        t, now = told.get(r), process(*people[r])
        where = t and f"{t['phase']} after {t['number']} updates; its last collective: {t['collective']}"
        lines.append(f"  {named(people, r)}: " + (where or f"it does not answer{now and f'; its process is {now}'}"))
    return "\n".join(lines)


def stacks(folder: Path, said: str) -> None:
    """Write stacks.txt: what is said, and where each thread of this process is."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stacks.txt").open("w") as f:
        f.write(said + "\n")
        f.flush()
        faulthandler.dump_traceback(f, all_threads=True)


def brief(e: BaseException) -> str:
    """The beginning of what an error says."""
    return str(e).partition("\n")[0][:300]


def collective() -> tuple[int, str]:
    """(how many collectives this process has begun, the last one in words), by torch's flight recorder."""
    c = torch._C._distributed_c10d
    dumps = [getattr(c, n) for n in ("_dump_fr_trace_json", "_dump_nccl_trace_json") if hasattr(c, n)]
    found = [e for dump in dumps for e in json.loads(dump(True, False)).get("entries") or []]
    if not found:
        return 0, "none"
    last = max(found, key=lambda e: e["time_created_ns"])
    return last["record_id"] + 1, (f"{last['profiling_name']} of {last['input_sizes']} in group "
                                   f"{last['process_group'][0]}, {'over' if last['retired'] else 'unfinished'}")


def check_in(store: dist.Store, at: Start, facts: dict[str, Any], seconds: float
             ) -> tuple[dist.Store, list[tuple[str, int]]]:
    """(the store of this start, host and process of all ranks), which have all come and have the same facts; else who
    is missing or differs."""
    store, greet = _entered(store, at, seconds)
    store.set(f"here/{at.rank}", json.dumps([socket.gethostname(), os.getpid(), facts], default=str))
    if at.rank == 0:
        keys = [f"here/{r}" for r in range(at.world)]
        gone = absent(store, keys, seconds, greet)
        told = [] if gone else [json.loads(x) for x in store.multi_get(keys)]
        store.set("met", json.dumps({"gone": gone, "wrong": differing(told), "people": [t[:2] for t in told]}))
    elif absent(store, ["met"], seconds + 10):
        raise missing(f"rank 0 is missing: it has said nothing within {seconds + 10:.0f} s")
    met = json.loads(store.get("met"))
    store.set(f"read/{at.rank}", "")
    if at.hosts and (met["gone"] or met["wrong"]):
        absent(store, [f"read/{r}" for r in range(at.world) if r not in met["gone"]], 5)
    if met["gone"]:
        raise missing(f"{shown(met['gone'])} of {at.world} did not come within {seconds:.0f} s")
    if met["wrong"]:
        raise Agreed(met["wrong"])
    return store, [(host, pid) for host, pid in met["people"]]


def _entered(store: dist.Store, at: Start, seconds: float) -> tuple[dist.Store, Callable[[int], bool]]:
    """(the part of a store that is of this start, what the first rank does for others that are not there yet).

    A launcher's store outlives the ranks that it starts again, and its hosts do not count starts alike. So the first
    rank counts, and tells the number to whoever knocks; what an earlier process has left there is answered in vain.
    """
    if at.rank:
        token = uuid.uuid4().hex
        store.set(f"knock/{at.rank}", token)
        if absent(store, [f"answer/{token}"], seconds + 10):
            raise missing(f"rank 0 is missing: it has not answered within {seconds + 10:.0f} s")
        return dist.PrefixStore(store.get(f"answer/{token}").decode(), store), lambda r: False
    start = f"start-{store.add('starts', 1)}"

    def greet(r: int) -> bool:
        if store.check([f"knock/{r}"]):
            store.set(f"answer/{store.get(f'knock/{r}').decode()}", start)
        return False

    return dist.PrefixStore(start, store), greet


def differing(told: list[tuple[str, int, dict]]) -> str:
    """What ranks have otherwise than the first one."""
    host, _, first = told[0] if told else ("", 0, {})
    lines = [f"rank {r} ({other}) has {k} {facts.get(k)}, rank 0 ({host}) has {first.get(k)}"
             for r, (other, _, facts) in enumerate(told) for k in facts | first if facts.get(k) != first.get(k)]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"the ranks were started differently: {'; '.join(lines[:4])}{more}" if lines else ""


def flat(said: dict[str, Any], name: str = "--") -> dict[str, Any]:
    """Settings by dotted name."""
    out = {}
    for k, v in said.items():
        out |= flat(v, f"{name}{k}.") if isinstance(v, dict) else {f"{name}{k}": json.loads(json.dumps(v, default=str))}
    return out


def content(path: Path) -> str:
    """A file or folder in short: names, sizes, and the beginnings and ends of files."""
    path, h, size = Path(path), xxhash.xxh3_64(), 0
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path] if path.exists() else []
    for i, file in enumerate(files):
        n = file.stat().st_size
        h.update(f"{file.relative_to(path)} {n} ".encode())
        size += n
        with file.open("rb") as f:
            for start in (0, max(n - ENDS, 0)) if i < FILES else ():
                f.seek(start)
                h.update(f.read(ENDS))
    return f"of {len(files)} files, {size:,} bytes, hash {h.hexdigest()}" if files else "that is not there"


def facts(flags: Any, files: list[str]) -> dict[str, Any]:
    """What ranks must have in common: flags, a dataclass, and the content of those that are paths."""
    named = {n: getattr(flags, n) for n in files}
    return flat(asdict(flags)) | {f"a --{n}": content(p) for n, p in named.items() if p}
