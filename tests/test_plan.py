"Plans of sweeps: requests, their cost, and the terms that draw them."

import itertools
import json
import shutil

import clear_errors
import numpy as np
import pytest
import torch
from conftest import ROOT
from pipeline_helpers import flow, flux, sd3

from cf_guidance import attention, karras, negatives, schedules, text, weak
from cf_guidance.guided import GuidedDenoiser, Inside, Negative
from cf_guidance.lab import plan
from cf_guidance.lab.backends import with_backend
from cf_guidance.lab.plan import (
    NEGATIVES,
    POST_RULES,
    RULES,
    SAMPLERS,
    SCHEDULES,
    SIGMAS,
    Sweep,
    batch_key,
    evaluations_of,
    fingerprint,
    posts_of,
    scheduler_of,
    step_of,
    terms_of,
)
from cf_guidance.lab.store import key_of
from cf_guidance.noise import randn
from cf_guidance.pipelines import (
    MinimalDiffusion,
    embedded_path,
    guided,
    pipeline_denoiser,
    sigmas_of,
)

PROMPT = 'a red sneaker on a blue background'
OTHER = 'a yellow coat on a black background'


@pytest.fixture(scope='module')
def md():
    return MinimalDiffusion(progress=False).load()


def draw(md, requests, **kwargs):
    "Pixels and evaluations of requests with one batch key, as JSON brings them."
    requests = json.loads(json.dumps(requests))
    prompts, seeds = ([r[k] for r in requests] for k in ('prompt', 'seed'))
    md.pipe.scheduler = scheduler_of(requests[0])
    terms = terms_of(requests, md.pipe)
    return md.sample(
        prompts, terms, seeds, num_steps=requests[0]['steps'], return_nfe=True, **kwargs
    )


@pytest.mark.parametrize('negative', [*NEGATIVES, 'none'])
def test_each_rule_draws_with_each_negative(md, negative):
    same = dict(prompt=PROMPT, negative_prompt=OTHER, steps=2, seed=3)
    inside = issubclass(NEGATIVES.get(negative, Negative), Inside)  # which takes no rule
    rules = ['cfg'] if inside else [*RULES]
    sweep = Sweep(negative=negative, rule=rules, w=[1, 1.5], **same)
    batches = itertools.groupby(sweep.requests, batch_key)  # w runs fastest
    for _, requests in batches:
        requests = list(requests)
        pixels, nfe = draw(md, requests)
        assert pixels.isfinite().all()
        assert nfe == [evaluations_of(r) for r in requests]


def mixed(**settings):
    "Requests of one batch: other prompts, seeds and weights."
    return Sweep(prompt=[PROMPT, OTHER], seed=[5, 1], w=[0.5, 2.5], steps=3, **settings).requests


@pytest.mark.parametrize(
    'settings',
    [
        *(dict(negative=o) for o in NEGATIVES if o not in ('perpneg', 'vsf')),
        dict(negative=f'vsf(prompt={OTHER!r})'),
        dict(guidance=[{}, dict(negative='pladis', w=2)]),
        dict(negative=f'perpneg(prompts={[OTHER, "a bag"]}, weights=[0.5, 2])', interval=(0.5, 9)),
        dict(negative='tpg', every=2, interval=(0.5, 9)),
        dict(rule='apg', schedule='linear', interval=(0.5, 5)),
        dict(rule='t_norm', post=[['rescale', 'ep_cfg(trim=0.1)']], eta=1),
        dict(guidance=[{}, dict(negative='tpg', w=1.75), dict(negative='icg', w=1.1)]),
        dict(guidance=[dict(w=2), dict(negative='mg'), dict(negative='higs')]),
        dict(scheduler='EulerAncestralDiscreteScheduler', negative='autoguidance'),
        dict(scheduler='HeunDiscreteScheduler', stop=0.99, interval=(0, 5)),
    ],
    ids=str,
)
def test_a_request_alone_is_the_same_as_in_a_batch(md, settings):
    requests = mixed(**settings)
    assert len({batch_key(r) for r in requests}) == 1
    more = dict(eta=settings.get('eta', 0.0))
    together, nfe = draw(md, requests, **more)
    if 'stop' not in settings:
        assert nfe == [evaluations_of(r) for r in requests]
    for i in (0, 3, 6):
        alone, _ = draw(md, [requests[i]], **more)
        assert (alone[0] - together[i]).abs().max() < 1e-4


