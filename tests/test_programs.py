"""The programs end to end on a few digits: train, stop, go on with the same bits, evaluate, convert, chat."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import kills
import pytest
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import chat
import convert
import digits
import evaluate
import train

from mmfunc import checkpoint, models, records, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A data set of a few pictures, and a model trained on it for six updates, saved after each."""
    root = tmp_path_factory.mktemp("digits")
    digits.main(digits.Args(root, singles=24, pages=12))
    a = args(root, root / "whole")
    assert train.main(a) == 0
    return root, a


def args(root, out, **more):
    rows = train.Rows(tokens=(28,), patches=(128,), attention=64)
    return replace(
        train.Args(
            root / "model",
            root / "data" / "train.jsonl",
            out,
            scratch=True,
            steps=6,
            batch=4,
            lr=1e-3,
            warmup=2,
            save=1,
            backend="eager",
            workers=0,
            rows=rows,
        ),
        **more,
    )


def final(out):
    return kills.final(out, 6)


def test_training_and_held_out_scans_never_mix(run):
    root, _ = run
    x, _, held, _ = digits.scans()
    assert not {t.numpy().tobytes() for t in x} & {t.numpy().tobytes() for t in held}
    assert len(x) + len(held) == 1797
    trained = {r for i in range(60) for r in map(str, records.open(root / "data" / "train.jsonl")[i].images)}
    assert all("/train/" in r for r in trained)


def resumed(a, out, step, **more):
    """The bits at the end of a run that goes on from a step of another."""
    (out / "checkpoints").mkdir(parents=True)
    for s in checkpoint.steps(a.out / "checkpoints"):
        if s <= step:
            shutil.copytree(checkpoint.place(a.out / "checkpoints", s), checkpoint.place(out / "checkpoints", s))
    assert train.main(replace(a, out=out, **more)) == 0
    return final(out)


@pytest.mark.parametrize(("kind", "more"), [("whole", {}), ("accumulate", {"accumulate": 2, "batch": 2}), ("lora", {})])
def test_going_on_gives_the_same_bits(run, tmp_path, kind, more):
    root, a = run
    if kind == "lora":
        more = {"model": a.out / "export", "scratch": False, "lora": train.Lora(2, 4)}
    a = args(root, tmp_path / "a", **more)
    # every step must be there to go on from it
    keep = checkpoint.Saver
    train.checkpoint.Saver = lambda path, failed: keep(path, keep=9, failed=failed)
    try:
        assert train.main(a) == 0
    finally:
        train.checkpoint.Saver = keep
    want = final(a.out)
    for step, workers in ((1, 0), (3, 2), (5, 0)):
        found = resumed(a, tmp_path / f"b{step}", step, workers=workers)
        assert found.keys() == want.keys() and all(torch.equal(v, want[k]) for k, v in found.items())
    if kind == "lora":
        assert (a.out / "adapter" / "adapter_config.json").exists()
        assert not torch.equal(models.load(a.out / "export")[2]["blocks"][0]["self"]["q"]["weight"],
                               models.load(a.model)[2]["blocks"][0]["self"]["q"]["weight"])


def test_other_settings_and_bad_input_are_refused(run, tmp_path):
    root, a = run
    with pytest.raises(ValueError, match="lr: 0.001 then, 0.002 now"):
        train.main(replace(a, lr=0.002, steps=8))
    with pytest.raises(FileNotFoundError, match="has no weights.*say so explicitly"):
        train.main(args(root, tmp_path / "x", scratch=False))
    with pytest.raises(ValueError, match="'nowhere' matches none"):
        train.main(args(root, tmp_path / "y", train="nowhere"))


