"""Whole pipelines against diffusers: prompts through the tokenizers, the same noise, pixels in the end."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusion_references import velocity
from PIL import Image
from references import redraw
from test_vaes import reference as autoencoder
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import convert

from mmfunc import gallery, keys, lora, models, pipeline, random, sampler, tree
from mmfunc.kernels import wide

WORDS = "a photo of an astronaut riding a horse on mars , it's film the cat is red blurry low quality".split()
PROMPTS = ["a photo of the cat", "an astronaut riding a horse on mars , film"]
NEGATIVE = ["blurry", "low quality photo"]


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip_tokenizer():
    """A word is one token, between a start and an end."""
    names = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(WORDS)]
    t = Tokenizer(token_models.WordLevel({n: i for i, n in enumerate(names)}, "<|endoftext|>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=[
        ("<|startoftext|>", 0), ("<|endoftext|>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token=names[0], eos_token=names[1],
                                                pad_token=names[1], unk_token=names[1], model_max_length=12)


def t5_tokenizer(length):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{w}", -8.0 - i / 10) for i, w in enumerate(dict.fromkeys(WORDS))]
    pieces += [(ch, -11.0 - i / 10) for i, ch in enumerate("abcdefghijklmnopqrstuvwxyz,'")]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=4, model_max_length=length)


def t5(kind):
    made = {"umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
            "t5": (transformers.T5Config, transformers.T5EncoderModel)}[kind]
    config = made[0](d_model=24, d_ff=40, num_heads=2, d_kv=12, num_layers=2, vocab_size=160,
                     feed_forward_proj="gated-gelu", relative_attention_num_buckets=16,
                     relative_attention_max_distance=40, tie_word_embeddings=False)
    return redraw(made[1](config).eval())


def clip(kind):
    size = {"hidden_size": 12 if kind == "text" else 32, "intermediate_size": 24, "num_attention_heads": 2,
            "num_hidden_layers": 3}
    if kind == "text":
        config = transformers.CLIPTextConfig(**size, vocab_size=40, max_position_embeddings=12, eos_token_id=1,
                                             bos_token_id=0, pad_token_id=1)
        return redraw(transformers.CLIPTextModel(config).eval())
    config = transformers.CLIPVisionConfig(**size, image_size=28, patch_size=7)
    return redraw(transformers.CLIPVisionModel(config).eval())


def wan(condition=0, places=None):
    return redraw(diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=80, num_layers=2, text_dim=24, freq_dim=16, in_channels=4 +
        condition, out_channels=4, image_dim=32 if condition else None, added_kv_proj_dim=48 if condition else None,
        pos_embed_seq_len=places).eval())


def flux(guidance=True):
    return redraw(diffusers.FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2, in_channels=64,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6)).eval())


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
       "max_image_seq_len": 4096}


@cache
def theirs(kind, extra=""):
    """diffusers' pipeline, its weights drawn anew."""
    if kind.startswith("Wan"):
        image = kind == "WanImageToVideoPipeline"
        parts = {"tokenizer": t5_tokenizer(512), "text_encoder": t5("umt5"), "vae": autoencoder("wan_vae:tiny", 0.3),
                 "transformer": wan(8 if image else 0, 34 if extra == "last" else None),
                 "scheduler": diffusers.UniPCMultistepScheduler(**FLOW)}
        if image:
            n = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
            parts |= {"image_encoder": clip("vision"), "image_processor": transformers.CLIPImageProcessorPil(**n)}
    else:
        parts = {"tokenizer": clip_tokenizer(), "text_encoder": clip("text"), "tokenizer_2": t5_tokenizer(16),
                 "text_encoder_2": t5("t5"), "vae": autoencoder("sd_vae:tiny", 0.3),
                 "transformer": flux(extra != "schnell"),
                 "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 1.0} if extra == "schnell" else DEV))}
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder as diffusers writes it, our pipeline of it), by kind."""
    found = {}

    def of(kind, extra=""):
        if (kind, extra) not in found:
            folder = tmp_path_factory.mktemp("pipes") / f"{kind}{extra}"
            theirs(kind, extra).save_pretrained(folder)
            found[kind, extra] = folder, pipeline.load(folder)
        return found[kind, extra]

    return of


def close(ours, wanted, bound=1e-4):
    """Pixels in -1..1 against diffusers' numpy images in 0..1."""
    wanted = torch.as_tensor(np.asarray(wanted)) * 2 - 1
    wanted = wanted.movedim(-1, 1)
    assert ours.shape == wanted.shape and (ours - wanted).abs().max() < bound
    assert 0.1 < ours.abs().mean() < 0.95  # neither flat nor all clamped


