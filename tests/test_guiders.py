"`Guider` in diffusers' modular pipelines, tiny SDXL and SD3: equal to diffusers' own guider for plain CFG, and to `guided` in the stock pipeline for the rest."

import json, math, threading
import diffusers, pytest, torch

pytest.importorskip('diffusers.guiders.guider_utils')
try:
    from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
        StableDiffusion3T2ICoreDenoiseStep,
    )
except ImportError:
    StableDiffusion3T2ICoreDenoiseStep = None  # since diffusers 0.39
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
)
from cf_guidance.attention import PAG, SAG, SEG, SLG, TPG
from cf_guidance.guided import Term
from cf_guidance.guiders import Guider
from cf_guidance.karras import on_ladder
from cf_guidance.pipelines import NegativePrompt, guided, ladder_of
from cf_guidance.transforms import apg, base_norm, cfg, cfg_zero, fdg, rescale, rule
from test_pipeline_denoiser import (
    PROMPTS,
    euler_discrete,
    randomized,
    sd3 as stock_sd3,
    seeded,
    xl as stock_xl,
)

diffusers.utils.logging.set_verbosity_error()
LATENTS = torch.randn(2, 4, 8, 8, generator=seeded(2))


class XL:
    "A stock pipeline and a modular one of the same parts."

    flow, levels = False, (1.0, 8.0)

    def __init__(self, scheduler=None):
        p = self.stock = stock_xl(scheduler or euler_discrete())
        blocks = dict(
            text=StableDiffusionXLTextEncoderStep(),
            input=StableDiffusionXLInputStep(),
            times=StableDiffusionXLSetTimestepsStep(),
            latents=StableDiffusionXLPrepareLatentsStep(),
            sizes=StableDiffusionXLPrepareAdditionalConditioningStep(),
            denoise=StableDiffusionXLDenoiseStep(),
        )
        self.modular = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
        self.modular.update_components(
            **{
                k: getattr(p, k)
                for k in (
                    'unet',
                    'scheduler',
                    'text_encoder',
                    'text_encoder_2',
                    'tokenizer',
                    'tokenizer_2',
                )
            }
        )
        self.net, self.scheduler, self.args = (
            p.unet,
            p.scheduler,
            dict(prompt=PROMPTS, negative_prompt=[''] * 2, latents=LATENTS, height=16, width=16),
        )
        for o in (p, self.modular):
            o.set_progress_bar_config(disable=True)

    def run(self, guider, steps=4, **kw):
        if guider is not None:
            self.modular.update_components(guider=guider)
        return self.modular(
            **{**self.args, 'original_size': (16, 16), 'target_size': (16, 16), **kw},
            num_inference_steps=steps,
            output='latents',
        )  # without an autoencoder it takes other sizes

    def want(self, *terms, w=5.0, steps=4, **kw):
        with guided(self.stock, *terms, **kw) as g:
            out = self.stock(
                **self.args, num_inference_steps=steps, guidance_scale=w, output_type='latent'
            ).images
        return out, g.denoiser.nfe_per_sample


class SD3(XL):
    flow, levels = True, (0.5, 2.0)

    def __init__(self, scheduler=None):
        if StableDiffusion3T2ICoreDenoiseStep is None:
            pytest.skip('no modular Stable Diffusion 3')
        p = self.stock = stock_sd3(
            scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        )
        self.modular = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
        self.modular.update_components(transformer=p.transformer, scheduler=p.scheduler)
        self.net, self.scheduler, self.args = (
            p.transformer,
            p.scheduler,
            dict(prompt=PROMPTS, negative_prompt=[''] * 2, latents=LATENTS, height=16, width=16),
        )
        pos, neg, pool, neg_pool = p.encode_prompt(
            PROMPTS, None, None, negative_prompt=[''] * 2, do_classifier_free_guidance=True
        )
        self.given = dict(
            prompt_embeds=pos,
            negative_prompt_embeds=neg,
            pooled_prompt_embeds=pool,
            negative_pooled_prompt_embeds=neg_pool,
            latents=LATENTS,
            height=16,
            width=16,
        )
        for o in (p, self.modular):
            o.set_progress_bar_config(disable=True)

    def run(self, guider, steps=4, **kw):
        if guider is not None:
            self.modular.update_components(guider=guider)
        return self.modular(**{**self.given, **kw}, num_inference_steps=steps, output='latents')