@pytest.mark.parametrize('negative', ['mg', 'sgprev', 'higs'])
def test_history_costs_nothing(md, negative):
    free = dict(negative=negative)
    terms = {  # evaluations of 5 steps
        5: [free],
        10: [{}, free],
        6: [dict(schedule=[0, 0, 2, 0, 0]), free, free],  # a weight of 0 is the negative alone
        7: [free, dict(schedule=[1, 1, 2, 1, 2])],
    }
    for wanted, guidance in terms.items():
        (r,) = Sweep(prompt=PROMPT, steps=5, guidance=[guidance]).requests
        assert evaluations_of(r) == wanted
        assert draw(md, [r])[1] == [wanted]


def test_autoguidance_of_a_faster_network(md):
    (r,) = Sweep(prompt=PROMPT, negative='autoguidance', steps=2).requests
    fast = with_backend(md, 'onnx')
    assert (draw(fast, [r])[0] - draw(md, [r])[0]).abs().max() < 1e-4


def test_numpy_values_are_numbers():
    sweep = Sweep(prompt=PROMPT, seed=list(np.arange(2)), w=np.linspace(1, 2, 3), steps=2)
    assert json.loads(json.dumps(sweep.labels)) == sweep.labels
    assert len(sweep) == 6


def test_many_seeds_are_an_axis_too():
    assert len(Sweep(prompt=PROMPT, seed=range(3000), steps=2)) == 3000


def test_a_negative_that_is_reused_is_counted_and_saved(md):
    same = dict(prompt=PROMPT, steps=8, w=[0, 3], interval=(0.2, 5))
    requests = Sweep(every=[1, 2, 3], **same).requests
    assert [r['terms'][0].get('every') for r in requests[::2]] == [None, 2, 3]
    counts = [draw(md, [r])[1] for r in requests]
    assert counts == [[evaluations_of(r)] for r in requests]
    assert counts[1] > counts[3] > counts[5]
    (r,) = Sweep(prompt=PROMPT, steps=5, every=2, scheduler='HeunDiscreteScheduler').requests
    assert draw(md, [r])[1] == [evaluations_of(r)]


def test_perpneg_takes_the_negative_prompt_or_prompts_of_its_own():
    def of(negative, **more):
        (r,) = Sweep(prompt=PROMPT, steps=2, negative=negative, **more).requests
        return r

    own = of(f"perpneg(prompts='{OTHER}')")
    assert own == of('perpneg', negative_prompt=OTHER)
    assert evaluations_of(own) == 2 * 3
    two = of(dict(name='perpneg', prompts=[OTHER, 'a bag'], weights=0.5), negative_prompt='a boot')
    assert two['terms'][0]['negative']['weights'] == [0.5, 0.5]
    assert evaluations_of(two) == 2 * 4
    for bad in ('perpneg', f"perpneg(prompts='{OTHER}', weights=[1, 2])", 'perpneg(weights=-1)'):
        clear_errors.check(lambda bad=bad: of(bad), 'negative')
    unknown = "perpneg(prompts='ugly')"
    clear_errors.check(lambda: of(unknown), 'negative_prompt')


def test_seeds_and_negative_prompts_act(md):
    requests = Sweep(prompt=PROMPT, negative_prompt=['', OTHER], seed=[0, 1], steps=3).requests
    pixels, _ = draw(md, requests)
    flat = pixels.flatten(1)
    assert torch.pdist(flat).min() > 0.1


