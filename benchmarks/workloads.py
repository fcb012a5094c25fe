"""The workloads W1 to W7, each for ours or for a peer: the same weights and the same batches, made from one seed.

    python benchmarks/workloads.py W3 mmfunc    # what suite.py starts: answers lines on its standard input
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfunc import generate, jit, keys, lower, models, nn, optim, pipeline, quant, tree
from mmfunc.hub import respelled
from mmfunc.models import flux, qwen2, qwen2vl, sd_vae, wan, wan_vae

VLM = qwen2vl.Config(
    qwen2.Config(width=768, hidden=2048, heads=6, kv_heads=2, layers=8, vocab=16384, tokens=4096),
    width=384, hidden=1024, heads=6, layers=8, full=(3, 7), tokens_per_second=4, image_token=16000, video_token=16001,
    start_token=16002, end_token=16003)
WAN = wan.Config(width=768, hidden=3072, heads=6, layers=8, text=512, positions=256)
FLUX = flux.Config(width=768, heads=6, layers=3, single=6, text=512, pooled=256)
LLM = qwen2.Config(width=896, hidden=4864, heads=14, kv_heads=2, layers=24, vocab=151936, tied=True)
NEW = 17  # tokens that a call of W5 decodes, less the first


class Work(NamedTuple):
    """What a process measures."""

    check: Any  # of float32, to be compared with the others': a loss or an output
    call: Callable[[], Any]
    lowered: Callable[[], lower.Lowered] | None = None  # ours: the graph that call runs
    kept: int = 0  # bytes of parameters and optimizer state that lie there between calls
    less: Callable[[], Any] | None = None  # what call does besides what is asked
    times: int = 1  # that the graph runs in a call
    renewed: int = 0  # bytes of its arguments that the graph renews: parameters that are trained, and moments
    ahead: Callable[[], lower.Lowered] | None = None  # ours: the graph that runs once before lowered, in each call
    device: str = "cpu"  # or cuda: a call is over when the device has done it


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def low(t: Any) -> Any:
    return tree.map(lambda x: x.to(torch.bfloat16), t)


def loaded(family: Any, c: Any, ref: torch.nn.Module) -> tree.Tree:
    """Our parameters with the weights of a peer's module."""
    flat = tree.flatten(family.params(c))
    theirs = {respelled(n, models.spellings(family, c)): p.detach() for n, p in ref.named_parameters()}
    found = keys.load(flat, keys.lookup(flat, models.table(family, c)), theirs.__getitem__)
    return tree.unflatten(dict(found), family.params(c))


def made(library: str, family: Any, c: Any, device: str = "cpu") -> torch.nn.Module:
    """A peer's model in float32."""
    said = family.hub(c)
    torch.manual_seed(0)
    if library == "diffusers":
        import diffusers

        config = {k: v for k, v in said.items() if not k.startswith("_")}
        with torch.device(device):
            return getattr(diffusers, said["_class_name"])(**config).to(device)  # tables made by numpy too
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {k: v for k, v in said.items() if k not in ("model_type", "architectures")}
    with torch.device(device):
        return getattr(transformers, said["architectures"][0])(CONFIG_MAPPING[said["model_type"]](**config)).to(device)


# ---- training


def trained(check: Any, loss: Callable, params: tree.Tree, frozen: tree.Tree, batch: dict, mode: str,
            backend: str = "inductor") -> Work:
    """Our step as programs/train.py makes it with --remat dots, in the mode that is faster (FLUX: whole)."""
    tx = optim.chain(optim.adamw(), optim.decay(0.01, lambda n, t: True), optim.scale(1e-4))
    state = optim.init(tx, low(params), None if frozen is None else low(frozen))
    step = jit.jit(partial(optim.step, loss, tx), mode, backend, donate=True, remat="dots")
    return Work(check, lambda: step(state, batch)[1]["loss"].item(), lambda: step.lower(state, batch),
                tree.nbytes(state), renewed=tree.nbytes([state["params"], state["opt"]]))


def theirs(check: Any, ref: torch.nn.Module, loss: Callable) -> Work:
    opt = torch.optim.AdamW([q for q in ref.parameters() if q.requires_grad], lr=1e-4, fused=True)

    def call() -> float:
        opt.zero_grad(set_to_none=True)  # before the step: gradients would count as memory that a step finds there
        value = loss()
        value.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        return value.item()

    n = sum(q.nbytes * (3 if q.requires_grad else 1) for q in ref.parameters())
    return Work(check, call, kept=n)


