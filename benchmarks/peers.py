"""What the side by side benchmarks share: the same weights on both sides, interleaved times, memory, one JSON line."""

import json
import statistics
import time

import torch

from mmfunc import keys, models, tree
from mmfunc.hub import respelled


def loaded(family, c, ref):
    """Our parameters with the weights of a peer's module."""
    flat = tree.flatten(family.params(c))
    theirs = {respelled(n, models.spellings(family, c)): p.detach() for n, p in ref.named_parameters()}
    found = keys.load(flat, keys.lookup(flat, models.table(family, c)), theirs.__getitem__)
    return tree.unflatten(dict(found), family.params(c))


def interleaved(calls, runs):
    """Wall seconds of each call, in turn."""
    times = {k: [] for k in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def temporary(call):
    """Most bytes that one call holds at once beside what was there before it, by the allocator's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


def show(work, times, peer, **more):
    """Print medians, spreads, and the ratios of all to ours; peer: the module that is compared with."""
    said = {
        "work": work,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        peer.__name__: peer.__version__,
    }
    said |= {
        k: {"median_s": round(statistics.median(v), 4), "min_s": round(min(v), 4), "max_s": round(max(v), 4)}
        for k, v in times.items()
    }
    ours = statistics.median(times["mmfunc"])
    said |= {f"{k}_over_mmfunc": round(statistics.median(v) / ours, 3) for k, v in times.items() if k != "mmfunc"}
    print(json.dumps(said | more), flush=True)
