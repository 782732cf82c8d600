"NAG, VSF, PLADIS and CDG: against attention written out, in their limits, and what they refuse."

import copy
import pickle

import pytest
import torch
from pipeline_helpers import (
    NEGS,
    PROMPTS,
    W,
    ddim,
    dit,
    euler_discrete,
    pixart,
    run,
    sd,
    seeded,
    xl,
)
from text_helpers import flip, nag_by_tokens, softmax
from torch import nn
from torch.nn import functional as F

from cf_guidance.attention import PAG, SAG
from cf_guidance.denoisers import NetDenoiser
from cf_guidance.guided import GuidedDenoiser, Microbatched, Term
from cf_guidance.lab.fashion import quiet
from cf_guidance.negatives import CADS
from cf_guidance.perturb import ADAPTERS
from cf_guidance.pipelines import MinimalDiffusion, guided, pipeline_denoiser, sigmas_of
from cf_guidance.text import CDG, NAG, PLADIS, VSF, _normalised, entmax, word_tokens

quiet()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope='module')
def pipes():
    return dict(sd=sd(ddim()), xl=xl(ddim()))


@pytest.fixture(params=['sd', 'xl'])
def pipe(request, pipes):
    return pipes[request.param]


def at_noise(pipe, n=2):
    "A denoiser, its arguments and its conditions."
    D = pipeline_denoiser(pipe)
    x = 5 * torch.randn((n, *D.latent_shape), generator=seeded(0))
    return D, (x, torch.linspace(4.0, 6.0, n)), D.cond((PROMPTS * n)[:n])


def negs(D, n=2):
    return D.cond((NEGS * n)[:n])


def words_of(pipe, n=2):
    return word_tokens(pipe.tokenizer, (NEGS * n)[:n])


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# attention written out, as processors of diffusers


class WrittenOut:
    "A processor for cross-attention: `combine(q, k, v, other_k, other_v)` of heads."

    def __init__(self, combine, other=None):
        self.combine, self.other = combine, other

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        def heads(o):
            return o.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        texts = [encoder_hidden_states]
        if self.other is not None:
            texts.append(self.other)
        pairs = [heads(f(o)) for o in texts for f in (attn.to_k, attn.to_v)]
        out = self.combine(q, *pairs).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def with_processor(pipe, processor):
    "The pipeline with another processor in each cross-attention of a copy of its U-Net."
    new = copy.copy(pipe)
    new.unet = copy.deepcopy(pipe.unet)
    own = new.unet.attn_processors
    new.unet.set_attn_processor({k: processor if 'attn2' in k else p for k, p in own.items()})
    return new


def evaluated(pipe, processor):
    D, args, cond = at_noise(with_processor(pipe, processor))
    return D(*args, **cond)


# NAG


def test_nag_by_hand():
    pos = torch.tensor([[[[3.0, -1.0]], [[0.0, 0.0]]]])  # one row, two heads, one token
    neg = torch.tensor([[[[1.0, 1.0]], [[0.0, 2.0]]]])
    far = torch.tensor(
        [[[[7.0, -5.0]], [[0.0, -4.0]]]]
    )  # pos + 2 (pos - neg), |far| = 16, |pos| = 4
    assert torch.equal(_normalised(neg, pos, 3.0, 10.0, 1.0), far)
    assert torch.equal(_normalised(neg, pos, 3.0, 2.0, 1.0), far / 2)
    assert torch.equal(_normalised(neg, pos, 3.0, 10.0, 0.5), (far + pos) / 2)


def test_nag_of_nothing_is_nothing():
    zero = torch.zeros(1, 2, 3, 4)
    assert torch.equal(_normalised(zero + 1, zero, 3.0, 2.5, 0.5), zero)


@pytest.mark.parametrize('tau', [0.5, 2.5])
def test_nag_is_that_of_the_equations(pipe, tau):
    D, args, cond = at_noise(pipe)
    got = GuidedDenoiser(D, NAG(D, negs(D), tau, 0.4), w=4.0)(*args, **cond)
    text = negs(D)['encoder_hidden_states']
    want = evaluated(pipe, WrittenOut(nag_by_tokens([4.0, 4.0], tau, 0.4), text))
    assert off(got, want) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-3