def w1(peer: str) -> Work:
    """A training step of a small Qwen2.5-VL with a frozen tower: 4 rows of 345 tokens, 336 x 336 pixels each."""
    g, side = torch.Generator().manual_seed(0), 24
    ids = torch.randint(0, 15000, (4, 345), generator=g)
    ids[:, 5], ids[:, 6:150] = 16002, 16000
    labels = torch.where(torch.arange(345) < 150, -100, ids)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids),
             "pixel_values": torch.randn(4 * side * side, 1176, generator=g),
             "image_grid_thw": torch.tensor([[1, side, side]] * 4)}
    ref = made("transformers", qwen2vl, VLM)
    if peer == "mmfunc":
        p, ready = loaded(qwen2vl, VLM, ref), qwen2vl.prepare(VLM, dict(batch), rule="5.23")
        loss = lambda p, b: qwen2vl.loss(p, VLM, b)
        with torch.no_grad():
            check = loss(p, ready)
        return trained(check, loss, *tree.split(p, "^(?!vision)"), ready, "block")
    more = {"mm_token_type_ids": (ids == 16000).int()}
    with torch.no_grad():
        check = ref(**batch, **more).loss
    ref = ref.to(torch.bfloat16)
    ref.model.visual.requires_grad_(False)
    model = torch.compile(ref) if peer == "compiled" else ref
    half = batch | {"pixel_values": low(batch["pixel_values"])} | more
    return theirs(check, ref, lambda: model(**half).loss)


