"""`Guider` in modular pipelines of diffusers, on tiny SDXL, SD3 and Wan networks.

Plain CFG must equal diffusers' own guider, and everything else `guided` in the stock pipeline.
"""

import json
import math
import threading

import diffusers
import pytest
import torch

pytest.importorskip('diffusers.guiders.guider_utils')
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise as xl_steps
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
)
from pipeline_helpers import PROMPTS, euler_discrete, randomized, seeded
from pipeline_helpers import sd3 as stock_sd3
from pipeline_helpers import xl as stock_xl

from cf_guidance import guiders
from cf_guidance.attention import PAG, SAG, SEG, SLG, TPG
from cf_guidance.guided import Term
from cf_guidance.guiders import Guider
from cf_guidance.karras import on_sigmas
from cf_guidance.pipelines import NegativePrompt, guided, sigmas_of
from cf_guidance.transforms import apg, base_norm, cfg, cfg_zero, fdg, rescale, rule

try:
    from diffusers.modular_pipelines.stable_diffusion_3 import (
        modular_blocks_stable_diffusion_3 as sd3_blocks,
    )
except ImportError:  # before diffusers 0.39
    sd3_blocks = None

diffusers.utils.logging.set_verbosity_error()
LATENTS = torch.randn(2, 4, 8, 8, generator=seeded(2))
NEG = NegativePrompt


class XL:
    "A stock pipeline and a modular one with the same components."

    flow, interval = False, (1.0, 8.0)

    def __init__(self, scheduler=None):
        p = self.stock = stock_xl(scheduler or euler_discrete())
        blocks = dict(
            text=StableDiffusionXLTextEncoderStep(),
            input=xl_steps.StableDiffusionXLInputStep(),
            times=xl_steps.StableDiffusionXLSetTimestepsStep(),
            latents=xl_steps.StableDiffusionXLPrepareLatentsStep(),
            sizes=xl_steps.StableDiffusionXLPrepareAdditionalConditioningStep(),
            denoise=StableDiffusionXLDenoiseStep(),
        )
        self.modular = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
        names = 'unet', 'scheduler', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2'
        self.modular.update_components(**{k: getattr(p, k) for k in names})
        self.net, self.scheduler = p.unet, p.scheduler
        self.args = dict(prompt=PROMPTS, negative_prompt=['', ''], latents=LATENTS)
        self.args |= dict(height=16, width=16)
        self.given = self.args | dict(original_size=(16, 16), target_size=(16, 16))
        self.quiet()

    def quiet(self):
        for o in (self.stock, self.modular):
            o.set_progress_bar_config(disable=True)

    def run(self, guider=None, steps=4, **kw):
        if guider is not None:
            self.modular.update_components(guider=guider)
        given = self.given | kw
        return self.modular(**given, num_inference_steps=steps, output='latents')

    def want(self, *terms, w=5.0, steps=4, **kw):
        "Latents and evaluations of the guided stock pipeline."
        sd = guided(self.stock, *terms, **kw)
        options = dict(num_inference_steps=steps, guidance_scale=w, output_type='latent')
        return sd(**self.args, **options).images, sd.report.nfe


class SD3(XL):
    flow, interval = True, (0.5, 2.0)

    def __init__(self, scheduler=None):
        if sd3_blocks is None:
            pytest.skip('this diffusers has no modular Stable Diffusion 3')
        scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        p = self.stock = stock_sd3(scheduler)
        self.modular = sd3_blocks.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
        self.modular.update_components(transformer=p.transformer, scheduler=p.scheduler)
        self.net, self.scheduler = p.transformer, p.scheduler
        self.args = dict(prompt=PROMPTS, negative_prompt=['', ''], latents=LATENTS)
        self.args |= dict(height=16, width=16)
        pos, neg, pooled, neg_pooled = p.encode_prompt(
            PROMPTS, None, None, negative_prompt=['', ''], do_classifier_free_guidance=True
        )
        self.given = dict(
            prompt_embeds=pos,
            negative_prompt_embeds=neg,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=neg_pooled,
            latents=LATENTS,
            height=16,
            width=16,
        )
        self.quiet()


@pytest.fixture(scope='module', params=[XL, SD3])
def both(request):
    return request.param()


