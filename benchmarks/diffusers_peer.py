"""Side by side with diffusers: same weights, same batches, interleaved in one process.

    OMP_NUM_THREADS=2 python benchmarks/diffusers_peer.py wan compiled   # W2: train step of a Wan of 8 layers
    OMP_NUM_THREADS=2 python benchmarks/diffusers_peer.py flux compiled  # W3: train step of a FLUX of 3 + 6 layers
    OMP_NUM_THREADS=2 python benchmarks/diffusers_peer.py vae            # W4: decoders of SD's and Wan's VAE
    OMP_NUM_THREADS=2 python benchmarks/diffusers_peer.py sample         # W7: FLUX, 8 steps, 1024 + 77 tokens

`compiled` adds the peer under torch.compile. Losses and outputs are compared first, in float32, within 1e-4. Prints a
JSON line for each workload: medians, spreads, ratios, memory, FLOPs and what a closed formula says of them.
"""

import sys
import time
from functools import partial

import diffusers
import torch
from peers import interleaved, loaded, show, temporary

from mmfunc import jit, optim, pipeline, tree
from mmfunc.models import flux, sd_vae, wan, wan_vae

WAN = wan.Config(width=768, hidden=3072, heads=6, layers=8, text=512, positions=256)
FLUX = flux.Config(width=768, heads=6, layers=3, single=6, text=512, pooled=256)


def made(family, c):
    """diffusers' model in float32."""
    torch.manual_seed(0)
    said = family.hub(c)
    return getattr(diffusers, said["_class_name"])(**{k: v for k, v in said.items() if not k.startswith("_")})


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def low(tree_):
    return tree.map(lambda t: t.to(torch.bfloat16), tree_)


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def packed(x):
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


# ---- closed formulas: a multiply-add is 2; dense maps and attention of one sample's forward pass


def wan_flops(c, tokens, words):
    d = c.width
    dense = c.layers * (2 * tokens * (6 * d * d + 2 * d * c.hidden) + 2 * words * 2 * d * d)
    ends = 2 * tokens * 2 * 4 * c.channels * d + 2 * words * (c.text + d) * d + 2 * (c.time + d + 6 * d) * d
    return dense + ends, c.layers * 4 * tokens * (tokens + words) * d


def flux_flops(c, tokens, words):
    d, n, layers = c.width, tokens + words, c.layers + c.single
    dense = 2 * n * 12 * d * d * layers + 2 * (12 * c.layers + 3 * c.single + 2) * d * d
    ends = 2 * tokens * 2 * 4 * c.channels * d + 2 * words * c.text * d + 2 * (2 * 256 + c.pooled + 3 * d) * d
    return dense + ends, layers * 4 * n * n * d


def trained(flops):
    """Of a training step; attention's backward pass computes the scores again."""
    return 3 * flops[0] + 3.5 * flops[1]


# ---- training


def wan_case():
    batch = {"latents": draw(1, 16, 5, 30, 52), "noise": draw(1, 16, 5, 30, 52, seed=1), "t": torch.tensor([0.5]),
             "encoder_hidden_states": draw(1, 128, 512, seed=2)}

    def theirs(ref, x, b):
        return ref(x, 1000 * b["t"], b["encoder_hidden_states"], return_dict=False)[0]

    return "W2 Wan train step", wan, WAN, batch, theirs, lambda x: x, trained(wan_flops(WAN, 1950, 128))


def flux_case():
    batch = {"latents": draw(4, 16, 32, 32), "noise": draw(4, 16, 32, 32, seed=1), "pooled_projections":
             draw(4, 256, seed=2), "t": torch.tensor([0.2, 0.4, 0.6, 0.8]), "guidance": torch.ones(4),
             "encoder_hidden_states": draw(4, 77, 512, seed=3)}
    return "W3 FLUX train step", flux, FLUX, batch, flux_peer, packed, 4 * trained(flux_flops(FLUX, 256, 77))


def flux_peer(ref, x, b):
    """diffusers' velocity of packed latents x."""
    side = int(x.shape[1] ** 0.5)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    words = torch.zeros(b["encoder_hidden_states"].shape[1], 3)
    return ref(x, b["encoder_hidden_states"], b["pooled_projections"], b["t"].to(x.dtype), places, words,
               b["guidance"].to(x.dtype), return_dict=False)[0]


def error(theirs, layout, ref, b):
    """The peer's loss: mean squared error of the velocity."""
    t = b["t"].view(-1, *[1] * (b["latents"].ndim - 1))
    x = ((1 - t) * b["latents"].float() + t * b["noise"].float()).to(b["latents"].dtype)
    target = b["noise"].float() - b["latents"].float()
    return (theirs(ref, layout(x), b).float() - layout(target)).square().mean()


def half(batch):
    """What a bf16 run reads: times and guidance stay float32."""
    return {k: v if v.ndim == 1 else v.to(torch.bfloat16) for k, v in batch.items()}