def test_the_threshold_of_nag_matters(pipe):
    D, args, cond = at_noise(pipe)
    a, b = (GuidedDenoiser(D, NAG(D, negs(D), tau), w=6.0)(*args, **cond) for tau in (0.5, 2.5))
    assert off(a, b) > 1e-3


@pytest.mark.parametrize(
    'make',
    [
        lambda D, p: NAG(D, negs(D)),
        lambda D, p: VSF(D, negs(D), words_of(p)),
        lambda D, p: PLADIS(D),
    ],
)
def test_a_weight_of_1_is_plain_to_the_bit(pipe, make):
    D, args, cond = at_noise(pipe)
    G = GuidedDenoiser(D, make(D, pipe), w=1.0)
    assert torch.equal(G(*args, **cond), D(*args, **cond))
    assert torch.equal(G.parts(*args, **cond).pred, D(*args, **cond))


def test_nag_of_equal_prompts_is_plain(pipe):
    D, args, cond = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, cond), w=5.0)
    assert off(G(*args, **cond), D(*args, **cond)) < 1e-6


def test_nag_with_alpha_0_is_plain(pipe):
    D, args, cond = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, negs(D), alpha=0.0), w=5.0)
    assert off(G(*args, **cond), D(*args, **cond)) < 1e-6


@pytest.mark.parametrize('name', ['NAG', 'VSF', 'PLADIS'])
def test_each_sample_has_its_own_weight_and_prompt(pipe, name):
    D, args, cond = at_noise(pipe, 3)

    def make(rows=slice(None)):
        some = {k: v[rows] for k, v in negs(D, 3).items()}
        if name == 'PLADIS':
            return PLADIS(D)
        return NAG(D, some) if name == 'NAG' else VSF(D, some, words_of(pipe, 3)[rows])

    w = torch.tensor([2.0, 1.0, 5.0])
    got = GuidedDenoiser(D, make(), w=w)(*args, **cond)
    for i in range(3):
        one = slice(i, i + 1)
        alone = GuidedDenoiser(D, make(one), w=w[i].item())
        want = alone(*(o[one] for o in args), **{k: v[one] for k, v in cond.items()})
        assert off(got[one], want) < 1e-5


def test_one_row_of_a_negative_serves_all_samples(pipe):
    D, args, cond = at_noise(pipe)
    one = D.cond(NEGS[:1])
    two = D.cond(NEGS[:1] * 2)
    a, b = (GuidedDenoiser(D, NAG(D, o), w=4.0)(*args, **cond) for o in (one, two))
    assert torch.equal(a, b)


@pytest.mark.parametrize('name', ['NAG', 'VSF', 'PLADIS'])
def test_there_is_no_further_evaluation(pipe, name):
    D, args, cond = at_noise(pipe)
    neg = dict(NAG=NAG(D, negs(D)), VSF=VSF(D, negs(D), words_of(pipe)), PLADIS=PLADIS(D))[name]
    G = GuidedDenoiser(D, neg)
    G(*args, **cond)
    assert G.nfe == 2
    assert G.last_nfe.tolist() == [1, 1]
    assert G.run.guided == [2]


def test_nag_acts_inside_its_interval_only(pipe):
    D, args, cond = at_noise(pipe)
    G = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0, interval=(5.0, 9.0))  # sigma is 4 and 6
    got, all_of_it = G(*args, **cond), GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)(*args, **cond)
    assert off(got[:1], D(*args, **cond)[:1]) < 1e-6
    assert off(got[1:], all_of_it[1:]) < 1e-6
    assert off(got[1:], D(*args, **cond)[1:]) > 1e-3