@pytest.fixture(scope='module', params=[XL, SD3])
def both(request):
    return request.param()


def same(got, want, tol=1e-5):
    assert got.shape == want.shape and got.dtype == want.dtype and want.std() > 0.02
    assert (got - want).abs().max() < tol * want.abs().max(), (
        got - want
    ).abs().max() / want.abs().max()


def watched(net):
    "Rows of the network's forwards."
    rows = []
    return rows, net.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True
    )


def test_cfg(both):
    want = both.run(ClassifierFreeGuidance(guidance_scale=5.0))
    g = Guider(both.scheduler, Term(NegativePrompt(), 5.0))
    same(both.run(g), want)
    assert g.denoiser.nfe_per_sample.tolist() == [8, 8]
    same(
        both.run(Guider(both.scheduler)), both.run(ClassifierFreeGuidance(guidance_scale=7.5)), 5e-5
    )
    same(
        both.run(Guider(both.scheduler, Term(NegativePrompt(), 1.0))),
        both.run(ClassifierFreeGuidance(guidance_scale=1.0)),
    )


TERMS = dict(
    pag=lambda b: dict(terms=[Term(NegativePrompt(), 4.0), Term(PAG(b.net), 3.0)]),
    pag_alone=lambda b: dict(terms=[Term(PAG(b.net), 3.0)]),
    apg=lambda b: dict(terms=[Term(NegativePrompt(), 6.0, apg.of(beta=-0.5, eta=0.1))]),
    schedule=lambda b: dict(terms=[Term(NegativePrompt(), [7.0, 1.0, 4.0, 2.0])]),
    interval=lambda b: dict(terms=[Term(NegativePrompt(), 6.0, interval=b.levels)]),
    per_image=lambda b: dict(terms=[Term(NegativePrompt(), torch.tensor([1.0, 5.0]))]),
    stop=lambda b: dict(terms=[Term(NegativePrompt(), 4.0, stop=0.6)]),
    last=lambda b: dict(
        terms=[Term(NegativePrompt(), 4.0), Term(SEG(b.net, 2.0), 3.0, base_norm, b.levels)],
        last=rescale.of(phi=0.5),
    ),
    seeded=lambda b: dict(
        terms=[
            Term(TPG(b.net, generator=3), 3.0),
            Term(SLG(b.net), 2.0),
            Term(SAG(b.net, threshold=0.5), 2.0),
        ]
    ),
    fdg=lambda b: dict(terms=[Term(NegativePrompt(), 4.0, fdg)]),
    pieces=lambda b: dict(terms=[Term(NegativePrompt(), 4.0)], max_batch=2),
)


@pytest.mark.parametrize('name', TERMS)
def test_as_guided(both, name):
    "Equal to the stock pipeline, at the same cost"
    kw = TERMS[name](both)
    terms = kw.pop('terms')
    want, nfe = both.want(*terms, **kw)
    g = Guider(both.scheduler, terms, **kw)
    same(both.run(g), want)
    assert g.denoiser.nfe_per_sample.tolist() == nfe.tolist()


def test_zero_init():
    b = SD3()
    want, nfe = b.want(Term(NegativePrompt(), 4.0, cfg_zero), zero_init=2)
    g = Guider(b.scheduler, Term(NegativePrompt(), 4.0, cfg_zero), zero_init=2)
    same(b.run(g), want)
    assert g.denoiser.nfe_per_sample.tolist() == nfe.tolist() == [4, 4]
    with pytest.raises(ValueError, match='zero_init=1.*flow'):
        Guider(euler_discrete(), zero_init=1)


def test_cost(both):
    "One forward where one batch is enough, and only rows that count"
    rows, hook = watched(both.net)
    try:
        both.run(Guider(both.scheduler, Term(NegativePrompt(), [4.0, 1.0, 0.0, 1.0])))
    finally:
        hook.remove()
    # a call of the loop is seen by hooks as well: it has two rows, and is answered by the guider
    assert [r for r in rows if r != 2] == [4]
    g = Guider(both.scheduler, Term(NegativePrompt(), [4.0, 1.0, 0.0, 1.0]))
    both.run(g)
    assert g.denoiser.nfe_per_sample.tolist() == [5, 5]


