"`MinimalDiffusion`: equal to the stock pipeline, per image, and clear about what it cannot do."

import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from pipeline_helpers import flow, flux, sd3, seeded, xl

from cf_guidance.attention import PAG, TPG
from cf_guidance.denoisers import from_x0, to_x0
from cf_guidance.guided import Term
from cf_guidance.noise import split_generator
from cf_guidance.pipelines import (
    MinimalDiffusion,
    NegativePrompt,
    embedded_path,
    guided,
    pipeline_denoiser,
)
from cf_guidance.transforms import (
    BaseNormGuidance,
    FullNormGuidance,
    GuidanceTfm,
    TNormGuidance,
    apg,
    rescale,
)

# of torchsde, and of schedulers of diffusers under newer versions of numpy
pytestmark = [
    pytest.mark.filterwarnings('ignore:Should have t:UserWarning'),
    pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning'),
    pytest.mark.filterwarnings('ignore:__array_wrap__ must accept:DeprecationWarning'),
]
PROMPTS = [
    'a red sneaker on a blue background',
    'a green dress on a white background',
    'a purple bag on an orange background',
]
CFG = GuidanceTfm({'g': [4.0] * 6})


def minimal(scheduler=None, **kw):
    return MinimalDiffusion(scheduler=scheduler, progress=False, **kw).load()


@pytest.fixture(scope='module')
def md():
    return minimal()


def stock(md, prompt=PROMPTS[0], steps=6, seed=3, scale=4.0, **kw):
    md.pipe.set_progress_bar_config(disable=True)
    n = 1 if isinstance(prompt, str) else len(prompt)
    return md.pipe(
        prompt,
        guidance_scale=scale,
        num_inference_steps=steps,
        generator=[seeded(seed + i) for i in range(n)],
        output_type='pt',
        **kw,
    ).images