@pytest.mark.parametrize('negative', ['nag', 'vsf'])
def test_guidance_inside_the_network_has_its_own_prompt_or_that_of_the_plan(md, negative):
    same = dict(prompt=PROMPT, w=4, steps=2)
    (a,) = Sweep(negative=negative, negative_prompt=OTHER, **same).requests
    (b,) = Sweep(negative=f'{negative}(prompt={OTHER!r})', **same).requests
    assert a == b
    (plain,) = Sweep(negative='none', prompt=PROMPT, steps=2).requests
    pixels, nfe = draw(md, [a])
    assert nfe == [2]
    assert (pixels - draw(md, [plain])[0]).abs().max() > 0.05


# where text and image attend together, the other text is a second row


@pytest.fixture(scope='module', params=[sd3, flux])
def joint(request, tmp_path_factory):
    "A pipeline of such a network, and the folder that a plan reads."
    pipe, folder = request.param(flow()), tmp_path_factory.mktemp('joint')
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, str(folder)


WEIGHTS = [  # settings of 3 steps, and how many of them guide
    (dict(w=4), 3),
    (dict(w=1), 0),
    (dict(schedule=[1, 4, 4]), 2),
    (dict(w=4, interval=(1, 4)), 1),
]


@pytest.mark.filterwarnings('ignore:NAG never guided')
@pytest.mark.parametrize('settings, guided_steps', WEIGHTS)
def test_a_second_row_is_counted(joint, settings, guided_steps):
    pipe, folder = joint
    same = dict(prompt=PROMPT, negative_prompt=OTHER, negative='nag', steps=3)
    (r,) = Sweep(folder, **same, **settings).requests
    sd = guided(pipe, *terms_of([r], pipe))
    sd(PROMPT, num_inference_steps=3, height=16, width=16, output_type='latent')
    assert sd.report.nfe == [3 + guided_steps]
    assert evaluations_of(r) == 3 + guided_steps


@pytest.mark.parametrize('settings, guided_steps', WEIGHTS)
@pytest.mark.parametrize(('sampler', 'each'), [('heun', 2), ('euler_cfg_pp', 1), ('fbg', 1)])
def test_a_second_row_is_counted_by_samplers(joint, sampler, each, settings, guided_steps):
    pipe, folder = joint
    same = dict(prompt=PROMPT, negative_prompt=OTHER, negative='nag', size=16)
    (r,) = Sweep(folder, sampler=sampler, sigmas=[9, 3, 0.5], **same, **settings).requests
    D = pipeline_denoiser(pipe, False, 16, 16)
    G = GuidedDenoiser(D, *terms_of([r], pipe))
    step, options = step_of(r['sampler'])
    x = 9 * randn((1, *D.latent_shape), 0)
    karras.sample(G, x, r['sigmas'], step, D.cond([PROMPT]), 0, **options)
    assert evaluations_of(r) == G.nfe
    if settings == dict(w=4):
        assert G.nfe == 2 * (3 * each - (each == 2))


def test_a_second_row_beside_a_negative_prompt(joint):
    pipe, folder = joint
    nag = dict(negative='nag', negative_prompt=OTHER, w=4)
    (r,) = Sweep(folder, prompt=PROMPT, guidance=[dict(w=3), nag], steps=2).requests
    sd = guided(pipe, *terms_of([r], pipe))
    sd(PROMPT, num_inference_steps=2, height=16, width=16, output_type='latent')
    assert sd.report.nfe == [6]
    assert evaluations_of(r) == 6