def run(pipe, noise, cond, uncond=None, **how):
    return pipeline.pixels(pipe, pipeline.sample(pipe, cond, uncond, noise, steps=4, **how))


def test_wan_from_text(saved):
    folder, pipe = saved("WanPipeline")
    noise, said = draw(2, 4, 3, 6, 10), [" the&nbsp;cat  &amp;amp; mars\n", PROMPTS[1]]
    wanted = theirs("WanPipeline")(said, NEGATIVE, 48, 80, 9, 4, 5.0, latents=noise).frames
    cond, uncond = pipeline.texts(pipe, said), pipeline.texts(pipe, NEGATIVE)
    assert cond["encoder_hidden_states"].shape == (2, 512, 24)
    close(run(pipe, noise, cond, uncond), wanted)


def picture(height, width, seed=3):
    x = draw(3, height // 8 + 1, width // 8 + 1, seed=seed)[None]
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic")[0].mul(50).add(128).clamp(0, 255)
    return Image.fromarray(x.to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("last", ["", "last"])
def test_wan_from_an_image(last, saved):
    folder, pipe = saved("WanImageToVideoPipeline", last)
    noise, frames = draw(2, 4, 3, 6, 10), [picture(48, 80), picture(48, 80, 4)][: 1 + bool(last)]
    wanted = theirs("WanImageToVideoPipeline", last)(
        frames[0], PROMPTS, NEGATIVE, 48, 80, 9, 4, 4.0, latents=noise, last_image=frames[1] if last else None).frames
    given = [gallery.resized(x, 48, 80)[None].expand(2, -1, -1, -1) for x in frames]
    cond = pipeline.texts(pipe, PROMPTS) | pipeline.conditions(pipe, given[0], 9, *given[1:])
    assert cond["condition"].shape == (2, 8, 3, 6, 10)
    close(run(pipe, noise, cond, pipeline.texts(pipe, NEGATIVE), guidance=4.0), wanted)


def test_wan_from_a_video(saved):
    folder, pipe = saved("WanVideoToVideoPipeline")
    video = [picture(48, 80, i) for i in range(9)]
    wanted = theirs("WanVideoToVideoPipeline")(video, PROMPTS[:1], NEGATIVE[:1], 48, 80, 4, strength=0.6,
                                               generator=torch.Generator().manual_seed(5)).frames
    noise = draw(1, 4, 3, 6, 10, seed=5)
    x = torch.stack([gallery.resized(v, 48, 80) for v in video], 1)[None]
    start = pipeline.latents(pipe, x), 0.6
    cond, uncond = pipeline.texts(pipe, PROMPTS[:1]), pipeline.texts(pipe, NEGATIVE[:1])
    close(run(pipe, noise, cond, uncond, start=start), wanted)


def packed(x):
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def test_flux_from_text(saved):
    """With guidance as an input, and with a negative prompt besides."""
    folder, pipe = saved("FluxPipeline")
    noise, ref = draw(2, 16, 8, 12), theirs("FluxPipeline")
    how = {"height": 16, "width": 24, "num_inference_steps": 4, "latents": packed(noise), "output_type": "np",
           "max_sequence_length": 16}
    cond, uncond = pipeline.texts(pipe, PROMPTS), pipeline.texts(pipe, NEGATIVE)
    assert cond["encoder_hidden_states"].shape == (2, 16, 24) and cond["pooled_projections"].shape == (2, 12)
    close(run(pipe, noise, cond), ref(PROMPTS, guidance_scale=3.5, **how).images)
    wanted = ref(PROMPTS, negative_prompt=NEGATIVE, true_cfg_scale=2.0, guidance_scale=1.5, **how).images
    close(run(pipe, noise, cond, uncond, guidance=1.5, true_guidance=2.0), wanted)


def test_flux_schnell(saved):
    folder, pipe = saved("FluxPipeline", "schnell")
    noise = draw(1, 16, 8, 12)
    wanted = theirs("FluxPipeline", "schnell")(PROMPTS[:1], height=16, width=24, num_inference_steps=4, guidance_scale=0,
                                               latents=packed(noise), output_type="np", max_sequence_length=16).images
    close(run(pipe, noise, pipeline.texts(pipe, PROMPTS[:1])), wanted)
    assert pipeline.defaults(pipe)["steps"] == 4
    with pytest.raises(ValueError, match="guidance is 3.5, but this model has none"):
        pipeline.plan(pipe, noise.shape, guidance=3.5)


def test_flux_from_an_image(saved):
    """Their latents of the image are given to them as ours are to us; how they are made is compared besides."""
    folder, pipe = saved("FluxImg2ImgPipeline")
    ref, x = theirs("FluxImg2ImgPipeline"), gallery.resized(picture(30, 50), 16, 24)[None]
    z = pipeline.latents(pipe, x)
    scale = ref.vae.config
    wanted = (ref.vae.encode(x).latent_dist.mode() - scale.shift_factor) * scale.scaling_factor
    assert (z - wanted).abs().max() < 1e-5
    wanted = ref(PROMPTS[:1], image=z, height=16, width=24, strength=0.6, num_inference_steps=4, guidance_scale=7.0,
                 generator=torch.Generator().manual_seed(5), output_type="np", max_sequence_length=16).images
    noise = draw(1, 16, 8, 12, seed=5)
    close(run(pipe, noise, pipeline.texts(pipe, PROMPTS[:1]), start=(z, 0.6), guidance=7.0), wanted)


def test_flux_kontext(saved):
    folder, pipe = saved("FluxKontextPipeline")
    noise, image = draw(1, 16, 8, 12), picture(20, 28)
    wanted = theirs("FluxKontextPipeline")(image, PROMPTS[:1], height=16, width=24, num_inference_steps=4, max_area=384,
                                           guidance_scale=2.5, latents=packed(noise), output_type="np",
                                           max_sequence_length=16, _auto_resize=False).images
    z = pipeline.latents(pipe, gallery.resized(image, 20, 28)[None])
    close(run(pipe, noise, pipeline.texts(pipe, PROMPTS[:1]) | {"image_latents": [z]}), wanted)


@pytest.mark.parametrize("solver", ["flow_euler", "dpm", "unipc"])
def test_another_sampler_and_shift(solver, saved):
    folder, pipe = saved("WanPipeline")
    ref, noise = theirs("WanPipeline"), draw(1, 4, 2, 4, 6)
    flow = FLOW | {"flow_shift": 2.0}
    ref.scheduler, was = {"flow_euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
                          "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
                          "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow)}[solver](), ref.scheduler
    wanted = ref(PROMPTS[:1], NEGATIVE[:1], 32, 48, 5, 4, 5.0, latents=noise).frames
    ref.scheduler = was
    cond, uncond = pipeline.texts(pipe, PROMPTS[:1]), pipeline.texts(pipe, NEGATIVE[:1])
    mine = run(pipe, noise, cond, uncond, solver=solver, shift=2.0)
    close(mine, wanted)
    assert (mine - run(pipe, noise, cond, uncond)).abs().max() > 1e-2


def test_a_dynamic_shift_is_the_same_for_other_samplers(saved):
    """flow_heun's first step equals that of Euler's method at the same times; dpm of order 1 is Euler's method."""
    folder, pipe = saved("FluxPipeline")
    size, mu = (1, 16, 8, 12), 0.5 + (1.15 - 0.5) / (4096 - 256) * (24 - 256)
    ours = {n: pipeline.plan(pipe, size, steps=4, solver=n).table for n in (None, "flow_euler", "unipc", "flow_heun")}
    assert torch.equal(ours[None].timesteps, ours["flow_euler"].timesteps)
    shifted = lambda s: np.exp(mu) / (np.exp(mu) + 1 / s - 1)
    assert np.allclose(ours[None].timesteps, 1000 * shifted(np.linspace(1, 0.25, 4)), atol=1e-2)
    fixed = pipeline.plan(pipe, size, steps=4, mu=mu).table.timesteps
    assert torch.allclose(ours[None].timesteps, fixed)
    assert abs(ours["unipc"].timesteps[1] / 1000 - shifted(0.75)) < 2e-3
    with pytest.raises(ValueError, match="no sampler 'ddim' of flows; there are flow_euler, flow_heun, unipc, dpm"):
        pipeline.plan(pipe, size, solver="ddim")


# folders


def same(a, b):
    mine, wanted = a.state_dict(), b.state_dict()
    return mine.keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in mine.items())


@pytest.mark.parametrize("kind", ["WanImageToVideoPipeline", "FluxPipeline"])
def test_folders_go_both_ways(kind, saved, tmp_path):
    folder, pipe = saved(kind)
    (tmp_path / "b" / "old").mkdir(parents=True)
    pipeline.export(tmp_path / "b", pipe)
    convolutions = [t for t in tree.leaves(pipe.vae.params) if t.ndim > 3]  # they lie as their kernels read them
    assert convolutions and all(t.stride(1) == 1 for t in convolutions)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"] and not (tmp_path / "b" / "old").exists()
    again, ref = getattr(diffusers, kind).from_pretrained(tmp_path / "b"), theirs(kind)
    models = [n for n, v in ref.components.items() if isinstance(v, torch.nn.Module)]
    assert len(models) == 4 and all(same(getattr(again, n), getattr(ref, n)) for n in models)
    for n in ("tokenizer", "tokenizer_2"):
        if n in ref.components:
            assert getattr(again, n)(PROMPTS)["input_ids"] == getattr(ref, n)(PROMPTS)["input_ids"]
    assert again.scheduler.config.items() >= {k: v for k, v in ref.scheduler.config.items() if k[0] != "_"}.items()
    back = pipeline.load(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(pipe.transformer.params),
                                                 tree.leaves(back.transformer.params)))
    assert back.lengths == pipe.lengths and back.scheduler == pipe.scheduler


def test_one_part_is_trained_and_the_others_are_carried(saved, tmp_path):
    folder, _ = saved("FluxPipeline")
    pipe = pipeline.load(folder, ["transformer"], torch.bfloat16)
    assert pipe.vae.params is None and pipe.text == () and pipe.lengths == ()
    assert all(t.dtype == torch.bfloat16 for t in tree.leaves(pipe.transformer.params))
    doubled = replace(pipe.transformer, params=tree.map(lambda t: 2 * t.float(), pipe.transformer.params))
    pipeline.export(tmp_path / "b", replace(pipe, transformer=doubled))
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "b")
    for n in ("vae", "text_encoder", "text_encoder_2"):
        assert same(getattr(again, n), getattr(theirs("FluxPipeline"), n))
    assert torch.equal(again.transformer.proj_out.weight,
                       2 * theirs("FluxPipeline").transformer.proj_out.weight.bfloat16().float())
    with pytest.raises(ValueError, match=r"the vae of .* is not loaded: load\(..., parts=\['vae'\]\)"):
        pipeline.pixels(pipe, draw(1, 16, 8, 8))
    with pytest.raises(ValueError, match="the text of .* is not loaded"):
        pipeline.texts(pipe, ["x"])
    mixed = pipeline.load(folder, ("transformer", "vae"), {"transformer": torch.bfloat16})
    assert {t.dtype for t in tree.leaves(mixed.vae.params)} == {torch.float32}
    assert pipeline.latents(mixed, draw(1, 3, 16, 16)).dtype == torch.float32


