"""Pipelines equal one process: families, schedules, real ranks; and the schedules by themselves."""

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import meshes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules as torchs
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmfunc import jit, optim, relay, shard, stages, tree, update
from mmfunc.relay import Plan
from mmfunc.shard import schedule
from mmfunc.shard.schedule import Action, build, places, simulate

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("1f1b", 2), ("zero-bubble", 1)]
FAMILIES = ["qwen2", "qwen2 odd", "qwen2 lora", "qwen2vl", "flux", "wan", "wan i2v", "t5", "clip", "sd_vae", "experts"]
MICRO = [[0], [1], [2], [3], [1]]  # five micro-batches, no multiple of the ranks
THEIRS = {"forward": "F", "backward": "B", "input": "I", "weight": "W", "send": "SEND_F", "receive": "RECV_F",
          "send_back": "SEND_B", "receive_back": "RECV_B"}


# ---- schedules

def accepted(table, place):
    """Whether torch's simulator gets through a table."""
    actions = {r: [torchs._Action.from_str(f"{a.stage}{THEIRS[a.kind]}{a.micro}") for a in row] for r, row in enumerate(table)}
    try:
        torchs._simulate_comms_compute(actions, place.__getitem__, len(place))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", schedule.NAMES)
def test_any_numbers_give_a_table(name, capsys):
    """No deadlock, here and in torch's simulator, and no more activations than the limits."""
    for virtual in (1, 2, 3):
        for ranks in range(1, 5):
            for micro in (1, 2, 3, 5, 8):
                table, place = build(name, ranks, micro, virtual), places(name, ranks, virtual)
                assert accepted(table, place)
                limit = {"gpipe": micro * virtual, "zero-bubble": ranks * virtual}.get(name)
                for r, peak in enumerate(simulate(table, place).peak):
                    few = ranks - r if virtual == 1 else 2 * (ranks - r - 1) + (virtual - 1) * ranks + 1
                    assert peak <= min(limit or few, micro * virtual)


@pytest.mark.parametrize("ranks, micro", [(2, 4), (4, 8), (8, 32)])
def test_bubbles_are_those_of_the_papers(ranks, micro):
    """Beside the work of 3 a micro-batch: 3 (P - 1), that over the stages of a rank, P - 1, and about half of it."""
    def idle(name, virtual=1):
        place = places(name, ranks, virtual)
        report = simulate(build(name, ranks, micro, virtual), place)
        assert report.bubble[0] == pytest.approx(1 - 3 * micro * virtual / report.time)
        return report.time / virtual - 3 * micro

    assert idle("gpipe") == idle("1f1b") == 3 * (ranks - 1)
    assert idle("1f1b", 2) == 1.5 * (ranks - 1)
    assert idle("zero-bubble") == ranks - 1
    assert idle("zero-bubble", 2) <= (ranks + 1) / 2


@pytest.mark.parametrize("ranks, micro", [(2, 4), (4, 9), (6, 12)])
def test_zero_bubble_is_no_slower_than_torchs(ranks, micro):
    given = SimpleNamespace(pp_group_size=ranks, _n_microbatches=micro, num_stages=2 * ranks)
    kinds = {v: k for k, v in THEIRS.items()}
    theirs = [[Action(a.stage_index, kinds[a.computation_type.value], a.microbatch_index)
               for a in torchs.ScheduleZBVZeroBubble._calculate_single_rank_operations(given, r) if a is not None]
              for r in range(ranks)]
    place = places("zero-bubble", ranks, 2)
    theirs = simulate(schedule.connect(theirs, place), place)
    ours = simulate(build("zero-bubble", ranks, micro, 2), place)
    assert ours.time <= theirs.time and max(ours.peak) <= max(theirs.peak)


def test_a_table_out_of_order_is_refused():
    """Each exchange of two neighbours either does no harm in torch's simulator too, or is refused; some are."""
    place = places("1f1b", 2)
    table = build("1f1b", 2, 3)
    refused = 0
    for r in range(2):
        for i in range(len(table[r]) - 1):
            wrong = [list(row) for row in table]
            wrong[r][i], wrong[r][i + 1] = wrong[r][i + 1], wrong[r][i]
            try:
                simulate(wrong, place)
                assert accepted(wrong, place)
            except ValueError as e:
                assert "gets stuck: rank" in str(e)
                refused += 1
    assert refused > 10
    for wrong in ([table[0][:-1], table[1]], [table[0] + table[0][-1:], table[1]]):
        with pytest.raises(ValueError, match="rank 0 does backward of stage 0, micro-batch 2, [02] times"):
            simulate(wrong, place)
    with pytest.raises(ValueError, match="'2f2b' is unknown; there are gpipe, 1f1b, zero-bubble"):
        build("2f2b", 2, 3)