def test_a_profile_changes_nothing(run, tmp_path):
    """The trace has the steps that were asked for, also of a run that ends within them."""
    root, a = run
    assert train.main(args(root, tmp_path / "a", profile=(4, 9))) == 0
    assert kills.same(final(tmp_path / "a"), final(a.out))
    events = json.loads((tmp_path / "a" / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::embedding" for e in events) == 2 and "aten::mm" in (tmp_path / "a" / "profile" / "ops.txt").read_text()
    with pytest.raises(ValueError, match="--profile 3 3: a span is two numbers"):
        train.main(args(root, tmp_path / "b", profile=(3, 3)))


def test_a_run_that_blows_up_stops_with_code_4(run, tmp_path):
    root, _ = run
    assert train.main(args(root, tmp_path / "a", lr=1e30, steps=12, save=99)) == 4
    rows = [json.loads(r) for r in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert sum(r.get("event") == "not finite" and len(r["ids"]) == 4 for r in rows) == 5


def test_a_full_disk_does_not_stop_training(run, tmp_path, monkeypatch):
    root, a = run
    real, seen = os.fsync, []
    def sometimes(fd):
        seen.append(fd)
        if 6 < len(seen) < 9:
            raise OSError(28, "No space left on device")
        return real(fd)
    monkeypatch.setattr(os, "fsync", sometimes)
    assert train.main(args(root, tmp_path / "a")) == 0
    rows = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert "save failed" in rows and "No space left" in rows
    assert all(torch.equal(v, final(a.out)[k]) for k, v in final(tmp_path / "a").items())


def program(root, out, steps=6):
    """The command line of the run that args describes."""
    said = (f"--model {root}/model --data {root}/data/train.jsonl --out {out} --scratch --steps {steps} --batch 4 --lr 1e-3 "
            "--warmup 2 --save 1 --backend eager --workers 0 --rows.tokens 28 --rows.patches 128 --rows.attention 64")
    return [sys.executable, train.__file__, *said.split()]


def test_kills_and_sigterm_end_in_the_same_bits(run, tmp_path):
    """The program itself, killed by -9 at some time and asked to stop by SIGTERM, then run to its end."""
    root, a = run
    kills.stopped(program(root, tmp_path / "a"), tmp_path / "a")
    assert kills.same(final(tmp_path / "a"), final(a.out))


@pytest.mark.deep
def test_25_kills_lose_nothing(run, tmp_path):
    """Killed by -9 at 25 random times, after start-up and in the midst of saving, the program ends in the same bits."""
    root, _ = run
    assert kills.start(program(root, tmp_path / "whole", 600)).wait() == 0
    kills.often(program(root, tmp_path / "a", 600), tmp_path / "a", 600)
    assert kills.same(*(kills.final(tmp_path / n, 600) for n in ("whole", "a")))


def test_evaluate_convert_and_chat(run, tmp_path, capsys):
    root, a = run
    folder = a.out / "export"
    evaluate.main(evaluate.Args(folder, root / "data" / "heldout.jsonl", tmp_path / "e", batch=8, new=4, limit=20))
    rows = [json.loads(r) for r in (tmp_path / "e" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(r["question"] == "which digit is this ?" for r in rows)
    assert json.loads((tmp_path / "e" / "results.json").read_text())["overall"]["count"] == 20
    convert.main(convert.Args(folder, tmp_path / "c", dtype="bf16", shard=1e-4))
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    half = models.load(tmp_path / "c")[2]
    assert all(torch.equal(t.bfloat16(), tree.at(half, n)) for n, t in tree.flatten(models.load(folder)[2]).items())
    capsys.readouterr()
    chat.main(chat.Args(folder, "what is the sum ?", (root / "data" / "heldout" / "page00003.png",), new=4))
    mine = capsys.readouterr().out.strip()
    assert mine == theirs(folder, root / "data" / "heldout" / "page00003.png", "what is the sum ?")
    with pytest.raises(ValueError, match="not finite"):
        convert.check(folder, "x", {"a": torch.tensor([float("nan")])})


def theirs(folder, image, question):
    """What transformers answers from the same folder."""
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    t = AutoTokenizer.from_pretrained(folder)
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(Image.open(image), return_tensors="pt")
    said = t.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                                 tokenize=False, add_generation_prompt=True)
    said = said.replace("<|image_pad|>", "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4))
    ids = t(said, return_tensors="pt")
    kinds = (ids["input_ids"] == model.config.image_token_id).int()
    out = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        mm_token_type_ids=kinds,
        **seen,
        max_new_tokens=4,
        do_sample=False,
    )
    return t.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()


def test_the_report_is_one_safe_page(run):
    root, a = run
    (a.out / "samples.jsonl").write_text(
        json.dumps(
            {
                "step": 6,
                "question": "<script>alert(1)</script>",
                "answer": "<img src=x>",
                "truth": ["&"],
                "score": 0.0,
                "images": ["/none.png"],
            }
        )
        + "\n"
    )
    from mmfunc import report
    page = report.write(a.out).read_text()
    assert "<script" not in page and "<img src=x" not in page and "http" not in page.split("<main>")[0]
    assert "loss" in page and "polyline" in page