def test_a_second_row_saves_nothing(joint):
    same = dict(prompt=PROMPT, negative='nag', steps=2)
    with pytest.raises(ValueError, match='every: nag is a part of each evaluation'):
        Sweep(joint[1], every=2, **same)
    with pytest.raises(ValueError, match='stop: nag is a part of each evaluation'):
        Sweep(joint[1], stop=0.9, **same)


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        (dict(negative='vsf'), 'negative: vsf: expected a prompt, or a negative_prompt'),
        (dict(negative='nag', rule='apg'), 'rule: nag combines inside the network, got apg'),
        (dict(negative='nag', every=2), 'every: nag costs no evaluation to save'),
        (dict(negative='nag(words=3)'), 'negative: nag: expected tau, alpha, layers, prompt'),
    ],
)
def test_mistakes_of_guidance_inside_the_network(settings, match):
    with pytest.raises(ValueError, match=match):
        _ = Sweep(prompt=PROMPT, steps=2, **settings).requests


def test_all_of_the_core_has_a_name_or_a_reason():
    page = (ROOT / 'nbs/lab/09_plan.ipynb').read_text()
    unnamed = page.split('## What a plan cannot say')[1].split('## Batches')[0]
    kinds = {o.__name__ for o in NEGATIVES.values()}
    for module in (attention, negatives, text, weak):
        for name in module.__all__:
            o = getattr(module, name)
            if isinstance(o, type) and issubclass(o, Negative):
                assert o.__name__ in kinds or f'`{name}`' in unnamed, name
    for name in schedules.__all__:
        if name.endswith('_sched'):
            assert name.removesuffix('_sched') in SCHEDULES or f'`{name}`' in unnamed, name


BAD = {
    'prompt': [
        3,
        None,
        [],
        [PROMPT, PROMPT],
        'a red spaceship',
        ' '.join(['red'] * 20),
        [[PROMPT]],
    ],
    'negative_prompt': [3, 'ugly', []],
    'seed': [-1, 0.5, '0', None, 2**64, True, [0, 0], []],
    'w': [-1, 'high', float('nan'), float('inf'), 1e39, [1, 1.0], [], True, {'a': 1}],
    'rule': ['cgf', 'apg(', 'apg(.5)', 'apg(etta=1)', "apg(eta='x')", 3, 'rescale', {'eta': 1}, ''],
    'negative': [
        *('pagg', 'pag(sigma=1)', 'seg(sigma=-1)', 'sag(kernel=0)', 'sag(kernel=1.5)', 5),
        *('mg(beta=1)', "sgprev(space='x')", 'higs(t_min=2)'),
    ],
    'interval': [(5, 0.3), '5:0.3', '.3', 'a:b', (1000, 2000), 3, (-1, 2), {'lo': 1}],
    'stop': [2, 'x', True],
    'every': [0, -1, 1.5, 'two', True, None],
    'schedule': ['lin', 'linear(num_steps=3)', 'linear(foo=1)', [-1, 2], [1, 2, 3], 'points', {}],
    'post': ['cfg', 'rescale(phi=7)', 'rescal', 3, [['rescale', 'x']]],
    'scheduler': [
        "DDIMScheduler(beta_end='x')",
        'DDIM',
        'DDIMScheduler(foo=1)',
        3,
        'FlowMatchEulerDiscreteScheduler',
        'EulerDiscreteScheduler(stochastic_sampling=True)',
        'torch',
    ],
    'sampler': [
        *('eulr', 'euler(', 'euler(foo=1)', 'heun(s_churn=-1)', 'heun(quantize=None)', 3),
        *('lms(order=0)', "dpmpp_2m_sde(solver_type='x')", 'DDIMScheduler'),
    ],
    'sigmas': [
        *('karas', 'karras(foo=1)', "karras(rho='x')", 'karras(rho=0)', 'linear(rho=2)', 3),
        *('karras(sigma_max=100)', 'karras(sigma_max=.01)', [1, 2], [-1.0], [100.0, 1], [[1, 'x']]),
    ],
    'cads': [
        *(-0.1, 'cds', 'cads(', 'cads(s=-1)', 'cads(seed=1)', 'cads(tau1=.9, tau2=.5)', True),
        *({'psi': 2}, {'s': 'x'}, {'names': ['text']}, {'name': 'pag'}, [0.25, 'cads'], []),
    ],
    'steps': [0, -5, 1.5, 'many', 1001, [5, 5]],
    'eta': [-1, 'x', float('nan')],
    'size': [0, [(1, 2, 3)], 'x', (32, 'x')],
    'dtype': ['float', 'int8', 3],
    'device': ['gpu', 'cuda:0', None],
    'backend': ['tf', None],
    'guidance': [{}, [1], [{'weight': 1}], [{'seed': 1}], 'pag'],
    'cases': [[{'foo': 1}], [3], 'w'],
    'where': [
        'w <',
        'foo < 1',
        '__import__("os")',
        'w.real > 1',
        'w > 100',
        'rule < 4',
        3,
        lambda foo: True,
    ],
    'model': ['', 'no-such', '/no/such/folder', 'a/b/c', 3, '../x', '\0'],
    'weight': [3],
}


