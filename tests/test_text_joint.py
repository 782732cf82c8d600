"NAG and VSF where text and image attend together: against forwards written out."

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from pipeline_helpers import NEGS, PROMPTS, flow, flux, randomized, run, sd3, seeded
from text_helpers import flip, nag_by_tokens, softmax
from tiny_families import aura_flow, flux2_klein
from tiny_families import run as tiny_run

from cf_guidance.attention import PAG
from cf_guidance.guided import GuidedDenoiser, Microbatched, Term
from cf_guidance.lab.fashion import quiet
from cf_guidance.pipelines import guided, pipeline_denoiser
from cf_guidance.text import NAG, PLADIS, VSF

quiet()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def sd35():
    "Stable Diffusion 3.5 Medium: normed queries and keys, and a second attention of the image."
    pipe = sd3(flow())
    more = dict(qk_norm='rms_norm', dual_attention_layers=(0,))
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith('_')}
    pipe.transformer = randomized(diffusers.SD3Transformer2DModel(**{**config, **more}))
    return pipe


MAKE = dict(sd3=lambda: sd3(flow()), sd35=sd35, flux=lambda: flux(flow()))


@pytest.fixture(scope='module')
def pipes():
    return {k: make() for k, make in MAKE.items()}


@pytest.fixture(params=[*MAKE])
def pipe(request, pipes):
    return pipes[request.param]


def at_noise(pipe, n=2):
    "A denoiser, its arguments, its conditions, and those of the negative prompts."
    D = pipeline_denoiser(pipe)
    x = 2 * torch.randn((n, *D.latent_shape), generator=seeded(0))
    cond, neg = (D.cond((o * n)[:n]) for o in (PROMPTS, NEGS))
    return D, (x, torch.linspace(1.0, 2.0, n)), cond, neg


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# the forward of a network with one image and two texts, written out


def merged(o):
    return o.transpose(1, 2).flatten(2)


def heads(attn, o, projections, norms, rotary=None):
    "Queries, keys and values."
    q, k, v = (f(o).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in projections)
    q, k = (x if f is None else f(x) for f, x in zip(norms, (q, k), strict=True))
    if rotary is not None:
        q, k = (apply_rotary_emb(x, rotary) for x in (q, k))
    return q, k, v


def attended(own, image, text):
    "Attention of `own` to the image and to a text, which are (q, k, v) each."
    return softmax(own[0], torch.cat([image[1], text[1]], 2), torch.cat([image[2], text[2]], 2))


def after_attention(h, attended, gate, norm, ff, shift, scale, gate_ff):
    h = h + gate[:, None] * attended
    new = norm(h) * (1 + scale[:, None]) + shift[:, None]
    return h + gate_ff[:, None] * ff(new)


def double_block(block, h, texts, embs, guide, rotary=(None, None)):
    attn, images = block.attn, block.norm1(h, emb=embs[0])
    own = attn.to_q, attn.to_k, attn.to_v
    image = heads(attn, images[0], own, (attn.norm_q, attn.norm_k), rotary[1])
    added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    norms = attn.norm_added_q, attn.norm_added_k
    last = getattr(block, 'context_pre_only', False)
    if last:
        normed = [(block.norm1_context(t, e),) for t, e in zip(texts, embs, strict=True)]
    else:
        normed = [block.norm1_context(t, emb=e) for t, e in zip(texts, embs, strict=True)]
    parts = [heads(attn, o[0], added, norms, rotary[0]) for o in normed]
    z = attn.to_out[0](merged(guide(image, *parts)))
    if len(images) == 7:
        h2 = h + images[1][:, None] * z
        second = block.attn2
        other = second.to_q, second.to_k, second.to_v
        alone = softmax(*heads(second, images[5], other, (second.norm_q, second.norm_k)))
        h = h2 + images[6][:, None] * second.to_out[0](merged(alone))
        z = torch.zeros_like(z)
    h = after_attention(h, z, images[1], block.norm2, block.ff, *images[2:5])
    if last:
        return h, texts
    out = []
    for t, o, part in zip(texts, normed, parts, strict=True):
        z = attn.to_add_out(merged(attended(part, image, part)))
        out.append(after_attention(t, z, o[1], block.norm2_context, block.ff_context, *o[2:5]))
    return h, out