def test_stages_are_balanced():
    assert stages.balance([1, 1, 1, 9, 1, 1], 3) == [3, 1, 2]
    assert stages.balance([5, 1, 1, 1, 1, 1], 2) == [1, 5]
    costs = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = stages.balance(costs, 8)
    assert sum(sizes) == 40 and max(sum(costs[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(8)) < 1.2 * sum(costs) / 8


# ---- pipelines

def loss_of(name):
    one = meshes.case(name)
    return lambda p, b: one.loss(p, one.c, b)


@cache
def wanted(name):
    """Micro-batches, losses and summed gradients of one process."""
    params, frozen = meshes.divided(name)
    batches = [meshes.case(name).batch(which) for which in MICRO]
    loss = loss_of(name)
    found = [jit.value_and_grad(lambda p, b: loss(tree.merge(p, frozen), b))(params, b) for b in batches]
    grads = [tree.flatten(g) for _, g in found]
    return batches, torch.stack([v for v, _ in found]), {n: sum(g[n] for g in grads) for n in grads[0]}


@cache
def traced(name):
    """A pipeline whose traces others of the same case use."""
    return relay.pipeline(loss_of(name), *meshes.divided(name), wanted(name)[0][0], 2, backend="eager")


def made(case, ranks=2, schedule="1f1b", virtual=1, backend="eager", remat=None, **plan):
    return replace(traced(case), ranks=ranks, plan=Plan(schedule, virtual, **plan), backend=backend, remat=remat, made={},
                   tables={})


def check(name, pipe):
    batches, losses, grads = wanted(name)
    params, frozen = meshes.divided(name)
    value, found = pipe(params, frozen, batches)
    assert ((value - losses).abs() <= 1e-6 * losses.abs()).all()
    assert meshes.worst(tree.flatten(found), grads)[0] < 1e-5
    report = simulate(pipe.table(len(batches)), pipe.place)
    assert [pipe.peak[r] for r in range(pipe.ranks)] == report.peak


@pytest.mark.parametrize("case", FAMILIES)
def test_equals_one_process(case):
    stage = {}  # of gpipe and 1f1b: the same functions in another order
    for name, virtual in SCHEDULES:
        pipe = made(case, 2, name, virtual)
        pipe.made = stage if (name, virtual) in SCHEDULES[:2] else {}
        check(case, pipe)


@pytest.mark.parametrize("case", ["qwen2 odd", "clip"])
def test_stages_in_a_v(case):
    """The first and the last stage are on one rank: the embedding is not shared with another."""
    pipe = made(case, 2, "zero-bubble", 2)
    check(case, pipe)
    assert pipe.place == [0, 1, 1, 0] and max(map(len, pipe.holders.values())) == 1


@pytest.mark.parametrize("case", ["qwen2 odd", "qwen2vl"])
def test_four_ranks_and_stages_by_hand(case):
    check(case, made(case, 4, "zero-bubble"))
    check(case, made(case, 4, recompute=True))
    check(case, made(case, sizes={"qwen2 odd": (1, 3), "qwen2vl": (6, 2)}[case]))


@pytest.mark.parametrize("case, how", [("qwen2 lora", {}), ("qwen2vl", {"recompute": True}),
                                       ("t5", {"schedule": "zero-bubble", "remat": "nothing"}),
                                       ("qwen2 odd", {"schedule": "zero-bubble", "backend": "inductor"})])
def test_compiled(case, how):
    """Each kind of function of each stage is one graph."""
    pipe = made(case, **{"backend": "aot_eager"} | how)
    check(case, pipe)
    pieces = [p for s in pipe.made.values() for p in s.pieces.values()]
    assert len(pieces) == (6 if pipe.plan.schedule == "zero-bubble" else 4)
    assert all(len(p.call.entries) == bool(p.gives) and p.call.backend == pipe.backend for p in pieces)


def saved(pipe, s, case="wan"):
    """Bytes that a stage keeps from the forward on, besides what flows in, parameters and batch."""
    piece = pipe.stage(s, wanted(case)[0][0]).pieces["backward"]
    nodes = [k for k in piece.needs if isinstance(k, stages.Node)]
    memory = lambda ns: {t._cdata: t.nbytes() for t in (n.meta["val"].untyped_storage() for n in ns)}
    given = memory(nodes[0].graph.find_nodes(op="placeholder")) if nodes else {}
    return sum(n for k, n in memory(nodes).items() if k not in given)


def test_less_is_kept():
    everything, nothing, recomputed = (saved(made("wan", **how), 0) for how in ({}, {"remat": "nothing"}, {"recompute": True}))
    assert recomputed == 0 < nothing < everything / 2


@contextmanager
def on_mesh(mesh, rank, case):
    """The step of both stages, which are here, on a rank along other axes whose other ranks are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world)
    try:
        with shard.use(shard.connect(mesh), meshes.declared(case)):
            params = shard.place(meshes.case(case).params)
            yield update.step(loss_of(case), TX, params, None, lambda: wanted(case)[0][0], 2, backend="eager").pipe, params
    finally:
        dist.destroy_process_group()


def code(pipe, batch):
    pieces = [p for s in (0, 1) for p in pipe.stage(s, batch).pieces.values()]
    return [re.sub(r"'\d+'\)", "group)", p.call.fn.__closure__[0].cell_contents.code) for p in pieces]


def test_stages_of_a_mesh():
    """Compiled they do what they do eagerly, all ranks run the same graphs, and no micro-batch keeps parameters that
    its stage has gathered."""
    batch, mesh = wanted("qwen2")[0][0], shard.Mesh(fsdp=2, tp=2)
    with on_mesh(mesh, 0, "qwen2") as (pipe, params):
        first = code(pipe, batch)
    with on_mesh(mesh, 3, "qwen2") as (pipe, params):
        (value, grads), (again, slopes) = [p(optim.ready(params, None), None, [batch]) for p in (
            pipe, replace(pipe, backend="aot_eager", made={}))]
        assert code(pipe, batch) == first and all("all_gather_into_tensor" in c for c in first)
        assert torch.allclose(value, again, rtol=1e-6) and meshes.worst(tree.flatten(slopes), tree.flatten(grads))[0] < 1e-6
    with on_mesh(shard.Mesh(fsdp=2), 1, "qwen2") as (pipe, _):
        assert saved(pipe, 0, "qwen2") == saved(made("qwen2"), 0, "qwen2")


def test_frozen_parts_send_nothing_back():
    params = meshes.case("qwen2vl").params
    trained = tree.select(params, "^(?!vision)")
    batch = wanted("qwen2vl")[0][0]
    pipe = relay.pipeline(loss_of("qwen2vl"), trained, tree.without(params, trained), batch, 2, Plan(sizes=(4, 4)),
                          backend="eager")
    value, grads = pipe(trained, tree.without(params, trained), wanted("qwen2vl")[0])
    assert torch.allclose(value, wanted("qwen2vl")[1], rtol=1e-6)
    assert meshes.worst(tree.flatten(grads), {n: wanted("qwen2vl")[2][n] for n in tree.flatten(trained)})[0] < 1e-5
    assert not pipe.stage(1, batch).come.back and pipe.stage(0, batch).pieces["backward"].gives == []


def test_batches_of_two_signatures():
    """Rows of other lengths in one call; a parameter that nothing reads is held by the first rank, without gradient."""
    one = meshes.case("qwen2")
    batches = [one.batch([0]), one.batch([1, 2]), one.batch([3])]
    params = one.params | {"unread": torch.ones(3)}
    pipe = relay.pipeline(loss_of("qwen2"), params, None, batches[0], 2, backend="eager")
    value, grads = pipe(params, None, batches)
    found = [jit.value_and_grad(loss_of("qwen2"))(params, b) for b in batches]
    assert torch.allclose(value, torch.stack([v for v, _ in found]), rtol=1e-6)
    assert meshes.worst(tree.flatten(grads), {n: sum(tree.at(g, n) for _, g in found) for n in tree.flatten(params)})[0] < 1e-5
    assert "unread" in pipe.holds[0] - pipe.holds[1] and not grads["unread"].any()


def test_errors():
    one = meshes.case("qwen2")
    batch = one.batch([0])
    how = {"params": one.params, "frozen": None, "batch": batch, "ranks": 2}
    with pytest.raises(ValueError, match=r"\[2, 1\] must be 2 numbers above 0 that add up to the 4 parts of this model: "
                                         "embed, blocks.0, blocks.1, head"):
        relay.pipeline(loss_of("qwen2"), plan=Plan(sizes=(2, 1)), **how)
    with pytest.raises(ValueError, match="4 parts cannot be cut into 6 stages"):
        relay.pipeline(loss_of("qwen2"), plan=Plan(virtual=3), **how)
    with pytest.raises(ValueError, match="calls none"):
        relay.pipeline(lambda p, b: p["norm"]["weight"].sum(), **how)
    with pytest.raises(ValueError, match="calls two"):
        relay.pipeline(lambda p, b: loss_of("qwen2")(p, b) + loss_of("qwen2")(p, b), **how)


# ---- training, and real ranks

TX = optim.chain(optim.adamw(), optim.decay(0.1), optim.scale(1e-3))


def trained(pipe, case):
    """Parameters after three updates."""
    batches = wanted(case)[0]
    params, frozen = meshes.divided(case)
    state = optim.init(TX, params, frozen)
    for _ in range(3):
        value, grads = pipe(state["params"], frozen, batches)
        state, _ = optim.apply(TX, grads, state, value.sum())
    return tree.flatten(state["params"])


@cache
def alone(case):
    """The same by accumulation in one process."""
    tx, loss = optim.accumulate(len(MICRO), TX), loss_of(case)
    state = optim.init(tx, *meshes.divided(case))
    for _ in range(3):
        for batch in wanted(case)[0]:
            state, _ = optim.step(loss, tx, state, batch)
    return tree.flatten(state["params"])


@pytest.mark.parametrize("case", ["qwen2 odd", "qwen2 lora", "flux"])
def test_parameters_after_updates(case):
    after = trained(made(case, 2, "zero-bubble"), case)
    assert meshes.apart(after, alone(case), wanted(case)[2]) < 1e-5