def test_nag_beside_cfg_changes_the_positive(pipe):
    D, args, cond = at_noise(pipe)
    pos = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)(*args, **cond)
    neg = D(*args, **{k: v.expand(2, *v.shape[1:]) for k, v in D.cond().items()})
    G = GuidedDenoiser(D, Term(D.cond(), 3.0), Term(NAG(D, negs(D)), 4.0))
    assert off(G(*args, **cond), neg + 3.0 * (pos - neg)) < 1e-5
    assert G.nfe == 4


def test_nag_beside_pag_changes_the_positive(monkeypatch, pipe):
    monkeypatch.setattr('cf_guidance.perturb._MIN_POSITIONS_TO_JOIN', 0)
    D, args, cond = at_noise(pipe)
    pos = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)(*args, **cond)
    neg = GuidedDenoiser(D, PAG(D), w=3.0).parts(*args, **cond).neg
    G = GuidedDenoiser(D, Term(PAG(D), 3.0), Term(NAG(D, negs(D)), 4.0))
    assert off(G(*args, **cond), neg + 3.0 * (pos - neg)) < 1e-5
    assert 'late' in G.run.perturbed[1].joins


def test_two_terms_inside_may_take_turns(pipe):
    D, args, cond = at_noise(pipe)  # sigma is 4 and 6
    low, high = (Term(NAG(D, negs(D)), w, interval=o) for w, o in ((4, (0, 5)), (2, (5, 9))))
    got = GuidedDenoiser(D, low, high)(*args, **cond)
    w = torch.tensor([4.0, 2.0])
    assert off(got, GuidedDenoiser(D, NAG(D, negs(D)), w=w)(*args, **cond)) < 1e-5


def test_two_terms_inside_act_one_after_the_other(pipe):
    D, args, cond = at_noise(pipe)
    first, second = NAG(D, negs(D), layers='down*'), NAG(D, D.cond(), layers='up*')
    both = GuidedDenoiser(D, Term(first, 4.0), Term(second, 2.0))(*args, **cond)
    alone = [GuidedDenoiser(D, o, w=w)(*args, **cond) for o, w in ((first, 4.0), (second, 2.0))]
    assert min(off(both, o) for o in alone) > 1e-4


@pytest.mark.parametrize('name', ['NAG', 'PLADIS'])
def test_microbatches_change_nothing(pipe, name):
    D, args, cond = at_noise(pipe, 3)
    neg = NAG(D, negs(D, 3)) if name == 'NAG' else PLADIS(D)
    w = torch.tensor([2.0, 1.0, 5.0])
    terms = Term(D.cond(), 3.0), Term(neg, w)
    want = GuidedDenoiser(D, *terms)(*args, **cond)
    for size in (1, 2, 4):
        assert off(GuidedDenoiser(Microbatched(D, size), *terms)(*args, **cond), want) < 1e-5


def test_the_network_stays_as_it_is(pipe):
    D, args, cond = at_noise(pipe)
    before = D(*args, **cond)
    GuidedDenoiser(D, NAG(D, negs(D)))(*args, **cond)
    assert torch.equal(D(*args, **cond), before)


def test_half_precision(pipes):
    D, args, cond = at_noise(pipes['sd'])
    want = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)(*args, **cond)
    half = copy.copy(pipes['sd'])
    half.unet = copy.deepcopy(half.unet).bfloat16()
    H = pipeline_denoiser(half)
    got = GuidedDenoiser(H, NAG(H, negs(D)), w=4.0)(*args, **cond)
    assert off(got, want) < 0.05


def test_it_can_be_pickled(pipes):
    D, args, cond = at_noise(pipes['sd'])
    G = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)
    want = G(*args, **cond)
    assert torch.equal(pickle.loads(pickle.dumps(G))(*args, **cond), want)


def test_a_projected_text_is_projected(pipes):
    net = dict(encoder_hid_dim=16, encoder_hid_dim_type='text_proj')
    pipe = sd(ddim(), **net)
    D, args, cond = at_noise(pipe)
    got = GuidedDenoiser(D, NAG(D, negs(D)), w=4.0)(*args, **cond)
    text = pipe.unet.encoder_hid_proj(negs(D)['encoder_hidden_states'])
    want = evaluated(pipe, WrittenOut(nag_by_tokens([4.0, 4.0], 2.5, 0.5), text))
    assert off(got, want) < 1e-5


