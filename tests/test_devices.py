"""That nothing is left behind on the CPU: models on a device that is not here, by shapes only.

An operation of tensors of two devices is an error there, as it is on the device. What has gradients is shown on an NPU
that is not there either (test_ge).
"""

from unittest import mock

import meshes
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmfunc import bundle, generate, pipeline, random, tree
from mmfunc.models import flux, sd_vae, wan, wan_vae
from mmfunc.recipes import Part

DEVICE = "cuda:0"


@pytest.fixture
def elsewhere():
    """tree -> the same on the device."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x
        yield lambda t: tree.put(tree.map(fake, t), DEVICE)


@pytest.mark.parametrize("name", meshes.CASES)
def test_losses(name, elsewhere):
    one = meshes.CASES[name]()
    loss = one.loss(elsewhere(one.params), one.c, elsewhere(one.batch([0, 1])))
    assert str(loss.device) == DEVICE


@pytest.mark.parametrize("how", [None, generate.Sampling(0.7, 5, 0.9, 1.2)])
def test_generation(how, elsewhere):
    """A prompt in two parts, then token by token."""
    one = meshes.CASES["qwen2"]()
    batch = elsewhere({"input_ids": meshes.words(3, 2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)})
    with mock.patch.object(FakeTensor, "tolist", lambda self: [1] * len(self)):
        out = generate.generate(one.module, elsewhere(one.params), one.c, batch, new=3, how=how, chunk=4,
                                key=random.key(1, DEVICE))
    assert out == [[1] * 3] * 2


@pytest.mark.parametrize("kind, model, vae, size", [
    ("FluxPipeline", flux, sd_vae, {}), ("WanPipeline", wan, wan_vae, {"frames": 5})])
def test_sampling(kind, model, vae, frames, elsewhere):
    part = lambda family, c: Part(family, c, elsewhere(tree.init(family.params(c), random.key(1))))
    pipe = bundle.scratch(kind, part(model, model.PRESETS["tiny"]), part(vae, vae.PRESETS["tiny"]), key=random.key(0))
    shape = 2, *pipeline.shape(pipe, 16, 16, **frames)
    texts = elsewhere({"encoder_hidden_states": torch.ones(2, 4, pipe.transformer.config.text)})
    texts |= elsewhere({"pooled_projections": torch.ones(2, pipe.transformer.config.pooled)}) if "Flux" in kind else {}
    made = pipeline.plan(pipe, shape, steps=3)
    key = random.split(random.key(3, DEVICE))
    z = pipeline.sample(pipe, texts, texts if made.scale > 1 else None, shape, key=key, made=made)
    x = pipe.vae.family.decode(pipe.vae.params, pipe.vae.config, z)
    assert str(z.device) == str(x.device) == DEVICE
