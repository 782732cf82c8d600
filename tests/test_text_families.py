"NAG and VSF in the families: against single samples without padding, two networks side by side."

import threading
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from pipeline_helpers import NEGS, PROMPTS, ddim, off, pixart, seeded
from text_helpers import flip, nag_by_tokens, softmax
from tiny_families import make
from torch.nn import functional as F

from cf_guidance.attention import PAG
from cf_guidance.families import _texts
from cf_guidance.guided import GuidedDenoiser, Microbatched, Term
from cf_guidance.lab.fashion import quiet
from cf_guidance.pipelines import FAMILIES, guided, pipeline_denoiser
from cf_guidance.text import NAG, PLADIS, VSF

quiet()
pytestmark = pytest.mark.filterwarnings('ignore:[\\s\\S]*utocast')  # Mochi turns it off on the CPU


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# where the tokens of the image are: at the side of a sequence, and how many; or in the queries only
SIDES = {
    'PixArt': 'queries',
    'Sana': 'queries',
    'LTX': 'queries',
    'Wan': 'queries',
    'SkyReels V2': 'queries',
    'Kolors': 'queries',
    'HunyuanDiT': 'queries',
    'Qwen-Image': ('last', 24),
    'Chroma': ('last', 24),
    'Krea 2': ('last', 24),
    'CogView 4': ('last', 24),
    'CogVideoX': ('last', 2 * 2 * 3),
    'AuraFlow': ('last', 24),
    'Flux.2 Klein': ('last', 24),
    'HunyuanVideo': ('first', 2 * 2 * 3),
    'Mochi': ('first', 2 * 2 * 3),
    'HiDream': ('first', 16),
    'Z-Image': ('first', 32),  # 24, padded to a multiple of 32
    'Lumina 2': ('last', 24),
}
# text, and mask or lengths, in families where padding can be cut off
PADDED = {
    'PixArt': ('encoder_hidden_states', 'encoder_attention_mask'),
    'Sana': ('encoder_hidden_states', 'encoder_attention_mask'),
    'LTX': ('encoder_hidden_states', 'encoder_attention_mask'),
    'Qwen-Image': ('encoder_hidden_states', 'encoder_hidden_states_mask'),
    'Chroma': ('encoder_hidden_states', 'attention_mask'),
    'HunyuanVideo': ('encoder_hidden_states', 'encoder_attention_mask'),
    'Mochi': ('encoder_hidden_states', 'encoder_attention_mask'),
    'Lumina 2': ('encoder_hidden_states', 'encoder_attention_mask'),
    'Z-Image': ('cap_feats', 'text_lengths'),
}


def setting(name):
    "Denoiser, network, arguments, conditions, and those of the negative prompts, for two samples."
    if name == 'PixArt':
        pipe = pixart(ddim())
        D = pipeline_denoiser(pipe)
        cond, neg = D.cond(PROMPTS[:2]), D.cond(NEGS[:2])
    else:
        pipe, call = make(name)
        pos = _texts(call, False)
        given = {k: v for k, v in call.items() if 'prompt' not in k and 'scale' not in k}
        if FAMILIES[type(pipe).__name__].text is None:
            given |= pos
        else:
            given = {k: given[k] for k in ('height', 'width')}
        D = pipeline_denoiser(pipe, **given)
        cond, neg = (D.cond(o.pop('prompt', None), **o) for o in (pos, _texts(call, True)))
    x = 2 * torch.randn((2, *D.latent_shape), generator=seeded(0))
    net = pipe.unet if hasattr(pipe, 'unet') else pipe.transformer
    return D, net, (x, torch.tensor([1.0, 2.0])), cond, neg


def cut(name, cond, i):
    "The conditions of one sample, without padding."
    one = {k: v[i : i + 1] for k, v in cond.items()}
    if name in PADDED:
        text, mask = PADDED[name]
        padding = one[text].shape[1]
        n = int(one[mask].flatten()[:padding].sum())
        one[text] = one[text][:, :n]
        if one[mask].ndim > 1:
            one[mask] = torch.cat([one[mask][:, :n], one[mask][:, padding:]], 1)
    return one


