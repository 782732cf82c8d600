"LTX-2: pictures and sound are guided at once, each with its own weight."

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from pipeline_helpers import seeded
from tiny_families import STEPS, W, ltx2, wan

from cf_guidance import transforms as T
from cf_guidance.attention import PAG, SAG, Perturbation
from cf_guidance.guided import Term
from cf_guidance.negatives import HiGS
from cf_guidance.pipelines import NegativePrompt, guided, pipeline_denoiser
from cf_guidance.text import NAG, PLADIS, VSF

cls = getattr(diffusers, 'LTX2Pipeline', object)
if 'audio_guidance_scale' not in inspect.signature(cls.__call__).parameters:
    pytest.skip('needs LTX-2 of diffusers 0.38', allow_module_level=True)

SOUND = 2.0  # weight of the sound in the call
SCALES = dict(stg_scale=2.0, modality_scale=3.0, guidance_rescale=0.7)
SCALES |= dict(audio_stg_scale=1.5, audio_modality_scale=2.0, audio_guidance_rescale=0.4)


def call_of(pipe, call, **kw):
    "Pictures and sound of a call, as latents."
    args = dict(num_inference_steps=STEPS, generator=seeded(0), output_type='latent')
    return pipe(**{**call, **args, **kw}, return_dict=False)


def offs(got, want):
    "The largest differences of the pictures and of the sound, in shares of the largest value."
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)]


@pytest.fixture(scope='module')
def made():
    return ltx2()


@pytest.fixture(scope='module')
def own(made):
    return call_of(*made)


@pytest.mark.parametrize('what', [{k: v} for k, v in SCALES.items()])
def test_each_scale_of_the_pipeline(made, own, what):
    pipe, call = made
    want = call_of(pipe, call, **what)
    assert max(offs(want, own)) > 1e-3
    assert max(offs(call_of(guided(pipe), call, **what), want)) < 1e-5


def test_all_scales_of_the_pipeline(made):
    pipe, call = made
    sd = guided(pipe)
    assert max(offs(call_of(sd, call, **SCALES), call_of(pipe, call, **SCALES))) < 1e-5
    assert sd.report.nfe == [4 * STEPS] * 2
    assert [t.negative for t in sd.report.terms] == ['NegativePrompt', 'PAG', 'Perturbation']


def test_what_the_pipeline_has_on_by_default():
    "STG, the other modality and a rescaling, too."
    pipe, call = ltx2()
    defaults = {k: v for k, v in call.items() if 'scale' not in k}
    assert max(offs(call_of(guided(pipe), defaults), call_of(pipe, defaults))) < 1e-5


def test_a_picture_to_begin_with():
    pipe, call = ltx2('LTX2ImageToVideoPipeline')
    sd = guided(pipe)
    assert max(offs(call_of(sd, call, **SCALES), call_of(pipe, call, **SCALES))) < 1e-5


def test_the_sound_keeps_the_weight_of_the_call(made):
    pipe, call = made
    want = call_of(pipe, call, guidance_scale=5.0)
    assert max(offs(call_of(guided(pipe, w=5.0), call), want)) < 1e-5


def test_no_weight_for_the_sound_is_that_of_the_pictures(made):
    pipe, call = made
    some = dict(audio_guidance_scale=None)
    want = call_of(pipe, call, audio_guidance_scale=W)
    assert max(offs(call_of(guided(pipe), call, **some), want)) < 1e-5


@pytest.mark.parametrize('w, sound', [(1.0, 5.0), (5.0, 1.0), (4.0, 6.0)])
def test_a_weight_for_each(made, w, sound):
    pipe, call = made
    sd = guided(pipe, NegativePrompt(sound=sound), w=w)
    want = call_of(pipe, call, guidance_scale=w, audio_guidance_scale=sound)
    assert max(offs(call_of(sd, call), want)) < 1e-5
    assert sd.report.nfe == [2 * STEPS] * 2