def short_name(value):
    return getattr(value, '__name__', str(value))


@pytest.mark.parametrize(
    'name, value', [(k, v) for k, each in BAD.items() for v in each], ids=short_name
)
def test_bad_values_are_clear(name, value):
    settings = {'prompt': PROMPT, 'w': 2, 'steps': 5, name: value}
    if name == 'schedule' and value != [1, 2, 3]:
        del settings['w'], settings['steps']
    if name == 'sigmas':
        settings['sampler'] = 'euler'
        del settings['steps']
    clear_errors.check(lambda: Sweep(**settings), name, most=400)  # some list all names


def test_what_does_not_go_together_is_clear():
    check = clear_errors.check
    check(lambda: Sweep(w=2), 'prompt')
    check(lambda: Sweep(prompt=PROMPT, schedule=[1, 2], w=2), 'w')
    check(lambda: Sweep(prompt=PROMPT, schedule='linear(w=2)', w=2), 'w')
    check(lambda: Sweep(prompt=PROMPT, schedule={'name': 'points', 'points': [[0, 1]]}, w=2), 'w')
    check(lambda: Sweep(prompt=PROMPT, scheduler='EulerDiscreteScheduler', eta=0.5), 'eta')
    check(lambda: Sweep(prompt=PROMPT, sampler='heun', eta=0.5), 'eta')
    check(lambda: Sweep(prompt=PROMPT, sampler='euler_cfg_pp', negative='none'), 'sampler')
    check(lambda: Sweep(prompt=PROMPT, sigmas='karras'), 'sigmas')
    check(lambda: Sweep(prompt=PROMPT, sampler='heun', sigmas=[5, 1], steps=3), 'steps')
    check(lambda: Sweep(prompt=PROMPT, w=[1, 2], cases=[{'w': 3}]), 'cases')
    check(lambda: Sweep(prompt=PROMPT, where=lambda **kw: True).settings(), 'where')
    check(lambda: Sweep.from_dict([1]), 'settings')
    check(lambda: Sweep.from_toml('/no/such.toml'), 'plan')
    check(lambda: terms_of([], None), 'requests')
    two = Sweep(prompt=PROMPT, rule=['cfg', 'apg'], steps=2).requests
    check(lambda: terms_of(two, None), 'requests')


def test_the_order_is_that_of_the_axes_and_nothing_is_twice():
    sweep = Sweep(seed=range(2), prompt=PROMPT, negative=['none', 'prompt'], w=[1, 2], steps=2)
    assert [(o['seed'], o['negative'], o['w']) for o in sweep.labels] == [
        *[(0, 'none', 1), (0, 'prompt', 1), (0, 'prompt', 2)],
        *[(1, 'none', 1), (1, 'prompt', 1), (1, 'prompt', 2)],
    ]
    assert len(sweep) == 6
    assert sweep.evaluations == 2 * (2 + 2 + 4)
    assert repr(sweep).startswith('6 pictures (seed 2, negative 2, w 2), 16 network')