def close(got, want, tol=3e-5):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert want.std() > 0.02
    assert (got - want).abs().max() < tol * want.abs().max()


def nfe(guider):
    return guider.denoiser.run.nfe_per_sample.tolist()


def test_plain_cfg_equals_diffusers_guider(both):
    g = Guider(both.scheduler, Term(NEG(), 5.0))
    close(both.run(g), both.run(ClassifierFreeGuidance(guidance_scale=5.0)))


def test_cost_of_plain_cfg(both):
    g = Guider(both.scheduler, Term(NEG(), 5.0))
    both.run(g)
    assert nfe(g) == [8, 8]


def test_the_usual_weight_is_7_5(both):
    theirs = both.run(ClassifierFreeGuidance(guidance_scale=7.5))
    close(both.run(Guider(both.scheduler)), theirs, 5e-5)


def test_unguided(both):
    theirs = both.run(ClassifierFreeGuidance(guidance_scale=1.0))
    close(both.run(Guider(both.scheduler, Term(NEG(), 1.0))), theirs)


TERMS = dict(
    pag=lambda b: dict(terms=[Term(NEG(), 4.0), Term(PAG(b.net), 3.0)]),
    pag_alone=lambda b: dict(terms=[Term(PAG(b.net), 3.0)]),
    apg=lambda b: dict(terms=[Term(NEG(), 6.0, apg.of(beta=-0.5, eta=0.1))]),
    schedule=lambda b: dict(terms=[Term(NEG(), [7.0, 1.0, 4.0, 2.0])]),
    interval=lambda b: dict(terms=[Term(NEG(), 6.0, interval=b.interval)]),
    per_image=lambda b: dict(terms=[Term(NEG(), torch.tensor([1.0, 5.0]))]),
    stop=lambda b: dict(terms=[Term(NEG(), 4.0, stop=0.6)]),
    every=lambda b: dict(terms=[Term(NEG(), 4.0, every=2)]),
    post=lambda b: dict(
        terms=[Term(NEG(), 4.0), Term(SEG(b.net, 2.0), 3.0, base_norm, b.interval)],
        post=rescale.of(phi=0.5),
    ),
    seeded=lambda b: dict(terms=[Term(TPG(b.net, generator=3), 3.0), Term(SLG(b.net), 2.0)]),
    fdg=lambda b: dict(terms=[Term(NEG(), 4.0, fdg)]),
    pieces=lambda b: dict(terms=[Term(NEG(), 4.0)], max_batch=2),
)


@pytest.mark.parametrize('name', TERMS)
def test_equals_the_guided_stock_pipeline(both, name):
    kw = TERMS[name](both)
    terms = kw.pop('terms')
    want, cost = both.want(*terms, **kw)
    g = Guider(both.scheduler, terms, **kw)
    close(both.run(g), want)
    per_step_skips = name in ('per_image',)  # the loop evaluates a pass for the whole batch
    assert per_step_skips or nfe(g) == cost


def test_sag_evaluates_its_own_positive(both):
    term = Term(SAG(both.net, threshold=0.5), 2.0)
    want, cost = both.want(term)
    g = Guider(both.scheduler, term)
    close(both.run(g), want)
    assert sum(nfe(g)) >= sum(cost)


def test_zero_init():
    b = SD3()
    want, _ = b.want(Term(NEG(), 4.0, cfg_zero), zero_init=2)
    g = Guider(b.scheduler, Term(NEG(), 4.0, cfg_zero), zero_init=2)
    close(b.run(g), want)


def test_zero_init_needs_a_flow_model():
    with pytest.raises(ValueError, match='zero_init: expected the scheduler of a flow model'):
        Guider(euler_discrete(), zero_init=1)


def test_no_pass_where_nothing_is_guided(both):
    g = Guider(both.scheduler, Term(NEG(), [4.0, 1.0, 0.0, 1.0]))
    both.run(g)
    assert nfe(g) == [6, 6]  # the loop evaluates the prompt at each step