def test_passes(both):
    "The loop is asked for a second pass only where a negative prompt counts; num_conditions is the most outside"
    seen, forward = [], Guider.forward

    def spy(self, *args, **kw):
        seen.append((self.num_conditions, len(args) + len(kw)))
        return forward(self, *args, **kw)

    def passes(*terms, **kw):
        seen.clear()
        g = Guider(both.scheduler, [*terms], **kw)
        assert g.num_conditions == 2
        both.run(g)
        assert g.num_conditions == 2 and all(a == b for a, b in seen)
        return [a for a, _ in seen]

    Guider.forward = spy
    try:
        assert passes(Term(NegativePrompt(), [4.0, 1.0, 0.0, 1.0])) == [2, 1, 2, 1]
        assert passes(Term(NegativePrompt(), 4.0, stop=-1.0), Term(PAG(both.net), 2.0)) == [
            2,
            1,
            1,
            1,
        ]
        assert passes(Term(NegativePrompt(), 4.0, interval=both.levels)).count(2) in (1, 2)
        assert passes(Term(NegativePrompt(), torch.tensor([1.0, 3.0]))) == [2, 2, 2, 2]
        if both.flow:
            assert passes(NegativePrompt(), zero_init=2) == [1, 1, 2, 2]
    finally:
        Guider.forward = forward
    assert Guider(both.scheduler, Term(NegativePrompt(), 1.0)).num_conditions == 1
    assert Guider(both.scheduler, Term(NegativePrompt(), 1.0, base_norm)).num_conditions == 2
    assert Guider(both.scheduler, PAG(both.net)).num_conditions == 1


def test_parts(both):
    "pred_cond is what the network says of the prompt"
    got, forward = [], Guider.forward

    def spy(self, *args, **kw):
        got.append(forward(self, *args, **kw))
        return got[-1]

    Guider.forward = spy
    try:
        both.run(Guider(both.scheduler, Term(NegativePrompt(), 3.0)), steps=1)
    finally:
        Guider.forward = forward
    (o,) = got
    same(o.pred, torch.lerp(o.pred_uncond, o.pred_cond, 3.0))
    assert (o.pred_cond - o.pred_uncond).abs().max() > 1e-3


def test_second_call(both):
    "Also with guidance off at the end"
    g = Guider(both.scheduler, Term(NegativePrompt(), [6.0, 3.0, 1.0, 1.0], apg.of(beta=0.5)))
    a, b = both.run(g), both.run(None)
    assert torch.equal(a, b)


def test_heun():
    for cls, steps, w in ((XL, 3, [6.0, 3.0, 2.0]), (SD3, 3, [6.0, 1.0, 2.0])):
        sched = (
            diffusers.FlowMatchHeunDiscreteScheduler()
            if cls is SD3
            else diffusers.HeunDiscreteScheduler.from_config(euler_discrete().config)
        )
        b = cls(sched)
        want, nfe = b.want(Term(NegativePrompt(), w), steps=steps)
        g = Guider(b.scheduler, Term(NegativePrompt(), w))
        same(b.run(g, steps=steps), want, 5e-5)
        assert g.denoiser.nfe_per_sample.tolist() == nfe.tolist()
        other = Guider(
            SD3().scheduler if cls is SD3 else euler_discrete(), Term(NegativePrompt(), w)
        )
        with pytest.raises(ValueError, match='scheduler: .* has 3 evaluations in 3 steps'):
            b.run(other, steps=steps)
        same(
            b.run(Guider(other.scheduler, Term(NegativePrompt(), 3.0)), steps=steps),
            b.want(Term(NegativePrompt(), 3.0), steps=steps)[0],
            5e-5,
        )
    with pytest.raises(ValueError, match='FlowMatchHeun.* has 7 evaluations in 4 steps'):
        SD3().run(Guider(sched, Term(NegativePrompt(), [1.0, 2.0, 3.0, 4.0])))


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
    want, _ = b.want(Term(NegativePrompt(), [6.0, 3.0, 2.0, 1.0], apg, b.levels))
    same(
        b.run(Guider(b.scheduler, Term(NegativePrompt(), [6.0, 3.0, 2.0, 1.0], apg, b.levels))),
        want,
    )


