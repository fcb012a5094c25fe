"""The GPU part of make bench on CPU at tiny sizes: equal losses, steps, numbers of layers, MFU, and the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import page
import workloads

from mmfunc import tree
from mmfunc.machines import MACHINES

ROOT = Path(__file__).parent.parent
TINY = "tiny-G1", "tiny-G2", "tiny-G3"
GIB = 2**30


def inside(name, who, layers, device, runs):
    """gpu.started, in this process and without a compiler."""
    found = gpu.side(gpu.SPECS[name]._replace(backend="eager"), who, layers, device, 1)
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    return {n: gpu.workload(n, "cpu", runs=1, rounds=1, sides=("mmfunc", "eager"), start=inside) for n in TINY}


def test_sides_agree_and_all_layers_run(found):
    for w in found.values():  # workload() refuses losses that differ
        assert w["of"] == w["sides"]["eager"]["layers"] == w["sides"]["mmfunc"]["layers"]
        assert all(r["min_s"] > 0 and r["peak"] > 0 and "mfu" not in r for r in w["sides"].values())
        assert w["ratios"].keys() == {"eager"} and "alone" not in w


def test_losses_that_differ_are_refused():
    other = lambda name, who, *rest: inside(name, who, *rest) | {"check": 1.0 if who == "mmfunc" else 1.001}
    with pytest.raises(RuntimeError, match="losses of {'eager': 1.001} differ from ours, 1.0"):
        gpu.workload("tiny-G2", "cpu", sides=("mmfunc", "eager"), start=other)


def fake(fixed, layer, free):
    """What sides of a given number of layers would say: a layer of 1 GiB of state and so much at the peak."""
    def start(name, who, layers, device, runs):
        more = layer * (2 if who == "eager" else 1)
        return {"times": [[0.1 + 0.2 * layers] * 2] * runs, "first_s": 9.0, "free": free * GIB, "kept": 0,
                "peak": (fixed + more * layers) * GIB, "state": layers * GIB, "device": "NVIDIA H200", "check": 2.0}
    return start


def test_as_many_layers_as_fit():
    probe = lambda peak, state: {"peak": peak * GIB, "state": state * GIB, "free": 100 * GIB}
    assert gpu.fit(probe(10, 5), probe(15, 8), 40) == 16  # 5 + 5 n <= 85
    assert gpu.fit(probe(10, 5), probe(15, 15), 40) == 9  # the state grows faster: 10 n - 5 <= 85
    assert gpu.fit(probe(10, 5), probe(15, 8), 4) == 4
    with pytest.raises(RuntimeError, match="one layer needs 90.0 GiB; 85.0 are planned"):
        gpu.fit(probe(90, 5), probe(95, 8), 40)


def test_a_gpu_that_holds_fewer_layers(capsys):
    w = gpu.workload("tiny-G1", "cpu", start=fake(1, 3, 20))
    assert w["fits"] == {"mmfunc": 3, "eager": 2, "compiled": 3}  # of 17 GiB: 1 + 3 n, 1 + 6 n
    ours = w["sides"]["mmfunc"]
    assert ours["layers"] == 2 and ours["peak"] == 7 * GIB and w["alone"]["layers"] == 3
    assert ours["median_s"] == pytest.approx(0.5) and ours["all_s"] == pytest.approx(0.7) and "all_s" not in w["alone"]
    assert ours["tflop_per_s"] == pytest.approx(gpu.flops(gpu.SPECS["tiny-G1"], 2) / 0.5e12)
    assert "all 3 layers: 0.7 s, extrapolated from 1 and 2" in capsys.readouterr().out


def test_mfu_is_of_the_peak_of_the_named_device(monkeypatch):
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
             "NVIDIA A100 80GB PCIe": "a100"}
    assert all(gpu.peak(n) == MACHINES[m].peak for n, m in names.items())
    assert [gpu.peak(n) for n in ("NVIDIA H100 PCIe", "NVIDIA L4", "host")] == [None] * 3
    monkeypatch.setattr(gpu, "flops", lambda s, n: 100e12 * n)
    one = fake(1, 1, 99)("", "mmfunc", 1, "", 3)
    found = gpu.told(gpu.SPECS["G1"], 4, [one | {"times": [[0.5, 0.5]]}] * 3, one)
    assert found["tflop_per_s"] == pytest.approx(800) and found["mfu"] == round(800e12 / 989e12, 4)
    assert "mfu" not in gpu.told(gpu.SPECS["G1"], 4, [one], one | {"device": "NVIDIA L4"})


def test_flops_count_a_block_as_by_hand():
    """Of Qwen2's block at 4096 tokens: products thrice; of attention, where causal, half of the pairs."""
    s = gpu.SPECS["G3"]
    s = s._replace(c=replace(s.c, layers=1, full=()), size=(4, 1024, 2))
    block = gpu.flops(s, 2) - gpu.flops(s, 1)
    c, n = s.c.text, 4 * 1024
    weights = c.width * c.k * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.hidden
    assert block == pytest.approx(6 * n * weights + 3 * 4 * n * (1024 + 1) / 2 * c.width, rel=0.002)


