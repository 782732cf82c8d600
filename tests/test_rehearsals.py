"""The newer families as denoisers: their conditions, latents and pictures.

That Euler's method on them ends where the pipeline ends is a property of `check_family`.
"""

import copy

import pytest
import torch
from pipeline_helpers import PROMPTS, close, ddim, sd, seeded, t5, tokenizer
from test_families import make
from tiny_families import FAMILIES as MADE
from tiny_families import VAES, W, embeddings, run, with_vae

from cf_guidance import families
from cf_guidance.attention import PAG
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.pipelines import FAMILIES, pipeline_denoiser

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:[\\s\\S]*utocast')
NOT_YET = 'Ideogram 4', 'LTX-2'  # two networks, or pictures and sound
REHEARSED = [k for k, (cls, _) in MADE.items() if FAMILIES[cls].text is None and k not in NOT_YET]


def texts(call, negative=False):
    "Embeddings of a call for its prompts, or for its negative prompts."
    names = [k for k in call if 'prompt' in k and k.startswith('negative_') == negative]
    return {k.removeprefix('negative_'): call[k] for k in names if call[k] is not None}


def denoiser(pipe, call):
    sizes = {k: v for k, v in call.items() if 'prompt' not in k and 'scale' not in k}
    return pipeline_denoiser(pipe, **sizes, **texts(call))


def noise_of(D, n=2):
    return torch.randn((n, *D.latent_shape), generator=seeded(3))