class Passes(Guider):
    "A guider that notes how many passes each step had."

    def forward(self, *args, **kwargs):
        self.seen.append(len(args) + len(kwargs))
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    'want, terms',
    [
        ([2, 1, 2, 1], lambda b: [Term(NEG(), [4.0, 1.0, 0.0, 1.0])]),
        ([2, 1, 1, 1], lambda b: [Term(NEG(), 4.0, stop=-1.0), Term(PAG(b.net), 2.0)]),
        ([2, 1, 2, 1], lambda b: [Term(NEG(), 4.0, every=2)]),
        ([2, 2, 2, 2], lambda b: [Term(NEG(), torch.tensor([1.0, 3.0]))]),
    ],
)
def test_passes_of_each_step(both, want, terms):
    g = Passes(both.scheduler, terms(both))
    g.seen = []
    assert g.num_conditions == 2
    both.run(g)
    if both.flow and g.terms[0].stop is not None:
        want = [2, *want[:-1]]  # its first step is all noise, where nothing stops
    assert g.seen == want
    assert g.num_conditions == 2


@pytest.mark.parametrize(
    'want, make',
    [
        (1, lambda b: Term(NEG(), 1.0)),
        (1, lambda b: Term(NEG(), [1.0, 1.0])),
        (2, lambda b: Term(NEG(), 1.0, base_norm)),
        (1, lambda b: PAG(b.net)),
    ],
)
def test_most_passes_outside_of_a_step(both, want, make):
    assert Guider(both.scheduler, make(both)).num_conditions == want


@pytest.mark.parametrize('terms', [[], {}])
def test_no_terms(both, terms):
    with pytest.raises(TypeError, match='terms: expected at least one term'):
        Guider(both.scheduler, terms)


def test_the_answer_has_its_parts(both):
    answers = []

    class Watched(Guider):
        def forward(self, *args, **kwargs):
            answers.append(super().forward(*args, **kwargs))
            return answers[-1]

    both.run(Watched(both.scheduler, Term(NEG(), 3.0)), steps=1)
    (o,) = answers
    close(o.pred, torch.lerp(o.pred_uncond, o.pred_cond, 3.0), 1e-4)
    assert (o.pred_cond - o.pred_uncond).abs().max() > 1e-3


def test_a_second_call_equals_the_first(both):
    g = Guider(both.scheduler, Term(NEG(), [6.0, 3.0, 1.0, 1.0], apg.of(beta=0.5)))
    assert torch.equal(both.run(g), both.run())


def test_disabled():
    b = SD3()
    g = Guider(b.scheduler, Term(NEG(), 5.0))
    g.disable()
    assert g.num_conditions == 1
    theirs = b.run(ClassifierFreeGuidance(guidance_scale=1.0))
    assert torch.equal(b.run(g), theirs)


HEUN = [
    (XL, lambda: diffusers.HeunDiscreteScheduler.from_config(euler_discrete().config)),
    (SD3, diffusers.FlowMatchHeunDiscreteScheduler),
]


@pytest.mark.parametrize('cls, scheduler', HEUN)
def test_heun(cls, scheduler):
    b = cls(scheduler())
    want, _ = b.want(Term(NEG(), [6.0, 3.0, 2.0]), steps=3)
    g = Guider(b.scheduler, Term(NEG(), [6.0, 3.0, 2.0]))
    close(b.run(g, steps=3), want, 5e-5)


@pytest.mark.parametrize('cls, scheduler', HEUN)
def test_another_scheduler_is_noticed_where_steps_matter(cls, scheduler):
    b, other = cls(scheduler()), cls().scheduler
    with pytest.raises(ValueError, match='pass the scheduler of the pipeline'):
        b.run(Guider(other, Term(NEG(), [6.0, 3.0, 2.0])), steps=3)


@pytest.mark.parametrize(
    'make',
    [
        lambda: diffusers.DDIMScheduler.from_config(euler_discrete().config),
        lambda: diffusers.DPMSolverMultistepScheduler.from_config(
            euler_discrete().config, use_karras_sigmas=True
        ),
        lambda: euler_discrete('v_prediction'),
    ],
)
def test_schedulers(make):
    b = XL(make())
    term = Term(NEG(), [6.0, 3.0, 2.0, 1.0], apg, b.interval)
    close(b.run(Guider(b.scheduler, term)), b.want(term)[0])