@pytest.mark.parametrize("name", TINY)
def test_cutting_keeps_the_width(name):
    s = gpu.SPECS[name[5:]]
    assert gpu.cut(s, s.layers) == s.c
    one, two = (tree.size(s.family.params(gpu.cut(s, n))) for n in (1, 2))
    assert one + (s.layers - 1) * (two - one) == tree.size(s.family.params(s.c))


def test_the_page_gets_a_table_where_there_was_a_gpu(tmp_path):
    said = json.loads(sorted((ROOT / "benchmarks" / "results").glob("*.json"))[-1].read_text())
    page.write(said, tmp_path, [])
    plain = (tmp_path / "benchmarks.md").read_text()
    page.write(said | {"gpu": {"G1": gpu.workload("tiny-G1", "cpu", start=fake(1, 3, 20))}}, tmp_path, [])
    text = (tmp_path / "benchmarks.md").read_text()
    at = text.index("## On a GPU")
    assert "GPU" not in plain and text.replace(text[at : text.index("## ", at + 9)], "") == plain
    rows = [line for line in text[at:].splitlines() if line.startswith("| G1 | tiny Wan |")]
    assert [r.split(" | ")[2:4] for r in rows] == [["2 of 3", "mmfunc"], ["2 of 3", "eager"], ["2 of 3", "compiled"],
                                                   ["3 of 3", "mmfunc alone"]]
    assert rows[0].endswith("| 7.0 | 0.7 |") and "%" in rows[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    assert gpu.here() == ()
    with pytest.raises(RuntimeError, match="G1 needs a GPU"):
        gpu.workload("G1")


def test_a_side_is_a_process():
    found = gpu.started("tiny-G2", "eager", 1, "cpu", 2)
    assert len(found["times"]) == 2 and found["check"] == pytest.approx(inside("tiny-G2", "mmfunc", 1, "cpu", 1)["check"], 1e-5)
    with pytest.raises(ValueError, match="there is no side 'nobody' of 1 layers; sides are mmfunc, eager, compiled"):
        inside("tiny-G2", "nobody", 1, "cpu", 1)


@pytest.mark.parametrize("name", TINY)
def test_peers_can_be_made_on_a_device(name):
    """The meta device stands for one: no tensor of a model stays on the host."""
    s = gpu.SPECS[name]
    ref = workloads.made("transformers" if name == "tiny-G3" else "diffusers", s.family, s.c, "meta")
    assert {t.device.type for t in (*ref.parameters(), *ref.buffers())} == {"meta"}


def test_a_side_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="tiny-G2, eager, 7 layers"):
        gpu.started("tiny-G2", "eager", 7, "cpu", 1)