def single_block(block, h, texts, embs, guide, rotary):
    "A block of Flux with the same weights for text and image."
    attn = block.attn

    def begin(o, emb, positions):
        normed, gate = block.norm(o, emb=emb)
        own, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        return normed, gate, heads(attn, normed, own, norms, positions)

    def end(o, normed, gate, z):
        both = torch.cat([merged(z), block.act_mlp(block.proj_mlp(normed))], 2)
        return o + gate[:, None] * block.proj_out(both)

    normed, gate, image = begin(h, embs[0], rotary[1])
    begun = [begin(t, e, rotary[0]) for t, e in zip(texts, embs, strict=True)]
    new = end(h, normed, gate, guide(image, *(o[2] for o in begun)))
    out = []
    for t, (normed, gate, part) in zip(texts, begun, strict=True):
        out.append(end(t, normed, gate, attended(part, image, part)))
    return new, out


def sd3_forward(net, guides, other_text, other_pooled):
    def forward(hidden_states, timestep, encoder_hidden_states, pooled_projections, **kwargs):
        height, width = (o // 2 for o in hidden_states.shape[-2:])
        pooled = pooled_projections, other_pooled
        embs = [net.time_text_embed(timestep, o) for o in pooled]
        texts = [net.context_embedder(o) for o in (encoder_hidden_states, other_text)]
        h = net.pos_embed(hidden_states)
        for block, guide in zip(net.transformer_blocks, guides, strict=True):
            h, texts = double_block(block, h, texts, embs, guide)
        h = net.proj_out(net.norm_out(h, embs[0])).unflatten(1, (height, width))
        h = h.unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
        return Transformer2DModelOutput(h.flatten(4).flatten(2, 3))

    return forward


def flux_forward(net, guides, other_text, other_pooled):
    def forward(
        hidden_states,
        timestep,
        encoder_hidden_states,
        pooled_projections,
        txt_ids,
        img_ids,
        guidance=None,
        **kwargs,
    ):
        pooled, time = (pooled_projections, other_pooled), timestep * 1000
        embs = [net.time_text_embed(time, guidance * 1000, o) for o in pooled]
        texts = [net.context_embedder(o) for o in (encoder_hidden_states, other_text)]
        rotary = [net.pos_embed(o) for o in (txt_ids, img_ids)]
        h, guides_of_blocks = net.x_embedder(hidden_states), iter(guides)
        for block in net.transformer_blocks:
            h, texts = double_block(block, h, texts, embs, next(guides_of_blocks), rotary)
        for block in net.single_transformer_blocks:
            h, texts = single_block(block, h, texts, embs, next(guides_of_blocks), rotary)
        return Transformer2DModelOutput(net.proj_out(net.norm_out(h, embs[0])))

    return forward


def written_out(pipe, guides, other):
    "The pipeline with a network that runs two texts beside each other, with a guide per block."
    new, net = copy.copy(pipe), copy.deepcopy(pipe.transformer)
    make = flux_forward if 'Flux' in type(net).__name__ else sd3_forward
    net.forward = make(net, guides, other['encoder_hidden_states'], other['pooled_projections'])
    new.transformer = net
    return new


def plain(image, pos, neg):
    return attended(image, image, pos)


def nag(w, tau=2.5, alpha=0.5):
    combine = nag_by_tokens(w, tau, alpha)

    def guide(image, pos, neg):
        pairs = [torch.cat([image[i], o[i]], 2) for o in (pos, neg) for i in (1, 2)]
        return combine(image[0], *pairs)

    return guide


def vsf(alpha, offset, words):
    combine = flip(alpha, offset, words)

    def guide(image, pos, neg):
        both = [torch.cat([image[i], pos[i]], 2) for i in (1, 2)]
        return combine(image[0], *both, *neg[1:])

    return guide


def words_of(neg, n=2):
    "Some tokens of each negative prompt."
    return torch.rand(n, neg['encoder_hidden_states'].shape[1], generator=seeded(4)) < 0.1


def test_the_written_out_forward_is_that_of_the_network(pipe):
    D, args, cond, neg = at_noise(pipe)
    by_hand = pipeline_denoiser(written_out(pipe, [plain] * 2, neg))
    assert off(by_hand(*args, **cond), D(*args, **cond)) < 1e-5


# NAG


@pytest.mark.parametrize('tau', [0.5, 2.5])
def test_nag_is_that_of_the_equations_with_one_image_and_two_texts(pipe, tau):
    D, args, cond, neg = at_noise(pipe)
    got = GuidedDenoiser(D, NAG(D, neg, tau, 0.4), w=4.0)(*args, **cond)
    guides = [nag([4.0, 4.0], tau, 0.4)] * 2
    want = pipeline_denoiser(written_out(pipe, guides, neg))(*args, **cond)
    assert off(got, want) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-3


@pytest.mark.parametrize('which', [0, 1])
def test_nag_in_one_layer_keeps_one_image_in_the_other(pipe, which):
    D, args, cond, neg = at_noise(pipe)
    names = [*NAG(D).layers]
    assert len(names) == 2
    got = GuidedDenoiser(D, NAG(D, neg, layers=names[which]), w=4.0)(*args, **cond)
    guides = [plain, plain]
    guides[which] = nag([4.0, 4.0])
    want = pipeline_denoiser(written_out(pipe, guides, neg))(*args, **cond)
    assert off(got, want) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-4


def test_each_sample_has_its_own_weight(pipe):
    D, args, cond, neg = at_noise(pipe)
    got = GuidedDenoiser(D, NAG(D, neg), w=torch.tensor([2.0, 5.0]))(*args, **cond)
    guides = [nag([2.0, 5.0])] * 2
    want = pipeline_denoiser(written_out(pipe, guides, neg))(*args, **cond)
    assert off(got, want) < 1e-5


@pytest.mark.parametrize('name', ['NAG', 'VSF'])
def test_a_sample_is_guided_as_it_is_alone(pipe, name):
    D, args, cond, neg = at_noise(pipe, 3)

    def make(rows):
        some = {k: v[rows] for k, v in neg.items()}
        return NAG(D, some) if name == 'NAG' else VSF(D, some, words_of(neg, 3)[rows])

    w = torch.tensor([2.0, 1.0, 5.0])
    G = GuidedDenoiser(D, make(slice(None)), w=w)
    got = G(*args, **cond)
    assert G.last_nfe.tolist() == [2, 1, 2]
    for i in range(3):
        one = slice(i, i + 1)
        alone = GuidedDenoiser(D, make(one), w=w[i].item())
        want = alone(*(o[one] for o in args), **{k: v[one] for k, v in cond.items()})
        assert off(got[one], want) < 1e-5


@pytest.mark.parametrize('name', ['NAG', 'VSF'])
def test_a_weight_of_1_is_plain_to_the_bit_and_costs_nothing(pipe, name):
    D, args, cond, neg = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, neg) if name == 'NAG' else VSF(D, neg, words_of(neg)), w=1.0)
    assert torch.equal(G(*args, **cond), D(*args, **cond))
    assert torch.equal(G.parts(*args, **cond).pred, D(*args, **cond))
    assert G.last_nfe.tolist() == [1, 1]