def test_neither_is_guided(made):
    pipe, call = made
    sd = guided(pipe, NegativePrompt(sound=1.0), w=1.0)
    why = 'never guided: its weights for pictures and sound are 1, which is unguided'
    with pytest.warns(UserWarning, match=why):
        got = call_of(sd, call)
    want = call_of(pipe, call, guidance_scale=1.0, audio_guidance_scale=1.0)
    assert max(offs(got, want)) < 1e-5
    assert sd.report.nfe == [STEPS] * 2


def test_a_schedule_for_the_sound(made):
    "A list for each that guides in the first step only is the interval of that step."
    pipe, call = made
    rest = [1.0] * (STEPS - 1)
    listed = guided(pipe, NegativePrompt(sound=[6.0, *rest]), w=[W, *rest])
    got = call_of(listed, call)
    first = max(listed.report.sigmas[1:]), float('inf')
    want = call_of(guided(pipe, NegativePrompt(sound=6.0), w=W, interval=first), call)
    assert max(offs(got, want)) == 0.0
    assert listed.report.nfe == [STEPS + 1] * 2


def test_a_schedule_for_the_sound_alone(made):
    "The pictures are guided all the time, the sound in the first step only."
    pipe, call = made
    sd = guided(pipe, NegativePrompt(sound=[SOUND, 1.0, 1.0, 1.0]))
    got = call_of(sd, call)
    assert sd.report.nfe == [2 * STEPS] * 2

    def switch_off(pipe, i, t, kwargs):
        pipe._audio_guidance_scale = 1.0
        return kwargs

    assert max(offs(got, call_of(guided(pipe), call, callback_on_step_end=switch_off))) == 0.0
    assert max(offs(got, call_of(pipe, call, callback_on_step_end=switch_off))) < 1e-5


def test_weights_per_sample(made, own):
    pipe, call = made
    one = call_of(pipe, call, guidance_scale=1.0, audio_guidance_scale=1.0)
    each = torch.tensor([SOUND, 1.0])
    got = call_of(guided(pipe, NegativePrompt(sound=each), w=torch.tensor([W, 1.0])), call)
    assert max(offs([o[:1] for o in got], [o[:1] for o in own])) < 1e-5
    assert max(offs([o[1:] for o in got], [o[1:] for o in one])) < 1e-5


def test_shapes_that_a_rule_gets(made, own):
    pipe, call = made
    seen = []

    def look(neg, pos, w):
        seen.append((tuple(pos.shape), w))
        return T.cfg(neg, pos, w)

    got = call_of(guided(pipe, rule=look), call)
    assert seen[:2] == [((2, 4, 2, 2, 3), W), ((2, 2, 9, 4), SOUND)]
    assert max(offs(got, own)) < 1e-5


@pytest.mark.parametrize('rule', [T.mahiro, T.apg, T.smc, T.fdg, T.auto_cfg], ids=str)
def test_a_rule_acts_on_each_part_alone(made, rule):
    "In one step, the weight of one part does not change the other one."
    pipe, call = made
    both = [
        call_of(guided(pipe, NegativePrompt(sound=o), w=w, rule=rule), call, num_inference_steps=1)
        for w, o in [(3.0, 2.0), (3.0, 6.0), (5.0, 2.0)]
    ]
    (pictures, sound), (same, other), (others, again) = both
    assert torch.equal(pictures, same)
    assert torch.equal(sound, again)
    assert not torch.equal(pictures, others)
    assert not torch.equal(sound, other)


def test_a_state_goes_on_for_each_part(made):
    "APG with momentum, whose state is the sum so far; without momentum it has none."
    pipe, call = made
    momentum = call_of(guided(pipe, rule=T.apg.of(beta=-0.5, eta=1.0)), call)
    none = call_of(guided(pipe, rule=T.apg.of(beta=0.0, eta=1.0)), call)
    assert max(offs(none, call_of(pipe, call))) < 1e-5
    assert min(offs(momentum, none)) > 1e-3