def test_other_spellings_are_the_same_request():
    def of(**settings):
        return Sweep(prompt=PROMPT, steps=2, **settings).requests

    assert of(sampler='lms(order=4)') == of(sampler=dict(name='lms'))
    assert of(rule='apg(eta=1)') == of(rule={'name': 'apg', 'eta': 1.0})
    assert of(rule=RULES['apg'].of(eta=1)) == of(rule='apg(eta = 1)')
    assert of(interval=(0.5, 3)) == of(interval='.5:3') == of(interval=[0.5, 3.0])
    assert of(w=7.5, seed=0, eta=0) == of() == of(w='none', negative='prompt')
    assert of(scheduler='DDIMScheduler') == of(scheduler=None)
    assert of(schedule=[2, 3], w=None) == of(guidance=[{'schedule': [2.0, 3.0]}])
    assert of(size=32) == of(size=(32, 32))
    assert of(interval=(0.5, float('inf'))) == of(interval='.5:inf')


def test_requests_are_json_and_do_not_change():
    settings = dict(prompt=PROMPT, negative_prompt=OTHER, rule=[*RULES], steps=2)
    settings |= dict(
        negative=[o for o in NEGATIVES if not issubclass(NEGATIVES[o], Inside)], post=[*POST_RULES]
    )
    sweep = Sweep(**settings)
    text = json.dumps(sweep.requests, allow_nan=False)
    assert json.loads(text) == sweep.requests
    again = Sweep(**settings)
    assert json.dumps(again.requests) == text
    assert {type(posts_of(r)[0]) for r in sweep.requests} == {type(POST_RULES['rescale'])}


OLD = [  # requests without CADS, and their keys before it was an axis (without what a machine adds)
    (
        dict(w=3, seed=1, steps=2),
        'bf7472181b724085f0ea2ff8b9bcc6216da29d27ee7f03906d6a2d06083afa8f',
    ),
    (
        dict(sampler='heun(s_churn=3)', sigmas=[10, 1], rule='apg', every=2),
        '17b1ce3a06cac0163400f6530c39fc7cfbfbd19bbe1543cc97431be8a5ca2d86',
    ),
    (
        dict(negative='none', post='rescale', steps=2),
        'db3fb471d7cad66a149c681cb1d9c9eb1d23766f77428aa66509c7a5136fdddf',
    ),
]


@pytest.mark.parametrize('settings, key', OLD, ids=['scheduler', 'sampler', 'none'])
def test_requests_without_cads_keep_their_keys(settings, key):
    for more in ({}, dict(cads='none'), dict(cads=None)):
        (r,) = Sweep(prompt=PROMPT, **settings, **more).requests
        r['model']['fingerprint'] = 'x'
        r['sigmas'] = r['sigmas'] if 'sampler' in r else None
        assert key_of(r) == key


def test_cads_is_an_axis():
    sweep = Sweep(prompt=PROMPT, w=3, steps=2, cads=['none', 0.5, dict(s=0.5, tau1=0.3)])
    usual = dict(tau1=0.6, tau2=0.9, s=0.5, psi=1.0)
    assert [r.get('cads') for r in sweep.requests] == [None, usual, dict(usual, tau1=0.3)]
    assert [o['cads'] for o in sweep.labels] == ['none', 0.5, '(s=0.5, tau1=0.3)']
    assert len({key_of(r) for r in sweep.requests}) == 3
    assert len({batch_key(r) for r in sweep.requests}) == 3
    assert {evaluations_of(r) for r in sweep.requests} == {4}  # it costs nothing


def test_spellings_of_cads():
    def of(cads):
        return Sweep(prompt=PROMPT, steps=2, cads=cads).requests

    assert of('cads') == of({}) == of(0.25) == of('cads(s=0.25)') == of({'name': 'cads'})
    assert of('cads(s=1, psi=0)') == of(dict(psi=0.0, s=1.0))
    assert of([None, 0.5]) == of(['none', 'cads(s=.5)'])