# a network of one's own


class Cross(nn.Module):
    is_cross_attention = True

    def __init__(self, by_hand=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 6) for _ in range(3))
        self.out, self.by_hand = nn.Linear(6, 3), by_hand

    def forward(self, x, context):
        return self.run(softmax if self.by_hand else F.scaled_dot_product_attention, x, context)

    def run(self, attend, x, context):
        heads = [
            f(o).unflatten(-1, (2, 3)).transpose(1, 2)
            for f, o in ((self.q, x), (self.k, context), (self.v, context))
        ]
        return self.out(attend(*heads).transpose(1, 2).flatten(2))


class CrossAttention(Cross):
    pass


class SlowCrossAttention(Cross):
    def __init__(self):
        super().__init__(by_hand=True)


class OwnNet(nn.Module):
    def __init__(self, attention=CrossAttention):
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention()

    def forward(self, x, t, words):
        return self.attention(x.flatten(2).mT, words).mT.view_as(x)


def own_case(attention):
    D = NetDenoiser(OwnNet(attention))
    args = torch.randn((2, 3, 2, 2), generator=seeded(0)), torch.ones(2)
    cond, other = ({'words': torch.randn((2, n, 3), generator=seeded(n))} for n in (4, 5))
    return GuidedDenoiser(D, NAG(D, other, text='words'), w=3.0), args, cond


def test_a_network_of_ones_own_and_a_text_of_another_length():
    G, args, cond = own_case(CrossAttention)
    got = G(*args, **cond)
    assert off(got, G.inner_model(*args, **cond)) > 1e-3


def test_adapters_see_the_other_text(monkeypatch):
    monkeypatch.setitem(
        ADAPTERS, SlowCrossAttention, lambda m, attend, x, context: m.run(attend, x, context)
    )
    G, args, cond = own_case(SlowCrossAttention)
    H, *_ = own_case(CrossAttention)
    assert off(G(*args, **cond), H(*args, **cond)) < 1e-5


def test_attention_that_cannot_be_changed_is_an_error():
    G, args, cond = own_case(SlowCrossAttention)
    with pytest.raises(RuntimeError, match='does not call scaled_dot_product_attention'):
        G(*args, **cond)


# in pipelines


def test_in_a_pipeline_the_negative_prompt_is_the_other_text(pipe):
    D = pipeline_denoiser(pipe)
    got = run(guided(pipe, NAG(pipe.unet), w=4.0))
    text = negs(D)['encoder_hidden_states']
    plain = with_processor(pipe, WrittenOut(nag_by_tokens([4.0, 4.0], 2.5, 0.5), text))
    want = run(plain, guidance_scale=1.0)
    assert off(got, want) < 1e-4
    assert off(got, run(pipe, guidance_scale=1.0)) > 1e-3


def test_conditions_of_its_own_need_no_negative_prompt(pipe):
    D = pipeline_denoiser(pipe)
    sd_ = guided(pipe, NAG(pipe.unet, negs(D)), w=4.0)
    got = run(sd_, guidance_scale=0.0, negative_prompt=None)
    assert off(got, run(guided(pipe, NAG(pipe.unet), w=4.0))) < 1e-5
    assert sd_.report.nfe == [3, 3]


def test_the_report_says_that_it_acted(pipe):
    sd_ = guided(pipe, NAG(pipe.unet), w=[1.0, 4.0, 4.0])
    run(sd_)
    assert sd_.report.terms[0].negative == 'NAG'
    assert sd_.report.terms[0].guided == 2
    assert sd_.report.nfe == [3, 3]


def test_several_pictures_per_prompt(pipe):
    D = pipeline_denoiser(pipe)
    cond, words = negs(D), words_of(pipe)
    for neg in (
        NAG(pipe.unet),
        NAG(pipe.unet, cond),
        VSF(pipe.unet, cond, words),
        CDG(D.cond(), words),
    ):
        two = run(guided(pipe, neg, w=3.0), num_images_per_prompt=2)
        assert len(two) == 4
        assert two.isfinite().all()