def packed(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def flux_peer(ref: Any, x: torch.Tensor, b: dict) -> torch.Tensor:
    """diffusers' velocity of packed latents x."""
    side = int(x.shape[1] ** 0.5)
    at = torch.stack([torch.zeros(side, side), *torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")], -1).float()
    at, words = at.to(x.device), torch.zeros(b["encoder_hidden_states"].shape[1], 3, device=x.device)
    return ref(x, b["encoder_hidden_states"], b["pooled_projections"], b["t"].to(x.dtype), at.flatten(0, 1), words,
               b["guidance"].to(x.dtype), return_dict=False)[0]


def wan_peer(ref: Any, x: torch.Tensor, b: dict) -> torch.Tensor:
    """diffusers' velocity of latents x."""
    return ref(x, 1000 * b["t"], b["encoder_hidden_states"], return_dict=False)[0]


def error(run: Callable, layout: Callable, model: Any, b: dict) -> torch.Tensor:
    """The squared error of a peer's velocity."""
    t = b["t"].view(-1, *[1] * (b["latents"].ndim - 1))
    x = ((1 - t) * b["latents"].float() + t * b["noise"].float()).to(b["latents"].dtype)
    return (run(model, layout(x), b).float() - layout(b["noise"].float() - b["latents"].float())).square().mean()


def velocity(peer: str, family: Any, c: Any, batch: dict, run: Callable, layout: Callable) -> Work:
    """A training step on the squared error of the velocity."""
    ref, half = made("diffusers", family, c), {k: v if v.ndim == 1 else low(v) for k, v in batch.items()}
    if peer == "mmfunc":
        p, loss = loaded(family, c, ref), lambda p, b: family.loss(p, c, b)
        with torch.no_grad():
            check = loss(p, batch)
        return trained(check, loss, p, None, half, "whole" if family is flux else "block")

    with torch.no_grad():
        check = error(run, layout, ref, batch)
    ref = ref.to(torch.bfloat16)
    model = torch.compile(ref, fullgraph=True) if peer == "compiled" else ref
    return theirs(check, ref, lambda: error(run, layout, model, half))


def w2(peer: str) -> Work:
    """A training step of a Wan of 8 layers: 5 x 30 x 52 latents, 1,950 tokens."""
    batch = {"latents": draw(1, 16, 5, 30, 52), "noise": draw(1, 16, 5, 30, 52, seed=1), "t": torch.tensor([0.5]),
             "encoder_hidden_states": draw(1, 128, 512, seed=2)}
    return velocity(peer, wan, WAN, batch, wan_peer, lambda x: x)


def w3(peer: str) -> Work:
    """A training step of a FLUX of 3 + 6 layers: 4 samples of 256 + 77 tokens."""
    batch = {"latents": draw(4, 16, 32, 32), "noise": draw(4, 16, 32, 32, seed=1), "pooled_projections":
             draw(4, 256, seed=2), "t": torch.tensor([0.2, 0.4, 0.6, 0.8]), "guidance": torch.ones(4),
             "encoder_hidden_states": draw(4, 77, 512, seed=3)}
    return velocity(peer, flux, FLUX, batch, flux_peer, packed)


# ---- inference


def openvino(module: torch.nn.Module, *args: torch.Tensor) -> Callable:
    """A module of tensors as OpenVINO runs it in bfloat16."""
    import openvino

    with torch.no_grad():
        graph = openvino.convert_model(module, example_input=args)
    hint = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(graph, "CPU", hint).create_infer_request()
    return lambda *args: torch.from_numpy(request.infer([a.numpy() for a in args])[0])


class Called(torch.nn.Module):
    """A function of a module and tensors, as a module."""

    def __init__(self, ref: torch.nn.Module, run: Callable):
        super().__init__()
        self.ref, self.run = ref, run

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.run(self.ref, *args)


def decoded(peer: str, family: Any, c: Any, latents: torch.Tensor) -> Work:
    """Decoding latents by a VAE, as the sample program does: op by op."""
    ref = made("diffusers", family, c).eval()
    if peer == "mmfunc":
        p = loaded(family, c, ref)
        run = lambda p, z: family.decode(p, c, z)
        check, p, z = run(p, latents), nn.laid(low(p)), low(latents)  # as bundle.load has them
        return Work(check, lambda: run(p, z), lambda: jit.jit(run).lower(p, z), tree.nbytes(p))
    run = lambda ref, z: ref.decode(z, return_dict=False)[0]
    check, kept = run(ref, latents), sum(q.nbytes for q in ref.parameters()) // 2
    if peer == "openvino":
        fast = openvino(Called(ref, run), latents)
        return Work(check, lambda: fast(latents), kept=kept)
    ref, z = ref.to(torch.bfloat16), low(latents)
    fast = torch.compile(partial(run, ref)) if peer == "compiled" else partial(run, ref)
    return Work(check, lambda: fast(z), kept=kept)


def w4a(peer: str) -> Work:
    """Decoding a 256 x 256 picture by SD's VAE."""
    return decoded(peer, sd_vae, sd_vae.Config(), draw(1, 16, 32, 32))


def w4b(peer: str) -> Work:
    """Decoding 9 frames of 128 x 128 by Wan's VAE."""
    return decoded(peer, wan_vae, wan_vae.Config(), draw(1, 16, 3, 16, 16))


def w5(peer: str) -> Work:
    """Decoding a token by a Qwen2 of 0.5B, 256 tokens before it; int8: ours, with such weights."""
    ref = made("transformers", qwen2, LLM).eval()
    ids = torch.randint(0, 30000, (1, 256), generator=torch.Generator().manual_seed(0))
    if peer in ("mmfunc", "int8"):
        p, step = loaded(qwen2, LLM, ref), generate.stepper(qwen2.step, LLM, backend="inductor")
        p = quant.quantize(p, quant.DECODER) if peer == "int8" else p
        check, p = qwen2.forward(p, LLM, {"input_ids": ids})[:, -1], tree.map(lambda t: low(t) if t.is_floating_point() else t, p)
        mine = lambda n: generate.generate(qwen2, p, LLM, {"input_ids": ids}, new=n, call=step, slots=288)
        return Work(check, lambda: mine(NEW), kept=tree.nbytes(p), less=lambda: mine(1), times=NEW - 1)
    check, ref = ref(ids).logits[:, -1], ref.to(torch.bfloat16)
    ref.generation_config.pad_token_id = 0
    run = lambda n: ref.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                 do_sample=False)
    return Work(check, lambda: run(NEW), kept=sum(q.nbytes for q in ref.parameters()), less=lambda: run(1),
                times=NEW - 1)


def w7(peer: str) -> Work:
    """Sampling by a FLUX of 3 + 6 layers: 1,024 + 77 tokens, 8 steps."""
    ref, noise, steps = made("diffusers", flux, FLUX).eval(), draw(1, 16, 64, 64), 8
    cond = {"encoder_hidden_states": draw(1, 77, 512, seed=1), "pooled_projections": draw(1, 256, seed=2)}
    if peer == "mmfunc":
        def sampler(p: tree.Tree, cond: dict, backend: str) -> tuple:
            pipe = pipeline.scratch("FluxPipeline", pipeline.Part(flux, FLUX, p), None, key=None,
                                    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
            plan = pipeline.plan(pipe, noise.shape, steps=steps, guidance=3.5, backend=backend)
            return plan, lambda: packed(pipeline.sample(pipe, cond, None, noise, made=plan))

        p, ones = loaded(flux, FLUX, ref), torch.ones(1)
        check, p, cond = sampler(p, cond, "eager")[1](), low(p), low(cond)
        plan, run = sampler(p, cond, "inductor")
        part = lambda i: plan.call.parts(p, noise, ones, cond | {"guidance": ones}, None, 1.0)[i]
        return Work(check, run, lambda: part(1), tree.nbytes(p), times=steps, ahead=lambda: part(0))

    def euler(step: Callable, x: torch.Tensor) -> torch.Tensor:
        for i in range(steps):
            x = x - step(x, torch.full((1,), 1 - i / steps)) / steps
        return x

    one = lambda ref, x, t, words, pooled: flux_peer(ref, x, {
        "encoder_hidden_states": words, "pooled_projections": pooled, "t": t, "guidance": torch.full((1,), 3.5)})
    run = lambda ref, cond, x: euler(lambda x, t: one(ref, x, t, *cond.values()), x)
    check, kept = run(ref, cond, packed(noise)), sum(q.nbytes for q in ref.parameters()) // 2
    if peer == "openvino":
        x, fast = packed(noise), openvino(Called(ref, one), packed(noise), torch.ones(1), *cond.values())
        return Work(check, lambda: euler(lambda x, t: fast(x, t, *cond.values()), x), kept=kept)
    ref = ref.to(torch.bfloat16)
    fast = torch.compile(ref, fullgraph=True) if peer == "compiled" else ref
    return Work(check, lambda: run(fast, low(cond), packed(low(noise))), kept=kept)


WORKS = {"W1": w1, "W2": w2, "W3": w3, "W4a": w4a, "W4b": w4b, "W5": w5, "W7": w7}


# ---- the process


def settle(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def temporary(call: Callable, device: str = "cpu") -> int:
    """Most bytes that one call holds at once beside what was there before it, by the allocator's own record."""
    if device == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        settle(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


def spent(children: bool = False) -> float:
    """CPU seconds of this process, and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, *[resource.RUSAGE_CHILDREN] * children)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def seconds(work: Work) -> list[float]:
    """(wall, CPU) seconds of one call, less what else it does."""
    out = [0.0, 0.0]
    for sign, call in ((1, work.call), (-1, work.less)):
        if call:
            start = time.perf_counter(), spent()
            call()
            settle(work.device)
            out = [t + sign * (now - was) for t, now, was in zip(out, (time.perf_counter(), spent()), start)]
    return [t / (work.times if work.less else 1) for t in out]


def turns(calls: dict[str, Callable], runs: int) -> dict[str, list[list[float]]]:
    """(wall, CPU) seconds of each call, in turn, after a first one that does not count."""
    times = {k: [] for k in calls}
    for i in range(runs + 1):
        for name, call in calls.items():
            found = seconds(Work(None, call))
            times[name] += [found] * (i > 0)
    return times


def row(times: list[list[float]]) -> dict[str, float]:
    """Medians and spread."""
    wall, cpu = zip(*times)
    median = statistics.median
    return {"median_s": median(wall), "min_s": min(wall), "max_s": max(wall), "cpu_s": median(cpu)}


def kinds(graph: lower.Lowered) -> dict[str, int]:
    """FLOPs of a graph by the kernels that do them, and the bytes of its arguments."""
    out = {"gemm": 0, "conv": 0, "attention": 0}
    for name, flops in graph.cost()["flops_by_op"].items():
        out["attention" if "attention" in name else "conv" if "conv" in name else "gemm"] += flops
    return out | {"bytes": graph.memory()["arguments"]}


def serve(name: str, peer: str, folder: str) -> None:
    """Say when the first calls are done; then, for each line read, run once; at an empty line tell the rest and end."""
    say = lambda **said: print(json.dumps(said), flush=True)
    with torch.set_grad_enabled(name in ("W1", "W2", "W3")):
        work = WORKS[name](peer)
        torch.save(work.check.detach().float(), Path(folder) / f"{peer}.pt")
        start = spent(children=True), time.perf_counter()
        work.call()
        first = spent(children=True) - start[0], time.perf_counter() - start[1]
        steady = statistics.median(seconds(work)[1] for _ in range(2)) if not work.less else 0.0
        say(compile_cpu_s=max(0.0, first[0] - steady), first_s=first[1])
        while sys.stdin.readline().strip():
            say(seconds=seconds(work))
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = [(work.ahead, 1, 0), (work.lowered, work.times, work.renewed)]
        graphs = [kinds(of()) | {"times": n, "renewed": new} for of, n, new in found if of]
        held = {} if work.less or peer == "openvino" else {"temporary": temporary(work.call)}
        say(kept=work.kept, peak_rss=rss, **({"graphs": graphs} if graphs else {}), **held)


if __name__ == "__main__":
    serve(*sys.argv[1:])