class Wide(TorchDispatchMode):
    """Counts the matrix products in float32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution)
        self.count += func.overloadpacket in products and args[1].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["WanPipeline", "WanImageToVideoPipeline", "FluxPipeline"])
def test_bf16_is_where_diffusers_has_it(kind, saved, monkeypatch):
    """Wan's time embedding, offsets and the norms beside them stay in float32; all products but that embedding's are
    bf16, as theirs."""
    monkeypatch.setattr(wide, "slow", tuple)  # whatever this CPU does with them
    folder, _ = saved(kind)
    ref = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.bfloat16)
    low = pipeline.load(folder, dtype=torch.bfloat16)
    for part, theirs in ((low.transformer, ref.transformer), (low.vae, ref.vae)):
        table, declared = models.table(part.family, part.config), tree.flatten(part.family.params(part.config))
        names, found = dict(theirs.named_parameters()), tree.flatten(part.params)
        assert {n: t.dtype for n, t in found.items()} == {
            n: names[place.name].dtype for n, place in keys.lookup(declared, table).items()}
    texts = [ref.text_encoder, *([ref.text_encoder_2] if "Flux" in kind else [])]
    assert {t.dtype for e in texts for t in e.parameters()} == {torch.bfloat16} == {
        t.dtype for part, _ in low.text for t in tree.leaves(part.params)}
    c, g = low.transformer.config, torch.Generator().manual_seed(2)
    x = torch.randn(1, c.channels, *((3, 6, 10) if kind.startswith("Wan") else (6, 10)), generator=g).bfloat16()
    cond = pipeline.texts(low, ["cat"]) | ({"guidance": x.new_full((1,), 3.5)} if "Flux" in kind else {})
    cond |= pipeline.conditions(low, draw(1, 3, 48, 80), 9) if "Image" in kind else {}
    with torch.no_grad(), Wide() as mine:
        y = low.transformer.family.predict(low.transformer.params, c, x, torch.tensor([0.5]), cond)
    b = tree.map(lambda t: t.bfloat16(), cond) | {"t": torch.tensor([0.5])}
    with torch.no_grad(), Wide() as their:
        wanted = velocity(kind.lower(), b, x, ref.transformer)
    assert mine.count == their.count == 2 * kind.startswith("Wan")
    assert y.dtype == wanted.dtype == torch.bfloat16 and (y - wanted).float().std() < 0.02 * wanted.float().std()


@pytest.mark.parametrize("kind", ["WanImageToVideoPipeline", "FluxKontextPipeline"])
def test_from_scratch_to_a_folder_that_diffusers_runs(kind, saved, tmp_path):
    """Random weights, and the tokenizers of another pipeline written as our own files."""
    _, pipe = saved(kind)
    bare = lambda part: replace(part, params=None) if part else None
    made = pipeline.scratch(kind, bare(pipe.transformer), bare(pipe.vae), [(bare(p), w) for p, w in pipe.text],
                            bare(pipe.image), key=random.key(0), limits=(pipe.lengths if "Flux" in kind else ()))
    full = tree.init(tree.map(lambda p: replace(p, init=tree.normal(0.2)), made.transformer.family.params(
        made.transformer.config)), random.key(1))
    made = replace(made, transformer=replace(made.transformer, params=full))
    assert made.lengths == pipe.lengths
    pipeline.export(tmp_path / "a", made)
    ref = getattr(diffusers, kind).from_pretrained(tmp_path / "a")
    ref.set_progress_bar_config(disable=True)
    back = pipeline.load(tmp_path / "a")
    if kind.startswith("Wan"):
        noise, image = draw(1, 4, 2, 4, 6), picture(32, 48)
        wanted = ref(image, PROMPTS[:1], None, 32, 48, 5, 2, 1.0, latents=noise).frames
        cond = pipeline.conditions(back, gallery.resized(image, 32, 48)[None], 5)
        z = pipeline.sample(back, pipeline.texts(back, PROMPTS[:1]) | cond, None, noise, steps=2, guidance=1.0)
    else:
        noise = draw(1, 16, 8, 12)
        wanted = ref(None, PROMPTS[:1], height=16, width=24, num_inference_steps=2, max_area=384, guidance_scale=2.5,
                     latents=packed(noise), output_type="np", max_sequence_length=16).images
        z = pipeline.sample(back, pipeline.texts(back, PROMPTS[:1]), None, noise, steps=2)
    x, wanted = pipeline.pixels(back, z), torch.as_tensor(np.asarray(wanted)).movedim(-1, 1) * 2 - 1
    assert (x - wanted).abs().max() < 1e-4 and x.std() > 1e-3


def test_pixels_in_place_of_latents(saved, tmp_path):
    _, pipe = saved("WanPipeline")
    c = replace(pipe.transformer.config, channels=3)
    made = pipeline.scratch("WanPipeline", pipeline.Part(pipe.transformer.family, c), None, pipe.text, key=random.key(0))
    pipeline.export(tmp_path / "a", made)
    assert json.loads((tmp_path / "a" / "model_index.json").read_text())["vae"] == [None, None]
    with pytest.raises(ValueError, match="only one of them has vae"):
        pipeline.export(tmp_path / "b", made, like=saved("WanPipeline")[0])
    back = pipeline.load(tmp_path / "a")
    assert back.vae is None and pipeline.shape(back, 10, 14, 3) == (3, 3, 10, 14)
    x = draw(1, 3, 3, 10, 14)
    assert torch.equal(pipeline.latents(back, x), x) and torch.equal(pipeline.pixels(back, x), x.clamp(-1, 1))
    z = pipeline.sample(back, pipeline.texts(back, ["cat"]), None, x.shape, steps=2, guidance=1.0, key=random.key(1))
    assert z.shape == x.shape and z.isfinite().all()


def test_adapters_of_diffusers(saved, tmp_path):
    from diffusion_references import adapters
    folder, pipe = saved("FluxPipeline")
    ref = diffusers.FluxPipeline.from_pretrained(folder)
    ref.set_progress_bar_config(disable=True)
    adapters(ref.transformer, ["to_q", "to_v"], {}, {})
    from peft.utils import get_peft_model_state_dict
    diffusers.FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(ref.transformer))
    noise = draw(1, 16, 8, 12)
    z = pipeline.sample(pipeline.adapted(pipe, tmp_path), pipeline.texts(pipe, PROMPTS[:1]), None, noise, steps=2)
    ref.load_lora_weights(tmp_path, adapter_name="again")
    ref.set_adapters(["again"])
    wanted = ref(PROMPTS[:1], height=16, width=24, num_inference_steps=2, latents=packed(noise), output_type="latent",
                 max_sequence_length=16).images
    assert (packed(z) - wanted).abs().max() < 1e-4
    plain = pipeline.sample(pipe, pipeline.texts(pipe, PROMPTS[:1]), None, noise, steps=2)
    assert (z - plain).abs().max() > 1e-2
    pipeline.export(tmp_path / "merged", pipeline.adapted(pipe, tmp_path))
    merged = pipeline.load(tmp_path / "merged")
    again = pipeline.sample(merged, pipeline.texts(pipe, PROMPTS[:1]), None, noise, steps=2)
    assert (again - z).abs().max() < 1e-4
    low = pipeline.adapted(pipeline.load(folder, dtype=torch.bfloat16), tmp_path)
    assert {t.dtype for t in tree.leaves(low.transformer.params)} == {torch.bfloat16}
    again = pipeline.sample(low, pipeline.texts(low, PROMPTS[:1]), None, noise, steps=2)
    assert again.isfinite().all()


@pytest.mark.parametrize("kind", ["FluxPipeline", "WanPipeline"])
def test_convert_merges_adapters_into_a_pipeline(kind, saved, tmp_path):
    """diffusers' file into FLUX, ComfyUI's into Wan; in bf16, where Wan keeps some of it in float32."""
    folder, pipe = saved(kind)
    part = pipe.transformer
    declared = lora.LoRA(part.family.params(part.config), 2, r"(self|attention)\.(q|v)$", 4)
    added = tree.select(tree.map(lambda p: replace(p, init=tree.normal(0.1)), declared), r"\.lora_[ab]$")
    scales = tree.select(tree.init(declared, random.key(0)), r"lora_scale$")
    wide = tree.merge(tree.merge(part.params, tree.init(added, random.key(1))), scales)
    comfy = kind.startswith("Wan")
    table = part.family.ORIGINAL(part.config) if comfy else models.table(part.family, part.config)
    lora.export_weights(tmp_path / "l.safetensors", wide, table, prefix="diffusion_model." if comfy else "transformer.")
    convert.main(convert.Args(folder, tmp_path / "full", tmp_path / "l.safetensors"))
    merged, back = tree.flatten(lora.merge(wide)), tree.flatten(pipeline.load(tmp_path / "full").transformer.params)
    assert all((t - back[n]).abs().max() < 1e-6 for n, t in merged.items())
    assert sum(not torch.equal(t, tree.at(part.params, n)) for n, t in back.items()) == len(tree.leaves(scales))
    convert.main(convert.Args(folder, tmp_path / "low", tmp_path / "l.safetensors", "bf16"))
    low = pipeline.load(tmp_path / "low")
    want = tree.flatten(pipeline.load(folder, dtype=torch.bfloat16).transformer.params)
    assert {n: t.dtype for n, t in tree.flatten(low.transformer.params).items()} == {n: t.dtype for n, t in want.items()}
    assert all((t - back[n]).abs().max() <= 0.01 * back[n].abs().max() for n, t in tree.flatten(low.transformer.params).items())
    assert {t.dtype for p in (low.vae, low.text[0][0]) for t in tree.leaves(p.params)} == {torch.bfloat16}
    getattr(diffusers, kind).from_pretrained(tmp_path / "low", torch_dtype=torch.bfloat16)
    nan = replace(part, params=tree.map(lambda t: t * float("nan"), part.params))
    pipeline.export(tmp_path / "nan", replace(pipe, transformer=nan))
    with pytest.raises(ValueError, match=r"tensors of .*/nan/transformer have values that are not finite"):
        convert.main(convert.Args(tmp_path / "nan"))


# properties


def test_a_sample_does_not_depend_on_its_neighbours(saved):
    """To the bit: features, latents and their noise, pixels, noise of a key."""
    _, wan_pipe = saved("WanImageToVideoPipeline")
    _, flux_pipe = saved("FluxPipeline")
    for pipe, x in ((wan_pipe, draw(3, 3, 5, 32, 48)), (flux_pipe, draw(3, 3, 16, 24))):
        all_of, one = pipeline.texts(pipe, [*PROMPTS, "cat"]), pipeline.texts(pipe, PROMPTS[1:])
        assert all(torch.equal(v[1:2], one[k]) for k, v in all_of.items())
        key = random.key(4)
        z = pipeline.latents(pipe, x, key)
        assert torch.equal(z[:1], pipeline.latents(pipe, x[:1], key))
        assert torch.equal(z[1:2], pipeline.latents(pipe, x[1:2], random.split(key)[1:]))
        mode = pipeline.latents(pipe, x)
        assert torch.equal(mode[2:], pipeline.latents(pipe, x[2:])) and not torch.equal(mode, z)
        assert torch.equal(pipeline.pixels(pipe, z)[1:2], pipeline.pixels(pipe, z[1:2]))
    drawn, keys = pipeline.texts(flux_pipe, PROMPTS), random.split(random.key(5))
    z = pipeline.sample(flux_pipe, drawn, None, (2, 16, 8, 12), steps=1, key=random.key(5))
    alone = pipeline.sample(flux_pipe, {k: v[1:] for k, v in drawn.items()}, None, (1, 16, 8, 12), steps=1, key=keys[1:])
    assert (z[1:] - alone).abs().max() < 1e-5 and (z[0] - z[1]).abs().max() > 0.1
    seen = pipeline.conditions(wan_pipe, draw(2, 3, 32, 48), 5)
    alone = pipeline.conditions(wan_pipe, draw(2, 3, 32, 48)[1:], 5)
    assert all(torch.equal(v[1:], alone[k]) for k, v in seen.items())


def test_compiled_sampling_is_one_graph_and_equal(saved):
    _, pipe = saved("WanPipeline")
    cond, uncond, told = pipeline.texts(pipe, PROMPTS), pipeline.texts(pipe, NEGATIVE), []
    made = pipeline.plan(pipe, (2, 4, 2, 4, 6), steps=3, backend="aot_eager")
    for seed in (0, 1):
        how = {"key": random.key(seed), "noise": (2, 4, 2, 4, 6)}
        z = pipeline.sample(pipe, cond, uncond, made=made, tell=lambda i, n: told.append((i, n)), **how)
        wanted = pipeline.sample(pipe, cond, uncond, steps=3, **how)
        assert (z - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert len(made.call.entries) == 1 and told == [(1, 3), (2, 3), (3, 3)] * 2


def test_what_a_prompt_loses_is_told(saved):
    """One warning that counts; strict: an error where no encoder reads all of it."""
    _, wan_pipe = saved("WanPipeline")
    _, pipe = saved("FluxPipeline")
    with pytest.warns(UserWarning) as told:
        found = pipeline.texts(pipe, ["cat", "a photo of the cat " * 5, "the cat " * 7])
    assert len(told) == 1 and found["encoder_hidden_states"].shape[1] == 16
    assert "2 of 3 prompts are longer than the 12 tokens of text_encoder and lose up to 15; 1 of 3" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.texts(wan_pipe, PROMPTS)
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer than the 12 tokens of text_encoder and lose up to 4"):
        pipeline.texts(pipe, ["the cat " * 7], strict=True)  # text_encoder_2 reads it to its end
    with pytest.raises(ValueError, match="1 of 2 prompts are longer than the 4 tokens of text_encoder and lose up to 1"):
        pipeline.texts(wan_pipe, ["cat", "a photo of cat"], 4, strict=True)
    assert pipeline.texts(wan_pipe, ["cat"], 7)["encoder_hidden_states"].shape == (1, 7, 24)


def test_what_does_not_fit_is_told(saved, tmp_path):
    folder, pipe = saved("FluxPipeline")
    _, video = saved("WanImageToVideoPipeline")
    _, plain = saved("WanPipeline")
    for said, match in (({"_class_name": "SanaPipeline"}, "'SanaPipeline' are not known; there are WanPipeline"),
                        ({"_class_name": "WanPipeline", "boundary_ratio": 0.9}, "has boundary_ratio"),
                        ({}, "has no _class_name")):
        (tmp_path / "model_index.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=match):
            pipeline.load(tmp_path)
    shutil.copytree(folder, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match="lacks text_encoder_2/, which its model_index.json names"):
        pipeline.load(tmp_path / "a")
    assert pipeline.load(tmp_path / "a", ["vae"]).vae.params
    with pytest.raises(FileNotFoundError, match="lacks text_encoder_2/"):
        pipeline.export(tmp_path / "b", pipeline.load(tmp_path / "a", ["vae"]))
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".b*"))
    with pytest.raises(ValueError, match="no part unet; it has transformer, vae, text, image"):
        pipeline.load(folder, ["unet"])
    with pytest.raises(FileNotFoundError, match="no model_index.json; give the folder of a whole"):
        pipeline.load(folder / "vae")
    with pytest.raises(ValueError, match="10 frames: there must be 4k [+] 1, such as 9"):
        pipeline.shape(video, 48, 80, 10)
    with pytest.raises(ValueError, match="50 x 80 pixels: .* multiples of 16 and 16, such as 48 x 80"):
        pipeline.shape(video, 50, 80, 9)
    with pytest.raises(ValueError, match="such as 16 x 4"):
        pipeline.shape(pipe, 17, 1)
    with pytest.raises(ValueError, match="guidance 5.0 needs the features of a negative prompt"):
        pipeline.sample(plain, {}, None, draw(1, 4, 2, 4, 6))
    with pytest.raises(ValueError, match="takes no first frame: its transformer has no channels"):
        pipeline.conditions(plain, draw(1, 3, 32, 48), 5)
    with pytest.raises(ValueError, match="takes no last frame: its transformer has no places"):
        pipeline.conditions(video, draw(1, 3, 32, 48), 5, draw(1, 3, 32, 48))
    z = draw(2, 16, 8, 12)
    z[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latents of 'cat', seed 7 are not finite"):
        pipeline.pixels(pipe, z, names=["'dog', seed 6", "'cat', seed 7"])


def test_presets_go_with_parts_that_fit():
    for family in ("wan", "flux"):
        for name, row in models.get(f"{family}:tiny")[0].PARTS.items():
            c, vae = models.get(f"{family}:{name}")[1], models.get(row["vae"])[1]
            widths = [models.get(n)[1].width for n in row["text"]]
            assert vae.latent == c.channels and widths[-1] == c.text and widths[0] == getattr(c, "pooled", c.text)
            assert ("image" in row) == bool(getattr(c, "condition", 0))
            assert "image" not in row or models.get(row["image"])[1].width == c.image
            pipe = pipeline.Pipeline(None, row["kind"], pipeline.Part(models.get(f"{family}:{name}")[0], c),
                                     pipeline.Part(models.get(row["vae"])[0], vae), (), None,
                                     sampler.to_config(row["sampler"][0], **row["sampler"][1]))
            assert pipeline.defaults(pipe)["length"] == row["length"]
            size = pipeline.shape(pipe, *row["size"], row.get("frames"))
            assert pipeline.plan(pipe, size).table.name == row["sampler"][0] and len(size) == 4 - (family == "flux")