class SideBySide:
    "A prompt and a negative prompt in two threads; their attentions meet."

    def __init__(self, side, combine):
        self.side, self.combine, self.layers = side, combine, None  # None: all guide
        self.own, self.local = F.scaled_dot_product_attention, threading.local()
        self.barrier, self.box = threading.Barrier(2, timeout=60), [None, None]

    def image(self, n):
        first, count = self.side[0] == 'first', self.side[1]
        return slice(0, count) if first else slice(n - count, n)

    def attend(self, query, key, value, attn_mask=None, *args, scale=None, **kw):
        q, k, v = query, key, value
        if not getattr(self.local, 'meets', False):
            return self.own(q, k, v, attn_mask, *args, scale=scale, **kw)
        if attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.shape[2] == 1:
            there = attn_mask[0, 0, 0]
            assert there[-1] or self.side[0] != 'last'
        else:
            assert attn_mask is None or attn_mask.all() or not attn_mask.any()
            there = torch.ones(k.shape[2], dtype=torch.bool)
        k, v = (o.repeat_interleave(q.shape[1] // o.shape[1], 1) for o in (k, v))
        q = q if scale is None else q * scale * q.shape[-1] ** 0.5
        self.box[self.local.who] = q, k, v, there
        self.barrier.wait()
        out = self.across() if self.side == 'queries' else self.together()
        self.barrier.wait()
        return out

    def across(self):
        (q, k, v, _), (_, other_k, other_v, _) = self.box
        if self.local.who == 1:
            return softmax(*self.box[1][:3])
        if not self.guides():
            return softmax(q, k, v)
        return self.combine(q, (k, v), (other_k, other_v), None)

    def guides(self):
        return self.layers is None or self.local.layer in self.layers

    def together(self):
        "Image and text in one sequence; the image is that of the prompt."
        (q, k, v, there), (other_q, other_k, other_v, other_there) = self.box
        image, other = self.image(q.shape[2]), self.image(other_q.shape[2])
        other_k, other_v = other_k.clone(), other_v.clone()
        other_k[:, :, other], other_v[:, :, other] = k[:, :, image], v[:, :, image]
        k, v = k[:, :, there], v[:, :, there]
        is_text = torch.ones(other_q.shape[2], dtype=torch.bool)
        is_text[other] = False
        is_text = is_text[other_there]
        other_k, other_v = other_k[:, :, other_there], other_v[:, :, other_there]
        if self.local.who == 1:
            return softmax(other_q, other_k, other_v)
        out = softmax(q, k, v)
        if self.guides():
            out[:, :, image] = self.combine(q[:, :, image], (k, v), (other_k, other_v), is_text)
        return out


@contextmanager
def met(both, layers, monkeypatch):
    "Inside, the attentions of these layers meet."

    def begin(m, args):
        both.local.meets, both.local.layer = True, m

    def end(m, args, out):
        both.local.meets = False

    hooks = [m.register_forward_pre_hook(begin) for m in layers]
    hooks += [m.register_forward_hook(end) for m in layers]
    monkeypatch.setattr(F, 'scaled_dot_product_attention', both.attend)
    try:
        yield
    finally:
        monkeypatch.undo()
        for hook in hooks:
            hook.remove()


def guided_alone(name, D, layers, args, cond, neg, i, combine, monkeypatch, chosen=None):
    "The prediction of one sample, by two networks side by side, without padding."
    both, outs = SideBySide(SIDES[name], combine), {}
    both.layers = chosen
    conds = [cut(name, o, i) for o in (cond, neg)]
    D(*(o[i : i + 1] for o in args), **conds[0])  # what is made in the first call is made

    def work(who):
        both.local.who = who
        try:
            with torch.no_grad():
                outs[who] = D(*(o[i : i + 1] for o in args), **conds[who])
        except BaseException as e:
            outs[who] = e
            both.barrier.abort()

    with met(both, layers, monkeypatch):
        threads = [threading.Thread(target=work, args=(who,)) for who in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for o in outs.values():
        if isinstance(o, BaseException) and not isinstance(o, threading.BrokenBarrierError):
            raise o
    return outs[0]


def nag_alone(w):
    combine = nag_by_tokens([w], 2.5, 0.5)
    return lambda q, own, other, is_text: combine(q, *own, *other)


def other_lengths(name, neg, n):
    "Texts with `n` more tokens of padding."
    text, mask = PADDED[name]
    more = {text: F.pad(neg[text], (0, 0, 0, n), value=3.0)}
    if neg[mask].ndim > 1:
        more[mask] = F.pad(neg[mask], (0, n))
    return {**neg, **more}


@pytest.mark.parametrize('name', SIDES)
def test_nag_of_a_batch_is_that_of_each_sample_without_padding(name, monkeypatch):
    D, net, args, cond, neg = setting(name)
    w = torch.tensor([2.0, 5.0])
    nag = NAG(net, neg)
    got = GuidedDenoiser(D, nag, w=w)(*args, **cond)
    for i in range(2):
        rest = nag_alone(w[i].item()), monkeypatch
        want = guided_alone(name, D, nag.layers.values(), args, cond, neg, i, *rest)
        assert off(got[i : i + 1], want) < 1e-5
        assert off(got[i : i + 1], D(*args, **cond)[i : i + 1]) > 1e-3


@pytest.mark.parametrize('which', [0, -1])
@pytest.mark.parametrize('name', ['Mochi', 'HunyuanVideo'])
def test_nag_in_one_layer_keeps_one_image_in_the_others(name, which, monkeypatch):
    D, net, args, cond, neg = setting(name)
    layer = [*NAG(net).layers][which]
    got = GuidedDenoiser(D, NAG(net, neg, layers=layer), w=4.0)(*args, **cond)
    layers = NAG(net).layers
    for i in range(2):
        rest = nag_alone(4.0), monkeypatch, [layers[layer]]
        want = guided_alone(name, D, layers.values(), args, cond, neg, i, *rest)
        assert off(got[i : i + 1], want) < 1e-5
        assert off(got[i : i + 1], D(*args, **cond)[i : i + 1]) > 1e-4


@pytest.mark.parametrize('name', ['Mochi'])
def test_nag_beside_pag_changes_the_positive(name):
    D, net, args, cond, neg = setting(name)
    pos = GuidedDenoiser(D, NAG(net, neg), w=4.0)(*args, **cond)
    pag = GuidedDenoiser(D, PAG(net), w=3.0).parts(*args, **cond).neg
    G = GuidedDenoiser(D, Term(PAG(net), 3.0), Term(NAG(net, neg), 4.0))
    assert off(G(*args, **cond), pag + 3.0 * (pos - pag)) < 1e-5
    assert off(pag, D(*args, **cond)) > 1e-3


@pytest.mark.parametrize('name', SIDES)
def test_nag_without_effect(name):
    D, net, args, cond, neg = setting(name)
    own = D(*args, **cond)
    assert torch.equal(GuidedDenoiser(D, NAG(net, neg), w=1.0)(*args, **cond), own)
    assert off(GuidedDenoiser(D, NAG(net, neg, alpha=0.0), w=5.0)(*args, **cond), own) < 1e-5
    assert off(GuidedDenoiser(D, NAG(net, cond), w=5.0)(*args, **cond), own) < 1e-5


@pytest.mark.parametrize('name', SIDES)
def test_cost_of_nag(name):
    D, net, args, cond, neg = setting(name)
    nag = NAG(net, neg)
    G = GuidedDenoiser(D, nag)
    G(*args, **cond)
    each = 1 if SIDES[name] == 'queries' and name != 'HunyuanDiT' else 2
    assert G.last_nfe.tolist() == [each, each]
    assert nag.nfe == each - 1


@pytest.mark.parametrize('name', PADDED)
def test_padding_is_nothing(name):
    "Where the padding has the same length as before, and where it is longer in one text."
    D, net, args, cond, neg = setting(name)
    want = GuidedDenoiser(D, NAG(net, neg), w=4.0)(*args, **cond)
    text, mask = PADDED[name]
    if name != 'Chroma':  # whose mask is also that of the image
        longer = other_lengths(name, neg, 3)
        assert off(GuidedDenoiser(D, NAG(net, longer), w=4.0)(*args, **cond), want) < 1e-5
        more = other_lengths(name, cond, 2)
        assert off(GuidedDenoiser(D, NAG(net, neg), w=4.0)(*args, **more), want) < 1e-5
        terms = [
            Term(NAG(net, o), 4.0, interval=i) for o, i in ((longer, (0, 1.5)), (neg, (1.5, 9)))
        ]
        assert off(GuidedDenoiser(D, *terms)(*args, **cond), want) < 1e-5
    for i in range(2):
        n = int(cut(name, neg, i)[text].shape[1])
        other = {**neg, text: neg[text].clone()}
        other[text][i, n:] = 7.0
        assert off(GuidedDenoiser(D, NAG(net, other), w=4.0)(*args, **cond), want) < 1e-5
        other[text][i, n - 1] = 7.0
        moved = GuidedDenoiser(D, NAG(net, other), w=4.0)(*args, **cond)
        assert (moved - want)[i].abs().max() > 1e-5


# VSF; AuraFlow and Kolors have other tests


WORDS = [o for o in SIDES if o not in ('HunyuanDiT', 'HiDream', 'AuraFlow', 'Kolors')]


@pytest.mark.parametrize('name', WORDS)
def test_vsf_of_a_batch_is_that_of_each_sample_without_padding(name, monkeypatch):
    D, net, args, cond, neg = setting(name)
    text = NAG(net).text
    words = torch.rand(neg[text].shape[:2], generator=seeded(4)) < 0.5
    words[:, 0] = True
    w = torch.tensor([2.0, 4.5])
    vsf = VSF(net, neg, words)
    got = GuidedDenoiser(D, vsf, w=w)(*args, **cond)
    for i in range(2):
        of_text = words[i, : cut(name, neg, i)[text].shape[1]]
        rest = vsf_alone(w[i].item() - 1, of_text), monkeypatch
        # what does not belong to the text is that of the prompt
        other = {**cond, **{k: neg[k] for k in vsf.of_text(cond)}}
        want = guided_alone(name, D, vsf.layers.values(), args, cond, other, i, *rest)
        assert off(got[i : i + 1], want) < 1e-5
        assert off(got[i : i + 1], D(*args, **cond)[i : i + 1]) > 1e-4


def vsf_alone(alpha, words):
    def combine(q, own, other, is_text):
        other = other if is_text is None else [o[:, :, is_text] for o in other]
        here = F.pad(words, (0, other[0].shape[2] - len(words)))
        return flip(alpha, 0.1, here[None])(q, *own, *other)

    return combine


def z_image_texts(neg):
    "The second of three texts has more tokens than the network pads others to."
    lengths = torch.tensor([6, 40, 3])
    text = torch.randn((3, 40, 12), generator=seeded(7))
    return {**neg, 'cap_feats': text, 'text_lengths': lengths}


def lumina_texts(neg):
    "Two short texts in more padding than there are tokens of a picture and a text."
    return other_lengths('Lumina 2', neg, 40)


@pytest.mark.parametrize('name, change', [('Z-Image', z_image_texts), ('Lumina 2', lumina_texts)])
@pytest.mark.parametrize('most', [2, 4])
def test_vsf_where_a_forward_is_shorter_than_the_padded_text(name, change, most, monkeypatch):
    D, net, args, cond, neg = setting(name)
    neg = change(neg)
    text = neg[NAG(net).text]
    rows = torch.arange(len(text)) % 2
    args, cond = [o[rows] for o in args], {k: o[rows] for k, o in cond.items()}
    words = torch.rand(text.shape[:2], generator=seeded(4)) < 0.7
    vsf = VSF(net, neg, words)
    got = GuidedDenoiser(Microbatched(D, most), vsf, w=4.5)(*args, **cond)
    for i in range(len(text)):
        of_text = words[i, : cut(name, neg, i)[vsf.text].shape[1]]
        rest = vsf_alone(3.5, of_text), monkeypatch
        other = {**cond, **{k: neg[k] for k in vsf.of_text(cond)}}
        want = guided_alone(name, D, vsf.layers.values(), args, cond, other, i, *rest)
        assert off(got[i : i + 1], want) < 1e-5


# weights in 16 bits


@pytest.mark.filterwarnings('ignore:Mismatch dtype between input and weight')
@pytest.mark.parametrize(
    'kind, name', [*product(['NAG', 'VSF'], ['PixArt', 'Chroma']), ('PLADIS', 'PixArt')]
)
def test_a_weight_per_sample_is_not_rounded(kind, name):
    "4.3 is not a number of 16 bits: the next ones are 4.28125 and 4.3125."
    D, net, args, cond, neg = setting(name)
    text = neg[NAG(net).text]
    inside = dict(
        NAG=lambda: NAG(net, neg),
        VSF=lambda: VSF(net, neg, torch.ones(text.shape[:2], dtype=torch.bool)),
        PLADIS=lambda: PLADIS(net),
    )[kind]()
    w = torch.tensor([4.3, 3.7])
    with torch.autocast('cpu', torch.bfloat16):
        got = GuidedDenoiser(D, inside, w=w)(*args, **cond)
        for i in range(2):
            want, rounded = (
                GuidedDenoiser(D, inside, w=o[i].item())(*args, **cond)[i]
                for o in (w, w.bfloat16())
            )
            assert torch.equal(got[i], want)
            assert not torch.equal(rounded, want)


# what is refused


def test_families_that_are_refused():
    D, net, _, _, neg = setting('HunyuanDiT')
    words = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match='one sequence of tokens, got HunyuanDiT2DModel'):
        VSF(net, neg, words)


def test_a_mask_for_one_text_is_refused():
    D, net, args, cond, neg = setting('LTX')
    neg.pop('encoder_attention_mask')
    with pytest.raises(ValueError, match='expected encoder_attention_mask for both texts'):
        GuidedDenoiser(D, NAG(net, neg))(*args, **cond)


def test_texts_of_two_lengths_are_refused_without_a_mask():
    D, net, args, cond, neg = setting('CogView 4')
    longer = {k: F.pad(v, (0, 0, 0, 16)) if v.ndim == 3 else v for k, v in neg.items()}
    with pytest.raises(ValueError, match='NAG expects .16, 12. per sample, as in the prompt, got'):
        GuidedDenoiser(D, NAG(net, longer))(*args, **cond)


class Unmasked(torch.nn.Module):
    "A denoiser of one's own around Qwen-Image, for texts without padding."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma, text):
        shapes = [[(1, 4, 6)]] * len(x)
        (out,) = self.net(x, text, timestep=sigma, img_shapes=shapes, return_dict=False)
        return out


def test_more_tokens_without_a_mask_are_refused():
    "Qwen-Image attends to all tokens where it gets no mask, to those of padding too."
    net = make('Qwen-Image')[0].transformer
    D, args = Unmasked(net), (torch.randn((2, 24, 16), generator=seeded(0)), torch.ones(2))
    short, long = (torch.randn((2, n, 12), generator=seeded(n)) for n in (7, 10))
    with pytest.raises(ValueError, match='expects .7, 12. per sample, as in the prompt, got .10'):
        GuidedDenoiser(D, NAG(net, dict(text=long), text='text'))(*args, text=short)
    with pytest.raises(ValueError, match='expects .10, 12. per sample, as in the prompt, got .7'):
        GuidedDenoiser(D, NAG(net, dict(text=short), text='text'))(*args, text=long)
    same = dict(text=short.flip(0))
    got = GuidedDenoiser(D, NAG(net, same, text='text'), w=4.0)(*args, text=short)
    assert off(got, D(*args, text=short)) > 1e-3


def test_half_a_text_is_refused():
    "HiDream attends to two texts."
    D, net, args, cond, neg = setting('HiDream')
    name = 'encoder_hidden_states_llama3'
    half = {k: v for k, v in neg.items() if k != name}
    with pytest.raises(ValueError, match=f'NAG: expected {name} for both texts'):
        GuidedDenoiser(D, NAG(net, half))(*args, **cond)
    half = {k: v for k, v in neg.items() if k != 'encoder_hidden_states_t5'}
    with pytest.raises(ValueError, match='expected encoder_hidden_states_t5 among the conditions'):
        GuidedDenoiser(D, NAG(net, half))(*args, **cond)


def test_the_refiners_are_left_alone():
    "Layers that only texts, or only the image, go through."
    for name, first in (('HunyuanVideo', 'transformer_blocks.0'), ('Z-Image', 'layers.0')):
        assert [*NAG(make(name)[0].transformer).layers][0].startswith(first)


def test_two_rows_in_small_batches():
    "Rows of different lengths, and fewer at once."
    D, net, args, cond, neg = setting('HunyuanVideo')
    nag = NAG(net, other_lengths('HunyuanVideo', neg, 3))
    want = GuidedDenoiser(D, nag, w=4.0)(*args, **cond)
    assert off(GuidedDenoiser(Microbatched(D, 2), nag, w=4.0)(*args, **cond), want) < 1e-5


@pytest.mark.filterwarnings('ignore:NAG never guided')
def test_nag_in_ideogram_has_conditions_of_its_own():
    "The pipeline has no negative prompt, but its encoder makes conditions of one."
    pipe, call = make('Ideogram 4')
    args = dict(num_inference_steps=2, output_type='latent')
    names = 'encoder_hidden_states', 'position_ids', 'segment_ids', 'indicator'

    def draw(neg, w):
        sd = guided(pipe, Term(NAG(pipe.transformer, neg), w))
        return sd(**call, **args, generator=seeded(0), return_dict=False)[0]

    same = dict(zip(names, pipe.encode_prompt(call['prompt'], 4, 6, 7, 'cpu'), strict=True))
    other = {**same, names[0]: same[names[0]].flip(2)}
    plain = draw(other, 1.0)
    assert off(draw(same, 4.0), plain) < 1e-4
    assert off(draw(other, 4.0), plain) > 1e-4