def near(a, b, tol=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tol


SCHEDULERS = (
    'DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete '
    'KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep '
    'SASolver LCM TCD'
).split()


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler(name):
    if name == 'LMSDiscrete':
        pytest.importorskip('scipy')
    md = minimal(f'{name}Scheduler')
    # an eighth of a level of 8 bits; the steps of KDPM2 make rounding errors larger
    near(md.sample(PROMPTS[0], CFG, generator=[3]), stock(md), tol=5e-4)


def test_tcd():
    "With the stock pipeline's own eta, and with another."
    md = minimal('TCDScheduler')
    for n in (4, 9):
        tfm = GuidanceTfm({'g': [4.0] * n})
        near(md.sample(PROMPTS[0], tfm, [3]), stock(md, steps=n))
        near(md.sample(PROMPTS[0], tfm, [3], eta=0.3), stock(md, steps=n, eta=0.3))


def test_sizes():
    md = minimal(height=32, width=64)
    x = md.sample(PROMPTS[0], CFG, generator=[3])
    assert x.shape == (1, 3, 32, 64)
    near(x, stock(md, height=32, width=64))


def test_negative_prompts(md):
    kw = dict(negative_prompt=['a sandal'] * 3)
    got = md.sample(PROMPTS, CFG, generator=[3, 4, 5], negative_prompt='a sandal')
    near(got, stock(md, PROMPTS, **kw))
    assert (got - md.sample(PROMPTS, CFG, generator=[3, 4, 5])).abs().max() > 1e-3


@pytest.mark.parametrize('seed', [3, [5, 6, 7], 'generators', range(5, 8)])
def test_each_image_for_itself(seed):
    "An image from the middle of a batch is the image made alone, also when noise is drawn."
    md = minimal('EulerAncestralDiscreteScheduler')
    ws = torch.tensor([0.05, 0.1, 0.2]).expand(6, 3)

    def of(i, n=3):
        if seed == 'generators':
            return [seeded(o) for o in range(5, 8)][i : i + n]
        return seed if seed == 3 else seed[i : i + n]

    batch = md.sample(PROMPTS, TNormGuidance({'g': ws}), generator=of(0))
    alone = md.sample(PROMPTS[0], TNormGuidance({'g': [0.05] * 6}), generator=of(0, 1))
    near(batch[:1], alone)
    assert (batch[1] - batch[0]).abs().max() > 0.1
    if seed != 3:
        alone = md.sample(PROMPTS[1], TNormGuidance({'g': [0.1] * 6}), generator=of(1, 1))
        near(batch[1:2], alone)


def test_seeds(md):
    "A seed gives each image its own noise; no generator is seed 0; nothing global is drawn from."
    state = torch.random.get_rng_state()
    many = md.sample([PROMPTS[0]] * 2, CFG, generator=0)
    assert (many[0] - many[1]).abs().max() > 0.1
    near(md.sample(PROMPTS[0], CFG), many[:1])
    near(md.sample(PROMPTS[0], CFG, np.int64(0)), many[:1])
    same = md.sample([PROMPTS[0]] * 2, CFG, generator=[0, 0])
    near(same[:1], same[1:])
    assert torch.equal(state, torch.random.get_rng_state())


def test_noise_of_a_scheduler():
    "DPMSolverSDE draws its noise by itself; here each image has its own."
    pytest.importorskip('torchsde')
    md = minimal('DPMSolverSDEScheduler')
    a, b = (md.sample(PROMPTS, CFG, generator=0) for _ in range(2))
    assert torch.equal(a, b)
    near(md.sample(PROMPTS[0], CFG, generator=0), a[:1])


@pytest.mark.parametrize(
    'tfm,rule',
    [(GuidanceTfm, None), (BaseNormGuidance, 3), (TNormGuidance, 0.2), (FullNormGuidance, 0.1)],
)
def test_transforms(md, tfm, rule):
    "A classic transform is a rule; as any other function it gives the same pictures."
    g = [rule or 4.0] * 3 + [(rule or 4.0) / 2] * 3
    known, plain = tfm({'g': g}), tfm({'g': g})
    a = md.sample(PROMPTS, known, generator=1)
    b = md.sample(PROMPTS, lambda u, t, idx: plain(u, t, idx), generator=1, num_steps=6)
    near(a, b)


def test_any_function(md):
    "A subclass gets both predictions at every step, also where the weight is 0."

    class Mine(GuidanceTfm):
        steps = []

        def post_proc(self, u, t, idx=None):
            self.steps.append((idx, (u - t).abs().max().item() > 0))
            self.pred = t

    a, nfe = md.sample(PROMPTS[0], Mine({'g': [0.0] * 4}), generator=2, return_nfe=True)
    assert nfe == [8]
    assert Mine.steps == [(i, True) for i in range(4)]
    near(a, md.sample(PROMPTS[0], lambda u, t, idx: t, generator=2, num_steps=4), 1e-6)


@pytest.mark.parametrize('name', ['HeunDiscrete', 'KDPM2Discrete', 'PNDM', 'DDIM'])
def test_steps_of_a_transform(name):
    "Both evaluations of a step get its number."
    seen, md = [], minimal(f'{name}Scheduler')

    def tfm(u, t, idx):
        seen.append(idx)
        return t

    md.sample(PROMPTS[0], tfm, num_steps=4)
    expected = {'DDIM': [0, 1, 2, 3], 'PNDM': [0, 0, 1, 2, 3]}
    assert seen == expected.get(name, [0, 0, 1, 1, 2, 2, 3])


def test_counts(md):
    "Where the guided prediction is one of the two, the other is not computed."
    ws = torch.tensor([0.0, 1.0, 3.0]).expand(6, 3)
    _, nfe = md.sample(PROMPTS[0], GuidanceTfm({'g': ws}), generator=[0] * 3, return_nfe=True)
    assert nfe == [6, 6, 12]


def test_terms(md):
    D = pipeline_denoiser(md.pipe)
    ws = torch.tensor([1.0, 2.0, 5.0]).expand(6, 3)
    want = md.sample(PROMPTS[0], GuidanceTfm({'g': ws}), generator=1)
    got, nfe = md.sample(PROMPTS[0], Term(D.cond(), ws), generator=1, return_nfe=True)
    near(got, want)
    assert nfe == [6, 12, 12]
    near(md.sample(PROMPTS[0], Term(NegativePrompt(), ws), generator=1), want)
    terms = [Term(D.cond(), [4.0] * 4 + [1.0] * 2), Term(PAG(md.unet), 2.0)]
    _, nfe = md.sample(PROMPTS[0], terms, generator=0, return_nfe=True)
    assert nfe == [4 * 3 + 2 * 2]
    with pytest.raises(ValueError, match='negative_prompt: a Term has its own negative'):
        md.sample(PROMPTS[0], terms, negative_prompt='a bag')


def test_report_of_each_image(md):
    ws = torch.tensor([1.0, 2.0, 5.0]).expand(6, 3)
    term = Term(NegativePrompt(), ws)
    x, report = md.sample(PROMPTS, term, generator=1, return_report=True)
    scales = report.terms[0].scales
    assert report.nfe == [6, 12, 12]
    assert np.isnan(scales[0])
    assert scales[1:] == pytest.approx([2, 5], rel=1e-3)
    near(x, md.sample(PROMPTS, term, generator=1))
    y, report = md.sample(PROMPTS, term, generator=1, post=rescale, return_report=True)
    assert (x - y).abs().max() > 0.01
    sd = guided(md.pipe, term, post=rescale)
    sd.set_progress_bar_config(disable=True)
    own = dict(generator=split_generator(1, 3), num_inference_steps=6, output_type='pt')
    near(y, sd(PROMPTS, **own).images)
    assert report.terms[0].scales[2] < 5


def test_cads_of_a_guided_pipeline(md):
    term, cads = Term(NegativePrompt(), 3.0), dict(s=0.5, seed=[1, 2, 3])
    x = md.sample(PROMPTS, term, generator=1, num_steps=3, cads=cads)
    sd = guided(md.pipe, term, cads=cads)
    sd.set_progress_bar_config(disable=True)
    own = dict(generator=split_generator(1, 3), num_inference_steps=3, output_type='pt')
    near(x, sd(PROMPTS, **own).images)
    assert (x - md.sample(PROMPTS, term, generator=1, num_steps=3)).abs().max() > 0.02
    with pytest.raises(ValueError, match='s: expected a finite number from 0, got -1'):
        md.sample(PROMPTS, term, cads=dict(s=-1))
    with pytest.raises(TypeError, match=r'cads: expected settings such as dict\(s=0.1\), got 0.5'):
        md.sample(PROMPTS, term, cads=0.5)


def test_micro_batches(md):
    small = minimal(batch_size=2)
    for guide in (CFG, Term(NegativePrompt(), 4.0, apg)):
        a, n = md.sample(PROMPTS, guide, generator=1, num_steps=6, return_nfe=True)
        b, m = small.sample(PROMPTS, guide, generator=1, num_steps=6, return_nfe=True)
        near(a, b)
        assert n == m


@pytest.mark.parametrize('fails', ['above 3', 'second call', 'decoder'])
@pytest.mark.parametrize('guide', ['cfg', 'drawing'])
def test_out_of_memory(md, fails, guide):
    "The network is asked again with fewer rows; nothing is drawn or counted twice."
    small, calls, sizes = minimal(batch_size=8), [], []

    def limited(m, args):
        calls.append(1)
        sizes.append(len(args[0]))
        if (
            len(calls) == 2
            if fails == 'second call'
            else len(args[0]) > (1 if fails == 'decoder' else 3)
        ):
            raise torch.OutOfMemoryError('simulated')

    def tfm(md):
        return CFG if guide == 'cfg' else Term(TPG(md.unet, generator=5), 3.0)

    part = small.vae.decoder if fails == 'decoder' else small.unet
    part.register_forward_pre_hook(limited)
    want, n = md.sample(PROMPTS, tfm(md), generator=1, num_steps=6, return_nfe=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got, m = small.sample(PROMPTS, tfm(small), generator=1, num_steps=6, return_nfe=True)
    near(got, want)
    assert n == m
    assert small.batch_size == 8
    first = len(sizes)
    calls.extend([1] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small.sample(PROMPTS, tfm(small), generator=1, num_steps=6)
    assert max(sizes[first:]) >= max(sizes[:first])


def test_threads(md):
    "Tokens, pictures and counts are those of each call."

    def job(i):
        prompts = PROMPTS[: 1 + i % 3]
        tfm = GuidanceTfm({'g': [1.0 if i % 2 else 4.0] * 2})
        return md.sample(prompts, tfm, generator=i % 3, return_nfe=True)

    alone = [job(i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for i, (x, nfe) in enumerate(pool.map(job, range(24))):
            assert torch.equal(x, alone[i % 6][0])
            assert nfe == alone[i % 6][1]


class Speaks(torch.nn.Module):
    "A U-Net made to predict `v` or the image."

    def __init__(self, unet, abar, kind):
        super().__init__()
        self.unet, self.abar, self.kind, self.config = unet, abar, kind, unet.config
        self.dtype, self.device = unet.dtype, unet.device

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        out = self.unet(sample, timestep, encoder_hidden_states)
        a = self.abar[timestep.long()].clamp(min=2**-24)
        sigma = ((1 - a) / a).sqrt()
        x = sample * (1 + sigma.view(-1, 1, 1, 1) ** 2) ** 0.5
        out.sample = from_x0(to_x0(out.sample, x, sigma, 'eps'), x, sigma, self.kind)
        return out if kwargs.get('return_dict', True) else (out.sample,)


@pytest.mark.parametrize('kind,name', [('v', 'v_prediction'), ('x0', 'sample')])
def test_predictions(md, kind, name):
    "A checkpoint that predicts v or the image gives the same pictures under a rule on noise."
    tfm = TNormGuidance({'g': [0.15] * 6})
    want, other = md.sample(PROMPTS[:2], tfm, generator=1), minimal()
    other.unet = Speaks(other.unet, other.scheduler.alphas_cumprod, kind)
    config = other.scheduler.config
    other.scheduler = type(other.scheduler).from_config(config, prediction_type=name)
    near(other.sample(PROMPTS[:2], tfm, generator=1), want, 1e-3)
    near(
        other.sample(PROMPTS[:2], CFG, generator=1), md.sample(PROMPTS[:2], CFG, generator=1), 1e-3
    )
    if kind == 'v':
        more = dict(rescale_betas_zero_snr=True, timestep_spacing='trailing')
        other.scheduler = diffusers.DDIMScheduler.from_config(other.scheduler.config, **more)
        assert other.sample(PROMPTS[:2], tfm, generator=1).isfinite().all()


def test_half_precision():
    md = minimal(dtype=torch.bfloat16)
    for guide in (CFG, [Term(NegativePrompt(), [4.0] * 6), Term(PAG(md.unet), 2.0)]):
        assert md.sample(PROMPTS[0], guide).isfinite().all()


def test_generate(md):
    assert type(md.generate(PROMPTS[0], num_steps=2)).__name__ == 'Image'
    assert len(md.generate([PROMPTS[0]], num_steps=2)) == 1
    assert len(md.generate(('a red bag',), num_steps=2)) == 1
    assert len(md.generate(PROMPTS[0], num_steps=2, generator=[1, 2])) == 2


def test_before_load():
    md = MinimalDiffusion(num_steps=2, progress=False)
    with pytest.raises(AttributeError, match=r'unet: call load\(\) first'):
        _ = md.unet
    assert md.sample('a red bag').shape == (1, 3, 32, 32)


def test_other_families():
    "Any pipeline of a known family, given as such."
    for pipe in (
        xl(diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)),
        sd3(flow()),
        flux(flow()),
    ):
        size = dict(height=16, width=16)
        md = MinimalDiffusion(pipe, progress=False, **size)
        scale = 'true_cfg_scale' if 'Flux' in type(pipe).__name__ else 'guidance_scale'
        more = dict(max_sequence_length=16) if 'Flux' in type(pipe).__name__ else {}
        got = md.sample(['a red bag'] * 2, GuidanceTfm({'g': [3.0] * 3}), [1, 2], **more)
        want = pipe(
            ['a red bag'] * 2,
            negative_prompt=['', ''],
            num_inference_steps=3,
            generator=[seeded(1), seeded(2)],
            output_type='pt',
            **{scale: 3.0},
            **size,
            **more,
        ).images
        near(got, want)
        assert type(pipe).__call__ is not None


@pytest.mark.parametrize('make', [sd3, flux])
def test_a_negative_of_its_own_in_other_families(make):
    "A term that brings its negative needs no negative prompt."
    pipe = make(flow())
    pipe.set_progress_bar_config(disable=True)
    size, term = dict(height=16, width=16), Term(PAG(pipe.transformer), 2.0)
    md = MinimalDiffusion(pipe, progress=False, num_steps=3, **size)
    got = md.sample(['a red bag'], [term], [1], max_sequence_length=16)
    scale = {} if make is flux else dict(guidance_scale=1.0)
    more = dict(size, **scale, num_inference_steps=3, max_sequence_length=16, output_type='pt')
    near(got, guided(pipe, term)('a red bag', generator=[seeded(1)], **more).images)


def test_a_weight_for_sound_is_refused(md):
    with pytest.raises(ValueError, match='sound: expected a pipeline with sound, got StableDiff'):
        md.sample(PROMPTS[0], Term(NegativePrompt(sound=2.0), 4.0), num_steps=2)


def test_checkpoints(tmp_path):
    "A folder runs; what does not fit is refused in one sentence."
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.save_pretrained(tmp_path / 'sd')
    own = MinimalDiffusion(tmp_path / 'sd', num_steps=2, progress=False).sample('a red dragon')
    assert own.isfinite().all()
    text = dict(addition_embed_type='text_time', addition_time_embed_dim=8)
    nets = dict(
        xl=dict(text, projection_class_embeddings_input_dim=64 + 48), lcm=dict(time_cond_proj_dim=8)
    )
    for name, more in nets.items():
        unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, **more})
        parts = {**pipe.components, 'unet': unet}
        cls = diffusers.StableDiffusionPipeline
        cls(**parts, requires_safety_checker=False).save_pretrained(tmp_path / name)
    (tmp_path / 'model.safetensors').touch()
    says = {
        'xl': "model_name: its U-Net needs 'text_time' conditions",
        'lcm': 'NegativePrompt: this call evaluates no negative prompt',
        'model.safetensors': 'model_name: could not load',
        'nope': 'model_name: could not load',
    }
    for name, message in says.items():
        with pytest.raises(ValueError, match=message):
            MinimalDiffusion(str(tmp_path / name), num_steps=2, progress=False).sample('a red bag')
    lcm = MinimalDiffusion(str(tmp_path / 'lcm'), num_steps=2, progress=False).load()
    assert lcm.sample('a red bag', Term(PAG(lcm.unet), 2.0)).isfinite().all()


def test_revision(monkeypatch, tmp_path):
    "A model of the hub is loaded from one commit, which is recorded."
    folder = tmp_path / '1234abcd'
    diffusers.StableDiffusionPipeline.from_pretrained(embedded_path()).save_pretrained(folder)
    asked = {}

    def download(name, **kw):
        asked.update(kw, name=name)
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, 'download', download)
    md = MinimalDiffusion('someone/model', revision='main', progress=False).load()
    assert asked == dict(name='someone/model', revision='main', use_safetensors=True)
    assert md.revision == '1234abcd'


def test_not_finite():
    md = minimal()
    md.vae.register_forward_hook(lambda m, a, out: out)
    md.vae.decoder.conv_out.weight.data.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='not finite'):
        md.sample(PROMPTS[0], CFG)
    zero = diffusers.DDIMScheduler.from_config(
        minimal().scheduler.config, rescale_betas_zero_snr=True, timestep_spacing='trailing'
    )
    with pytest.raises(ValueError, match='zero terminal SNR'):
        minimal(zero).sample(PROMPTS[0], CFG)


