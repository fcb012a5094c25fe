"""Whole pipelines against diffusers: prompts through the tokenizers, the same noise, pixels in the end."""

import json
import warnings
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from references import redraw
from test_vaes import reference as autoencoder
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models

from mmfunc import gallery, pipeline, random, tree

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
    noise = draw(2, 4, 3, 6, 10)
    wanted = theirs("WanPipeline")(PROMPTS, NEGATIVE, 48, 80, 9, 4, 5.0, latents=noise).frames
    cond, uncond = pipeline.texts(pipe, PROMPTS), pipeline.texts(pipe, NEGATIVE)
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