def test_nag_of_equal_prompts_is_plain(pipe):
    D, args, cond, _ = at_noise(pipe)
    assert off(GuidedDenoiser(D, NAG(D, cond), w=5.0)(*args, **cond), D(*args, **cond)) < 1e-5


def test_nag_with_alpha_0_is_plain(pipe):
    D, args, cond, neg = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, neg, alpha=0.0), w=5.0)
    assert off(G(*args, **cond), D(*args, **cond)) < 1e-5


def test_the_pooled_text_of_the_negative_reaches_its_own_text_alone(pipe):
    D, args, cond, neg = at_noise(pipe)
    swapped = {**neg, 'pooled_projections': cond['pooled_projections']}
    a, b = (GuidedDenoiser(D, NAG(D, o), w=4.0)(*args, **cond) for o in (neg, swapped))
    guides = [nag([4.0, 4.0])] * 2
    assert off(b, pipeline_denoiser(written_out(pipe, guides, swapped))(*args, **cond)) < 1e-5
    assert off(a, b) > 1e-4


@pytest.mark.parametrize('name', ['NAG', 'VSF'])
def test_two_rows_are_two_evaluations(pipe, name):
    D, args, cond, neg = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, neg) if name == 'NAG' else VSF(D, neg, words_of(neg)))
    G(*args, **cond)
    assert G.terms[0].neg.nfe == 1
    assert G.nfe == 4
    assert G.last_nfe.tolist() == [2, 2]
    assert G.run.guided == [2]


