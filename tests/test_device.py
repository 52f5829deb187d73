"""python -m pytest tests/test_device.py

No GPU is needed: torch's fake tensors have shapes, dtypes and a device "cuda", but no numbers. An operation on tensors
of two devices is an error with them, as it is on a GPU, and a test can see when the CPU would wait for the device.
"""
from dataclasses import replace

import pytest
import torch
import world
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eval_gqa
import fork
import knockout
import lens
import llava_min
import llava_onevision
import prune
from groups import token_groups

pytestmark = pytest.mark.slow
KINDS = ["llava-1.5", "llama3-next", "vicuna", "onevision-tied"]


class Watch(TorchDispatchMode):
    """Answer where a number is asked for, which no fake tensor has. If the device would have it, the CPU waits for it:
    note in which layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.waits = None, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0] if args else None
        if f in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            if first.device.type == "cuda":
                self.waits.append(self.layer)
            if first.dtype == torch.bool:                           # is all finite? Yes. Has a query no key? No.
                return first.device.type == "cuda"
            return 1.0 if first.is_floating_point() else 1
        if isinstance(first, FakeTensor):
            first.constant = None                                   # torch.tensor([1, 2]) keeps its numbers
        out = f(*args, **(kwargs or {}))
        if all(isinstance(t, torch.Tensor) for t in (first, out)) and (
                (first.device.type, out.device.type) == ("cuda", "cpu")):
            self.waits.append(self.layer)
        return out


class Counted(torch.nn.ModuleList):
    """A decoder's layers; watch.layer is the number of the one whose turn it is, None outside the loop."""
    watch = None

    def __iter__(self):
        try:
            for i, layer in enumerate(super().__iter__()):
                self.watch.layer = i
                yield layer
        finally:
            self.watch.layer = None


@pytest.fixture(params=KINDS)
def gpu(request, checkpoint):
    """(a model whose weights are all on a device "cuda", a prompt, its token groups, a Watch that is on)."""
    folder = checkpoint(request.param)
    family = llava_onevision if "onevision" in request.param else llava_min
    real = family.load(folder)                                      # a tokenizer works with real numbers
    words = "Is the cup red or blue?"
    prompt = real.prompt(words, world.picture(90, 60)) if real.config.vision else real.prompt(words, captions="a cup.")
    groups = token_groups(prompt)
    with torch.device("meta"):
        model = family.LLaVA(real.config)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch() as watch:
        photo = {name: fake.from_tensor(getattr(prompt, name)) for name in ("positions", "pixels", "slots")
                 if getattr(prompt, name) is not None}              # as they are, on the CPU
        model = model.to_empty(device="cuda").eval().requires_grad_(False)
        model.tokenizer, model.stop, model.special = real.tokenizer, {2}, real.special
        model.decoder.layers = Counted(model.decoder.layers)
        Counted.watch = watch
        photo["positions"] = photo["positions"].to("cuda")
        yield model, replace(prompt, **photo), groups, watch


def test_nothing_is_left_on_the_cpu_and_no_layer_waits_for_the_device(gpu):
    model, p, groups, watch = gpu
    d, x = model.decoder, model.embed(p)
    assert x.device.type == "cuda" and not watch.waits
    clean = fork.clean_pass(d, x, p.positions)
    question, last, T, L = groups.positions("question"), [len(p) - 1], len(p), len(d.layers)
    image = groups.positions("image") if model.config.vision else [1, 2]
    cuts = [(question, last), (image, question), (image, last)]
    for heads in (None, [0, 2]):
        curves = knockout.sweep(d, clean, cuts, 5, 2, heads)
        assert len(curves) == 3 and len(curves[0]) == L
        assert len(knockout.curve(d, x, p.positions, image, last, 5, 2, heads)) == L
    assert lens.lens(d, clean.stream, [-1]).device.type == "cuda"
    lens.top_words(d, clean.stream, image, 3, "final")
    lens.module_curves(d, clean, question, 2)
    lens.edge_curve(d, clean, image, question, question, 2)
    lens.without(d, x, p.positions, question, "mlp", [1])
    for stay in ((), image[:1], 1):
        h, caches, _ = prune.prefill(d, x, p.positions, image, 1, stay)
        assert h.device.type == caches[-1][0].device.type == "cuda"
    logits = fork.unembed(d, h[:, -1])
    model.decode(logits, caches, T, 3)                              # one wait a token, after the layers
    eval_gqa.answers(model, [p, p], 2)
    assert watch.waits and set(watch.waits) == {None}, watch.waits


def test_a_watch_sees_a_wait_in_a_layer_and_a_tensor_that_was_left_behind(gpu):
    model, p, _, watch = gpu
    x = model.embed(p)
    for _ in model.decoder.layers:
        bool(x.isfinite().all()), x[0, 0].cpu()
    assert set(watch.waits) == {*range(len(model.decoder.layers))}
    with pytest.raises(Exception, match="device"):
        x + torch.zeros(x.shape)
