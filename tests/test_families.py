"Families of pipelines: guidance in each gives what its definition says."

import diffusers
import pytest
import torch
from packaging.version import Version
from tiny_families import FAMILIES as MADE
from tiny_families import STEPS, W, run

from cf_guidance.attention import SLG
from cf_guidance.guided import Term
from cf_guidance.pipelines import FAMILIES, NegativePrompt, guided

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:[\\s\\S]*utocast')


def make(what):
    "A pipeline and a call of it; skipped where this diffusers does not have it."
    cls, made = MADE[what]
    if Version(diffusers.__version__) < Version(FAMILIES[cls].since):
        pytest.skip(f'needs diffusers {FAMILIES[cls].since}')
    return made()


def off(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


GUIDED = [k for k, (cls, _) in MADE.items() if FAMILIES[cls].negative]


@pytest.mark.parametrize('what', GUIDED)
def test_plain_guidance_is_that_of_the_pipeline(what):
    pipe, call = make(what)
    sd = guided(pipe)
    own = run(pipe, call)
    assert own.isfinite().all()
    assert off(run(sd, call), own) < 1e-5
    assert sd.report.nfe == [2 * STEPS] * 2
    assert off(run(guided(pipe, w=W + 1), call), own) > 1e-3


def test_every_family_is_tested():
    new = {cls for cls, family in FAMILIES.items() if family.text is None} | {'KolorsPipeline'}
    assert {cls for cls, _ in MADE.values()} == new


def test_told_weight():
    "Flux.2 is told its weight, and evaluates no negative prompt."
    pipe, call = make('Flux.2')
    with pytest.raises(ValueError, match='NegativePrompt: .* not distilled for a weight'):
        run(guided(pipe), call)
    sd = guided(pipe, Term(SLG(pipe.transformer), 3.0))
    assert off(run(sd, call), run(pipe, call)) > 1e-3
    assert sd.report.nfe == [2 * STEPS] * 2


RENORMED = {
    'Qwen-Image': {},
    'Z-Image': dict(cfg_normalization=0.9),
    'Z-Image 1': dict(cfg_normalization=True),
    'Z-Image truncated': dict(cfg_truncation=0.4),
    'Lumina 2': dict(cfg_normalization=True),
    'Lumina 2 plain': dict(cfg_normalization=False),
    'Lumina 2 truncated': dict(cfg_trunc_ratio=0.5),
}


@pytest.mark.parametrize('what', RENORMED)
def test_own_renormalisation(what):
    name = next(k for k in MADE if what.startswith(k))
    pipe, call = make(name)
    call |= RENORMED[what]
    sd = guided(pipe)
    assert off(run(sd, call), run(pipe, call)) < 1e-5
    cut = 'truncated' in what
    assert sd.report.nfe == [(STEPS + 2 if cut else 2 * STEPS)] * 2


def test_post_replaces_the_renormalisation():
    pipe, call = make('Lumina 2')
    plain = run(pipe, dict(call, cfg_normalization=False))
    assert off(run(guided(pipe, post=[]), call), plain) < 1e-5


def test_weights_of_two_experts():
    pipe, call = make('Wan, two experts')
    sd = guided(pipe)
    call |= dict(guidance_scale=3.0, guidance_scale_2=1.5)
    assert off(run(sd, call), run(pipe, call)) < 1e-5
    first = [s for s in sd.report.sigmas if s / (1 + s) >= 0.8]
    weights = [3.0 if i < len(first) else 1.5 for i in range(STEPS)]
    assert 0 < len(first) < STEPS
    listed = guided(pipe, NegativePrompt(), w=weights)
    assert torch.equal(run(listed, call), run(sd, call))


def test_two_experts_and_perturbed_layers():
    pipe, call = make('Wan, two experts')
    with pytest.raises(ValueError, match='two networks, transformer and transformer_2'):
        run(guided(pipe, SLG(pipe.transformer)), call)


def test_times_of_tokens():
    "The network of Wan 2.2 may have a time for each token."
    pipe, call = make('Wan')
    pipe.register_to_config(expand_timesteps=True)
    assert off(run(guided(pipe), call), run(pipe, call)) < 1e-5


def test_masks_that_are_none():
    "Qwen-Image passes no mask where all tokens count."
    pipe, call = make('Qwen-Image')
    call['prompt_embeds_mask'] = torch.ones_like(call['prompt_embeds_mask'])
    assert off(run(guided(pipe), call), run(pipe, call)) < 1e-5


def test_refused_arguments():
    pipe, call = make('CogVideoX')
    with pytest.raises(ValueError, match='use_dynamic_cfg: use guided'):
        run(guided(pipe), call, use_dynamic_cfg=True)