def test_images_per_prompt():
    b = XL()
    latents = torch.randn(4, 4, 8, 8, generator=seeded(3))
    got = b.run(
        Guider(b.scheduler, Term(NegativePrompt(), 3.0)), latents=latents, num_images_per_prompt=2
    )
    same(
        got,
        b.run(ClassifierFreeGuidance(guidance_scale=3.0), latents=latents, num_images_per_prompt=2),
    )


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}, [
        {k: id(v) for k, v in vars(m).items()} for m in net.modules()
    ]


class Stop(Exception):
    pass


@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt])
def test_exceptions(both, error):
    "In the network, at each of its forwards; and between prepare_models and the call of the network"
    weights, attrs = snapshot(both.net)
    g = Guider(
        both.scheduler,
        [Term(NegativePrompt(), [5.0, 1.0, 4.0, 3.0], apg), Term(PAG(both.net), 3.0)],
    )
    want = [both.run(g) for _ in range(2)][1]  # PAG has then learnt what it need not compute again
    block = list(both.net.children())[-1]
    for at in range(7):
        left = [at]

        def fail(*_):
            left[0] -= 1
            if left[0] < 0:
                raise error

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(error):
            both.run(g)
        hook.remove()
        assert 'forward' not in vars(both.net)
        assert g.num_conditions == 2
        assert torch.equal(both.run(g), want)
    assert (
        all(torch.equal(v, weights[k]) for k, v in both.net.state_dict().items())
        and [{k: id(v) for k, v in vars(m).items()} for m in both.net.modules()] == attrs
    )


def test_between(both):
    "The loop is gone before it called its network: the network is as it was for everybody else"
    g = Guider(both.scheduler, Term(NegativePrompt(), 3.0))
    want, prepare = both.run(g), Guider.prepare_models

    def fail(self, net):
        prepare(self, net)
        if self._step == 2:
            raise Stop

    Guider.prepare_models = fail
    try:
        with pytest.raises(Stop):
            both.run(g)
    finally:
        Guider.prepare_models = prepare
    plain = both.run(ClassifierFreeGuidance(guidance_scale=3.0))
    assert 'forward' not in vars(both.net)
    same(plain, want)
    assert torch.equal(both.run(g), want)


def test_threads():
    "Two pipelines that share a network"
    b, out = XL(), {}
    c = XL()
    c.modular.update_components(unet=b.net)
    runs = dict(a=(b, 3.0), b=(c, 6.0))

    def ran(o, w):
        o.run(Guider(o.scheduler, [Term(NegativePrompt(), w), Term(PAG(b.net), w)]), steps=8)
        return o.run(None, steps=8)

    want = {k: ran(*o) for k, o in runs.items()}
    threads = [
        threading.Thread(target=lambda k=k: out.update({k: runs[k][0].run(None, steps=8)}))
        for k in runs
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(out[k], want[k]) for k in runs) and 'forward' not in vars(b.net)


@pytest.mark.parametrize('inplace', [True, False])
def test_compiled(inplace):
    b = SD3()
    want = b.run(Guider(b.scheduler, Term(NegativePrompt(), 3.0)))
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    net = b.net
    if inplace:
        net.compile(backend=backend)
    else:
        b.modular.transformer = net = torch.compile(net, backend=backend)
    same(b.run(Guider(b.scheduler, Term(NegativePrompt(), 3.0))), want)
    assert graphs


SAVED = {
    **{k: v for k, v in TERMS.items() if k != 'per_image'},
    'by_hand': lambda b: dict(
        terms=[
            'NegativePrompt',
            dict(neg=dict(name='SEG', sigma=math.inf), w=3, rule='cfg', interval=[0, 3]),
        ],
        last=dict(name='rescale', settings=dict(phi=0.5)),
    ),
    'rule_of_rule': lambda b: dict(
        terms=[Term(NegativePrompt(), 4.0, rescale.of(rule=cfg, phi=0.3))]
    ),
    'plain': lambda b: dict(terms=None),
}


@pytest.mark.parametrize('name', SAVED)
def test_saved(both, name, tmp_path):
    g = Guider(both.scheduler, **SAVED[name](both))
    g.save_pretrained(tmp_path)
    json.loads(
        (tmp_path / 'guider_config.json').read_text(), parse_constant=lambda o: pytest.fail(o)
    )
    h = Guider.from_pretrained(tmp_path)
    assert torch.equal(both.run(h), both.run(g))
    assert {k: v for k, v in h.config.items() if not k.startswith('_')} == {
        k: v for k, v in g.config.items() if not k.startswith('_')
    }
    assert torch.equal(both.run(g.new(max_batch=None)), both.run(h.new(max_batch=None)))