def test_both_rows_are_in_one_forward(pipe):
    D, args, cond, neg = at_noise(pipe)
    rows = []
    hook = pipe.transformer.register_forward_hook(lambda m, given, out: rows.append(len(out[0])))
    GuidedDenoiser(D, NAG(D, neg), w=4.0)(*args, **cond)
    hook.remove()
    assert rows == [4]


def test_the_network_stays_as_it_is(pipe):
    D, args, cond, neg = at_noise(pipe)
    before = D(*args, **cond)
    GuidedDenoiser(D, NAG(D, neg), w=4.0)(*args, **cond)
    assert torch.equal(D(*args, **cond), before)


def test_the_interval_holds_for_the_second_row(pipe):
    D, args, cond, neg = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, neg), w=4.0, interval=(1.5, 9.0))  # sigma is 1 and 2
    got = G(*args, **cond)
    assert G.last_nfe.tolist() == [1, 2]
    both = GuidedDenoiser(D, NAG(D, neg), w=4.0)(*args, **cond)
    assert off(got[:1], D(*args, **cond)[:1]) < 1e-5
    assert off(got[1:], both[1:]) < 1e-5


def test_nag_beside_cfg_changes_the_positive(pipe):
    D, args, cond, neg = at_noise(pipe)
    pos = GuidedDenoiser(D, NAG(D, neg), w=4.0)(*args, **cond)
    empty = D(*args, **{k: v.expand(2, *v.shape[1:]) for k, v in D.cond().items()})
    G = GuidedDenoiser(D, Term(D.cond(), 3.0), Term(NAG(D, neg), 4.0))
    assert off(G(*args, **cond), empty + 3.0 * (pos - empty)) < 1e-5
    assert G.nfe == 6


def test_nag_beside_pag_changes_the_positive(monkeypatch, pipe):
    monkeypatch.setattr('cf_guidance.perturb._MIN_POSITIONS_TO_JOIN', 0)
    D, args, cond, neg = at_noise(pipe)
    pos = GuidedDenoiser(D, NAG(D, neg), w=4.0)(*args, **cond)
    pag = GuidedDenoiser(D, PAG(D), w=3.0).parts(*args, **cond).neg
    G = GuidedDenoiser(D, Term(PAG(D), 3.0), Term(NAG(D, neg), 4.0))
    assert off(G(*args, **cond), pag + 3.0 * (pos - pag)) < 1e-5