def test_post_rules_act_on_each_part_alone(made):
    "A rescaling in the space of the pipeline's own, with one strength for both."
    pipe, call = made
    post = replace(T.rescale.of(phi=0.6), space='x0')
    want = call_of(pipe, call, guidance_rescale=0.6, audio_guidance_rescale=0.6)
    assert max(offs(call_of(guided(pipe, post=post), call), want)) < 1e-5
    got = call_of(guided(pipe, post=[]), call, **SCALES)
    some = {k: v for k, v in SCALES.items() if 'rescale' not in k}
    assert max(offs(got, call_of(pipe, call, **some))) < 1e-5


def test_its_negatives_as_terms(made):
    "For schedules of their own: STG is PAG, and the other one is silence between the two."
    pipe, call = made
    layers = ['transformer_blocks.1.attn1', 'transformer_blocks.1.audio_attn1']
    stg = Term(PAG(pipe.transformer, layers), 3.0)
    between = ['*.audio_to_video_attn', '*.video_to_audio_attn']
    apart = Perturbation(pipe.transformer, lambda out, site: 0 * out, between, 'output')
    sd = guided(pipe, NegativePrompt(), stg, Term(apart, 2.5))
    scales = dict(stg_scale=2.0, audio_stg_scale=2.0, modality_scale=2.5, audio_modality_scale=2.5)
    assert max(offs(call_of(sd, call), call_of(pipe, call, **scales))) < 1e-5


def test_without_the_negative_prompt_nothing_of_the_pipeline_is_left(made):
    pipe, call = made
    sd = guided(pipe, Term(PAG(pipe.transformer), 3.0))
    assert max(offs(call_of(sd, call, **SCALES), call_of(sd, call))) == 0.0
    assert sd.report.nfe == [2 * STEPS] * 2


def test_a_network_that_cannot_be_perturbed(made):
    "diffusers leaves out STG where the network was not made for it."
    pipe, call = made
    was = pipe.transformer.config.perturbed_attn
    pipe.transformer.register_to_config(perturbed_attn=False)
    try:
        sd = guided(pipe)
        call_of(sd, call, stg_scale=2.0)
        assert sd.report.nfe == [2 * STEPS] * 2
    finally:
        pipe.transformer.register_to_config(perturbed_attn=was)


def test_sharper_attention_to_the_text(made, own):
    "PLADIS changes both, and only the layers that attend to a text."
    pipe, call = made
    neg = PLADIS(pipe.transformer)
    assert {n.rpartition('.')[2] for n in neg.layers} == {'attn2', 'audio_attn2'}
    assert min(offs(call_of(guided(pipe, NegativePrompt(), neg), call), own)) > 1e-3


def in_half_precision(call):
    return {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in call.items()
    }


def test_bfloat16():
    "As near to single precision as the pipeline itself is."
    pipe, call = ltx2()
    half = in_half_precision(call)
    pipe.to(torch.bfloat16)
    ours, own = call_of(guided(pipe), half, **SCALES), call_of(pipe, half, **SCALES)
    pipe.to(torch.float32)
    single = {k: v.float() if v is not call[k] else v for k, v in half.items()}
    want = call_of(pipe, single, **SCALES)
    for a, b, c in zip(ours, own, want, strict=True):
        assert (a - c).norm() < 1.5 * (b - c).norm()


def test_the_prediction_is_not_rounded():
    "The pipeline goes on with it in single precision."
    pipe, call = ltx2()
    seen = []

    class Mine(type(pipe)):
        def convert_velocity_to_x0(self, sample, output, *args):
            seen.append(output)
            return super().convert_velocity_to_x0(sample, output, *args)

    mine = Mine(**pipe.components).to(torch.bfloat16)
    mine.set_progress_bar_config(disable=True)
    call_of(guided(mine), in_half_precision(call))
    assert len(seen) == 4 * STEPS
    for o in seen:
        assert not torch.equal(o, o.bfloat16().float())