@pytest.mark.skipif(
    diffusers.__version__.startswith('0.36'), reason='its pipelines save none of their parts'
)
def test_saved_with_the_pipeline(both, tmp_path):
    g = Guider(
        both.scheduler, [Term(NegativePrompt(), 4.0, apg.of(beta=-0.5)), Term(PAG(both.net), 3.0)]
    )
    want = both.run(g)
    both.modular.save_pretrained(str(tmp_path / 'pipe'), overwrite_modular_index=True)
    assert (tmp_path / 'pipe' / 'guider' / 'guider_config.json').exists()
    again = type(both.modular)(
        blocks=both.modular.blocks, pretrained_model_name_or_path=str(tmp_path / 'pipe')
    )
    again.load_components(names=['guider'])
    assert type(again.guider) is Guider
    assert torch.equal(both.run(again.guider), want)


def mine(neg, pos, w):
    return torch.lerp(neg, pos, w)


def cfg_paper(neg, pos, w):
    "Of the same name as one of ours"
    return torch.lerp(neg, pos, w)


named = rule('any')(cfg_paper)


@pytest.mark.parametrize(
    'name, make',
    [
        ('terms[0].rule', lambda b: dict(terms=Term(NegativePrompt(), 2.0, mine))),
        ('last', lambda b: dict(last=mine)),
        ('terms[0].rule', lambda b: dict(terms=Term(NegativePrompt(), 2.0, named))),
        ('terms[0].w', lambda b: dict(terms=Term(NegativePrompt(), lambda s: 2.0))),
        ('terms[0].w', lambda b: dict(terms=Term(NegativePrompt(), torch.tensor([1.0, 2.0])))),
        (
            'terms[0].neg',
            lambda b: dict(terms=Term({'encoder_hidden_states': torch.zeros(1, 77, 32)})),
        ),
        (
            'terms[1].neg',
            lambda b: dict(terms=[NegativePrompt(), Term(lambda x, sigma, **c: x * 0.5)]),
        ),
        ('terms[0].neg.generator', lambda b: dict(terms=TPG(b.net, generator=torch.Generator()))),
    ],
)
def test_not_saved(both, name, make, tmp_path):
    "Works; saving names it, and writes nothing; printing works"
    g = Guider(both.scheduler, **make(both))
    if name != 'terms[0].neg':
        assert both.run(g).isfinite().all()
    with pytest.raises(TypeError) as e:
        g.save_pretrained(tmp_path / 'new')
    assert name in str(e.value) and 'allowed' in str(e.value) and not (tmp_path / 'new').exists()
    assert name in repr(g)
    if name != 'terms[0].neg' and 'generator' not in name:
        assert torch.equal(both.run(g.new()), both.run(g))


def test_bad(both):
    s = both.scheduler
    for error, match, f in (
        (TypeError, 'scheduler=None', lambda: Guider(None)),
        (TypeError, 'scheduler=.*_class_name', lambda: Guider({'num_train_timesteps': 5})),
        (ValueError, "neg='PAGG'.*PAG", lambda: Guider(s, 'PAGG')),
        (ValueError, "rule='apgg'", lambda: Guider(s, dict(neg='PAG', rule='apgg'))),
        (TypeError, "no 'weight'", lambda: Guider(s, dict(neg='PAG', weight=3.0))),
        (ValueError, 'w has -1', lambda: Guider(s, dict(neg='PAG', w=-1.0))),
        (TypeError, 'terms are none', lambda: Guider(s, [])),
        (ValueError, 'zero_init=-1', lambda: Guider(s, zero_init=-1)),
        (ValueError, 'max_batch=0', lambda: Guider(s, max_batch=0)),
        (TypeError, '3 is not a rule', lambda: Guider(s, last=3)),
        (
            ValueError,
            'layers=',
            lambda: both.run(Guider(s, dict(neg=dict(name='PAG', layers=['nowhere'])))),
        ),
        (
            ValueError,
            'w has 3 values.* 4 steps',
            lambda: both.run(Guider(s, Term(NegativePrompt(), [1.0, 2.0, 3.0]))),
        ),
        (
            ValueError,
            'interval=.*noise levels',
            lambda: both.run(Guider(s, Term(NegativePrompt(), 3.0, interval=(20000, 30000.0)))),
        ),
        (RuntimeError, 'update_components', lambda: Guider(s).forward(LATENTS)),
    ):
        with pytest.raises(error, match=match):
            f()


