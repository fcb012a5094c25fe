"""make bench: this machine's limits, ours and peers in turn on the same work, and a page of what was found.

    python benchmarks/suite.py                # all of it, in less than 45 minutes on two cores
    python benchmarks/suite.py --quick        # fewer runs, a warm compile cache; tells what fell by more than 15 %
    python benchmarks/suite.py --only W3 ranks               # parts of it, nothing written
    python benchmarks/suite.py --only W3 --update FILE.json  # and put in the place of what these results have of it

On a machine with a GPU, but for --quick, also blocks of full width on it (gpu.py: G1, G2, G3).

Each peer of a workload is a process of its own (workloads.py); they take turns. Equal losses (1e-4 relative, float32)
come first. Writes results/<date>-<machine>.json, and from it docs/benchmarks.md with pictures.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu
import machine
import page
import scaling
import torch
import tyro
from workloads import row

HERE = Path(__file__).parent
PEERS = {"W1": ("eager", "compiled"), "W2": ("eager", "compiled"), "W3": ("eager", "compiled"),
         "W4a": ("eager", "compiled", "openvino"), "W4b": ("eager",), "W5": ("eager", "int8"),
         "W7": ("eager", "compiled", "openvino")}


ROUNDED = {"int8": 0.1}  # how far the check of a side may be off; of all others 1e-4


@dataclass(frozen=True)
class Args:
    quick: bool = False  # fewer runs, no cold compilation of W1; compared with the last results of such a machine
    only: tuple[str, ...] = ()  # workloads, also of gpu.py, and parts of scaling.py; nothing is written
    update: Path | None = None  # results in which to replace what was measured now
    runs: int = 0  # of each peer; 0: 3 when quick, else 7


class Peer:
    """A process that runs one side of a workload."""

    def __init__(self, name: str, peer: str, folder: str, cache: str | None):
        env = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
        self.errors, command = Path(folder) / f"{peer}.txt", [sys.executable, str(HERE / "workloads.py")]
        with self.errors.open("w") as told:
            self.process = subprocess.Popen([*command, name, peer, folder], env=env, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=told, text=True)
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.errors.read_text()[-3000:])
        return json.loads(line) if line.startswith("{") else self.read()

    def ask(self, line: str) -> dict[str, Any]:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()


def off(folder: str, peer: str) -> float:
    """How far a peer's check is from ours, of the largest number in it."""
    a, b = (torch.load(Path(folder) / f"{n}.pt") for n in ("mmfunc", peer))
    return ((a - b).abs().max() / b.abs().max()).item()


def workload(name: str, runs: int, can: dict[str, float], cold: bool) -> dict[str, Any]:
    """Times of all sides of a workload in turn, and what follows from them."""
    names = ("mmfunc", *PEERS[name])
    with tempfile.TemporaryDirectory() as folder:
        peers = {n: Peer(name, n, folder, f"{folder}/{n}" if cold else None) for n in names}
        found = {n: off(folder, n) for n in names}
        if apart := {n: x for n, x in found.items() if x > ROUNDED.get(n, 1e-4)}:
            raise RuntimeError(f"{name}: the checks of {apart} differ too much from ours")
        times, reads = {n: [] for n in names}, []
        for _ in range(runs):
            if name == "W5":  # what it is compared with varies: in turn too
                reads.append(machine.reading(0.2))
            for n, p in peers.items():
                times[n].append(p.ask("run")["seconds"])
        rows = {n: row(times[n]) | p.first | p.ask("") for n, p in peers.items()}
        for p in peers.values():
            p.process.wait()
        if cold:
            again = Peer(name, "mmfunc", folder, f"{folder}/mmfunc")
            rows["mmfunc"] |= {f"warm_{k}": v for k, v in again.first.items()}
            again.process.kill()
    ours, graphs = rows["mmfunc"], rows["mmfunc"].get("graphs")
    said = {"peers": rows, "ratios": {n: round(rows[n]["median_s"] / ours["median_s"], 3) for n in PEERS[name]}}
    said |= {"off": rounded} if (rounded := {n: round(found[n], 4) for n in names if n in ROUNDED}) else {}
    if "temporary" in ours:
        said["memory"] = round(ours["temporary"] / rows["eager"]["temporary"], 3)
        whole = [r["temporary"] + r["kept"] for r in (ours, rows["eager"])]
        said["memory_with_state"] = round(whole[0] / whole[1], 3)
    if graphs:
        flops = sum(g["times"] * g[k] for g in graphs for k in ("gemm", "conv", "attention"))
        said |= {"gflop": round(flops / 1e9, 1), "gflop_per_core_s": round(flops / ours["cpu_s"] / 1e9, 1),
                 "fkr": round(sum(machine.best_time(g, can) for g in graphs) / ours["median_s"], 3)}
    elif name == "W5":
        can_read = statistics.median(reads)
        said |= {"read_gb_s": round(can_read / 1e9, 1),
                 "read_share": round(ours["kept"] / ours["median_s"] / can_read, 3)}
    return said