def test_a_prompt_and_conditions_agree_for_several_pictures(pipe):
    D = pipeline_denoiser(pipe)
    a, b = (
        run(guided(pipe, NAG(pipe.unet, cond), w=3.0), num_images_per_prompt=2)
        for cond in (None, negs(D))
    )
    assert off(a, b) < 1e-5


def test_minimal_diffusion_takes_it():
    md = MinimalDiffusion(num_steps=2).load()
    x, report = md.sample(
        'a bag', Term(NAG(md.pipe.unet), 4.0), negative_prompt='a red bag', return_report=True
    )
    assert report.terms[0].guided == 2
    assert (x - md.sample('a bag', Term(NAG(md.pipe.unet), 4.0))).abs().max() > 0.01


# VSF


@pytest.mark.parametrize('offset', [0.0, 0.7])
def test_vsf_is_that_of_the_equation(pipe, offset):
    D, args, cond = at_noise(pipe)
    words = words_of(pipe)
    got = GuidedDenoiser(D, VSF(D, negs(D), words, offset), w=3.5)(*args, **cond)
    text = negs(D)['encoder_hidden_states']
    assert off(got, evaluated(pipe, WrittenOut(flip(2.5, offset, words), text))) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-3


def test_vsf_without_words_is_plain(pipe):
    D, args, cond = at_noise(pipe)
    vsf = VSF(D, negs(D), torch.zeros_like(words_of(pipe)))
    assert off(GuidedDenoiser(D, vsf)(*args, **cond), D(*args, **cond)) < 1e-6


def test_words_are_neither_start_nor_end_nor_padding():
    tokenizer = MinimalDiffusion().load().pipe.tokenizer
    words = word_tokens(tokenizer, ['a red bag', 'a red bag on a blue background'], 10)
    assert words.tolist() == [
        [False] + [True] * 3 + [False] * 6,
        [False] + [True] * 7 + [False] * 2,
    ]
    assert word_tokens(tokenizer, '').sum() == 0


# PLADIS


def by_bisection(z, alpha):
    "alpha-entmax by definition: the threshold at which the weights add up to 1."
    s = (alpha - 1) * z.double()
    low, high = s.amax(-1, keepdim=True) - 1, s.amax(-1, keepdim=True)
    for _ in range(80):
        mid = (low + high) / 2
        more = (s - mid).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) > 1
        low, high = torch.where(more, mid, low), torch.where(more, high, mid)
    return (s - low).clamp(min=0).pow(1 / (alpha - 1)).to(z)


@pytest.mark.parametrize('alpha', [1.5, 2])
@pytest.mark.parametrize('scale', [0.1, 1.0, 20.0])
def test_entmax_is_its_definition(alpha, scale):
    z = scale * torch.randn((50, 12), generator=seeded(0))
    assert (entmax(z, alpha) - by_bisection(z, alpha)).abs().max() < 1e-5
    assert (entmax(z, alpha).sum(-1) - 1).abs().max() < 1e-5


def test_entmax_by_hand():
    assert entmax(torch.tensor([0.0, 0.0]), 2).tolist() == [0.5, 0.5]
    assert entmax(torch.tensor([1.0, 0.5, -1.0]), 2).tolist() == [0.75, 0.25, 0.0]
    assert entmax(torch.tensor([3.0, 0.0]), 1.5).tolist() == [1.0, 0.0]
    # s = (.5, 0): (.5 - t)^2 + t^2 = 1 has the root t = (1 - sqrt(7))/4
    t = (1 - 7**0.5) / 4
    got = entmax(torch.tensor([1.0, 0.0]), 1.5)
    assert (got - torch.tensor([(0.5 - t) ** 2, t**2])).abs().max() < 1e-6


def test_entmax_leaves_out_what_is_masked():
    z = torch.tensor([1.0, -torch.inf, 0.8])
    assert entmax(z)[1] == 0
    assert torch.allclose(entmax(z)[[0, 2]], entmax(z[[0, 2]]))


