"""T5, mT5, UMT5 and CLIP against transformers, attention with a bias, and prompts as tokens."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_models import worst
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmfunc import hub, jit, keys, lora, models, nn, prompts, random, tree
from mmfunc.kernels import attention
from mmfunc.models import clip, t5

TINY = {
    "t5": (t5, t5.PRESETS["tiny"]), "umt5": (t5, t5.PRESETS["tiny-umt5"]), "relu": (t5, t5.PRESETS["tiny-relu"]),
    "mt5": (t5, replace(t5.PRESETS["tiny"], kind="mt5")), "l": (clip, clip.PRESETS["tiny-text"]),
    "bigg": (clip, clip.PRESETS["tiny-bigg"]), "bigg-eos": (clip, replace(clip.PRESETS["tiny-bigg"], eos=159)),
    "vision": (clip, clip.PRESETS["tiny-vision"]), "image": (clip, replace(clip.PRESETS["tiny-vision"], project=24)),
}
PAIRS = [("hidden", "last_hidden_state"), ("pooled", "pooler_output"), ("projected", "text_embeds"),
         ("projected", "image_embeds")]


def hub_class(module, c, attention="eager"):
    """The reference's class and its config."""
    said = module.hub(c)
    made = CONFIG_MAPPING[said["model_type"]](**{k: v for k, v in said.items() if k not in ("model_type", "architectures")})
    made._attn_implementation = attention
    return getattr(transformers, said["architectures"][0]), made


@cache
def reference(name):
    made, config = hub_class(*TINY[name])
    ref, g = made(config).float().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in ref.named_parameters():
            r = torch.randn(p.shape, generator=g)
            if "embedding.weight" in n and p.ndim == 2 or "shared" in n or "class_embedding" in n:
                p.copy_(0.5 * r)
            elif "relative_attention_bias" in n:
                p.copy_(r)
            elif p.ndim > 1:  # T5 does not scale its scores: its queries are small
                p.copy_(r * p[0].numel() ** -0.5 * (0.4 if n.endswith("SelfAttention.q.weight") else 1))
            else:
                p.copy_(1 + 0.15 * r if n.endswith("weight") else 0.1 * r)
    return ref


def published(name):
    module, c = TINY[name]
    return {hub.respelled(n, models.spellings(module, c)): p for n, p in reference(name).named_parameters()}


@cache
def ours(name):
    module, c = TINY[name]
    flat = tree.flatten(module.params(c))
    places = keys.lookup(flat, module.KEYS(c))
    theirs = published(name)
    keys.check(flat, places, {k: tuple(v.shape) for k, v in theirs.items()})
    loaded = dict(keys.load(flat, places, lambda n: theirs[n].detach()))
    return tree.unflatten(loaded, module.params(c)), places


def batch(name, seed=1, size=None):
    module, c = TINY[name]
    g = torch.Generator().manual_seed(seed)
    if module is clip and c.kind == "vision":
        return {"pixel_values": torch.randn(3, c.channels, c.image, c.image, generator=g)}
    size = size or (19 if module is clip else 147)
    ids = torch.randint(3, 150, (3, size), generator=g)
    lengths = torch.tensor([size, size - 6, 4])
    if module is clip:  # the end token, then padding with end tokens (0 in one row)
        ids[torch.arange(size) >= (lengths - 1)[:, None]] = 159
        ids[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": (torch.arange(size) < lengths[:, None]).long()}


def outputs(name, out):
    """Of the reference, under our names."""
    if TINY[name][0] is t5:
        return {"hidden": out.last_hidden_state}
    found = {mine: getattr(out, its) for mine, its in PAIRS if getattr(out, its, None) is not None}
    return found | {"penultimate": out.hidden_states[-2]}


def run(name, p, b):
    module, c = TINY[name]
    out = module.forward(p, c, b)
    return {"hidden": out} if module is t5 else out


def scalar(outs):
    """A loss in which every output counts, unevenly."""
    return sum((outs[k] * (torch.arange(outs[k].numel()) ** 1.5).sin().view(outs[k].shape)).mean() for k in sorted(outs))


@pytest.mark.parametrize(("name", "masked"), [(n, m) for n in TINY for m in (True, False) if m or TINY[n][1].kind != "vision"])
def test_equals_the_reference(name, masked):
    """Outputs (padding included) to 1e-5, the loss to 1e-6, each gradient to 1e-4 of its largest element."""
    b = batch(name)
    if not masked:
        del b["attention_mask"]
    ref, (p, places) = reference(name), ours(name)
    ref.zero_grad()
    theirs = outputs(name, ref(**b, output_hidden_states=True))
    loss = scalar(theirs)
    loss.backward()
    value, grads = jit.value_and_grad(lambda p, b: scalar({k: run(name, p, b)[k] for k in theirs}))(p, b)
    mine = run(name, p, b)
    for k, v in theirs.items():
        assert (mine[k] - v).abs().max() < 1e-5 * v.abs().max(), k
    assert mine.keys() - theirs.keys() <= {"pooled"}  # which the reference's classes with projection keep to themselves
    assert abs(value - loss) < 1e-6 * max(abs(loss), 1)
    found = dict(keys.export(tree.flatten(grads), places))
    wanted = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in published(name).items()}
    assert found.keys() == wanted.keys()
    zero = 1e-6 * max(g.abs().max() for g in wanted.values())
    for k in [k for k in wanted if k.endswith("k_proj.bias")]:  # shifts all scores of a row: its true gradient is zero
        assert found.pop(k).abs().max() < zero and wanted.pop(k).abs().max() < zero
    assert worst(found, wanted)[0] < 1e-4