def test_microbatches_change_nothing(pipe):
    D, args, cond, neg = at_noise(pipe, 3)
    terms = Term(D.cond(), 3.0), Term(NAG(D, neg), torch.tensor([2.0, 1.0, 5.0]))
    want = GuidedDenoiser(D, *terms)(*args, **cond)
    for size in (2, 3, 4):
        assert off(GuidedDenoiser(Microbatched(D, size), *terms)(*args, **cond), want) < 1e-5


def test_one_row_at_a_time_is_refused(pipe):
    D, args, cond, neg = at_noise(pipe)
    with pytest.raises(RuntimeError, match='expected both texts of a sample in one forward'):
        GuidedDenoiser(Microbatched(D, 1), NAG(D, neg))(*args, **cond)


def test_gradients_flow_through_it(pipe):
    D, (x, sigma), cond, neg = at_noise(pipe)
    with torch.enable_grad():
        x = x.requires_grad_()
        GuidedDenoiser(D, NAG(D, neg), w=4.0)(x, sigma, **cond).sum().backward()
    assert x.grad.abs().sum() > 0


def test_it_can_be_pickled(pipes):
    D, args, cond, neg = at_noise(pipes['flux'])
    G = GuidedDenoiser(D, NAG(D, neg), w=4.0)
    want = G(*args, **cond)
    assert torch.equal(pickle.loads(pickle.dumps(G))(*args, **cond), want)


def test_half_precision(pipe):
    D, args, cond, neg = at_noise(pipe)
    half = copy.copy(pipe)
    half.transformer = copy.deepcopy(pipe.transformer).bfloat16()
    H = pipeline_denoiser(half)
    a, b = (GuidedDenoiser(o, NAG(o, neg), w=3.0)(*args, **cond) for o in (H, D))
    # the plain network of Flux rounds its time, and is off by more than a tenth
    assert off(a, b) < 0.02 + 1.1 * off(H(*args, **cond), D(*args, **cond))


def test_a_negative_in_another_type_is_converted(pipe):
    D, args, cond, neg = at_noise(pipe)
    rounded = {k: v.bfloat16() for k, v in neg.items()}
    back = {k: v.float() for k, v in rounded.items()}
    a, b = (GuidedDenoiser(D, NAG(D, o), w=3.0)(*args, **cond) for o in (rounded, back))
    assert torch.equal(a, b)


# VSF


@pytest.mark.parametrize('offset', [0.0, 0.7])
def test_vsf_is_that_of_the_equation(pipe, offset):
    D, args, cond, neg = at_noise(pipe)
    words = words_of(neg)
    got = GuidedDenoiser(D, VSF(D, neg, words, offset), w=3.5)(*args, **cond)
    # both texts are told the pooled text of the prompt
    other = {**neg, 'pooled_projections': cond['pooled_projections']}
    guides = [vsf(2.5, offset, words)] * 2
    want = pipeline_denoiser(written_out(pipe, guides, other))(*args, **cond)
    assert off(got, want) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-3


def test_vsf_in_one_layer(pipe):
    D, args, cond, neg = at_noise(pipe)
    words, (_, name) = words_of(neg), NAG(D).layers
    got = GuidedDenoiser(D, VSF(D, neg, words, layers=name), w=3.5)(*args, **cond)
    other = {**neg, 'pooled_projections': cond['pooled_projections']}
    guides = [plain, vsf(2.5, 0.1, words)]
    want = pipeline_denoiser(written_out(pipe, guides, other))(*args, **cond)
    assert off(got, want) < 1e-5


def test_vsf_without_words_is_plain(pipe):
    D, args, cond, neg = at_noise(pipe)
    vsf = VSF(D, neg, torch.zeros_like(words_of(neg)))
    assert off(GuidedDenoiser(D, vsf)(*args, **cond), D(*args, **cond)) < 1e-5


# in pipelines


def scale_of(pipe, scale):
    "The argument that has a pipeline encode its negative prompt, or not."
    return {'true_cfg_scale' if 'Flux' in type(pipe).__name__ else 'guidance_scale': scale}


