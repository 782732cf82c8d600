"What ComfyUI calls at each step: rules, post-rules, intervals and schedules of cf_guidance."

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

try:
    from cf_guidance import schedules, transforms
    from cf_guidance.denoisers import Denoiser
    from cf_guidance.guided import Called, GuidedDenoiser, Term
    from cf_guidance.schedules import _in_interval, knots_sched
except ImportError as e:
    raise ImportError(
        'these nodes need cf_guidance: install it into the Python of ComfyUI, as in their README'
    ) from e

NONE = 'none'  # no post-rule
RULES = {k: o for k, o in vars(transforms).items() if isinstance(o, transforms.Rule)}
POST_RULES = {k: o for k, o in vars(transforms).items() if isinstance(o, transforms.PostRule)}


def _schedules():
    "The schedules that need only the number of steps and numbers, by name."
    found = {'constant': None, 'knots': None}
    for name in schedules.__all__:
        f = getattr(schedules, name)
        if name.endswith('_sched') and next(iter(inspect.signature(f).parameters)) == 'num_steps':
            found[name.removesuffix('_sched')] = f
    return found


SCHEDULES = _schedules()


def _named(what, name, known):
    if name not in known:
        raise ValueError(f'{what}: expected one of {", ".join(known)}, got {name!r:.40}')
    return known[name]


def _value(node):
    "A value in the text of a setting: a Python literal, or `inf`."
    if isinstance(node, ast.Name) and node.id == 'inf':
        return math.inf
    return ast.literal_eval(node)