def test_every_bucket_of_positions_is_the_references():
    from transformers.models.t5.modeling_t5 import T5Attention
    for c in (t5.PRESETS["umt5-xxl"], t5.PRESETS["tiny"], replace(t5.PRESETS["tiny"], buckets=12, reach=50)):
        distance = torch.arange(700)[None] - torch.arange(700)[:, None]
        theirs = T5Attention._relative_position_bucket(distance, True, c.buckets, c.reach)
        assert torch.equal(t5.buckets(c, 700, torch.device("cpu")), theirs)
        assert theirs.max() == c.buckets - 1


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_segments_in_one_row_are_apart(name):
    """Two prompts packed into one row give what they give alone."""
    (p, _), b = ours(name), batch(name, size=9)
    alone = [run(name, p, {"input_ids": b["input_ids"][i : i + 1, :n]})["hidden"][0] for i, n in ((0, 9), (1, 5))]
    row = torch.cat([b["input_ids"][0], b["input_ids"][1, :5]])[None]
    both = run(name, p, {"input_ids": row, "attention_mask": torch.tensor([[1] * 9 + [2] * 5])})["hidden"][0]
    assert (both - torch.cat(alone)).abs().max() < 1e-5 * both.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_hub_round_trip(name, tmp_path):
    """transformers' folder -> ours -> a folder that transformers loads: the same bits, under published names."""
    module, c = TINY[name]
    ref = reference(name)
    ref.save_pretrained(tmp_path / "a")
    assert module.config(hub.config(tmp_path / "a")) == c
    p = hub.read(tmp_path / "a", module.params(c), module.KEYS(c), spellings=models.spellings(module, c))
    hub.write(tmp_path / "b", p, module.params(c), module.KEYS(c), module.hub(c))
    again, info = type(ref).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ref.state_dict().items())
    again = hub.read(tmp_path / "b", module.params(c), module.KEYS(c))  # no other spelling is needed for these
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(p), tree.leaves(again)))
    prefixes = {n.split(".")[0] for n in keys_of(tmp_path / "b")}
    assert prefixes == {"shared", "encoder"} if module is t5 else prefixes <= {
        f"{c.kind}_model", "text_projection", "visual_projection"}


def keys_of(folder):
    from safetensors import safe_open
    with safe_open(folder / "model.safetensors", "pt") as f:
        return list(f.keys())


SIZES = {"t5:umt5-xxl": 5_680_910_336, "t5:t5-v1.1-xxl": 4_762_310_656, "t5:t5-small": 35_330_816,
         "t5:mt5-xl": 1_669_958_656, "clip:text-l": 123_060_480, "clip:text-bigg": 694_659_840,
         "clip:vision-h": 630_766_080}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    module, c = models.get(name)
    assert tree.size(module.params(c)) == SIZES[name]
    made, config = hub_class(module, c)
    with torch.device("meta"):
        assert sum(p.numel() for p in made(config).parameters()) == SIZES[name]


@pytest.mark.parametrize("name", ["t5", "umt5", "bigg", "vision"])
def test_one_graph_for_all_batches(name):
    p = ours(name)[0]
    f = jit.jit(lambda p, b: run(name, p, b), backend="aot_eager")
    for seed in (1, 2):
        b = batch(name, seed)
        mine, eager = f(p, b), run(name, p, b)
        assert all(torch.allclose(mine[k], eager[k], rtol=1e-5, atol=1e-5) for k in eager)
    assert len(f.entries) == 1


