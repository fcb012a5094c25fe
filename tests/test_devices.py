"""That nothing is left behind on the CPU: models on a device that is not here, by shapes only.

An operation of tensors of two devices is an error there, as it is on the device. In the environment with torch_npu, and
run by `make test-ascend`.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is in an environment of its own: make test-ascend", allow_module_level=True)

import meshes
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmfunc import bundle, generate, jit, pipeline, random, tree
from mmfunc.kernels.ge import lowering  # noqa: F401  loads torch_npu
from mmfunc.models import flux, sd_vae, wan, wan_vae
from mmfunc.recipes import Part

DEVICE = "npu:0"


class Elsewhere:
    """Within, tensors have shapes only; called it puts a tree on the device."""

    def __enter__(self):
        self.modes = FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad()
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def __call__(self, t):
        fake = lambda x: self.modes[0].from_tensor(x) if isinstance(x, Tensor) else x
        return tree.put(tree.map(fake, t), DEVICE)


@pytest.mark.parametrize("name", meshes.CASES)
def test_losses(name):
    one = meshes.CASES[name]()
    batch = one.batch([0, 1])
    with Elsewhere() as put:
        assert str(one.loss(put(one.params), one.c, put(batch)).device) == DEVICE


@pytest.mark.parametrize("how", [None, generate.Sampling(0.7, 5, 0.9, 1.2)])
def test_generation(how):
    """A prompt in two parts, then token by token."""
    one, batch = meshes.CASES["qwen2"](), {"input_ids": meshes.words(3, 2, 6), "attention_mask": torch.ones(2, 6)}
    unseen = mock.patch.object(FakeTensor, "tolist", lambda self: [1] * len(self))
    with Elsewhere() as put, unseen, mock.patch.object(jit, "check_donated"):  # tensors without memory share it
        out = generate.generate(one.module, put(one.params), one.c, put(batch), new=3, how=how, chunk=4,
                                key=random.key(1, DEVICE))
    assert out == [[1] * 3] * 2


@pytest.mark.parametrize("kind, model, vae, frames", [
    ("FluxPipeline", (flux, flux.PRESETS["tiny"]), sd_vae, {}),
    ("WanPipeline", (wan, replace(wan.PRESETS["tiny"], channels=4)), wan_vae, {"frames": 5})])
def test_sampling(kind, model, vae, frames):
    part = lambda family, c: Part(family, c, tree.init(family.params(c), random.key(1)))
    pipe = bundle.scratch(kind, part(*model), part(vae, vae.PRESETS["tiny"]), key=random.key(0))
    c, shape = pipe.transformer.config, (2, *pipeline.shape(pipe, 16, 16, **frames))
    texts = {"encoder_hidden_states": torch.ones(2, 4, c.text)}
    texts |= {"pooled_projections": torch.ones(2, c.pooled)} if kind == "FluxPipeline" else {}
    made = pipeline.plan(pipe, shape, steps=3)
    with Elsewhere() as put:
        there = lambda part: replace(part, params=put(part.params))
        pipe = replace(pipe, transformer=there(pipe.transformer), vae=there(pipe.vae))
        key, texts = random.split(random.key(3, DEVICE)), put(texts)
        z = pipeline.sample(pipe, texts, texts if made.scale > 1 else None, shape, key=key, made=made)
        x = pipe.vae.family.decode(pipe.vae.params, pipe.vae.config, z)
        assert str(z.device) == str(x.device) == DEVICE


def test_the_profiler_of_npus_is_there(tmp_path):
    """With the names that mmfunc uses of it; no device has run it. In a process of its own: it writes a file at its end."""
    use = "import pathlib; from mmfunc import profile; print(callable(profile._npu(pathlib.Path('.')).start))"
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, text=True, capture_output=True)
    assert "True" in done.stdout.splitlines(), done.stderr