def train(case, runs=5, compiled=False, mode="whole", remat="dots"):
    work, family, c, batch, theirs, layout, formula = case
    ref = made(family, c)
    p = loaded(family, c, ref)
    with torch.no_grad():
        losses = family.loss(p, c, batch).item(), error(theirs, layout, ref, batch).item()
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], losses
    ref, batch = ref.to(torch.bfloat16), half(batch)
    tx = optim.chain(optim.adamw(), optim.decay(0.01, lambda n, t: True), optim.scale(1e-4))
    state = optim.init(tx, low(p))
    del p
    step = jit.jit(partial(optim.step, lambda p, b: family.loss(p, c, b), tx), mode, donate=True, remat=remat)
    opt = torch.optim.AdamW(ref.parameters(), lr=1e-4, fused=True)

    def peer(call):
        opt.zero_grad(set_to_none=True)
        loss = call(ref, batch)
        loss.backward()
        opt.step()
        return loss.item()

    plain = partial(error, theirs, layout)
    calls = {"mmfunc": lambda: step(state, batch)[1]["loss"].item(), "diffusers_eager": partial(peer, plain)}
    if compiled:
        fast = torch.compile(ref, fullgraph=True)
        calls["diffusers_compiled"] = partial(peer, lambda ref, b: plain(fast, b))
    seconds, first = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        first[name] = [call(), call()]
        seconds[name] = round(time.perf_counter() - start, 1)
    memory = {}
    for name, call in calls.items():
        opt.zero_grad(set_to_none=True)  # gradients that a call finds there and frees would count as its own savings
        memory[name] = round(temporary(call) / 2**20)
    flops = step.lower(state, batch).cost()["flops"]
    show(f"{work}, bf16", interleaved(calls, runs), diffusers, temporary_MiB=memory, losses_fp32=losses, losses=first,
         memory_over_eager=round(memory["mmfunc"] / memory["diffusers_eager"], 3), first_calls_s=seconds,
         gflop=round(flops / 1e9, 1), flops_over_formula=round(flops / formula, 4))


# ---- decoding and sampling


def vae(family, c, latents, work, compiled, runs=5):
    ref = made(family, c).eval()
    p = loaded(family, c, ref)
    mine = lambda p, z: family.decode(p, c, z)
    theirs = lambda ref, z: ref.decode(z, return_dict=False)[0]
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        wanted = theirs(ref, latents)
    with torch.no_grad():
        error = off(mine(p, latents), wanted)
    assert error < 1e-4, error
    ref, p, z = ref.to(torch.bfloat16), low(p), latents.to(torch.bfloat16)
    fast = jit.jit(mine)
    calls = {"mmfunc": lambda: mine(p, z), "diffusers_eager": lambda: theirs(ref, z)}  # as the sample program decodes
    if compiled:
        other = torch.compile(lambda z: theirs(ref, z))
        calls |= {"mmfunc_compiled": lambda: fast(p, z), "diffusers_compiled": lambda: other(z)}
    with torch.no_grad():
        outputs = {name: round(off(call().float(), wanted), 4) for name, call in calls.items()}
        memory = {name: round(temporary(call) / 2**20) for name, call in calls.items()}
        times = interleaved(calls, runs)
    flops = fast.lower(p, z).cost()["flops"]
    show(f"{work}, bf16", times, diffusers, off_fp32=error, off_bf16=outputs, temporary_MiB=memory,
         gflop=round(flops / 1e9, 1), flops_over_torch=round(flops / counted.get_total_flops(), 4))


def euler(ref, noise, cond, steps=8):
    """Pixels' latents from noise by diffusers' model: equal steps of Euler's method."""
    x = packed(noise)
    for i in range(steps):
        t = torch.full((1,), 1 - i / steps)
        x = x - flux_peer(ref, x, cond | {"t": t, "guidance": torch.full((1,), 3.5)}) / steps
    return x


def sample(compiled, runs=5):
    ref, noise = made(flux, FLUX).eval(), draw(1, 16, 64, 64)
    p, cond = loaded(flux, FLUX, ref), {"encoder_hidden_states": draw(1, 77, 512, seed=1),
                                        "pooled_projections": draw(1, 256, seed=2)}

    def sampler(p, cond, backend):
        """What the sample program runs."""
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        pipe = pipeline.scratch("FluxPipeline", pipeline.Part(flux, FLUX, p), None, scheduler=scheduler, key=None)
        plan = pipeline.plan(pipe, noise.shape, steps=8, guidance=3.5, backend=backend)
        return plan, lambda: packed(pipeline.sample(pipe, cond, None, noise, made=plan))

    with torch.no_grad():
        wanted = euler(ref, noise, cond)
        error = off(sampler(p, cond, "eager")[1](), wanted)
    assert error < 1e-4, error
    ref, p, cond = ref.to(torch.bfloat16), low(p), low(cond)
    plan, mine = sampler(p, cond, "inductor")
    calls = {"mmfunc": mine, "diffusers_eager": lambda: euler(ref, noise.to(torch.bfloat16), cond)}
    if compiled:
        fast = torch.compile(ref, fullgraph=True)
        calls["diffusers_compiled"] = lambda: euler(fast, noise.to(torch.bfloat16), cond)
    with torch.no_grad():
        outputs = {name: round(off(call().float(), wanted), 4) for name, call in calls.items()}
        memory = {name: round(temporary(call) / 2**20) for name, call in calls.items()}
        times = interleaved(calls, runs)
    ones = torch.ones(1)
    flops = 8 * plan.call.lower(p, noise, ones, cond | {"guidance": ones}, None, 1.0).cost()["flops"]
    show("W7 FLUX sampling, 8 steps, bf16", times, diffusers, off_fp32=error, off_bf16=outputs, temporary_MiB=memory,
         gflop=round(flops / 1e9, 1), flops_over_formula=round(flops / (8 * sum(flux_flops(FLUX, 1024, 77))), 4))


if __name__ == "__main__":
    kind, more = sys.argv[1], "compiled" in sys.argv
    if kind in ("wan", "flux"):
        train({"wan": wan_case, "flux": flux_case}[kind](), compiled=more)
    elif kind == "vae":
        vae(sd_vae, sd_vae.Config(), draw(1, 16, 32, 32), "W4a SD VAE decode, 256 x 256", more)
        vae(wan_vae, wan_vae.Config(), draw(1, 16, 3, 16, 16), "W4b Wan VAE decode, 9 x 128 x 128", more)
    else:
        sample(more)