def test_a_plan_with_cads_is_the_same_after_its_file(tmp_path):
    sweep = Sweep(prompt=PROMPT, steps=2, cads=['none', 0.5, dict(s=0.5, tau1=0.3), 'cads(psi=0)'])
    sweep.to_toml(tmp_path / 'plan.toml')
    assert Sweep.from_toml(tmp_path / 'plan.toml').requests == sweep.requests


def test_each_schedule_makes_weights():
    points = {'name': 'points', 'points': [[0, 1], [1, 3]]}
    knots = {'name': 'knots', 'at': [0.1, 10], 'ws': [0, 4], 'low': 1}
    families = [dict(points=points, knots=knots).get(o, o) for o in SCHEDULES]
    for r in Sweep(prompt=PROMPT, schedule=families, steps=6).requests:
        assert len(r['terms'][0]['weights']) == 6
    a, b = Sweep(prompt=PROMPT, schedule=['linear', 'get_cos'], w=4, steps=6).requests
    assert sum(a['terms'][0]['weights']) == pytest.approx(24)
    assert b['terms'][0]['weights'][0] == 4
    (at,) = Sweep(prompt=PROMPT, schedule=knots, steps=6).requests
    want = schedules.knots_sched(at['sigmas'][:6], [0.1, 10], [0, 4], 1)
    assert at['terms'][0]['weights'] == pytest.approx(want, rel=1e-11)
    (pag,) = Sweep(prompt=PROMPT, negative='pag', steps=2).requests
    assert pag['terms'][0]['weights'] == [4.0, 4.0]


def test_sigmas_are_those_of_the_pipeline(md):
    for name in (
        'DDIMScheduler',
        'EulerDiscreteScheduler',
        'PNDMScheduler',
        'HeunDiscreteScheduler',
    ):
        (r,) = Sweep(prompt=PROMPT, scheduler=name, steps=7).requests
        md.pipe.scheduler = scheduler_of(r)
        assert r['sigmas'] == pytest.approx(sigmas_of(md.pipe, 7).tolist(), rel=5e-4)
    karras = 'DPMSolverMultistepScheduler(use_karras_sigmas=True)'
    a, b = Sweep(prompt=PROMPT, scheduler=[karras, karras.split('(')[0]], steps=7).requests
    assert a['sigmas'] != b['sigmas']
    assert scheduler_of(a).config.use_karras_sigmas


@pytest.mark.parametrize(
    'settings',
    [dict(), dict(sampler='euler'), dict(sampler='euler', sigmas='karras')],
    ids=['scheduler', 'sampler', 'named'],
)
def test_a_request_is_the_same_on_processors_that_round_differently(settings, monkeypatch):
    def of():
        cached = (plan._levels, plan._bare_denoiser, plan._sampler_levels)
        for f in cached:
            f.cache_clear()
        knots = {'name': 'knots', 'at': [0.1, 10], 'ws': [1, 4]}
        return Sweep(prompt=PROMPT, steps=8, schedule=knots, **settings).requests

    linspace, here = torch.linspace, of()
    with monkeypatch.context() as m:  # as another processor has it: off in the last digit
        m.setattr(torch, 'linspace', lambda *args, **kw: linspace(*args, **kw) * (1 - 6e-8))
        moved, there = scheduler_of(here[0]).alphas_cumprod, of()
    assert not torch.equal(moved, scheduler_of(here[0]).alphas_cumprod)
    assert there == here == of()


@pytest.mark.parametrize('scheduler', ['PNDMScheduler', 'HeunDiscreteScheduler'])
def test_evaluations_of_schedulers_that_evaluate_twice(md, scheduler):
    (r,) = Sweep(prompt=PROMPT, scheduler=scheduler, steps=5, interval=(0.6, 4)).requests
    assert draw(md, [r])[1] == [evaluations_of(r)]