@pytest.mark.parametrize("mode", ["whole", "split", "block"])
@pytest.mark.parametrize("name", ["t5", "bigg"])
def test_modes_agree(name, mode):
    """What blocks share (a table of positions) and what is kept between them have their gradients in every mode."""
    p, b = ours(name)[0], batch(name)
    step = lambda p, b: jit.value_and_grad(lambda p, b: scalar(run(name, p, b)))(p, b)
    value, grads = step(p, b)
    mine, found = jit.jit(step, backend="aot_eager", mode=mode, remat="attention")(p, b)
    assert torch.allclose(mine, value, rtol=1e-5, atol=1e-6)
    largest = max(g.abs().max() for g in tree.leaves(grads))
    for x, y in zip(tree.leaves(found), tree.leaves(grads)):
        assert (x - y).abs().max() < 1e-4 * y.abs().max() + 1e-7 * largest


@pytest.mark.parametrize("name", ["umt5", "l", "vision"])
def test_lora_starts_as_the_identity_and_bf16_is_finite(name):
    module, c = TINY[name]
    (p, _), b = ours(name), batch(name)
    declared = lora.LoRA(module.params(c), 4, r"^blocks\..*\.(q|v|down)$", 8)
    wide = tree.merge(p, tree.init(tree.select(declared, r"\.lora_"), random.key(0)))
    low = run(name, tree.map(lambda t: t.bfloat16(), p), b)
    for k, v in run(name, p, b).items():
        assert torch.equal(run(name, wide, b)[k], v)
        assert low[k].dtype == torch.bfloat16 and (low[k].float() - v).abs().max() < 0.1 * v.abs().max()


def test_what_does_not_fit_is_told():
    c, p = TINY["t5"][1], ours("t5")[0]
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        t5.forward(tree.map(lambda t: t.half(), p), c, batch("t5"))
    with pytest.raises(ValueError, match="'gated-silu'.*relu, gated-gelu"):
        t5.config(t5.hub(c) | {"feed_forward_proj": "gated-silu"})
    with pytest.raises(ValueError, match="'silu'.*quick_gelu"):
        clip.config(clip.hub(clip.PRESETS["tiny"]) | {"hidden_act": "silu"})
    with pytest.raises(ValueError, match="whole 'clip'"):
        clip.config({"model_type": "clip"})
    with pytest.raises(ValueError, match="21 tokens.*positions for 20"):
        run("l", ours("l")[0], batch("l", size=21))
    with pytest.raises(ValueError, match=r"\(3, 3, 28, 21\).*28, 28"):
        run("vision", ours("vision")[0], {"pixel_values": torch.zeros(3, 3, 28, 21)})


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_means_the_same_in_every_attention(causal):
    """Values and all gradients, that of the bias summed over rows too; grouped heads, several blocks."""
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 9, 4, 8), "k": (2, 9, 2, 8), "v": (2, 9, 2, 8), "bias": (1, 4, 9, 9)}
    x = {n: torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    seen = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    segments = seen.clamp(min=1), seen
    found = []
    for fn, more in ((attention.reference, {}), (attention.fused, {}), (attention.blocked, {"block": 4})):
        y = fn(x["q"], x["k"], x["v"], causal, segments, None, 0.3, x["bias"], **more)
        found.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, 8)).sum(), list(x.values()))])
    plain = nn.attend(x["q"], x["k"], x["v"], causal=causal, segments=segments, scale=0.3)
    assert (found[0][0] - plain).abs().max() > 0.1
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[0], other))


# images


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (301, 999), (30, 41), (225, 224)])
def test_pixels_equal_transformers_to_the_bit(size):
    g = np.random.default_rng(0)
    for mode, channels in (("RGB", 3), ("RGBA", 4), ("L", 1)):
        x = g.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        image = Image.fromarray(x.squeeze(-1) if channels == 1 else x, mode)
        theirs = CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(clip.pixels(image), theirs), mode


# prompts