def test_images_per_prompt():
    b = XL()
    kw = dict(latents=torch.randn(4, 4, 8, 8, generator=seeded(3)), num_images_per_prompt=2)
    theirs = b.run(ClassifierFreeGuidance(guidance_scale=3.0), **kw)
    close(b.run(Guider(b.scheduler, Term(NEG(), 3.0)), **kw), theirs)


class Stop(Exception):
    pass


def attributes(net):
    return [{k: id(v) for k, v in vars(m).items()} for m in net.modules()]


@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(both, error):
    before = attributes(both.net)
    g = Guider(both.scheduler, [Term(NEG(), [5.0, 1.0, 4.0, 3.0], apg), Term(PAG(both.net), 3.0)])
    want = both.run(g)
    block = list(both.net.children())[-1]
    for at in range(7):
        left = [at]

        def fail(*_, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise error

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(error):
            both.run(g)
        hook.remove()
        assert len(both.net._forward_pre_hooks) == 0
        assert torch.equal(both.run(g), want)
    assert attributes(both.net) == before


def test_the_loop_ends_between_prepare_and_call(both):
    class Gone(Guider):
        def prepare_models(self, denoiser):
            super().prepare_models(denoiser)
            if self._step == 2:
                raise Stop

    g = Guider(both.scheduler, Term(NEG(), 3.0))
    want = both.run(g)
    with pytest.raises(Stop):
        both.run(Gone(both.scheduler, Term(NEG(), 3.0)))
    close(both.run(ClassifierFreeGuidance(guidance_scale=3.0)), want)
    assert len(both.net._forward_pre_hooks) == 0
    assert torch.equal(both.run(g), want)


def test_two_pipelines_share_a_network_in_threads():
    first, second, out = XL(), XL(), {}
    second.modular.update_components(unet=first.net)
    runs = dict(a=(first, 3.0), b=(second, 6.0))
    want = {}
    for k, (b, w) in runs.items():
        g = Guider(b.scheduler, [Term(NEG(), w), Term(PAG(first.net), w)])
        want[k] = b.run(g, steps=8)
    threads = [
        threading.Thread(target=lambda k=k, b=b: out.update({k: b.run(steps=8)}))
        for k, (b, _) in runs.items()
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(out['a'], want['a'])
    assert torch.equal(out['b'], want['b'])


@pytest.mark.parametrize('inplace', [True, False])
def test_compiled(inplace):
    b, graphs = SD3(), []
    want = b.run(Guider(b.scheduler, Term(NEG(), 3.0)))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if inplace:
        b.net.compile(backend=backend)
    else:
        b.modular.transformer = torch.compile(b.net, backend=backend)
    close(b.run(Guider(b.scheduler, Term(NEG(), 3.0))), want)
    assert graphs


BY_HAND = ['NegativePrompt', dict(neg=dict(name='SEG', sigma=math.inf), w=3, interval=[0, 3])]
SAVED = {k: v for k, v in TERMS.items() if k != 'per_image'} | dict(
    by_hand=lambda b: dict(terms=BY_HAND, post=dict(name='rescale', settings=dict(phi=0.5))),
    plain=lambda b: dict(terms=None),
)


@pytest.mark.parametrize('name', SAVED)
def test_saved_and_loaded(both, name, tmp_path):
    g = Guider(both.scheduler, **SAVED[name](both))
    g.save_pretrained(tmp_path)
    text = (tmp_path / 'guider_config.json').read_text()
    json.loads(text, parse_constant=lambda o: pytest.fail(o))
    h = Guider.from_pretrained(tmp_path)
    assert torch.equal(both.run(h), both.run(g))
    mine, theirs = ({k: v for k, v in o.config.items() if not k.startswith('_')} for o in (g, h))
    assert mine == theirs
    assert torch.equal(both.run(g.new(max_batch=None)), both.run(h.new(max_batch=None)))


@pytest.mark.skipif(
    diffusers.__version__.startswith('0.36'), reason='its pipelines save no components'
)
def test_saved_with_the_pipeline(both, tmp_path):
    terms = [Term(NEG(), 4.0, apg.of(beta=-0.5)), Term(PAG(both.net), 3.0)]
    want = both.run(Guider(both.scheduler, terms))
    folder = str(tmp_path / 'pipe')
    both.modular.save_pretrained(folder, overwrite_modular_index=True)
    assert (tmp_path / 'pipe' / 'guider' / 'guider_config.json').exists()
    again = type(both.modular)(blocks=both.modular.blocks, pretrained_model_name_or_path=folder)
    again.load_components(names=['guider'])
    assert type(again.guider) is Guider
    assert torch.equal(both.run(again.guider), want)


def mine(neg, pos, w):
    return torch.lerp(neg, pos, w)


@rule('any')
def tcfg(neg, pos, w):
    "A rule of the same name as one of the library."
    return torch.lerp(neg, pos, w)


UNSAVED = [
    ('terms[0].rule', lambda b: Term(NEG(), 2.0, mine)),
    ('terms[0].rule', lambda b: Term(NEG(), 2.0, tcfg)),
    ('terms[0].w', lambda b: Term(NEG(), lambda s: 2.0)),
    ('terms[0].w', lambda b: Term(NEG(), torch.tensor([1.0, 2.0]))),
    ('terms[1].neg', lambda b: [NEG(), Term(lambda x, sigma, **c: x * 0.5)]),
]


@pytest.mark.parametrize('name, terms', UNSAVED)
def test_what_cannot_be_saved_works_and_is_named(both, name, terms, tmp_path):
    g = Guider(both.scheduler, terms(both))
    out = both.run(g)
    assert out.isfinite().all()
    with pytest.raises(TypeError, match='save') as e:
        g.save_pretrained(tmp_path / 'new')
    assert name in str(e.value)
    assert not (tmp_path / 'new').exists()
    assert name in repr(g)
    assert torch.equal(both.run(g.new()), out)


def test_tensors_cannot_be_saved(both, tmp_path):
    g = Guider(both.scheduler, Term({'encoder_hidden_states': torch.zeros(1, 77, 32)}))
    with pytest.raises(TypeError, match=r'terms\[0\].neg'):
        g.save_pretrained(tmp_path)


BAD = [
    (TypeError, 'scheduler: expected', lambda b: Guider(None)),
    (TypeError, '_class_name', lambda b: Guider({'num_train_timesteps': 5})),
    (ValueError, "neg: expected one of .*PAG.* got 'PAGG'", lambda b: Guider(b.scheduler, 'PAGG')),
    (ValueError, "got 'agp'", lambda b: Guider(b.scheduler, dict(neg='PAG', rule='agp'))),
    (TypeError, "no 'weight'", lambda b: Guider(b.scheduler, dict(neg='PAG', weight=3.0))),
    (ValueError, 'w: expected', lambda b: Guider(b.scheduler, dict(neg='PAG', w=-1.0))),
    (TypeError, 'terms: expected', lambda b: Guider(b.scheduler, [])),
    (ValueError, 'zero_init: expected', lambda b: Guider(b.scheduler, zero_init=-1)),
    (TypeError, 'zero_init: expected', lambda b: Guider(b.scheduler, zero_init=True)),
    (ValueError, 'max_batch: expected', lambda b: Guider(b.scheduler, max_batch=0)),
    (TypeError, 'post: expected', lambda b: Guider(b.scheduler, post=3)),
    (ValueError, 'post: expected', lambda b: Guider(b.scheduler, post='sum')),
    (TypeError, 'has no setting', lambda b: Guider(b.scheduler, dict(neg=dict(name='PAG', s=1)))),
    (TypeError, 'neg: .* got int', lambda b: Guider(b.scheduler, dict(neg=5))),
    (RuntimeError, 'update_components', lambda b: Guider(b.scheduler).forward(LATENTS)),
]


@pytest.mark.parametrize('error, match, make', BAD)
def test_bad_arguments(both, error, match, make):
    with pytest.raises(error, match=match):
        make(both)


BAD_RUNS = [
    ('layers', lambda: dict(neg=dict(name='PAG', layers=['nowhere']))),
    ('w: expected one value per step, 4, got 3', lambda: Term(NEG(), [1.0, 2.0, 3.0])),
    ('interval: expected noise levels', lambda: Term(NEG(), 3.0, interval=(20000, 30000.0))),
]


@pytest.mark.parametrize('match, terms', BAD_RUNS)
def test_bad_runs(both, match, terms):
    with pytest.raises(ValueError, match=match):
        both.run(Guider(both.scheduler, terms()))


def test_weights_bound_to_noise_levels(both):
    w = on_sigmas([6.0, 3.0, 2.0, 1.0], sigmas_of(both.stock, 4))
    want = both.run(Guider(both.scheduler, Term(NEG(), [6.0, 3.0, 2.0, 1.0])))
    close(both.run(Guider(both.scheduler, Term(NEG(), w))), want, 5e-5)


def test_weights_bound_to_other_noise_levels(both):
    w = on_sigmas([6.0, 3.0, 2.0, 1.0, 4.0], sigmas_of(both.stock, 5))
    with pytest.raises(ValueError, match='belongs to other noise levels'):
        both.run(Guider(both.scheduler, Term(NEG(), w)))


def wan_network():
    return randomized(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm='rms_norm_across_heads',
            rope_max_seq_len=32,
        )
    )


@pytest.mark.parametrize(
    'scheduler',
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(
            prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
        ),
    ],
)
def test_video(scheduler):
    "Wan, whose loop names the fields of the passes."
    wan = pytest.importorskip('diffusers.modular_pipelines.wan.modular_blocks_wan')
    if not hasattr(wan, 'WanCoreDenoiseStep'):
        pytest.skip('this diffusers has other blocks')
    net, pipe = wan_network(), wan.WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pos, neg = (torch.randn(2, 5, 16, generator=seeded(i)) for i in range(2))
    latents = torch.randn(2, 4, 3, 8, 8, generator=seeded(3))
    given = dict(prompt_embeds=pos, negative_prompt_embeds=neg, latents=latents, num_frames=9)
    given |= dict(num_inference_steps=4, height=64, width=64, output='latents')

    def run(guider):
        pipe.update_components(guider=guider)
        return pipe(**given)

    theirs = run(ClassifierFreeGuidance(guidance_scale=5.0))
    close(run(Guider(scheduler, Term(NEG(), 5.0))), theirs)
    terms = [Term(NEG(), [5.0, 1.0, 3.0, 2.0], apg), Term(PAG(net), 3.0, interval=(0.3, 1e5))]
    g = Guider(scheduler, terms)
    assert run(g).isfinite().all()
    assert nfe(g)[0] in (9, 10, 11)


