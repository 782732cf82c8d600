"Faster networks: they say what PyTorch says, and where they cannot, PyTorch runs."

import pickle
import warnings
from copy import copy, deepcopy

import pipeline_helpers as tiny
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from cf_guidance.attention import PAG
from cf_guidance.guided import Term
from cf_guidance.lab import backends
from cf_guidance.lab.backends import backend_of, with_backend
from cf_guidance.lab.sweeps import create_expts, run
from cf_guidance.pipelines import MinimalDiffusion, NegativePrompt, embedded_path, guided
from cf_guidance.transforms import GuidanceTfm

PROMPTS = ['a red sneaker on a blue background', 'a green bag']


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield backends._cache_folder()


@pytest.fixture(scope='module')
def plain(cache):
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope='module')
def fast(plain):
    return with_backend(plain)


@pytest.fixture(scope='module')
def small(cache):
    return tiny.sd(tiny.ddim())


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def ask(pipe, rows, height=8, **kw):
    x = torch.randn(rows, 4, height, 8, generator=tiny.seeded(rows))
    width = pipe.unet.config.cross_attention_dim
    text = torch.randn(rows, 12, width, generator=tiny.seeded(1))
    with torch.no_grad():
        return pipe.unet(x, torch.linspace(1, 900, rows), text, **kw)[0]


def draw(pipe, *terms, steps=20, **kw):
    g = [tiny.seeded(i) for i in range(len(PROMPTS))]
    sd = guided(pipe, *terms)
    return sd(PROMPTS, num_inference_steps=steps, generator=g, output_type='pt', **kw).images


@pytest.mark.parametrize('rows', [1, 2, 7, 24])
def test_onnx_is_torch(plain, fast, rows):
    assert backend_of(fast) == 'onnx'
    assert apart(ask(fast, rows), ask(plain, rows)) < 1e-6


def test_other_sizes(plain, fast):
    assert apart(ask(fast, 2, 16), ask(plain, 2, 16)) < 1e-6


def test_time_as_a_number(plain, fast):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, plain.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert apart(fast.unet(x, 500, text).sample, plain.unet(x, 500, text).sample) < 1e-6


def test_pictures(plain, fast):
    assert (draw(fast) - draw(plain)).abs().max() < 1e-4


def test_plain_pipeline_is_untouched(plain, fast):
    assert backend_of(plain) == 'torch'
    assert type(plain.unet).__reduce__ is torch.nn.Module.__reduce__
    assert fast.unet.conv_in is plain.unet.conv_in
    assert not plain.unet.training
    assert backend_of(with_backend(fast, 'torch')) == 'torch'
    assert with_backend(fast, 'torch').unet is plain.unet


def test_perturbed_layers_run_on_torch(plain):
    fast = with_backend(plain)
    with pytest.warns(UserWarning, match='onnx: PyTorch runs the network, since its layers are p'):
        found = draw(fast, NegativePrompt(), Term(PAG(fast.unet), 2.0), steps=4)
    with warnings.catch_warnings():  # it warns once
        warnings.simplefilter('error')
        draw(fast, Term(PAG(fast.unet), 2.0), steps=1)
    want = draw(plain, NegativePrompt(), Term(PAG(plain.unet), 2.0), steps=4)
    assert torch.equal(found, want)


def test_pag_in_an_interval_is_fast_outside_it(plain):
    fast, calls = with_backend(plain), []
    session = fast.unet._fast.run.session

    def counted(*args):
        calls.append(args)
        return session(*args)

    fast.unet._fast.run.session = counted
    with pytest.warns(UserWarning, match='perturbed'):
        draw(fast, Term(PAG(fast.unet), 2.0, interval=(1.0, 5.0)), steps=6)
    assert 0 < len(calls) < 6