def sparse(w, alpha):
    def combine(q, k, v):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = w * by_bisection(scores, alpha) + (1 - w) * scores.softmax(-1)
        return weights @ v

    return combine


@pytest.mark.parametrize('alpha', [1.5, 2])
def test_pladis_is_that_of_the_equation(pipe, alpha):
    D, args, cond = at_noise(pipe)
    got = GuidedDenoiser(D, PLADIS(D, alpha), w=2.8)(*args, **cond)
    assert off(got, evaluated(pipe, WrittenOut(sparse(1.8, alpha)))) < 1e-4
    assert off(got, D(*args, **cond)) > 1e-4


def test_pladis_changes_both_halves_of_cfg(pipe):
    D, args, cond = at_noise(pipe)
    changed = pipeline_denoiser(with_processor(pipe, WrittenOut(sparse(1.8, 1.5))))
    want = GuidedDenoiser(changed, D.cond(), w=3.0)(*args, **cond)
    G = GuidedDenoiser(D, Term(D.cond(), 3.0), Term(PLADIS(D), 2.8))
    assert off(G(*args, **cond), want) < 1e-4


def test_pladis_changes_the_rows_of_pag_too(monkeypatch, pipe):
    monkeypatch.setattr('cf_guidance.perturb._MIN_POSITIONS_TO_JOIN', 0)
    D, args, cond = at_noise(pipe)
    C = pipeline_denoiser(with_processor(pipe, WrittenOut(sparse(1.8, 1.5))))
    want = GuidedDenoiser(C, PAG(C), w=3.0)(*args, **cond)
    G = GuidedDenoiser(D, Term(PAG(D), 3.0), Term(PLADIS(D), 2.8))
    assert off(G(*args, **cond), want) < 1e-4


def test_pladis_respects_a_mask():
    pipe = pixart(ddim())
    D, args, cond = at_noise(pipe)
    got = GuidedDenoiser(D, PLADIS(D), w=3.0)(*args, **cond)
    off_mask = cond['encoder_attention_mask'] == 0
    assert off_mask.any()
    noise = torch.randn(cond['encoder_hidden_states'].shape, generator=seeded(3))
    text = torch.where(off_mask[..., None], noise, cond['encoder_hidden_states'])
    again = GuidedDenoiser(D, PLADIS(D), w=3.0)(*args, **{**cond, 'encoder_hidden_states': text})
    assert off(again, got) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-4


# CDG


def test_cdg_moves_away_from_the_prompt_without_its_words(pipe):
    D, args, cond = at_noise(pipe)
    words = word_tokens(pipe.tokenizer, PROMPTS)
    text, empty = (o['encoder_hidden_states'] for o in (cond, D.cond()))
    degraded = text * ~words[..., None] + empty * words[..., None]
    neg = D(*args, **{**cond, 'encoder_hidden_states': degraded})
    pos = D(*args, **cond)
    G = GuidedDenoiser(D, CDG(D.cond(), words), w=4.0)
    assert off(G(*args, **cond), neg + 4.0 * (pos - neg)) < 1e-5
    assert off(neg, pos) > 1e-4
    assert G.nfe == 4


def test_cdg_without_words_is_plain_and_of_all_tokens_is_cfg(pipes):
    D, args, cond = at_noise(pipes['sd'])
    none = torch.zeros_like(words_of(pipes['sd']))
    plain = GuidedDenoiser(D, CDG(D.cond(), none), w=4.0)(*args, **cond)
    assert off(plain, D(*args, **cond)) < 1e-6
    cfg = GuidedDenoiser(D, D.cond(), w=4.0)(*args, **cond)
    assert torch.equal(GuidedDenoiser(D, CDG(D.cond(), ~none), w=4.0)(*args, **cond), cfg)


# what is refused


def test_networks_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match='with cross-attention of your own, or .*, got DiT'):
        NAG(dit(ddim()).transformer)