def call(*args, **kw):
    return lambda md: md.sample(*args, **kw)


def making(*args, **kw):
    return lambda md: MinimalDiffusion(*args, **kw, progress=False).load()


class Loose(GuidanceTfm):
    "A transform whose schedule is not checked."

    def __init__(self, g):
        self.schedules = {'g': g}


P, N = 'a red bag', dict(num_steps=3)
BAD = {  # what is done -> what the error says
    'a word': (call('a red astronaut'), "prompt: the embedded model does not know 'astronaut'"),
    'a negative word': (
        call(P, negative_prompt=['dragon'], **N),
        "negative_prompt: the embedded model does not know 'dragon'",
    ),
    'too long': (call('a red bag on ' * 4), 'prompt: expected at most 10 words'),
    'None': (call(None), 'prompt: expected a string or a list of strings, got NoneType'),
    'a number': (call(5), 'prompt: expected a string or a list of strings, got int'),
    'numbers': (call(['a bag', 5]), 'prompt: expected strings in the list, got int'),
    'a set': (call({'a red bag'}), 'prompt: expected a string .* got set'),
    'an array': (call(np.array(['a red bag'])), 'prompt: expected a string .* got ndarray'),
    'nested': (call([['a red bag']]), 'prompt: expected strings in the list, got list'),
    'nothing': (call([]), 'prompt: expected at least one string'),
    'negative number': (call(P, negative_prompt=5), 'negative_prompt: expected a string'),
    'negatives': (
        call([P] * 3, negative_prompt=['', '']),
        r'negative_prompt: expected one or 3 \(one per image\), got 2',
    ),
    'prompts': (call([P] * 2, generator=[1, 2, 3]), 'generator: expected .* a list of 2, got'),
    'seeds': (
        call([P] * 3, generator=[1, 2]),
        'generator: expected .* a list of 3, got a list of 2',
    ),
    'True': (call(P, generator=True), 'generator: expected'),
    'text': (call(P, generator='7'), 'generator: expected'),
    'no seed': (call([P] * 2, generator=[None, 1]), 'generator: expected .* got None'),
    'large': (call(P, generator=2**70), 'generator: expected a seed from 0'),
    'steps': (call(P, GuidanceTfm({'g': [1.0] * 5}), num_steps=8), 'one weight per step, 8, got 5'),
    'no weights': (call(P, Loose([])), 'guide_tfm'),
    'a weight': (call(P, Loose(5)), r"guide_tfm: expected schedules\['g'\]"),
    'low': (call(P, GuidanceTfm({'g': [-5.0] * 3})), 'guide_tfm: expected finite values from 0'),
    'inf': (call(P, GuidanceTfm({'g': [float('inf')] * 3})), 'guide_tfm: expected finite values'),
    'columns': (
        call([P] * 2, GuidanceTfm({'g': torch.ones(5, 3)})),
        'guide_tfm: expected weights for 2 images, got 3 columns',
    ),
    'rows': (
        call([P] * 2, GuidanceTfm({'g': [torch.ones(5)] * 3})),
        'guide_tfm: expected weights for 2 images, got 5 columns',
    ),
    'more seeds': (
        call(P, GuidanceTfm({'g': torch.ones(5, 3)}), generator=[1, 2]),
        'generator: expected .* a list of 3, got a list of 2',
    ),
    'fewer columns': (
        call([P] * 4, GuidanceTfm({'g': torch.ones(5, 3)})),
        'guide_tfm: expected weights for 4 images, got 3 columns',
    ),
    'a class': (call(P, GuidanceTfm), 'guide_tfm: expected a GuidanceTfm, .* got GuidanceTfm'),
    'a list': (call(P, [5]), 'guide_tfm: expected Terms in the list, got int'),
    'empty': (call(P, []), 'guide_tfm: expected at least one Term'),
    'a dict': (call(P, {'g': [1.0]}), 'guide_tfm: expected a GuidanceTfm, .* got dict'),
    'float': (call(P, 3.0), 'guide_tfm: expected a GuidanceTfm, .* got float'),
    'a network': (lambda md: md.sample(P, md.unet), 'guide_tfm: expected a GuidanceTfm'),
    'no tensor': (
        call(P, lambda u, t, i: None, **N),
        'guide_tfm: .* return a tensor .* got NoneType',
    ),
    'half': (call(P, lambda u, t, i: t[:, :2], **N), r'guide_tfm: .* got \(1, 2, 8, 8\)'),
    'arguments': (call(P, lambda u, t: t, **N), 'guide_tfm: expected a function of 3 arguments'),
    'num_steps': (call(P, num_steps=0), 'num_steps: expected a whole number from 1'),
    'num_steps=True': (call(P, num_steps=True), 'num_steps: expected a whole number'),
    'num_steps=1.5': (call(P, num_steps=1.5), 'num_steps: expected a whole number'),
    "num_steps='3'": (call(P, num_steps='3'), 'num_steps: expected a whole number'),
    'many steps': (call(P, num_steps=10000), 'num_inference_steps: expected at most 1000'),
    'foo': (call(P, foo=1, **N), 'foo: not an argument of StableDiffusionPipeline'),
    'dtype': (making(dtype='float32'), 'dtype: expected a floating-point type'),
    'int8': (making(dtype=torch.int8), 'dtype: expected a floating-point type'),
    'batch_size': (making(batch_size=0), 'batch_size: expected a whole number from 1, got 0'),
    'batch_size=-1': (making(batch_size=-1), 'batch_size: expected a whole number from 1'),
    'batch_size=1.5': (making(batch_size=1.5), 'batch_size: expected a whole number'),
    'batch_size=True': (making(batch_size=True), 'batch_size: expected a whole number'),
    'generator': (making(generator='a'), "generator: expected a seed.* got 'a'"),
    'height': (making(height='a'), 'height: expected a whole number'),
    'device': (making(device='nowhere'), "device: 'nowhere' is not available here"),
    'name': (making('nope'), "model_name: could not load 'nope'"),
    'folder': (making('/nope'), 'model_name: could not load'),
    'no name': (making(''), 'model_name: expected a name'),
    'nul': (making('\x00'), 'model_name: expected a name'),
    'number as name': (making(5), 'model_name: expected a name, a folder or a pipeline, got 5'),
    'scheduler': (
        making(scheduler='Nope'),
        "scheduler: expected a scheduler of diffusers, got 'Nope'",
    ),
    'scheduler=5': (making(scheduler=5), 'scheduler: expected a scheduler of diffusers, got 5'),
    'flow': (
        making(scheduler='FlowMatchEulerDiscreteScheduler'),
        "scheduler: expected noise levels of the same kind as the checkpoint's",
    ),
    'EDM': (making(scheduler=diffusers.EDMEulerScheduler()), 'noise levels of the same kind'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(md, what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says) as e:
        f(md)
    assert len(str(e.value)) < 160


def test_odd_sizes():
    with pytest.raises(ValueError, match='30'):
        minimal(height=30).sample('a red bag', CFG)


def test_weights_may_have_a_shape_that_broadcasts():
    "Sweeps give (steps, images, 1, 1, 1), which works in any formula of a transform."
    pipe = MinimalDiffusion(progress=False).load()
    wide = torch.tensor([[1.0, 4.0]] * 3)[..., None, None, None]
    narrow = wide.flatten(1)
    a, b = (pipe.sample('a red bag', GuidanceTfm({'g': g}), [0, 0]) for g in (wide, narrow))
    assert torch.equal(a, b)