def run_at(pipe, scale, **kw):
    return run(pipe, **{**scale_of(pipe, scale), **kw})


def length_of_run(pipe, cond):
    "Conditions in the length that `run` asks for."
    if 'Flux' not in type(pipe).__name__:
        return cond
    return {
        **cond,
        'encoder_hidden_states': pipe.encode_prompt(NEGS, None, max_sequence_length=16)[0],
    }


def test_in_a_pipeline_the_negative_prompt_is_the_other_text(pipe):
    before = run_at(pipe, 1.0)
    sd_ = guided(pipe, NAG(pipe.transformer), w=4.0)
    got = run_at(sd_, 2.0)
    neg = length_of_run(pipe, pipeline_denoiser(pipe).cond(NEGS))
    want = run_at(written_out(pipe, [nag([4.0, 4.0])] * 2, neg), 1.0)
    assert off(got, want) < 1e-4
    assert off(got, before) > 1e-3
    assert sd_.report.nfe == [6, 6]
    assert torch.equal(run_at(pipe, 1.0), before)


def test_conditions_of_its_own_need_no_negative_prompt(pipe):
    neg = length_of_run(pipe, pipeline_denoiser(pipe).cond(NEGS))
    sd_ = guided(pipe, NAG(pipe.transformer, neg), w=4.0)
    got = run_at(sd_, 1.0, negative_prompt=None)
    assert off(got, run_at(guided(pipe, NAG(pipe.transformer), w=4.0), 2.0)) < 1e-5
    assert sd_.report.nfe == [6, 6]


def test_a_weight_per_step_evaluates_two_rows_where_it_guides(pipe):
    sd_ = guided(pipe, NAG(pipe.transformer), w=[1.0, 4.0, 4.0])
    run_at(sd_, 2.0)
    assert sd_.report.terms[0].negative == 'NAG'
    assert sd_.report.terms[0].guided == 2
    assert sd_.report.nfe == [5, 5]


def test_several_pictures_per_prompt(pipe):
    neg = length_of_run(pipe, pipeline_denoiser(pipe).cond(NEGS))
    negatives = NAG(pipe.transformer), VSF(pipe.transformer, neg, words_of(neg))
    for negative in negatives:
        four = run_at(guided(pipe, negative, w=3.0), 2.0, num_images_per_prompt=2)
        assert len(four) == 4
        assert four.isfinite().all()


def test_a_pipeline_that_evaluates_two_rows_at_once(pipe):
    want = run_at(guided(pipe, NAG(pipe.transformer), w=4.0), 2.0)
    got = run_at(guided(pipe, NAG(pipe.transformer), w=4.0, max_batch=2), 2.0)
    assert off(got, want) < 1e-5


# other families, without a pooled text: both texts in one batch, and attention that gives both
# rows the image of the first


def both_texts_in_a_batch(pipe, other, length, combine):
    "The pipeline with a network that is given both texts, `length` tokens before the image."
    new, net = copy.copy(pipe), copy.deepcopy(pipe.transformer)
    forward = net.forward

    def attention(query, key, value, attn_mask=None, **kwargs):
        assert attn_mask is None
        out, n, image = softmax(query, key, value), len(query) // 2, slice(length, None)
        pairs = [o[rows] for rows in (slice(0, n), slice(n, None)) for o in (key, value)]
        out[:n, :, image] = combine(query[:n, :, image], *pairs)
        out[n:, :, image] = out[:n, :, image]
        return out

    def run_both(hidden_states, encoder_hidden_states, timestep, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, 'scaled_dot_product_attention', attention)
            texts = torch.cat([encoder_hidden_states, other])
            x, t = (torch.cat([o, o]) for o in (hidden_states, timestep))
            out = forward(hidden_states=x, encoder_hidden_states=texts, timestep=t, **kwargs)[0]
        return (out[: len(hidden_states)],)

    net.forward, new.transformer = run_both, net
    return new


