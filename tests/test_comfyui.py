"The nodes of `integrations/comfyui`, in a small stand-in for ComfyUI."

import copy
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, python

from cf_guidance import schedules, transforms
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.karras import sample_euler
from cf_guidance.noise import randn

SHAPE = (2, 4, 6, 5)
SIGMAS = torch.tensor([12.0, 6.0, 3.0, 1.5, 0.7, 0.3, 0.0])
FLOW_SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])


@pytest.fixture(scope='module')
def pack():
    "The folder, loaded as ComfyUI loads a folder of `custom_nodes`."
    folder = ROOT / 'integrations/comfyui'
    spec = importlib.util.spec_from_file_location('custom_x_comfyui', folder / '__init__.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [k for k in sys.modules if k.startswith(spec.name)]:
        del sys.modules[name]


class VE:
    "Noise levels of a model whose noise is added."

    sigma_min, sigma_max = torch.tensor(0.03), torch.tensor(15.0)


class CONST:
    "Those of a flow, as ComfyUI calls them."

    sigma_min, sigma_max = torch.tensor(0.001), torch.tensor(1.0)


class Network:
    "The exact denoiser of Gaussian data with variance 0.5, whose mean is the condition."

    def __init__(self, sampling=None):
        self.model_sampling, self.rows = sampling or VE(), 0

    def __call__(self, x, sigma, cond):
        self.rows += len(x)
        sigma = sigma.view(-1, *(1,) * (x.ndim - 1)).to(x)
        signal = 1 - sigma if isinstance(self.model_sampling, CONST) else torch.ones_like(sigma)
        gain = 0.5 * signal / (0.5 * signal**2 + sigma**2)
        return cond + gain * (x - signal * cond)


class Patcher:
    "A MODEL."

    def __init__(self, model, options=None):
        self.model, self.model_options = model, options or {'transformer_options': {}}

    def clone(self):
        return Patcher(self.model, copy.deepcopy(self.model_options))

    def get_model_object(self, name):
        return getattr(self.model, name)

    def set_model_sampler_cfg_function(self, fn, disable_cfg1_optimization=False):
        self.model_options['sampler_cfg_function'] = fn
        if disable_cfg1_optimization:
            self.model_options['disable_cfg1_optimization'] = True

    def set_model_sampler_calc_cond_batch_function(self, fn):
        self.model_options['sampler_calc_cond_batch_function'] = fn

    def set_model_sampler_post_cfg_function(self, fn):
        self.model_options.setdefault('sampler_post_cfg_function', []).append(fn)


def calc_cond_batch(model, conds, x, sigma, options):
    return [torch.zeros_like(x) if c is None else model(x, sigma, c) for c in conds]


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    "What the nodes import from ComfyUI."
    samplers = ModuleType('comfy.samplers')
    samplers.calc_cond_batch = calc_cond_batch
    comfy = ModuleType('comfy')
    comfy.samplers = samplers
    monkeypatch.setitem(sys.modules, 'comfy', comfy)
    monkeypatch.setitem(sys.modules, 'comfy.samplers', samplers)


def denoise(model, options, x, sigma, pos, neg, cfg):
    "One evaluation."
    conds = [pos, None if cfg == 1 and not options.get('disable_cfg1_optimization') else neg]
    evaluate = options.get('sampler_calc_cond_batch_function')
    facts = dict(model=model, input=x, sigma=sigma, timestep=sigma, model_options=options)
    if evaluate:
        d_pos, d_neg = evaluate(dict(conds=conds, **facts))
    else:
        d_pos, d_neg = calc_cond_batch(model, conds, x, sigma, options)
    if 'sampler_cfg_function' not in options:
        out = d_neg + (d_pos - d_neg) * cfg
    else:
        given = dict(cond=x - d_pos, uncond=x - d_neg, cond_denoised=d_pos, uncond_denoised=d_neg)
        out = x - options['sampler_cfg_function'](dict(cond_scale=cfg, **facts, **given))
    for f in options.get('sampler_post_cfg_function', []):
        out = f(dict(denoised=out, **facts))
    return out


def conditions(shape=SHAPE):
    return randn((2, *shape), generator=5) + 0.3


def euler(patcher, cfg=4.0, sigmas=SIGMAS, shape=SHAPE, seed=0, dtype=torch.float32, tell=True):
    "A run of the Euler sampler of ComfyUI."
    pos, neg = conditions(shape).to(dtype)
    options = {**patcher.model_options, 'transformer_options': {}}
    if tell:
        options['transformer_options']['sample_sigmas'] = sigmas
    x = randn(shape, generator=seed).to(dtype) * sigmas[0].to(dtype)
    for a, b in zip(sigmas, sigmas[1:], strict=False):
        level = a.expand(len(x)).to(dtype)
        d = denoise(patcher.model, options, x, level, pos, neg, cfg)
        x = d + (x - d) * (b / a).to(dtype)
    return x


def ours(w=4.0, sigmas=SIGMAS, seed=0, **settings):
    "The same by a `GuidedDenoiser` in our loop."
    pos, neg = conditions()
    G = GuidedDenoiser(Network(), dict(cond=neg), w=w, **settings)
    G.start(sigmas)
    x = randn(SHAPE, generator=seed) * sigmas[0]
    return sample_euler(G, x, sigmas, extra_args=dict(cond=pos), disable=True)


def patch_rule(pack, model, rule='cfg', settings='', post='none', post_settings=''):
    node = pack.NODE_CLASS_MAPPINGS['CFGuidanceRule']()
    return getattr(node, node.FUNCTION)(model, rule, settings, post, post_settings)[0]


def patch_schedule(pack, model, name='constant', settings='', knots='', low=0.0, high=1e5):
    node = pack.NODE_CLASS_MAPPINGS['CFGuidanceSchedule']()
    return getattr(node, node.FUNCTION)(model, name, settings, knots, low, high)[0]


@pytest.fixture
def model():
    return Patcher(Network())


def close(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def differ(a, b, tol=1e-2):
    assert (a - b).abs().max() > tol


def test_names_and_inputs(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert node.RETURN_TYPES == ('MODEL',)
        assert next(iter(node.INPUT_TYPES()['required'].values())) == ('MODEL',)


def test_all_rules_are_offered(pack):
    inputs = pack.NODE_CLASS_MAPPINGS['CFGuidanceRule'].INPUT_TYPES()['required']
    offered = {*inputs['rule'][0], *inputs['post_rule'][0]} - {'none'}
    kinds = transforms.Rule | transforms.PostRule
    assert offered == {k for k, o in vars(transforms).items() if isinstance(o, kinds)}


def test_needs_no_extra():
    "In a Python where neither diffusers nor the lab's packages can be imported."
    code = (
        'import sys\n'
        'for k in ("diffusers", "transformers", "matplotlib", "pandas"): sys.modules[k] = None\n'
        'sys.path.insert(0, "integrations")\n'
        'import comfyui\n'
        'assert comfyui.NODE_CLASS_MAPPINGS\n'
        'assert not [k for k in sys.modules if k.startswith("cf_guidance.lab")]'
    )
    r = python('-c', code, cwd=ROOT)
    assert r.returncode == 0, r.stderr


def test_the_model_given_stays_as_it_was(pack, model):
    patch_schedule(pack, patch_rule(pack, model, 'apg'), low=1, high=5)
    assert model.model_options == {'transformer_options': {}}


@pytest.mark.parametrize('cfg', [0.0, 1.0, 4.0])
def test_plain_cfg_is_that_of_comfyui(pack, model, cfg):
    close(euler(patch_rule(pack, model), cfg), euler(model, cfg), 1e-5)


@pytest.mark.parametrize(
    'rule, text',
    [
        *(('apg', 'eta=0.2, radius=5.0, beta=-0.5'), ('cfg_zero', ''), ('adg', '')),
        *(('smc', 'k=0.1'), ('beta_cfg', ''), ('fdg', 'shares=(1, 0.2)'), ('mimic', 'mimic=2')),
    ],
)
def test_rules_equal_our_own_loop(pack, model, rule, text):
    settings = eval(f'dict({text})')
    expected = ours(rule=getattr(transforms, rule).of(**settings))
    close(euler(patch_rule(pack, model, rule, text)), expected)
    differ(expected, ours())


@pytest.mark.parametrize(
    'post, text', [('rescale', 'phi=0.5'), ('cfg_norm', ''), ('tsr', 'k=0.8'), ('limit_norm', '')]
)
def test_post_rules_equal_our_own_loop(pack, model, post, text):
    expected = ours(post=getattr(transforms, post).of(**eval(f'dict({text})')))
    close(euler(patch_rule(pack, model, post=post, post_settings=text)), expected)
    differ(expected, ours())


@pytest.mark.parametrize('first', ['rule', 'schedule'])
def test_nodes_combine_in_any_order(pack, model, first):
    def rule(m):
        return patch_rule(pack, m, 'apg', 'eta=0.5', 'rescale', 'phi=0.4')

    def schedule(m):
        return patch_schedule(pack, m, 'linear', 'base=1', low=0.5, high=6)

    both = schedule(rule(model)) if first == 'rule' else rule(schedule(model))
    expected = ours(
        schedules.linear_sched(6, 4.0, base=1),
        rule=transforms.apg.of(eta=0.5),
        post=transforms.rescale.of(phi=0.4),
        interval=(0.5, 6.0),
    )
    close(euler(both), expected)


def test_interval_acts(pack, model):
    guided = euler(patch_schedule(pack, model, low=0.5, high=6))
    close(guided, ours(interval=(0.5, 6.0)))
    differ(guided, ours())


def test_outside_of_the_interval_the_positive_alone(pack, model):
    guided = patch_schedule(pack, patch_rule(pack, model, 'mimic', 'p=0.5'), low=0.031, high=0.2)
    close(euler(guided), euler(model, 1.0), 1e-5)


def test_the_negative_is_evaluated_inside_only(pack, model):
    euler(patch_schedule(pack, model, low=0.5, high=6))
    assert model.model.rows == 2 * (6 + 4)


def test_a_later_interval_replaces_an_earlier_one(pack, model):
    narrow = patch_schedule(pack, model, low=0.5, high=1)
    close(euler(patch_schedule(pack, narrow)), euler(model), 1e-5)


def test_another_cfg_function_gets_the_negative_everywhere(pack, model):
    m = patch_schedule(pack, model, low=0.5, high=6)
    m.set_model_sampler_cfg_function(lambda a: a['uncond'] + 4 * (a['cond'] - a['uncond']))
    close(euler(m), euler(model), 1e-5)


def test_a_later_function_gets_the_negative_everywhere(pack, model):
    m = patch_schedule(pack, model, low=0.5, high=6)
    m.set_model_sampler_post_cfg_function(lambda a: a['denoised'])
    close(euler(m), ours(interval=(0.5, 6.0)))
    assert model.model.rows == 2 * 2 * 6


@pytest.mark.parametrize('name', ['linear', 'tent', 'v', 'pcs', 'beta', 'exp', 'sine'])
def test_schedules_equal_our_own_loop(pack, model, name):
    ws = getattr(schedules, f'{name}_sched')(6, 4.0)
    close(euler(patch_schedule(pack, model, name)), ours(ws))
    differ(ours(ws), ours())


def test_old_schedule_takes_the_cfg_as_its_largest_weight(pack, model):
    ws = schedules.get_cos_sched(6, 4.0, 1.0)
    close(euler(patch_schedule(pack, model, 'get_cos', 'min_val=1.0')), ours(ws))


def test_knots(pack, model):
    at, ws = (10.0, 3.0, 0.5), (1.0, 7.0, 2.0)
    expected = ours(schedules.knots_sched(SIGMAS[:-1], at, ws))
    close(euler(patch_schedule(pack, model, 'knots', '', '0.5: 2, 10: 1\n3: 7')), expected)


def test_knots_need_no_steps(pack, model):
    m = patch_schedule(pack, model, 'knots', '', '10: 1, 3: 7')
    close(euler(m, tell=False), euler(m))


def test_weight_in_the_settings_wins(pack, model):
    m = patch_schedule(pack, model, 'constant', 'w=4')
    close(euler(m, 1.0), euler(model, 4.0), 1e-5)
    close(euler(m, 9.0), euler(model, 4.0), 1e-5)


@pytest.mark.parametrize('rule', ['cfg', 'apg', 'beta_cfg', 'smc', 'base_norm', 'full_norm'])
def test_weight_1_is_the_positive_alone(pack, model, rule):
    m = patch_rule(pack, model, rule, post='epsilon_scaling')
    close(euler(m, 1.0), euler(model, 1.0), 1e-5)
    close(euler(patch_schedule(pack, m, settings='w=1'), 4.0), euler(model, 1.0), 1e-5)


def test_second_run_equals_the_first(pack, model):
    m = patch_rule(pack, model, 'apg', 'beta=-0.75')
    first = euler(m)
    assert torch.equal(euler(m), first)
    differ(euler(m, seed=1), first)
    assert torch.equal(euler(m), first)


def test_stopped_run_leaves_nothing(pack, model):
    m = patch_rule(pack, model, 'smc')
    first = euler(m)
    euler(m, sigmas=SIGMAS[:2], seed=1, tell=False)
    assert torch.equal(euler(m, tell=False), first)
    euler(m, sigmas=SIGMAS[:4], seed=1, tell=False)
    assert torch.equal(euler(m, tell=False), first)


def test_one_model_in_two_samplers(pack, model):
    m = patch_rule(pack, model, 'smc')
    a, b = euler(m, 3.0), euler(m, 6.0)
    close(a, ours(3.0, rule=transforms.smc))
    close(b, ours(6.0, rule=transforms.smc))


def test_a_picture_does_not_depend_on_its_neighbours(pack, model):
    m = patch_rule(pack, model, 'apg', 'radius=3.0', 'rescale')
    both = euler(m)
    pos, neg = conditions()
    x = randn(SHAPE, generator=0) * SIGMAS[0]
    for i in range(2):
        row, options = slice(i, i + 1), m.model_options
        y = x[row]
        for a, b in zip(SIGMAS, SIGMAS[1:], strict=False):
            d = denoise(m.model, options, y, a.expand(1), pos[row], neg[row], 4.0)
            y = d + (y - d) * (b / a)
        close(y, both[row])


@pytest.mark.parametrize('shape', [(1, 4, 6, 5), (3, 4, 2, 6, 5)], ids=['4 axes', '5 axes'])
@pytest.mark.parametrize('rule', ['apg', 'fdg', 'mahiro'])
def test_shapes_and_half_precision(pack, model, rule, shape):
    m = patch_rule(pack, model, rule, post='rescale')
    wide = euler(m, shape=shape)
    half = euler(m, shape=shape, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.shape == shape
    close(half.float(), wide, 0.1)


class Flow:
    "A flow as our denoisers see it: the same network, clean image plus sigma times noise."

    def __call__(self, x, sigma, cond):
        t = (sigma / (1 + sigma)).view(-1, *(1,) * (x.ndim - 1))
        return Network(CONST())(x * (1 - t), t.flatten(), cond)


@pytest.mark.parametrize('rule', ['cfg_zero', 'apg', 'adg', 'smc'])
def test_flow_equals_our_own_denoiser(pack, rule):
    pos, neg = conditions()
    m = patch_rule(pack, Patcher(Network(CONST())), rule, post='rescale')
    m = patch_schedule(pack, m, low=0.2, high=0.95)
    G = GuidedDenoiser(
        Flow(),
        dict(cond=neg),
        w=4.0,
        rule=getattr(transforms, rule),
        post=transforms.rescale,
        interval=(0.2 / 0.8, 0.95 / 0.05),
    )
    x = randn(SHAPE, generator=0)
    for a, b in zip(FLOW_SIGMAS, FLOW_SIGMAS[1:], strict=False):
        t = a.clamp(max=0.9999)
        d = G(x / (1 - t), t / (1 - t), cond=pos)
        x = d + (x - d) * (b / a)
    close(euler(m, sigmas=FLOW_SIGMAS), x, 1e-3)


def test_plain_cfg_of_a_flow(pack):
    model = Patcher(Network(CONST()))
    m = patch_schedule(pack, model, 'knots', knots='1: 4, 0.2: 4')
    close(euler(m, sigmas=FLOW_SIGMAS), euler(model, sigmas=FLOW_SIGMAS), 1e-3)


def test_knots_of_a_flow_are_its_own_noise_levels(pack):
    m = patch_schedule(pack, Patcher(Network(CONST())), 'knots', knots='0.9: 1, 0.3: 5')
    guidance = m.model_options['sampler_cfg_function']
    scale = SimpleNamespace(model_sampling=CONST())
    run = guidance._guided(4.0, None, sys.modules[type(guidance).__module__]._Scale(scale))
    w = run.run.weights[0](torch.tensor([9.0, 3 / 7]))
    close(w, torch.tensor([1.0, 5.0], dtype=torch.float64))


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(rule='apgg'), "rule: expected one of .*, got 'apgg'"),
        (dict(post='rescaled'), "post_rule: expected one of none, .*, got 'rescaled'"),
        (dict(rule='rescale'), 'rule: expected one of'),
        (dict(rule='apg', settings='phi=1'), "apg: expected the settings .*, got 'phi'"),
        (dict(settings='phi=1'), "cfg: expected no settings, got 'phi'"),
        (dict(rule='apg', settings='eta'), 'rule_settings: expected names and numbers'),
        (dict(rule='apg', settings='eta=x'), 'rule_settings: expected names and numbers'),
        (dict(rule='apg', settings='eta=1)+(2'), 'rule_settings: expected names and numbers'),
        (dict(rule='apg', settings='**{}'), 'rule_settings: expected names and numbers'),
        (dict(post='rescale', post_settings='phi=2'), 'phi: expected a finite number, 0 to 1'),
        (dict(post_settings='phi=1'), 'post_settings: expected none without a post-rule'),
    ],
)
def test_bad_rules_are_refused(pack, model, settings, message):
    with pytest.raises(ValueError, match=message):
        patch_rule(pack, model, **settings)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(name='lines'), "schedule: expected one of .*, got 'lines'"),
        (dict(name='linear', settings='a=1'), "linear expected w, base, got 'a'"),
        (dict(name='linear', settings='num_steps=3'), 'linear expected w, base, got'),
        (dict(name='linear', settings='w="a"'), 'schedule_settings: w: expected a finite number'),
        (dict(settings='base=1'), "constant expected w, got 'base'"),
        (dict(settings='w=[1, 2]'), 'w: expected a number'),
        (dict(settings='w=-1'), 'expected finite values from 0'),
        (dict(name='knots'), 'knots: expected at least one knot such as "3: 7"'),
        (dict(name='knots', knots='3'), 'knots: expected noise levels and weights'),
        (dict(name='knots', knots='3: a'), 'knots: expected noise levels and weights'),
        (dict(name='knots', knots='0: 7'), 'knots: .*different noise levels above 0'),
        (dict(name='knots', knots='3: -7'), 'knots: .*expected finite values from 0'),
        (dict(knots='3: 7'), 'knots: expected none for constant'),
        (dict(low=3, high=2), 'sigma_low: expected a noise level from 0 and below sigma_high=2'),
    ],
)
def test_bad_schedules_are_refused(pack, model, settings, message):
    with pytest.raises(ValueError, match=message):
        patch_schedule(pack, model, **settings)


def test_interval_beyond_the_model_is_refused(pack, model):
    m = patch_schedule(pack, model, low=500, high=900)
    with pytest.raises(ValueError, match='noise levels between 0.03 and 15, the range of the mod'):
        euler(m)


def test_steps_that_are_not_told(pack, model):
    with pytest.raises(ValueError, match='update ComfyUI, or use the schedule knots'):
        euler(patch_schedule(pack, model, 'linear'), tell=False)