def test_half_precision():
    b = SD3()
    b.net.to(torch.bfloat16)
    given = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in b.given.items()}
    theirs = b.run(ClassifierFreeGuidance(guidance_scale=3.0), **given)
    close(b.run(Guider(b.scheduler, Term(NEG(), 3.0)), **given), theirs, 0.05)
    terms = [Term(NEG(), 3.0, apg), Term(PAG(b.net), 2.0)]
    assert b.run(Guider(b.scheduler, terms), **given).dtype == torch.bfloat16


def test_without_a_negative_prompt():
    b = SD3()
    none = dict(negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    with pytest.raises(ValueError, match='no negative prompt'):
        b.run(Guider(b.scheduler), **none)
    assert b.run(Guider(b.scheduler, PAG(b.net)), **none).isfinite().all()


def test_without_a_negative_prompt_in_sdxl():
    g = Guider(euler_discrete())
    g.set_state(0, 4, torch.tensor(999.0))
    data = dict(prompt_embeds=(LATENTS, None), time_ids=(LATENTS, LATENTS))
    with pytest.raises(ValueError, match='no negative prompt'):
        g.prepare_inputs(data)


def test_a_scheduler_of_another_kind():
    b = SD3()
    with pytest.raises(ValueError, match='scheduler: expected that of the pipeline'):
        b.run(Guider(euler_discrete(), PAG(b.net)), steps=30)


def test_a_scheduler_with_other_times():
    x = XL(diffusers.EulerDiscreteScheduler.from_config(euler_discrete().config))
    short = diffusers.EulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match='timestep: expected 0 to 500'):
        x.run(Guider(short))


def test_an_unknown_network():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match='network: expected one of .*SD3.* got Odd'):
        Guider(euler_discrete()).prepare_models(Odd())


def test_a_rule_is_saved_as_name_and_settings():
    saved = guiders._saved_rule('rule', base_norm)
    assert saved == dict(name='base_norm', settings={})
    assert guiders._as_rule(saved) == base_norm
    assert guiders._as_rule('cfg') == cfg