@pytest.mark.parametrize('what', VAES)
def test_pictures(what):
    "The pipeline's own pictures, and an `encode` that is the inverse up to the autoencoder."
    make(what)  # skips where this diffusers does not have it
    pipe, call = with_vae(what)
    D, latents = denoiser(pipe, call), []

    def keep(pipe, i, t, kwargs):
        latents.append(kwargs['latents'])
        return kwargs

    pictures = run(pipe, call, output_type='pt', callback_on_step_end=keep)
    pictures = pictures.transpose(1, 2) if len(D.latent_shape) == 4 else pictures
    close(D.decode(D.unpack(latents[-1])), pictures)
    z, x = D.encode(pictures), 2 * pictures - 1
    assert z.shape == (2, *D.latent_shape)
    with torch.no_grad():
        out = pipe.vae.encode(x.unsqueeze(2) if D.one_frame else x)
        mean = out.latent if hasattr(out, 'latent') else out.latent_dist.mode()
        want = (pipe.vae.decode(mean, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    close(D.decode(z), want[:, :, 0] if D.one_frame else want)


@pytest.mark.parametrize('what', REHEARSED)
def test_each_sample_for_itself(what):
    "Conditions have one row per sample, and a sample of a batch is what it is alone."
    pipe, call = make(what)
    told = FAMILIES[MADE[what][0]].negative is None
    D = denoiser(pipe, call)
    pos, neg = D.cond(**texts(call)), D.cond(**texts(call, negative=not told))
    assert {len(v) for v in pos.values()} == {2}
    x, sigma = noise_of(D), torch.tensor([0.5, 3.0])
    both = GuidedDenoiser(D, neg, w=W)(x, sigma, **pos)
    for i in range(2):
        own, other = ({k: v[i : i + 1] for k, v in o.items()} for o in (pos, neg))
        alone = GuidedDenoiser(D, other, w=W)(x[i : i + 1], sigma[i], **own)
        close(both[i : i + 1], alone)


def test_a_negative_that_comes_last(monkeypatch):
    "Z-Image puts the negative prompt behind the prompt; without a prompt it is the condition."
    pipe, call = make('Z-Image')
    pos, neg = call['prompt_embeds'][:1], call['negative_prompt_embeds'][:1]
    pipe.register_modules(text_encoder=t5(12), tokenizer=tokenizer())  # not called
    monkeypatch.setattr(type(pipe), 'encode_prompt', lambda *args, **kwargs: (pos, neg))
    D = pipeline_denoiser(pipe, height=call['height'], width=call['width'])
    (got,) = [v for k, v in D.cond().items() if k.startswith('cap_feats')]
    assert torch.equal(got[0, : len(neg[0])], neg[0])


ENCODED = ['AuraFlow', 'Chroma', 'LTX', 'CogVideoX', 'Wan', 'Mochi']


def encoded(what):
    "A pipeline with a text encoder, and a call with prompts."
    pipe, call = make(what)
    width = texts(call)['prompt_embeds'].shape[-1]
    pipe.register_modules(text_encoder=t5(width), tokenizer=tokenizer())
    sizes = {k: v for k, v in call.items() if 'prompt' not in k}
    return pipe, dict(sizes, prompt=PROMPTS, max_sequence_length=7)


def denoiser_of_prompts(pipe, call):
    sizes = {k: v for k, v in call.items() if k not in ('prompt', 'guidance_scale')}
    return pipeline_denoiser(pipe, **sizes)


@pytest.mark.parametrize('what', ENCODED)
def test_prompts(what):
    "Without a prompt, the conditions are those of the pipeline's own negative prompt."
    pipe, call = encoded(what)
    assert families._denoiser(families._Trial(pipe, call, 3, W)) < 1e-4
    D = denoiser_of_prompts(pipe, call)
    one, two = D.cond(PROMPTS[0]), D.cond(PROMPTS)
    assert all(torch.allclose(v, two[k][:1], atol=1e-5) for k, v in one.items())
    assert any((v[0] != two[k][1]).any() for k, v in one.items())
    assert {len(v) for v in D.cond().values()} == {1}


def test_told_weight():
    pipe, call = make('Flux.2')
    D, text = denoiser(pipe, call), texts(call)
    assert torch.equal(D.cond(guidance=2.5, **text)['guidance'], torch.full((2,), 2.5))
    assert torch.equal(D.cond(**text)['guidance'], torch.full((2,), 4.0))  # the pipeline's default


def test_nothing_changes():
    pipe, call = with_vae('AuraFlow')
    before, seed = dict(vars(pipe)), torch.get_rng_state()
    weights = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    D = denoiser(pipe, call)
    D.decode(D(noise_of(D), 1.0, **D.cond(**texts(call))))
    assert vars(pipe) == before
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())
    assert {id(p) for p in D.parameters() if p.numel()} == {
        id(p) for p in pipe.transformer.parameters()
    }


def test_the_order_of_calls_does_not_matter():
    pipe, call = encoded('Chroma')
    a, b = (denoiser_of_prompts(pipe, call) for _ in range(2))
    cond = a.cond(PROMPTS)
    x = noise_of(b)
    assert torch.equal(a(x, 1.0, **cond), b(x, 1.0, **b.cond(PROMPTS)))


def test_bfloat16():
    pipe, call = with_vae('AuraFlow')
    D = denoiser(pipe.to(torch.bfloat16), call | {k: v.bfloat16() for k, v in texts(call).items()})
    x = D(noise_of(D), 1.0, **D.cond(**{k: v.bfloat16() for k, v in texts(call).items()}))
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert D.decode(x).dtype == torch.float32


def test_the_loss_trains():
    pipe, call = make('Sana')
    pipe.transformer.requires_grad_(True)
    D = denoiser(pipe, call)
    cond = D.cond(**texts(call))
    D.loss(noise_of(D), noise_of(D).flip(0), torch.tensor([0.5, 2.0]), **cond).sum().backward()
    assert pipe.transformer.proj_out.weight.grad.abs().sum() > 0


def test_each_noise_level_has_its_expert():
    "In one batch, each sample is predicted by the network of its noise level."
    pipe, call = make('Wan, two experts')
    D = denoiser(pipe, call)
    cond, x, sigma = D.cond(**texts(call)), noise_of(D), torch.tensor([8.0, 1.0])  # the limit is 4
    one_scale = {k: v for k, v in call.items() if k != 'guidance_scale_2'}
    with torch.no_grad():
        got = D(x, sigma, **cond)
        for i, part in enumerate(('transformer', 'transformer_2')):
            alone = copy.copy(pipe)
            alone.transformer, alone.transformer_2 = getattr(pipe, part), None
            alone.register_to_config(boundary_ratio=None)
            want = denoiser(alone, one_scale)(x, sigma, **cond)
            close(got[i : i + 1], want[i : i + 1])
            assert (got - want)[1 - i].abs().max() > 1e-3


def test_layers_of_one_expert_are_not_changed():
    pipe, call = make('Wan, two experts')
    D = denoiser(pipe, call)
    with pytest.raises(ValueError, match='PAG: expected one network, got a denoiser with another'):
        GuidedDenoiser(D, PAG(pipe.transformer))(noise_of(D), 1.0, **D.cond(**texts(call)))


def test_without_a_boundary_the_first_network_predicts_all():
    pipe, call = make('Wan, two experts')
    pipe.register_to_config(boundary_ratio=None)
    call = {k: v for k, v in call.items() if k != 'guidance_scale_2'}
    D = denoiser(pipe, call)
    assert D.inner_model.later is None
    assert D(noise_of(D), 1.0, **D.cond(**texts(call))).isfinite().all()


def aura(**kw):
    "A denoiser without an autoencoder, and its conditions."
    pipe, call = make('AuraFlow')
    D = denoiser(pipe, call | kw)
    return D, D.cond(**texts(call))


BAD = {  # what is done -> what the error says
    'two networks': (
        lambda: denoiser(*make('Ideogram 4')),
        'pipe: Ideogram4Pipeline has transformer and unconditional_transformer: use guided',
    ),
    'no text encoder': (
        lambda: pipeline_denoiser(make('Sana')[0]).cond(PROMPTS),
        'pipe: expected text encoders, or embeddings such as prompt_embeds=',
    ),
    'no text encoder for the shape': (
        lambda: pipeline_denoiser(make('Sana')[0]).latent_shape,
        'pipe: expected text encoders, or embeddings such as prompt_embeds=',
    ),
    'argument': (
        lambda: aura()[0].cond('a bag', foo=1),
        'foo: not an argument of AuraFlowPipeline',
    ),
    'argument of an older family': (
        lambda: pipeline_denoiser(sd(ddim()), num_frames=5),
        'num_frames: expected only height and width for StableDiffusionPipeline',
    ),
    'prompt': (
        lambda: aura()[0].cond(3),
        'what: expected a string or a list of strings, got int',
    ),
    'no autoencoder': (
        lambda: aura()[0].decode(torch.zeros(1, 4, 8, 12)),
        'pipe: expected a pipeline with an autoencoder, got vae=None',
    ),
    'latents': (
        lambda: aura()[0](torch.zeros(2, 4, 8, 8), 1.0, **aura()[1]),
        r'x: expected latents \(B, 4, 8, 12\), got \(2, 4, 8, 8\)',
    ),
    'no conditions': (
        lambda: aura()[0](torch.zeros(2, 4, 8, 12), 1.0),
        r'conditions: expected encoder_hidden_states, as D.cond\(prompts\) makes them',
    ),
    'a picture for a video': (
        lambda: denoiser(*with_vae('Wan')).encode(torch.zeros(1, 3, 32, 48)),
        r'images: expected floating-point pixels \(B, C, F, H, W\), got torch.float32, 4 axes',
    ),
    'another size': (
        lambda: denoiser(*with_vae('AuraFlow')).encode(torch.zeros(1, 3, 32, 32)),
        r'latents: expected \(4, 16, 24\) per sample, got \(4, 16, 16\)',
    ),
    'latents of a video': (
        lambda: denoiser(*with_vae('Wan')).decode(torch.zeros(1, 4, 4, 6)),
        r'x: expected latents \(B, 4, f, h, w\), got \(1, 4, 4, 6\)',
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says) as e:
        f()
    assert len(str(e.value)) < 160


def test_a_pipeline_that_is_not_listed(monkeypatch):
    pipe, call = make('AuraFlow')
    monkeypatch.delitem(FAMILIES, 'AuraFlowPipeline')
    with pytest.raises(ValueError, match='AuraFlowPipeline is not listed: use guided'):
        denoiser(pipe, call)


def test_embeddings_of_the_older_families():
    "Embeddings are those of the prompt, with and without one."
    D, given = pipeline_denoiser(sd(ddim())), embeddings(0, 2, 3, 16)
    assert torch.equal(D.cond(prompt_embeds=given)['encoder_hidden_states'], given)