@pytest.mark.parametrize('change', ['_stg_scale', '_audio_modality_scale', '_guidance_rescale'])
@pytest.mark.parametrize('value', [0.0, 1.0, 2.0])
def test_callbacks_cannot_change_its_other_scales(made, change, value):
    pipe, call = made

    def callback(pipe, i, t, kwargs):
        setattr(pipe, change, value)
        return kwargs

    with pytest.raises(ValueError, match=f'{change[1:]}: expected it to stay .* got {value}'):
        call_of(guided(pipe), call, callback_on_step_end=callback, **SCALES)


@pytest.mark.parametrize('scale', ['stg', 'modality'])
def test_perturbed_calls_of_a_pipeline_are_refused(made, scale):
    "Of a subclass, for example."
    pipe, call = made
    do = 'do_spatio_temporal_guidance' if scale == 'stg' else 'do_modality_isolation_guidance'
    mine = type('Mine', (type(pipe),), {do: True})(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match='give PAG or Perturbation as a Term'):
        call_of(guided(mine), call)


def test_other_latents_for_the_negative_prompt_are_refused(made):
    "In any step: here after the first one."
    pipe, call = made

    def callback(pipe, i, t, kwargs):
        forward = pipe.transformer.forward

        def other(hidden_states, **kwargs):
            moved = torch.arange(len(hidden_states)).view(-1, 1, 1)
            return forward(hidden_states=hidden_states + moved, **kwargs)

        pipe.transformer.forward = other
        return kwargs

    with pytest.raises(ValueError, match='expected the same latents'):
        call_of(guided(pipe), call, callback_on_step_end=callback)


def words(call, *, n):
    "A stand-in for the text encoder: prompts by name, each `n` times in a row."

    def encode_prompt(self, prompt, negative_prompt, **kwargs):
        names = ['prompt_embeds', 'prompt_attention_mask']
        names += [f'negative_{o}' for o in names]
        return [call[o].repeat_interleave(n, 0) for o in names]

    return encode_prompt