MISTAKES = [
    (lambda D, c, p: NAG(D), 'expected cond=, or a pipeline'),
    (
        lambda D, c, p: NAG(D, {'other': c}),
        "expected encoder_hidden_states among the conditions, got .'other'",
    ),
    (lambda D, c, p: NAG(D, {'encoder_hidden_states': c[:, :, :-1]}), 'expects texts .B, L, '),
    (
        lambda D, c, p: NAG(D, {'encoder_hidden_states': c[[0, 1, 1]]}),
        'expected a tensor with 1 or 2',
    ),
    (lambda D, c, p: NAG(p.vae, {'encoder_hidden_states': c}), 'expected a network with cross-att'),
    (lambda D, c, p: VSF(D, negs(D), words_of(p)[:, :-1]), 'words: expected bools .1 or 2, '),
    (lambda D, c, p: CDG(D.cond(), words_of(p)[[0, 1, 1]]), 'words: expected bools .1 or 2, '),
    (lambda D, c, p: CDG({'encoder_hidden_states': c[:, :-1]}, words_of(p)), 'texts of one length'),
]


@pytest.mark.parametrize(('make', 'match'), MISTAKES, ids=[m for _, m in MISTAKES])
def test_what_does_not_fit_is_refused(pipes, make, match):
    D, args, cond = at_noise(pipes['sd'])
    with pytest.raises(ValueError, match=match):
        GuidedDenoiser(D, make(D, cond['encoder_hidden_states'], pipes['sd']))(*args, **cond)


@pytest.mark.parametrize(
    ('kw', 'match'),
    [
        (dict(tau=0.0), 'tau: expected a number above 0'),
        (dict(alpha=1.5), 'alpha: expected a number from 0 to 1'),
        (dict(layers='*.attn1'), 'layers: expected cross-attention such as'),
        (dict(layers=lambda n, m: n.endswith('attn1')), 'layers: expected cross-attention'),
    ],
)
def test_bad_settings_of_nag(pipes, kw, match):
    with pytest.raises(ValueError, match=match):
        NAG(pipes['sd'].unet, **kw)


def test_bad_words():
    with pytest.raises(TypeError, match='words: expected bools'):
        CDG({}, [True])
    with pytest.raises(TypeError, match='cond: expected a dict'):
        VSF(nn.Identity(), None, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match='tokenizer: expected one of transformers'):
        word_tokens('clip', 'a bag')


def test_terms_inside_the_network_take_no_rule_and_save_nothing(pipes):
    from cf_guidance.transforms import apg

    D, args, cond = at_noise(pipes['sd'])
    nag = NAG(D, negs(D))
    with pytest.raises(ValueError, match='rule: NAG combines inside the network, got apg'):
        Term(nag, rule=apg)
    with pytest.raises(ValueError, match='every: NAG costs no evaluation to save'):
        Term(nag, every=2)
    with pytest.raises(ValueError, match='known: NAG changes how the positive is made'):
        GuidedDenoiser(D, nag)(*args, known={'pos': args[0]}, **cond)


def test_a_pipeline_without_a_negative_prompt_is_told(pipes):
    with pytest.raises(ValueError, match='NAG: this call evaluates no negative prompt'):
        run(guided(pipes['sd'], NAG(pipes['sd'].unet)), guidance_scale=0.0)


def test_layers_of_another_network_are_refused(pipes):
    D, args, cond = at_noise(pipes['sd'])
    with pytest.raises(ValueError, match='belong to another network'):
        GuidedDenoiser(D, NAG(pipes['xl'].unet, negs(D)))(*args, **cond)


def test_masked_texts_are_refused(pipes):
    D, args, cond = at_noise(pipes['sd'])
    masked = {**cond, 'encoder_attention_mask': torch.ones(2, 3)}
    with pytest.raises(ValueError, match='a text without a mask, got encoder_attention_mask'):
        GuidedDenoiser(D, NAG(D, negs(D)))(*args, **masked)


# CADS in pipelines


