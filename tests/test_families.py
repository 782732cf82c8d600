"Families of pipelines: guidance in each gives what its definition says."

import json
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from pipeline_helpers import seeded
from tiny_families import FAMILIES as MADE
from tiny_families import STEPS, W, flux2_vae, make, run

from cf_guidance import families, perturb, text
from cf_guidance import transforms as T
from cf_guidance.attention import SLG, Perturbation, blurred
from cf_guidance.families import check_family
from cf_guidance.guided import Term
from cf_guidance.perturb import find_layers
from cf_guidance.pipelines import FAMILIES, NegativePrompt, guided, sigmas_of
from cf_guidance.text import PLADIS

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:[\\s\\S]*utocast')


def off(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


DATA = Path(families.__file__).parent / 'data'
STORED = json.loads((DATA / 'families.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('what', MADE)
def test_checked(what):
    "All properties hold, and the stored table says which ones a family cannot have."
    found = check_family(*make(what), steps=3)
    if diffusers.__version__ == STORED['diffusers']:
        stored = STORED['families'][what]
        assert [*found] == [*stored]
        for k, v in found.items():
            assert v == stored[k] if isinstance(v, str) else not isinstance(stored[k], str), k


def test_all_families_are_stored():
    assert [*STORED['families']] == [*MADE]


def test_every_family_is_tested():
    new = {cls for cls, family in FAMILIES.items() if family.text is None} | {'KolorsPipeline'}
    assert {cls for cls, _ in MADE.values()} | {'LTX2ImageToVideoPipeline'} == new


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


def test_the_second_network_predicts_the_negative():
    "One evaluation of each network per step; a negative that is not needed costs none."
    pipe, call = make('Ideogram 4')
    for sd, second in [
        (guided(pipe), STEPS),
        (guided(pipe, w=1.0), 0),
        (guided(pipe, SLG(pipe.transformer), w=3.0), 0),
        (guided(pipe, w=torch.tensor([3.0, 1.0])), STEPS),
    ]:
        with counted(pipe.unconditional_transformer) as rows, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            run(sd, call)
        assert len(rows) == second
    assert sum(rows) == STEPS
    assert sd.report.nfe == [2 * STEPS, STEPS]
    assert sd.report.terms[0].negative == 'NegativePrompt'


def test_the_schedule_of_ideogram():
    "Its default is 7 in 45 steps, then 3; a weight of your own replaces it."
    pipe, call = make('Ideogram 4')
    del call['guidance_scale'], call['guidance_schedule']
    own, sd = run(pipe, call, num_inference_steps=48), guided(pipe)
    assert off(run(sd, call, num_inference_steps=48), own) < 1e-5
    listed = guided(pipe, w=[7.0] * 45 + [3.0] * 3)
    assert torch.equal(
        run(listed, call, num_inference_steps=48), run(sd, call, num_inference_steps=48)
    )
    constant = run(guided(pipe, w=7.0), call, num_inference_steps=48)
    assert off(constant, own) > 1e-4
    assert (
        off(
            constant,
            run(
                pipe, dict(call, guidance_scale=7.0, guidance_schedule=None), num_inference_steps=48
            ),
        )
        < 1e-5
    )
    schedule = torch.tensor([5.0, 4.0, 1.0, 0.5])
    call['guidance_schedule'] = schedule
    assert off(run(sd, call), run(pipe, call)) < 1e-5


def test_ideogram_in_bfloat16():
    "The pipeline combines the outputs of its networks in single precision."
    pipe, call = make('Ideogram 4')
    pipe.to(torch.bfloat16)
    call |= dict(guidance_scale=None, guidance_schedule=[7.0] * 45 + [3.0] * 3)
    sd = guided(pipe)
    out, own = (run(o, call, num_inference_steps=48) for o in (sd, pipe))
    assert out.dtype == own.dtype == torch.float32
    assert off(out, own) < 1e-3


def test_pictures_of_ideogram():
    "Rules see the pixels as the autoencoder does: the last estimate is what it decodes."
    pipe, call = make('Ideogram 4')
    pipe, seen, decoded = MADE['Ideogram 4'][1](flux2_vae())[0], [], []
    pipe.vae.bn.running_mean.zero_()
    pipe.vae.bn.running_var.fill_(1 - pipe.vae.config.batch_norm_eps)

    @T.post_rule('x0', axes=3)
    def look(pred, pos):
        seen.append(pred)
        return pred

    def decode(z, **kw):
        decoded.append(z)
        return (torch.zeros(len(z), 3, *call_size),)

    call |= dict(height=16, width=24)
    call_size = (16, 24)
    pipe.vae.decode = decode
    run(guided(pipe, post=look), call, output_type='pt')
    assert seen[-1].shape == decoded[0].shape == (2, 4, 8, 12)
    assert off(seen[-1], decoded[0]) < 1e-5


def test_noise_levels_of_ideogram():
    "They depend on the size of the picture."
    pipe, call = make('Ideogram 4')
    sd = guided(pipe)
    run(sd, call)
    levels = sigmas_of(pipe, STEPS, height=64, width=96)
    assert off(torch.tensor(sd.report.sigmas), levels[:-1]) < 1e-5
    assert not torch.allclose(sigmas_of(pipe, STEPS), levels)
    assert torch.equal(sigmas_of(pipe, STEPS), sigmas_of(pipe, STEPS, height=2048, width=2048))


def test_several_pictures_of_a_prompt():
    pipe, call = make('Ideogram 4')
    call |= dict(num_images_per_prompt=2)
    assert off(run(guided(pipe), call), run(pipe, call)) < 1e-5
    w = torch.tensor([3.0, 1.0])
    rows = torch.cat([run(pipe, call)[:2], run(pipe, dict(call, guidance_scale=1.0))[2:]])
    assert off(run(guided(pipe, w=w), call), rows) < 1e-5


@pytest.mark.parametrize('name', ['Wan', 'LTX'])
def test_several_videos_of_a_prompt(name):
    "A weight, a row of conditions and a list of weights per prompt stand for all its videos."
    pipe, call = make(name)
    many = dict(prompt=['a', 'b'], num_videos_per_prompt=2)
    texts = [f'{o}prompt_{k}' for k in ('embeds', 'attention_mask') for o in ('', 'negative_')]
    texts = {k: call.pop(k) for k in texts if k in call}
    repeated = {k: v.repeat_interleave(2, 0) for k, v in texts.items()}
    order = sorted(texts, key=lambda k: ('negative' in k, 'mask' in k))
    encode = dict(encode_prompt=lambda self, **kw: [repeated[k] for k in order])
    mine = type('Mine', (type(pipe),), encode)(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    want = torch.cat([run(mine, call, **many)[:2], run(mine, call, **many, guidance_scale=5.0)[2:]])
    w = torch.tensor([W, 5.0])
    assert off(run(guided(mine, w=w), call, **many), want) < 1e-5
    assert off(run(guided(mine, w=[[W, 5.0]] * STEPS), call, **many), want) < 1e-5
    named = dict(embeds='encoder_hidden_states', attention_mask='encoder_attention_mask')
    cond = {v: texts.get(f'negative_prompt_{k}') for k, v in named.items()}
    term = Term({k: v for k, v in cond.items() if v is not None}, w)
    assert off(run(guided(mine, term), call, **many, guidance_scale=1.0), want) < 1e-5


def test_layers_of_the_second_network_are_refused():
    pipe, call = make('Ideogram 4')
    with pytest.raises(ValueError, match='its layers belong to another network'):
        run(guided(pipe, SLG(pipe.unconditional_transformer)), call)


def test_times_of_tokens():
    "The network of Wan 2.2 may have a time for each token."
    make('Wan, two experts')  # skips before Wan 2.2
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


UNLISTED = {  # name -> what the error says if the pipeline is not listed; '' if it works
    'Wan': '',
    'Flux.2 Klein': '',
    'CogVideoX': '',
    'Kolors': '',
    'Krea 2': '',
    'AuraFlow': '',
    'Qwen-Image': 'QwenImagePipeline is not listed, and its first step is not plain guidance',
    'Z-Image': 'ZImagePipeline is not listed, .* "Add your own family"',
    'HiDream': 'not plain guidance by one network',
    'Flux.2': 'NegativePrompt: this call evaluates no negative prompt',
}


@pytest.mark.parametrize('what', UNLISTED)
def test_unlisted(what, monkeypatch):
    pipe, call = make(what)
    own, says = run(pipe, call), UNLISTED[what]
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    sd = guided(pipe)
    if says:
        with pytest.raises(ValueError, match=says):
            run(sd, call)
        return
    with counted(pipe) as rows:
        assert off(run(sd, call), own) < 1e-5
    assert sd.report.nfe == [2 * STEPS + 4] * 2  # with the two trials of the first step
    assert sum(rows) == sum(sd.report.nfe)
    listed = guided(pipe, w=[W] + [1.0] * (STEPS - 1))
    assert off(run(listed, call), own) > 1e-4


@pytest.mark.parametrize('name', ['LTX2ConditionPipeline', 'LTX2InContextPipeline'])
def test_other_pictures_with_sound_are_refused(name):
    "Before any work starts, and by name."
    if not hasattr(diffusers, name):
        pytest.skip('needs LTX-2')
    pipe = object.__new__(getattr(diffusers, name))
    with pytest.raises(TypeError, match=f'got {name}: it guides pictures and sound at once: call'):
        guided(pipe)


@contextmanager
def counted(pipe):
    "Inside, a list gets the number of rows of each forward of the network, or of a pipeline's."
    net, rows = getattr(pipe, 'unet', None) or getattr(pipe, 'transformer', pipe), []

    def count(net, args, kwargs):
        latents = args[0] if args else kwargs.get('hidden_states', kwargs.get('sample'))
        rows.append(len(latents))

    handle = net.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize('what', [k for k, says in UNLISTED.items() if not says])
def test_unlisted_in_small_batches(what, monkeypatch):
    "The trial of the first step, too, evaluates at most `max_batch` rows at a time."
    pipe, call = make(what)
    own = run(pipe, call)
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    sd = guided(pipe, max_batch=1)
    with counted(pipe) as rows:
        assert off(run(sd, call), own) < 1e-5
    assert set(rows) == {1}
    assert sum(rows) == sum(sd.report.nfe) == 2 * (2 * STEPS + 4)


def test_the_report_says_what_the_trial_cost(monkeypatch):
    pipe, call = make('AuraFlow')
    sd = guided(pipe)
    run(sd, call)
    assert sd.report.tried == 0
    assert 'tried' not in repr(sd.report)
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    run(sd, call)
    assert sd.report.tried == 4
    assert f'of the network ({2 * STEPS + 4} per image)' in repr(sd.report)
    assert 'of these 4 per image tried the first step' in repr(sd.report)


def test_a_trial_without_a_negative_prompt_costs_two_evaluations(monkeypatch):
    pipe, call = make('AuraFlow')
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    sd = guided(pipe, SLG(pipe.transformer), w=3.0)
    with counted(pipe) as rows:
        run(sd, call, guidance_scale=1.0)
    assert sd.report.nfe == [2 * STEPS + 2] * 2
    assert sum(rows) == sum(sd.report.nfe)


def test_an_unlisted_flow_model_may_stand_still(monkeypatch):
    "The first step is tried once, also if the denoiser is first evaluated in a later one."
    pipe, call = make('AuraFlow')
    listed = run(guided(pipe, zero_init=2), call)
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    sd = guided(pipe, zero_init=2)
    assert off(run(sd, call), listed) < 1e-5
    assert sd.report.nfe == [2 * (STEPS - 2) + 4] * 2


WRONG = {  # a row with one mistake -> what is found
    'CogVideoX': dict(frames_first=False),
    'AuraFlow': dict(time_unit=1.0),
    'Wan': dict(negative='first'),
    'Mochi': dict(sign=1),
    'Lumina 2': dict(post=None),
    'Z-Image': dict(rising=False),
    'HiDream': dict(sign=1),
    'Kolors': dict(negative='last'),
    'Krea 2': dict(unguided=1.0),
    'Ideogram 4': dict(text_first=False),
}


@pytest.mark.parametrize('what', WRONG)
def test_wrong_rows_are_found(what, monkeypatch):
    name = MADE[what][0]
    pipe, call = make(what)
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **WRONG[what]))
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_family(pipe, call, steps=3)


JOINT = ['Qwen-Image', 'Z-Image', 'Flux.2', 'Chroma', 'CogVideoX', 'HunyuanVideo', 'AuraFlow']
JOINT += ['CogView 4', 'HiDream', 'Krea 2', 'Ideogram 4', 'Mochi']


@pytest.mark.parametrize('what', JOINT)
def test_image_tokens_in_joint_attention(what):
    "Before text and image meet, exactly the image's tokens depend on the latents."
    pipe, call = make(what)
    first = [n for n in find_layers(pipe.transformer, '*') if n.startswith(FIRST.get(what, ''))][0]
    seen = []

    class Seen(Perturbation):
        def __init__(self):
            super().__init__(pipe.transformer, self.look, first)

        def look(self, q, k, v, site):
            seen.append((q, site.image_of(q, k)))
            return site.attend(q, k, v)

    steps = 2 if what == 'Mochi' else 1  # whose schedule needs two
    for seed in (0, 1):
        args = dict(num_inference_steps=steps, generator=seeded(seed))
        run(guided(pipe, Term(Seen(), 3.0)), call, **args)
    (a, image), (b, _) = seen[0], seen[len(seen) // 2]
    moved = (a - b).abs().amax((0, 1, 3)) > 1e-6
    assert moved[image].all()
    assert int(moved.sum()) == image.stop - image.start or what == 'Z-Image'
    assert not moved.all()


FIRST = {'Z-Image': 'layers'} | dict.fromkeys(
    ['Krea 2', 'HunyuanVideo', 'Mochi'], 'transformer_blocks'
)


def test_video_is_blurred_frame_by_frame():
    "SEG blurs queries within a frame: constant queries in each frame stay as they are."
    q = torch.randn(1, 1, 3, 1, 8, generator=seeded(0)).expand(1, 1, 3, 20, 8).flatten(2, 3)

    class Site:
        image_of = staticmethod(lambda q, k: slice(0, 60))
        grid = staticmethod(lambda n: (3, 4, 5))
        attend = staticmethod(lambda q, k, v: q)

    assert off(blurred(2.0)(q, q, q, Site), q) < 1e-6
    assert off(blurred(2.0)(q, q, q, Site), q.flip(2)) > 0.1


@pytest.mark.parametrize('what', ['Wan', 'AuraFlow'])
def test_unlisted_in_bfloat16_calls_back_once_per_step(what, monkeypatch):
    pipe, call = make(what)
    monkeypatch.delitem(FAMILIES, type(pipe).__name__)
    seen = []
    call['callback_on_step_end'] = lambda pipe, i, t, kwargs: seen.append(i) or kwargs
    assert run(guided(pipe.to(torch.bfloat16)), call).isfinite().all()
    assert seen == list(range(STEPS))


def test_the_second_attention_of_a_block_is_cross_attention():
    pipe, _ = make('LTX')
    assert all(name.endswith('attn2') for name in PLADIS(pipe.transformer).layers)


def test_a_call_that_cannot_be_checked_is_refused():
    pipe, call = make('Sana')
    for bad, match in [
        (
            dict(call, guidance_scale=None),
            'guidance_scale: expected a number in the call, got None',
        ),
        (dict(call, guidance_scale=1.0), 'guidance_scale: expected one that guides, got 1'),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            check_family(pipe, bad)
    with pytest.raises(ValueError, match='steps: expected a whole number from 3, got 2'):
        check_family(pipe, call, steps=2)
    with pytest.raises(ValueError, match='expected a network in torch.float32, got torch.bfloat16'):
        check_family(pipe.to(torch.bfloat16), call)


def test_a_fault_in_a_perturbation_is_not_taken_for_a_refusal(monkeypatch):
    def broken(*args):
        raise RuntimeError('shapes')

    monkeypatch.setattr(families, 'PAG', broken)
    with pytest.raises(RuntimeError, match='shapes'):
        check_family(*make('Sana'), steps=3)


def test_an_offload_that_goes_past_the_hooks_is_a_fault(monkeypatch):
    "Blocks of Wan have weights of their own, which only their hook can fetch."
    monkeypatch.setattr(
        perturb, '_rebind_forward', lambda f, m, new, name: type(m).forward.__get__(new)
    )
    with pytest.raises(RuntimeError, match='meta'):
        check_family(*make('Wan'), steps=3)


def test_a_compiler_that_compiles_nothing_is_found():
    with torch._dynamo.config.patch(disable=True):
        with pytest.raises(AssertionError, match='compile: nothing was compiled'):
            check_family(*make('Wan'), steps=3)


def test_weights_that_compiled_blocks_do_not_see_are_found(monkeypatch):
    "A change that only a compiled network has."
    own = torch.nn.Module.compile

    def compile(net, **kw):
        own(net, **kw)
        next(net.parameters()).data.mul_(1.5)

    monkeypatch.setattr(torch.nn.Module, 'compile', compile)
    with pytest.raises(AssertionError, match='compile: the results differ by'):
        check_family(*make('Wan'), steps=3)


def test_offload_and_compile_leave_the_pipeline_alone():
    pipe, call = make('Wan')
    before = {k: (id(v), v.device) for k, v in pipe.transformer.named_parameters()}
    check_family(pipe, call, steps=3)
    assert {k: (id(v), v.device) for k, v in pipe.transformer.named_parameters()} == before
    assert not any('_hf_hook' in vars(m) for m in pipe.transformer.modules())
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())


def test_nag_that_acts_on_equal_prompts_is_found(monkeypatch):
    monkeypatch.setattr(text, '_normalised', lambda neg, pos, w, tau, alpha: 1.1 * pos)
    with pytest.raises(AssertionError, match='NAG: the prompt itself has an effect'):
        check_family(*make('Kolors'), steps=3)