def flipped(length, combine):
    "VSF as `combine(q, k, v, other_k, other_v)`, where `other_k` are keys of all tokens."
    return lambda q, k, v, k2, v2: combine(q, k, v, k2[..., length, :], v2[..., length, :])


@pytest.mark.parametrize('name', ['NAG', 'VSF'])
@pytest.mark.parametrize(('make', 'first'), [(flux2_klein, 0), (aura_flow, 8)])
def test_families_without_a_pooled_text(name, make, first):
    pipe, call = make()
    plain = {k: v for k, v in call.items() if 'negative' not in k} | dict(guidance_scale=1.0)
    neg = dict(encoder_hidden_states=call['negative_prompt_embeds'])
    other, end = neg['encoder_hidden_states'], first + 7
    words = words_of(neg) | (torch.arange(7) == 2)
    term, combine = NAG(pipe.transformer), nag_by_tokens([4.0, 4.0], 2.5, 0.5)
    if name == 'VSF':
        term = VSF(pipe.transformer, neg, words)
        combine = flipped(slice(first, end), flip(3.0, 0.1, words))
    sd_ = guided(pipe, term, w=4.0)
    got, before = tiny_run(sd_, call), tiny_run(pipe, plain)
    want = tiny_run(both_texts_in_a_batch(pipe, other, end, combine), plain)
    assert off(got, want) < 1e-5
    assert off(got, before) > 1e-3
    assert set(sd_.report.nfe) == {8}


# what is refused


def test_two_terms_with_a_second_row_are_refused(pipe):
    D, args, cond, neg = at_noise(pipe)
    first, second = NAG(D).layers
    one, other = NAG(D, neg, layers=first), VSF(D, neg, words_of(neg), layers=second)
    with pytest.raises(ValueError, match='terms: NAG and VSF both change'):
        GuidedDenoiser(D, Term(one), Term(other))(*args, **cond)


def test_two_terms_with_a_second_row_may_take_turns(pipe):
    D, args, cond, neg = at_noise(pipe)  # sigma is 1 and 2
    low, high = (Term(NAG(D, neg), w, interval=o) for w, o in ((4, (0, 1.5)), (2, (1.5, 9))))
    G = GuidedDenoiser(D, low, high)
    want = GuidedDenoiser(D, NAG(D, neg), w=torch.tensor([4.0, 2.0]))(*args, **cond)
    assert off(G(*args, **cond), want) < 1e-5
    assert G.last_nfe.tolist() == [2, 2]


@pytest.mark.parametrize('name', ['encoder_hidden_states', 'pooled_projections'])
def test_texts_of_two_lengths_are_refused(pipe, name):
    D, args, cond, neg = at_noise(pipe)
    short = {**neg, name: neg[name][:, :-1]}
    with pytest.raises(ValueError, match=f'{name}: NAG expects .* as in the prompt, got'):
        GuidedDenoiser(D, NAG(D, short))(*args, **cond)


def test_settings_that_save_evaluations_are_refused(pipe):
    with pytest.raises(ValueError, match='every: NAG is a part of each evaluation'):
        Term(NAG(pipe.transformer), every=2)
    with pytest.raises(ValueError, match='stop: NAG is a part of each evaluation'):
        Term(NAG(pipe.transformer), stop=0.9)


def test_layers_without_text_are_refused(pipes):
    net = pipes['sd35'].transformer
    assert hasattr(net.transformer_blocks[0].attn2, 'to_q')
    assert [*NAG(net).layers] == ['transformer_blocks.0.attn', 'transformer_blocks.1.attn']
    with pytest.raises(ValueError, match='layers: expected attention to the text such as'):
        NAG(net, layers='*.attn2')


def test_pladis_has_no_joint_form(pipe):
    with pytest.raises(ValueError, match='PLADIS: expected a network with cross-attention'):
        PLADIS(pipe.transformer)