def fallen(now: dict, before: dict) -> list[str]:
    """Ratios that are more than 15 % lower than they were."""
    out = []
    for name, found in now["workloads"].items():
        for peer, ratio in found["ratios"].items():
            was = before["workloads"].get(name, {}).get("ratios", {}).get(peer)
            print(f"{name} over {peer}: {ratio}" + (f", was {was}" if was else ""), flush=True)
            if was and peer not in ROUNDED and ratio < 0.85 * was:
                out.append(f"{name} over {peer}: {ratio}, was {was}")
    return out


def measured(a: Args, said: dict[str, Any]) -> list[str]:
    """Put what is asked for into the results; what failed."""
    start, failed = time.time(), []
    for name in a.only or (*PEERS, *(() if a.quick else (*scaling.PARTS, *gpu.here()))):
        try:
            if name in PEERS:
                cold = name == "W1" and not a.quick
                found = workload(name, a.runs or (3 if a.quick else 7), said["limits"], cold)
                said["workloads"][name] = found
            elif name in gpu.SPECS:
                found = gpu.workload(name)
                said.setdefault("gpu", {})[name] = found
            else:
                found = said[name] = scaling.PARTS[name](*([asked(said)] if name == "loader" else []))
        except RuntimeError as e:
            failed.append(name)
            print(f"{name} failed: {e}", file=sys.stderr, flush=True)
            continue
        said.setdefault("waits", {})[name] = machine.waits()
        short = {k: v for k, v in found.items() if k != "peers"} if name in PEERS else found
        print(name, f"{time.time() - start:.0f} s", json.dumps(short), flush=True)
    return failed


def asked(said: dict[str, Any]) -> float:
    """Samples a second that a loader is to give: ten times those of W1, of 4 in a step."""
    if "W1" not in said["workloads"]:
        raise RuntimeError("ten times the rate of W1 is asked for, but W1 was not measured: --only W1 loader")
    return 10 * 4 / said["workloads"]["W1"]["peers"]["mmfunc"]["median_s"]


def main(a: Args) -> int:
    start, can = time.time(), machine.measure(0.3 if a.quick else 1.0)
    print({k: f"{v / 1e9:.1f} G/s" for k, v in can.items()}, flush=True)
    now = {"date": time.strftime("%Y-%m-%d"), "machine": machine.described(), "versions": scaling.versions(),
           "command": " ".join(["python", *sys.argv]), "limits": can}
    said = json.loads(a.update.read_text()) if a.update and a.update.exists() else now | {"workloads": {}}
    failed = measured(a, said)
    if a.quick and not a.only:
        known = (json.loads(f.read_text()) for f in sorted((HERE / "results").glob("*.json")))
        before = [r for r in known if r["machine"] == said["machine"]]  # ratios differ from one kind of CPU to another
        wrong = fallen(said, before[-1] if before else {"workloads": {}})
        print(*wrong, sep="\n")
        return len(failed + wrong)
    if failed or (a.only and not a.update):
        return len(failed)
    said["minutes"] = round(said.get("minutes", 0) + (time.time() - start) / 60, 1)
    cpu = said["machine"]["cpu"].split()[1].lower()
    file = a.update or HERE / "results" / f"{said['date']}-{cpu}-{said['machine']['cores']}core.json"
    file.write_text(json.dumps(said, indent=1) + "\n")
    if "W1" in said["workloads"]:
        page.write(said, HERE.parent / "docs", [n for n in scaling.PARTS if n not in said])
    print(f"wrote {file}; {said['minutes']} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