def parse_settings(
    what: str,  # name of the input, for errors
    text: str,  # such as 'phi=0.3, p=0.9'
) -> dict:
    "Settings by name."
    try:
        call = ast.parse(f'dict({text.strip().rstrip(",")})', mode='eval').body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        if not all(k.arg for k in call.keywords):
            raise ValueError
        return {k.arg: _value(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(
            f'{what}: expected names and numbers such as "phi=0.3, p=0.9", got {text!r:.60}'
        ) from None


def parse_knots(
    text: str,  # such as '10: 1, 3: 7, 0.5: 2'
) -> tuple:  # pairs (noise level, weight)
    "Knots of the schedule `knots`."
    pairs = [o.split(':') for o in text.replace('\n', ',').split(',') if o.strip()]
    try:
        return tuple((float(sigma), float(w)) for sigma, w in pairs)
    except ValueError:
        raise ValueError(
            f'knots: expected noise levels and weights such as "10: 1, 3: 7", got {text!r:.60}'
        ) from None


def _of(what, rule, settings):
    try:
        return rule.of(**settings)
    except (TypeError, ValueError) as e:
        raise ValueError(f'{what}: {e}') from None


def rule_of(name, settings):
    "The rule of this name."
    return _of('rule_settings', _named('rule', name, RULES), settings)


def post_of(name, settings):
    "The post-rule of this name, or None."
    post = _named('post_rule', name, {NONE: None, **POST_RULES})
    if post is None and settings:
        raise ValueError(f'post_settings: expected none without a post-rule, got {settings!r:.60}')
    return post and _of('post_settings', post, settings)


@dataclass(frozen=True)
class Schedule:
    "A weight that may depend on the step, or on the noise level."

    name: str = 'constant'
    settings: dict = field(default_factory=dict)
    knots: tuple = ()  # pairs (noise level, weight), in the noise levels of ComfyUI

    def weight(
        self,
        cfg: float,  # of the sampler
        num_steps: int | None,  # of the run
        to_sigma: Callable,  # from our noise levels to ComfyUI's
    ):  # a number, a list with one value per step, or a function of our noise levels
        "The weight in a form that a `Term` takes."
        if self.name == 'constant':
            return self.settings.get('w', cfg)
        if self.name == 'knots':
            at, ws = zip(*self.knots, strict=True)
            return lambda sigma: knots_sched(to_sigma(sigma).tolist(), at, ws)
        if num_steps is None:
            raise ValueError(
                f'the schedule {self.name} counts steps, which this ComfyUI does not tell: '
                'update ComfyUI, or use the schedule knots'
            )
        f = SCHEDULES[self.name]
        strength = 'w' if 'w' in inspect.signature(f).parameters else 'max_val'
        return f(num_steps, **{strength: cfg, **self.settings})


def schedule_of(name, settings, knots):
    "The schedule of this name; an error if its settings do not fit."
    f = _named('schedule', name, SCHEDULES)
    known = [k for k in inspect.signature(f).parameters if k != 'num_steps'] if f else []
    known = ['w'] if name == 'constant' else known
    for k in settings:
        if k not in known:
            expected = ', '.join(known) or 'no settings'
            raise ValueError(f'schedule_settings: {name} expected {expected}, got {k!r}')
    if (name == 'knots') != bool(knots):
        expected = 'at least one knot such as "3: 7"' if name == 'knots' else f'none for {name}'
        raise ValueError(f'knots: expected {expected}, got {len(knots)}')
    schedule = Schedule(name, settings, knots)
    try:
        weight = schedule.weight(7.5, 10, torch.as_tensor)
        given = weight(torch.ones(1)) if callable(weight) else weight
        if name == 'constant' and isinstance(given, (list, tuple)):
            raise ValueError(f'w: expected a number, got {given!r:.40}')
        Term(_Given(), w=given)
    except (TypeError, ValueError) as e:
        what = 'knots' if name == 'knots' else 'schedule_settings'
        raise ValueError(f'{what}: {e}') from None
    return schedule


@dataclass(frozen=True)
class Settings:
    "All that the nodes have set."

    rule: transforms.Rule = transforms.cfg
    post: transforms.PostRule | None = None
    schedule: Schedule = Schedule()
    interval: tuple | None = None  # (low, high), in the noise levels of ComfyUI

    def but(self, **changes):
        "The same with changes."
        return replace(self, **changes)

    @property
    def guides_at_cfg_1(self):
        "May the weight differ from 1 where the sampler's cfg is 1?"
        return self.schedule.name != 'constant' or self.schedule.settings.get('w', 1) != 1


class _Given(Called):
    "A negative that ComfyUI has evaluated."


class _Evaluated(Denoiser):
    "Stands for the network of ComfyUI, which has been evaluated before."

    def __init__(self, sigma_range):
        super().__init__(torch.nn.Identity())
        self._sigma_min, self._sigma_max = sigma_range


class _Scale:
    "Noise levels of a ComfyUI model, and ours: clean image plus sigma times noise."

    highest = 0.9999  # of a flow, where ours are not infinite yet

    def __init__(self, model):
        self.sampling = getattr(model, 'model_sampling', None)
        kinds = [o.__name__ for o in type(self.sampling).__mro__]
        self.flow = 'CONST' in kinds  # x = (1-sigma)*image + sigma*noise

    def ours(self, sigma):
        "Our noise levels, for a tensor."
        if not self.flow:
            return sigma
        sigma = sigma.clamp(max=self.highest)
        return sigma / (1 - sigma)

    def theirs(self, sigma):
        "The noise levels of ComfyUI, for a tensor."
        return sigma / (1 + sigma) if self.flow else sigma

    def stretch(self, x, sigma):
        "Noisy images at our noise levels `sigma`."
        return x * (1 + sigma.view(-1, *(1,) * (x.ndim - 1))) if self.flow else x

    def range(self):
        "Smallest and largest noise level of the model, as ComfyUI has them."
        ends = (getattr(self.sampling, k, None) for k in ('sigma_min', 'sigma_max'))
        low, high = (None if o is None else float(o) for o in ends)
        return low or 0.0, math.inf if high is None else high

    def interval(self, ends):
        "An interval in our noise levels; an error if the model has none inside."
        if ends is None:
            return None
        (low, high), (least, most) = ends, self.range()
        if not (low < most and high >= least):
            raise ValueError(
                f'sigma_low and sigma_high: expected noise levels between {least:.4g} and '
                f'{most:.4g}, the range of the model, got {low:g} and {high:g}'
            )
        if not self.flow:
            return low, high
        return low / (1 - low), high / (1 - high) if high < self.highest else math.inf


@dataclass
class Run:
    "One run of a sampler."

    guided: GuidedDenoiser
    cfg: float  # of the sampler
    sigmas: tuple | None  # noise levels of its steps, if known
    first: float  # noise level of the first evaluation
    level: float | None = None  # of the last evaluation
    x: torch.Tensor | None = None  # its noisy images

    def goes_on(self, x, level, cfg, sigmas):
        "Does an evaluation belong to this run? Noise that a sampler adds within a step may."
        if (cfg, sigmas) != (self.cfg, self.sigmas):
            return False
        if (x.shape, x.device) != (self.x.shape, self.x.device):
            return False
        if math.isclose(level, self.first, rel_tol=1e-6):
            return torch.equal(x, self.x)
        return level <= 1.42 * self.level


class Guidance:
    "The function that ComfyUI calls with both predictions. Runs of a copy are its own."

    def __init__(self, settings: Settings):
        self.settings, self.run = settings, None

    def __deepcopy__(self, memo):
        return Guidance(self.settings)

    def __call__(
        self,
        args: dict,  # of ComfyUI
    ) -> torch.Tensor:  # (B, ...) noisy images minus the guided estimate
        "Guide one evaluation."
        x, pos, neg = (_wide(args[k]) for k in ('input', 'cond_denoised', 'uncond_denoised'))
        scale = _Scale(args.get('model'))
        sigma = _our_sigma(args, scale)
        noisy = scale.stretch(x, sigma)
        guided = self._current(noisy, sigma, args, scale).guided
        unguided = bool((guided.run.weights[0](sigma) == 1).all())
        pred = guided(noisy, sigma, known={'pos': pos, 0: neg}, off=(0,) if unguided else ())
        return (x - pred).to(args['input'].dtype)

    def _current(self, x, sigma, args, scale):
        "The run of this evaluation, a new one if it begins one."
        cfg, level = float(args['cond_scale']), float(sigma.max())
        sigmas = _steps(args.get('model_options'), scale)
        if self.run is None or not self.run.goes_on(x, level, cfg, sigmas):
            guided = self._guided(cfg, sigmas, scale)
            self.run = Run(guided, cfg, sigmas, level)
        self.run.x, self.run.level = x, level
        return self.run

    def _guided(self, cfg, sigmas, scale):
        "A guided denoiser at the beginning of a run."
        s = self.settings
        w = s.schedule.weight(cfg, sigmas and len(sigmas) - 1, scale.theirs)
        ends = scale.ours(torch.tensor(scale.range())).tolist()
        term = Term(_Given(), w=w, rule=s.rule, interval=scale.interval(s.interval))
        guided = GuidedDenoiser(_Evaluated(ends), term, post=s.post)
        guided.start(sigmas if isinstance(w, list) else None)
        return guided


def evaluate(
    args: dict,  # of ComfyUI
) -> list:  # the prediction of each condition, zeros for one that was left out
    "Evaluate the network, without the negative outside of the interval."
    import comfy.samplers

    conds, options = args['conds'], args['model_options']
    if len(conds) == 2 and _leaves_out_negative(args, options):
        conds = [conds[0], None]
    return comfy.samplers.calc_cond_batch(
        args['model'], conds, args['input'], args['sigma'], options
    )


def _leaves_out_negative(args, options):
    "Does nobody want the negative at this noise level? Functions of other nodes might."
    guidance = options.get('sampler_cfg_function')
    others = ('sampler_pre_cfg_function', 'sampler_post_cfg_function')
    if not isinstance(guidance, Guidance) or any(options.get(k) for k in others):
        return False
    scale = _Scale(args['model'])
    ends = scale.interval(guidance.settings.interval)
    levels = _our_sigma(args, scale).tolist()
    return ends is not None and not any(_in_interval(o, *ends) for o in levels)


def _wide(x):
    "In float32 or better."
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _our_sigma(args, scale):
    "Our noise level of each sample."
    x = _wide(args['input'])
    return scale.ours(args['sigma'].to(x).expand(len(x)))


def _steps(options, scale):
    "The noise levels of the sampler's steps, decreasing, if ComfyUI tells them."
    sigmas = (options or {}).get('transformer_options', {}).get('sample_sigmas')
    if sigmas is None:
        return None
    levels = sorted(set(scale.ours(sigmas.double()).tolist()), reverse=True)
    return tuple(levels) if len(levels) > 1 else None
