"""Side by side with transformers: same weights, same batches, interleaved in one process.

    OMP_NUM_THREADS=2 python benchmarks/transformers_peer.py train compiled   # W1: Qwen2.5-VL mini, frozen tower
    OMP_NUM_THREADS=2 python benchmarks/transformers_peer.py decode           # W5: Qwen2-0.5B shape, 256 tokens

Losses and tokens are compared first. Prints a JSON line for each workload: medians, spreads, ratios, memory.
"""

import statistics
import sys
import time
from functools import partial

import torch
import transformers
from peers import interleaved, loaded, show, temporary

from mmfunc import generate, jit, optim, tree
from mmfunc.models import qwen2, qwen2vl

W1 = qwen2vl.Config(
    qwen2.Config(width=768, hidden=2048, heads=6, kv_heads=2, layers=8, vocab=16384, tokens=4096),
    width=384,
    hidden=1024,
    heads=6,
    layers=8,
    full=(3, 7),
    tokens_per_second=4,
    image_token=16000,
    video_token=16001,
    start_token=16002,
    end_token=16003,
)
W5 = qwen2.Config(width=896, hidden=4864, heads=14, kv_heads=2, layers=24, vocab=151936, tied=True)


def pair(family, c):
    """(transformers' model in bf16, our parameters with the same weights)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    said = family.hub(c)
    made = CONFIG_MAPPING[said["model_type"]](
        **{k: v for k, v in said.items() if k not in ("model_type", "architectures")}
    )
    ref = getattr(transformers, said["architectures"][0])(made).to(torch.bfloat16)
    return ref, loaded(family, c, ref)


def train(runs=9, compiled=False):
    ref, p = pair(qwen2vl, W1)
    for q in ref.model.visual.parameters():
        q.requires_grad_(False)
    g, side = torch.Generator().manual_seed(0), 24
    ids = torch.randint(0, 15000, (4, 345), generator=g)
    ids[:, 5], ids[:, 6:150] = 16002, 16000
    labels = ids.clone()
    labels[:, :150] = -100
    pixels, grid = torch.randn(4 * side * side, 1176, generator=g), torch.tensor([[1, side, side]] * 4)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }
    opt = torch.optim.AdamW([q for q in ref.parameters() if q.requires_grad], lr=1e-4, fused=True)
    hf = batch | {"pixel_values": pixels.bfloat16(), "mm_token_type_ids": (ids == 16000).int()}

    def eager(model=ref):
        opt.zero_grad(set_to_none=True)
        loss = model(**hf).loss
        loss.backward()
        opt.step()
        return loss.item()

    tx = optim.chain(optim.adamw(), optim.decay(0.01, lambda n, t: True), optim.scale(1e-4))
    trained = tree.select(p, "^(?!vision)")
    state = optim.init(tx, trained, tree.without(p, trained))
    step = jit.jit(partial(optim.step, lambda q, b: qwen2vl.loss(q, W1, b), tx), donate=True, remat="dots")
    ready = qwen2vl.prepare(W1, batch | {"pixel_values": pixels}, rule="5.23")
    start = time.perf_counter()
    ours = [step(state, ready)[1]["loss"].item() for _ in range(2)]
    first = time.perf_counter() - start
    calls = {"mmfunc": lambda: step(state, ready)[1]["loss"].item(), "transformers_eager": eager}
    theirs = [eager() for _ in range(2)]
    if compiled:
        fast = torch.compile(ref)
        start = time.perf_counter()
        eager(fast)
        print("transformers compiled in", round(time.perf_counter() - start, 1), "s", flush=True)
        calls["transformers_compiled"] = partial(eager, fast)
    memory = {}
    for name, call in calls.items():
        opt.zero_grad(set_to_none=True)  # gradients that a call finds there and frees would count as its own savings
        memory[name] = round(temporary(call) / 2**20)
    show(
        "W1 train step, bf16",
        interleaved(calls, runs),
        transformers,
        temporary_MiB=memory,
        memory_over_eager=round(memory["mmfunc"] / memory["transformers_eager"], 3),
        losses={"mmfunc": ours, "transformers": theirs},
        compile_s=round(first, 1),
        gflop=round(step.lower(state, ready).cost()["flops"] / 1e9, 1),
    )


def decode(runs=3, rows=1, new=17):
    ref, p = pair(qwen2, W5)
    ref.eval().generation_config.pad_token_id = 0
    ids = torch.randint(0, 30000, (rows, 256), generator=torch.Generator().manual_seed(0))
    call = generate.stepper(qwen2.step, W5, backend="inductor")
    mine = lambda n: generate.generate(qwen2, p, W5, {"input_ids": ids}, new=n, call=call, slots=288)
    with torch.inference_mode():
        hf = lambda n: ref.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
        )
        same = sum(a == b for a, b in zip(mine(new)[0], hf(new)[0, 256:].tolist()))
        times = interleaved(
            {
                "mmfunc": lambda: mine(new),
                "first": lambda: mine(1),
                "transformers_eager": lambda: hf(new),
                "hf_first": lambda: hf(1),
            },
            runs,
        )
    per = {
        k: [(a - statistics.median(times[f])) / (new - 1) for a in times[k]]
        for k, f in (("mmfunc", "first"), ("transformers_eager", "hf_first"))
    }
    gb = tree.nbytes(p) / 1e9
    show(
        f"W5 decode a token, bf16, batch {rows}",
        per,
        transformers,
        equal_tokens=f"{same}/{new}",
        read_GB_per_s=round(gb / statistics.median(per["mmfunc"]), 1),
    )


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else "train"
    if kind == "train":
        train(compiled="compiled" in sys.argv)
    else:
        decode(rows=1)
        decode(rows=8)