def test_the_noise_levels_of_a_sampler_are_in_its_request():
    def of(**settings):
        return Sweep(prompt=PROMPT, sampler='euler', **settings).requests

    (own,) = of(sigmas=[5, 2.0, 0.5])
    assert own['sigmas'] == [5.0, 2.0, 0.5, 0.0]
    assert (own['steps'], evaluations_of(own)) == (3, 6)
    assert of(sigmas=own['sigmas']) == [own]
    (schedulers,) = Sweep(prompt=PROMPT, steps=7).requests
    assert 'sampler' not in schedulers  # so that keys of earlier plans are still those
    assert of(steps=7)[0]['sigmas'] == schedulers['sigmas']
    families = of(steps=7, sigmas=[*SIGMAS, 'karras(rho=3)', 'karras(sigma_max=5)'])
    assert len({tuple(r['sigmas']) for r in families}) == 5
    assert {(len(r['sigmas']), r['sigmas'][-1]) for r in families} == {(8, 0.0)}
    assert families[-1]['sigmas'][0] == 5


@pytest.mark.parametrize(
    'sampler', ['dpm_adaptive', 'dpm_adaptive(rtol=0.1)', dict(name='dpm_adaptive')], ids=str
)
def test_a_sampler_without_fixed_steps_is_refused(sampler):
    with pytest.raises(ValueError, match='^sampler: expected a sampler with fixed steps'):
        Sweep(prompt=PROMPT, sampler=sampler, steps=4)


def test_evaluations_of_samplers():
    requests = Sweep(prompt=PROMPT, sampler=[*SAMPLERS], w=[1, 2], steps=4).requests
    counts = {
        r['sampler']['name']: evaluations_of(r)
        for r in requests
        if r['terms'][0]['weights'][0] == 2
    }
    assert (counts['euler'], counts['heun'], counts['dpmpp_2m']) == (8, 14, 8)
    assert (counts['sa_solver'], counts['dpm_fast']) == (8, 18)
    assert counts['restart'] == 14 + 2 * 18
    assert counts['rectified_cfg_pp'] == 4 * 3
    assert counts['fbg'] == 4 * 2
    alone = [evaluations_of(r) for r in requests if r['terms'][0]['weights'][0] == 1]
    extra = dict(
        euler_cfg_pp=4, rectified_cfg_pp=6, fbg=4
    )  # they read both predictions at any weight
    assert sum(alone) == (sum(counts.values()) + 2 * sum(extra.values())) / 2


def test_a_plan_is_the_same_after_its_file(tmp_path):
    where = 'w < 4 or rule == "cfg"'
    sweep = Sweep(
        prompt=[PROMPT, OTHER],
        cases=[{'negative': 'pag', 'w': None}, {'w': 2, 'interval': None}, {'interval': (0.3, 5)}],
        rule=['cfg', RULES['apg'].of(eta=0.5)],
        schedule=[None, 'linear', {'name': 'beta', 'a': 3}],
        post=[None, [POST_RULES['rescale'], 'cfg_norm']],
        steps=3,
        where='schedule is None or rule == "cfg"',
    )
    sweep.to_toml(tmp_path / 'plan.toml')
    again = Sweep.from_toml(tmp_path / 'plan.toml')
    assert again.requests == sweep.requests
    assert again.settings() == sweep.settings()
    assert Sweep(prompt=PROMPT, w=[2, 8], rule=['cfg', 'apg'], steps=2, where=where).labels == [
        dict(prompt=PROMPT, seed=0, w=w, rule=rule)
        for w, rule in [(2, 'cfg'), (2, 'apg'), (8, 'cfg')]
    ]
    (tmp_path / 'bad.toml').write_text('w = [1,')
    clear_errors.check(lambda: Sweep.from_toml(tmp_path / 'bad.toml'), 'plan')


def test_a_fingerprint_follows_the_files(tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(embedded_path('fashion-sd'), folder)
    before = fingerprint(folder)
    assert before == fingerprint('fashion-sd')
    (folder / 'README.md').write_text('other words')
    assert fingerprint(folder) == before
    config = folder / 'unet' / 'config.json'
    config.write_text(config.read_text() + '\n')
    assert fingerprint(folder) != before