def test_bound_weights(both):
    "A weight that is bound to a ladder is for its noise levels"
    sigmas = ladder_of(both.stock, 4)
    for o, steps in ((sigmas, 4), (ladder_of(both.stock, 5), 5)):
        w = on_ladder([6.0, 3.0, 2.0, 1.0, 4.0][: len(o) - 1], o.clamp(max=1e4))
        same(
            both.run(Guider(both.scheduler, Term(NegativePrompt(), w)), steps=steps),
            both.run(
                Guider(both.scheduler, Term(NegativePrompt(), w.values.tolist())), steps=steps
            ),
            5e-5,
        )
    with pytest.raises(ValueError, match='bound to a ladder'):
        both.run(Guider(both.scheduler, Term(NegativePrompt(), w)))


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
    "Wan, whose loop names the fields of the passes"
    wan = pytest.importorskip('diffusers.modular_pipelines.wan.modular_blocks_wan')
    if not hasattr(wan, 'WanCoreDenoiseStep'):
        pytest.skip('this diffusers has other blocks')
    net = randomized(
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
    pipe, (pos, neg) = (
        wan.WanCoreDenoiseStep().init_pipeline(),
        (torch.randn(2, 5, 16, generator=seeded(i)) for i in range(2)),
    )
    pipe.update_components(transformer=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def run(g):
        pipe.update_components(guider=g)
        return pipe(
            prompt_embeds=pos,
            negative_prompt_embeds=neg,
            latents=torch.randn(2, 4, 3, 8, 8, generator=seeded(3)),
            num_inference_steps=4,
            num_frames=9,
            height=64,
            width=64,
            output='latents',
        )

    same(
        run(Guider(scheduler, Term(NegativePrompt(), 5.0))),
        run(ClassifierFreeGuidance(guidance_scale=5.0)),
    )
    g = Guider(
        scheduler,
        [
            Term(NegativePrompt(), [5.0, 1.0, 3.0, 2.0], apg),
            Term(PAG(net), 3.0, interval=(0.3, 1e5)),
        ],
    )
    assert run(g).isfinite().all() and g.denoiser.nfe_per_sample[0] in (9, 10, 11)


def test_half_precision():
    b = SD3()
    b.net.to(torch.bfloat16)
    given = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in b.given.items()}
    same(
        b.run(Guider(b.scheduler, Term(NegativePrompt(), 3.0)), **given),
        b.run(ClassifierFreeGuidance(guidance_scale=3.0), **given),
        0.05,
    )
    assert (
        b.run(
            Guider(b.scheduler, [Term(NegativePrompt(), 3.0, apg), Term(PAG(b.net), 2.0)]), **given
        ).dtype
        == torch.bfloat16
    )


def test_no_negative_prompt():
    b = SD3()
    none = dict(negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    with pytest.raises(ValueError, match='no negative prompt'):
        b.run(Guider(b.scheduler), **none)
    assert b.run(Guider(b.scheduler, PAG(b.net)), **none).isfinite().all()
    g = Guider(euler_discrete())
    g.set_state(0, 4, torch.tensor(999.0))
    with pytest.raises(ValueError, match='no negative prompt'):
        g.prepare_inputs(
            dict(prompt_embeds=(LATENTS, None), time_ids=(LATENTS, LATENTS))
        )  # as the loop of SDXL gives it


def test_other_networks_and_schedulers():
    b = SD3()
    with pytest.raises(ValueError, match='not one for flow models'):
        b.run(Guider(euler_discrete(), PAG(b.net)), steps=30)
    x = XL(diffusers.EulerDiscreteScheduler.from_config(euler_discrete().config))
    short = diffusers.EulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match='times are 0 to 500, but the loop is at 999'):
        x.run(Guider(short))

    class Odd(torch.nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match='asks a Odd.*SD3'):
        Guider(b.scheduler).prepare_models(Odd())