WORDS = """a photo of an astronaut riding a horse on mars, it's 35mm film! the cat's hat isn't red... we've 2023 snow
flakes naïve café 日本 猫 über straße don't I'll they'd you're I'm ½ price 100% sure <|endoftext|> back slash \\ tab\t"""
TEXTS = ["a photo of an astronaut", "", " ", "It's  the CAT'S hat!! isn't\n\nit?", "naïve CAFÉ ½ 100%", "猫 日本 🐈 ok",
         "<|endoftext|> back", "the <|ENDOFTEXT|> cat", "snow!flakes ! !!", "e\u0301 é ＦＵＬＬ", "1234 3.5e4",
         "photo " * 40, "a\u00a0b\u3000c", "<extra_id_0> horse </s>", "x" * 30, "\u200bzero",
         "a <new thing>, a <NEW thing>"]


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """vocab.json and merges.txt of a toy CLIP tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(token_models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trained.train_from_iterator(WORDS.lower().split("\n"), trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    merges = [" ".join(m) for m in state["merges"]]
    names = [*letters, *(x + "</w>" for x in letters), *(m.replace(" ", "") for m in merges)]
    names = [*dict.fromkeys(names), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert len(merges) > 100
    return folder


def token(text, normalized=True):
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def compare(folder, theirs, length):
    p = prompts.load(folder)
    for n in (length, 5):
        mine, cut = prompts.encode(p, TEXTS, n)
        found = theirs(TEXTS, padding="max_length", max_length=n, truncation=True, return_tensors="pt")
        assert torch.equal(mine["attention_mask"], found["attention_mask"])
        for row, wanted, text in zip(mine["input_ids"], found["input_ids"], TEXTS):
            assert row.tolist() == wanted.tolist(), text
        full = [len(x) for x in theirs(TEXTS)["input_ids"]]
        assert cut == [max(x - n, 0) for x in full] and max(cut) > 0
    return p


@pytest.mark.parametrize("style", ["SDXL", "FLUX", "plain", "bare"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_prompts_equal_transformers(pad, style, clip_files, tmp_path):
    """As the files of 2023 say special tokens, as those of 2024 do, as plain strings, and not at all."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((clip_files / name).read_text())
    count = len(json.loads((tmp_path / "vocab.json").read_text()))
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    dicts = {k: token(v) for k, v in ends.items()}
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    if style == "SDXL":
        said |= {k: v | {"__type": "AddedToken"} for k, v in dicts.items()}
    elif style == "FLUX":
        listed = {str(count - 2): token("<|startoftext|>"), str(count - 1): token("<|endoftext|>"),
                  str(count): token("<new thing>", False)} | ({"0": token("!", False)} if pad == "!" else {})
        said |= ends | {"added_tokens_decoder": {k: v | {"special": True} for k, v in listed.items()}}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(dicts | {"pad_token": pad}))
    elif style == "plain":
        said |= ends
    else:
        said.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    p = compare(tmp_path, theirs, 20)
    assert p.pad == theirs.pad_token_id
    theirs.save_pretrained(tmp_path / "new")  # with tokenizer.json
    assert (tmp_path / "new" / "tokenizer.json").exists()
    compare(tmp_path / "new", theirs, 20)


def test_t5_prompts_equal_transformers(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{w}", -8.0 - i / 10) for i, w in enumerate(dict.fromkeys(WORDS.split()))]
    pieces += [(ch, -11.0 - i / 10) for i, ch in enumerate("abcdefghijklmnopqrstuvwxyz0123456789.!,'IC½%")]
    theirs = transformers.T5TokenizerFast(vocab=pieces, extra_ids=4)
    theirs(TEXTS, padding="max_length", max_length=7, truncation=True)  # whose limits save_pretrained writes down too
    theirs.save_pretrained(tmp_path)
    assert compare(tmp_path, theirs, 30).pad == 0


def test_a_tokenizer_that_cannot_be_read_says_why(tmp_path, clip_files):
    (tmp_path / "clip").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "clip" / name).write_text((clip_files / name).read_text())
    (tmp_path / "clip" / "added_tokens.json").write_text('{"<|endoftext|>": 1, "<cat-toy>": 900}')
    with pytest.raises(ValueError, match="adds '<cat-toy>'"):
        prompts.load(tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match="has neither of them"):
        prompts.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="only spiece.model.*save_pretrained"):
        prompts.load(tmp_path)
    Tokenizer(token_models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names no pad_token"):
        prompts.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "a"}')
    with pytest.raises(ValueError, match="0 tokens have no room"):
        prompts.encode(prompts.load(tmp_path), ["a"], 0)


def test_clean_is_wans():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    for text in [*TEXTS, "  schÃ¶n &amp;amp; &lt;b&gt;  gut \n\n ", "â€œquoteâ€\x9d &#39;x&#39; &nbsp; y", "ﬁne\x1f\x85 text", "<b> &amp;lt; x"]:
        assert prompts.clean(text) == prompt_clean(text), text
    assert prompts.clean("<b> &amp;lt; x") == "<b> < x"  # text with < is left to html
    assert prompts.clean(" schÃ¶n  &amp;amp; gut ") == "schön & gut"