@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('rows', [1, 2, 3, 16, 17, 50])
def test_each_thread_runs_some_rows(small, threads, rows):
    run, seen = with_backend(small, 'onnx').unet._fast.run, []
    run.session.threads = threads
    session = run.session.with_threads(1)

    class Session:
        def run(self, names, given):
            seen.append(len(given['sample']))
            return session.run(names, given)

    run.session.sessions = {1: Session(), threads: Session()}
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(rows, 12, small.unet.config.cross_attention_dim)
    t = torch.linspace(1, 900, rows)
    with torch.no_grad():
        want = small.unet(x, t, text, return_dict=False)[0]
    found = run((x, t, text), {})
    assert torch.allclose(found, want, atol=1e-5)
    assert sum(seen) == rows
    assert max(seen) <= 16
    assert len(seen) >= threads or rows < threads


def test_gradients_run_on_torch(small):
    fast, x = with_backend(small), torch.randn(1, 4, 8, 8, requires_grad=True)
    text = torch.randn(1, 12, small.unet.config.cross_attention_dim)
    with pytest.warns(UserWarning, match='gradients are on'):
        fast.unet(x, 500, text).sample.sum().backward()
    assert x.grad.abs().sum() > 0


def test_changed_weights_run_on_torch():
    pipe = tiny.sd(tiny.ddim())
    fast = with_backend(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    text, x = torch.randn(1, 5, 16), torch.randn(1, 4, 8, 8)
    with torch.no_grad(), pytest.warns(UserWarning, match='have changed'):
        assert torch.equal(fast.unet(x, 5, text).sample, pipe.unet(x, 5, text).sample)


def test_other_inputs_run_on_torch(plain):
    fast = with_backend(plain)
    with pytest.warns(UserWarning, match='inputs of another kind'):
        found = ask(fast, 2, encoder_attention_mask=torch.ones(2, 12))
    assert torch.equal(found, ask(plain, 2, encoder_attention_mask=torch.ones(2, 12)))


@pytest.mark.parametrize('same', [copy, deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_plain(plain, fast, same):
    net = same(fast.unet)
    assert type(net) is type(plain.unet)
    assert torch.equal(net.conv_in.weight, plain.unet.conv_in.weight)


def test_minimal_diffusion(fast):
    md = MinimalDiffusion(progress=False)
    ours = with_backend(md)
    assert backend_of(ours) == 'onnx' and md.pipe is None
    tfm = GuidanceTfm({'g': [3.0] * 4})
    found, want = (o.sample(PROMPTS, tfm, 0) for o in (ours, MinimalDiffusion().load()))
    assert (found - want).abs().max() < 1e-4
    assert (MinimalDiffusion(fast).sample(PROMPTS, tfm, 0) - want).abs().max() < 1e-4


def test_run(plain):
    expts = create_expts({'g': [1.0, 4.0]}, num_steps=4)
    ours = with_backend(MinimalDiffusion(progress=False))
    assert (
        run(PROMPTS, expts, pipeline=ours)['pixels'] - run(PROMPTS, expts)['pixels']
    ).abs().max() < 1e-4


def test_bf16_is_near(plain):
    fast = with_backend(plain, 'bf16')
    assert backend_of(fast) == 'bf16' and plain.unet.dtype == fast.unet.dtype == torch.float32
    assert 1e-4 < apart(ask(fast, 2), ask(plain, 2)) < 0.1


def test_compile(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda net, **kw: net)  # the real one takes a minute
    pipe = tiny.sd(tiny.ddim())
    pipe.set_progress_bar_config(disable=True)
    assert (draw(with_backend(pipe, 'compile'), steps=2) - draw(pipe, steps=2)).abs().max() < 1e-4


FAMILIES = dict(
    xl=lambda: tiny.xl(tiny.euler_discrete()),
    sd3=lambda: tiny.sd3(FlowMatchEulerDiscreteScheduler(shift=3.0)),
)


@pytest.mark.parametrize('family', FAMILIES)
def test_other_families(family):
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    fast = with_backend(pipe, 'onnx')
    want, found = (
        p(PROMPTS, num_inference_steps=2, generator=tiny.seeded(0), output_type='latent').images
        for p in (pipe, fast)
    )
    assert backend_of(fast) == 'onnx' and apart(found, want) < 1e-4


def test_what_cannot_be_written_stays_torch():
    pipe = tiny.flux(FlowMatchEulerDiscreteScheduler())
    with pytest.warns(UserWarning, match="'auto' falls back to PyTorch: the network could not"):
        assert backend_of(with_backend(pipe)) == 'torch'
    with pytest.raises(RuntimeError, match='the network could not be written as ONNX'):
        with_backend(pipe, 'onnx')


def files(cache):
    return {f: f.stat().st_mtime_ns for f in cache.iterdir()}


def test_cache_is_used(plain, fast, cache, monkeypatch):
    before = files(cache)
    monkeypatch.setattr(backends, '_write_network', None)
    assert backend_of(with_backend(plain)) == 'onnx' and files(cache) == before


@pytest.mark.parametrize(
    'broken', [lambda b: b'', lambda b: b[:5000], lambda b: b[:99] + b'?' + b[100:]]
)
def test_broken_file_is_written_again(small, cache, broken):
    with_backend(small)
    file = cache / f'{backends._fingerprint(small.unet, *recorded(small))}.onnx'
    whole = file.read_bytes()
    file.write_bytes(broken(whole))
    with pytest.warns(UserWarning, match=f'{file.name} is broken'):
        assert backend_of(with_backend(small)) == 'onnx'
    assert file.read_bytes() == whole and len(files(cache)) == len(list(cache.glob('*.onnx')))


def recorded(pipe):
    args, kwargs, _ = backends._recorded_call(pipe, pipe.unet, 3)
    return (backends._tensors(pipe.unet, args, kwargs),)


def test_a_cache_that_cannot_be_written(small, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert backend_of(with_backend(small)) == 'onnx'


def test_other_weights_are_another_file(small):
    tensors, other = recorded(small), deepcopy(small.unet)
    with torch.no_grad():
        other.conv_out.bias[0] += 1e-6
    assert backends._fingerprint(other, *tensors) != backends._fingerprint(small.unet, *tensors)


def test_wrong_name(plain):
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, onnx.*got 'onx'"):
        with_backend(plain, 'onx')


def test_guided_pipelines_are_refused(plain):
    with pytest.raises(TypeError, match='pipe: expected a plain pipeline'):
        with_backend(guided(plain))


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match='pipe: expected a pipeline'):
        with_backend(3)


def test_what_onnx_cannot_do_stays_torch():
    pipe = tiny.sd(tiny.ddim())
    pipe.unet.to(torch.bfloat16)
    assert backend_of(with_backend(pipe)) == 'torch'
    with pytest.raises(RuntimeError, match="backend: 'onnx' cannot be used: it runs float32"):
        with_backend(pipe, 'onnx')


def test_another_output_is_refused(small, monkeypatch):
    monkeypatch.setattr(backends._Onnx, 'tolerance', 1e-9)
    with pytest.warns(
        UserWarning, match="backend: 'auto' falls back to PyTorch: its output differs"
    ):
        assert backend_of(with_backend(small)) == 'torch'
    with pytest.raises(RuntimeError, match='its output differs from that of PyTorch by'):
        with_backend(small, 'onnx')


def test_auto_is_safe_where_the_runtime_fails(small, monkeypatch):
    def broken(*args, **kwargs):
        raise SystemError('no such processor')

    monkeypatch.setattr(backends.onnxruntime, 'InferenceSession', broken)
    with pytest.warns(UserWarning, match="'auto' falls back to PyTorch: no such processor"):
        assert backend_of(with_backend(small)) == 'torch'
    with pytest.raises(RuntimeError, match="backend: 'onnx' cannot be used: no such processor"):
        with_backend(small, 'onnx')


def test_too_large(small, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, '_TOO_LARGE', 1000)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.raises(RuntimeError, match='an ONNX file holds 2 GB'):
        with_backend(small, 'onnx')