def test_several_videos_of_a_prompt(made):
    "Weights are per prompt, for the sound, too."
    pipe, call = made
    rest = {k: v for k, v in call.items() if 'prompt' not in k}
    mine = type('Mine', (type(pipe),), dict(encode_prompt=words(call, n=2)))(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    many = dict(prompt=['a', 'b'], num_videos_per_prompt=2)
    parts = [
        call_of(mine, rest, **many, guidance_scale=w, audio_guidance_scale=sound)
        for w, sound in [(W, SOUND), (5.0, 3.0)]
    ]
    want = [torch.cat([a[:2], b[2:]]) for a, b in zip(*parts, strict=True)]
    sound, w = torch.tensor([SOUND, 3.0]), torch.tensor([W, 5.0])
    got = call_of(guided(mine, NegativePrompt(sound=sound), w=w), rest, **many)
    assert max(offs(got, want)) < 1e-5
    with pytest.raises(ValueError, match='num_videos_per_prompt: expected a whole number from 1'):
        call_of(guided(mine), rest, **many | dict(num_videos_per_prompt=0))


@pytest.mark.parametrize('neg', ['HiGS', 'SAG'])
def test_negatives_for_pictures_only(made, neg):
    pipe, call = made
    neg = HiGS() if neg == 'HiGS' else SAG(pipe.transformer, 'transformer_blocks.1.attn1')
    with pytest.raises(ValueError, match='expect.* images'):
        call_of(guided(pipe, Term(neg, 2.0), NegativePrompt()), call)


def test_refused(made):
    pipe, call = made
    with pytest.raises(ValueError, match='LTX2Pipeline predicts pictures and sound: use guided'):
        pipeline_denoiser(pipe)
    with pytest.raises(ValueError, match='sound: expected one value per step, 4, got 3'):
        call_of(guided(pipe, NegativePrompt(sound=[1.0, 2.0, 3.0])), call)
    with pytest.raises(ValueError, match='guidance_blocks: expected numbers of blocks, got none'):
        call_of(guided(pipe), call, stg_scale=1.0, spatio_temporal_guidance_blocks=None)
    with pytest.raises(ValueError, match='sound: expected finite values from 0'):
        NegativePrompt(sound=-1.0)
    with pytest.raises(ValueError, match='sound: expected a pipeline with sound, got WanPipeline'):
        guided(wan()[0], NegativePrompt(sound=2.0))
    with pytest.raises(ValueError, match='cads: expected a pipeline with prompts, got one without'):
        guided(pipe, cads=dict(s=0.1))
    ones = dict(guidance_scale=1.0, audio_guidance_scale=1.0)
    least = r'needs guidance_scale or audio_guidance_scale above 1 \(got 1.0 and 1.0\)'
    with pytest.raises(ValueError, match=least):
        call_of(guided(pipe), call, **ones)
    for name in ('guidance_scale', 'audio_guidance_scale', 'audio_stg_scale'):
        with pytest.raises(TypeError, match=f"^{name}: expected a finite number, got '7'"):
            call_of(guided(pipe), call, **{name: '7'})


class Attentions:
    "What goes through the attentions to the text, in order; `change(q, k, v, mask)` may differ."

    def __init__(self, net, monkeypatch):
        self.seen, self.change, self.inside = [], None, False
        self.own = F.scaled_dot_product_attention
        for name, m in net.named_modules():
            if name.endswith('attn2'):
                m.register_forward_pre_hook(lambda *args: setattr(self, 'inside', True))
                m.register_forward_hook(lambda *args: setattr(self, 'inside', False))
        monkeypatch.setattr(F, 'scaled_dot_product_attention', self.attend)

    def attend(self, query, key, value, attn_mask=None, **kw):
        if not self.inside:
            return self.own(query, key, value, attn_mask, **kw)
        self.seen.append((key, value, attn_mask))
        return (self.change or self.own)(query, key, value, attn_mask)


def test_nag_is_that_of_the_equation_for_pictures_and_sound(monkeypatch):
    pipe, call = ltx2()
    unguided = dict(guidance_scale=1.0, audio_guidance_scale=1.0)
    got = call_of(guided(pipe, NAG(pipe.transformer), w=4.0), call)
    negative = {k: call[f'negative_{k}'] for k in ('prompt_embeds', 'prompt_attention_mask')}
    attentions = Attentions(pipe.transformer, monkeypatch)
    apart = call_of(pipe, {**call, **negative}, **unguided)
    others = iter(attentions.seen)
    assert len(attentions.seen) == 2 * 2 * STEPS  # two layers, each for pictures and for sound

    def by_tokens(q, k, v, mask):
        other_k, other_v, other_mask = next(others)
        pos, neg = attentions.own(q, k, v, mask), attentions.own(q, other_k, other_v, other_mask)
        z = pos.transpose(1, 2).flatten(2)
        far = z * 4 - 3 * neg.transpose(1, 2).flatten(2)
        ratio = far.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        far = far * (2.5 / ratio).clamp(max=1)
        return (0.5 * far + 0.5 * z).unflatten(2, (q.shape[1], -1)).transpose(1, 2)

    attentions.change, attentions.seen = by_tokens, []
    want = call_of(pipe, call, **unguided)
    assert max(offs(got, want)) < 1e-4
    assert min(offs(got, apart)) > 1e-3


def test_nag_costs_a_second_row_of_pictures_and_sound(made):
    pipe, call = made
    sd = guided(pipe, NAG(pipe.transformer), w=4.0)
    got = call_of(sd, call)
    assert sd.report.nfe == [2 * STEPS] * 2
    pictures = NAG(pipe.transformer, layers='transformer_blocks.*.attn2')
    assert max(offs(call_of(guided(pipe, pictures, w=4.0), call), got)) > 1e-3
    text = dict(encoder_hidden_states=torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match='one sequence of tokens, got LTX2VideoTransformer3DModel'):
        VSF(pipe.transformer, text, torch.ones(1, 8, dtype=torch.bool))