@pytest.mark.parametrize('make', [sd, xl])
def test_cads_in_a_pipeline_is_that_of_a_denoiser(make):
    # a single step of Euler's method ends with the estimate of the image
    pipe = make(euler_discrete())
    cads = dict(s=0.3, seed=[4, 5], tau1=0.5, tau2=1.0)
    got = run(guided(pipe, w=W, cads=cads), steps=1)
    D = pipeline_denoiser(pipe)
    sigma = sigmas_of(pipe, 1)[0].item()
    x = sigma * torch.randn((2, *D.latent_shape), generator=seeded(0))
    names = [k for k in ('encoder_hidden_states', 'text_embeds') if k in D.cond()]
    hidden = CADS(GuidedDenoiser(D, negs(D), w=W), names=names, **cads)
    assert off(got, hidden(x, sigma, **D.cond(PROMPTS))) < 1e-3
    assert off(got, run(guided(pipe, w=W), steps=1)) > 1e-3


def test_cads_repeats_with_its_seed(pipes):
    pictures = [run(guided(pipes['sd'], cads=dict(seed=s))) for s in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert off(pictures[2], pictures[0]) > 1e-3


def test_cads_that_hides_nothing_is_plain(pipes):
    late = dict(tau1=0.9999, tau2=1.0)  # the first of three steps is at 0.67
    got = run(guided(pipes['sd'], cads=late))
    assert torch.equal(got, run(guided(pipes['sd'])))


@pytest.mark.parametrize(
    ('cads', 'error', 'match'),
    [
        (0.1, TypeError, 'cads: expected settings such as'),
        (dict(noise=1), TypeError, "cads: got an unexpected keyword argument 'noise'"),
        (dict(s=-1), ValueError, 's: expected a finite number from 0'),
    ],
)
def test_bad_settings_of_cads(pipes, cads, error, match):
    with pytest.raises(error, match=match):
        guided(pipes['sd'], cads=cads)


def test_cads_needs_prompts():
    with pytest.raises(ValueError, match='cads: expected a pipeline with prompts'):
        guided(dit(ddim()), cads={})


def test_entmax_in_half_precision_adds_up_to_1():
    z = torch.randn(64, 77, generator=torch.Generator().manual_seed(0)) * 3
    for dtype, tol in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        weights = entmax(z.to(dtype), 1.5)
        assert weights.dtype == dtype
        assert (weights.float() - entmax(z.to(dtype).float(), 1.5)).abs().max() < tol


def test_entmax_of_nothing_is_0():
    z = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    assert entmax(z, 1.5).tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert entmax(z, 2).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_pladis_is_refused_beside_a_negative_that_calls_the_denoiser(pipe):
    with pytest.raises(ValueError, match='PLADIS changes all evaluations of a step, .* got SAG'):
        GuidedDenoiser(nn.Identity(), Term(PLADIS(pipe.unet)), Term(SAG(pipe.unet)))


def test_two_terms_in_one_attention_are_refused(pipe):
    "Only the last would act."
    D, args, cond = at_noise(pipe)
    nag, pladis = NAG(pipe.unet, cond), PLADIS(pipe.unet)
    message = 'terms: NAG and PLADIS both change .*attn2; expected one of them'
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(D, Term(nag, 4.0), Term(pladis, 2.0))(*args, **cond)
    high, low = Term(nag, 4.0, interval=(5.0, 100)), Term(pladis, 2.0, interval=(0.0, 5.0))
    assert GuidedDenoiser(D, high, low)(*args, **cond).isfinite().all()
    names = list(pladis.layers)
    apart = Term(NAG(pipe.unet, cond, layers=names[:1])), Term(PLADIS(pipe.unet, layers=names[1:]))
    assert GuidedDenoiser(D, *apart)(*args, **cond).isfinite().all()


def test_a_text_must_be_a_tensor(pipe):
    D, args, cond = at_noise(pipe)
    bad = {'encoder_hidden_states': [1, 2]}
    with pytest.raises(TypeError, match='encoder_hidden_states: NAG expects a tensor, got list'):
        GuidedDenoiser(D, NAG(pipe.unet, bad))(*args, **cond)
