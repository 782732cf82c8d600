"Fashion: data, colours, captions, loading, adherence; damaged files, threads, bad input."

import gzip
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor

import clear_errors
import pytest
import torch

from cf_guidance.lab import fashion
from cf_guidance.lab.fashion import (
    _COLOUR_NAMES,
    COLOURS,
    GARMENTS,
    PARTS,
    _check_prompt,
    _download,
    _find_fashion_mnist,
    _parse_prompt,
    _read_idx,
    adherence,
    caption,
    colourise,
    fashion_mnist,
    fashion_path,
    load_ddpm,
    load_net,
    load_weak,
    random_colours,
    random_prompts,
    shares,
    wilson,
)
from cf_guidance.lab.scenes import _parse_scene, random_scenes
from cf_guidance.lab.training import (
    _draw_captions,
    _draw_scene_captions,
    _draw_scenes,
    _train_tokenizer,
)

nan, inf = math.nan, math.inf
GREY, KIND = fashion_mnist()
COLOUR, BACKGROUND = random_colours(len(GREY), torch.Generator().manual_seed(0))
X = colourise(GREY, COLOUR, BACKGROUND)


# data


def idx(shape, content=None):
    content = bytes(math.prod(shape)) if content is None else content
    return bytes([0, 0, 8, len(shape)]) + b''.join(n.to_bytes(4, 'big') for n in shape) + content


@pytest.fixture
def site(tmp_path, monkeypatch):
    "Four small files as a place to download from, with their checksums, and no other place."
    files = {}
    for name in fashion._FILES:
        content = idx((300, 28, 28) if 'images' in name else (300,))
        data = gzip.compress(content)
        (tmp_path / name).write_bytes(data)
        files[name] = (hashlib.md5(data).hexdigest(), len(content))
    monkeypatch.setattr(fashion, '_FILES', files)
    monkeypatch.setattr(fashion, '_URL', f'file://{tmp_path}/')
    monkeypatch.setattr(fashion, '_DEBIAN', str(tmp_path / 'none'))
    monkeypatch.setattr(fashion, '_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('FASHION_MNIST', raising=False)
    return tmp_path


def test_download(site):
    folder = _download(site / 'new')
    assert sorted(os.listdir(folder)) == sorted(fashion._FILES)
    assert _read_idx(folder / 't10k-images-idx3-ubyte.gz').shape == (300, 28, 28)
    assert _find_fashion_mnist() == site / 'cache'
    assert fashion_mnist('train')[0].shape == (300, 28, 28)


@pytest.mark.parametrize(
    'data', [b'<html>not found</html>', gzip.compress(b'something else', mtime=0), b'']
)
def test_download_of_something_else(site, data):
    for name in fashion._FILES:
        (site / name).write_bytes(data)
    with pytest.raises(OSError, match='expected a file with MD5'):
        _download(site / 'new')
    clear_errors.check(_find_fashion_mnist, 'the download failed')
    assert os.listdir(site / 'new') == os.listdir(site / 'cache') == []


def test_download_stops_at_the_size(site, monkeypatch):
    "A bomb is neither fetched whole nor unpacked before its checksum is known."
    for name in fashion._FILES:
        (site / name).write_bytes(gzip.compress(bytes(10**8)))
    monkeypatch.setattr(gzip, 'open', None)
    with pytest.raises(OSError, match='expected a file with MD5'):
        _download(site / 'new')


def test_nowhere(site):
    clear_errors.check(lambda: _find_fashion_mnist('/nowhere'), 'path')
    clear_errors.check(lambda: _find_fashion_mnist(download=False), 'FASHION_MNIST')


def test_place_by_the_environment(site, monkeypatch):
    monkeypatch.setenv('FASHION_MNIST', str(site))
    assert _find_fashion_mnist(download=False) == site


def zipped(data):
    "The same bytes at any time, for names of tests that do not change."
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'no gzip',
        zipped(idx((2,)))[:-9],
        zipped(b''),
        zipped(b'\0\0'),
        zipped(idx((2,), b'abc')),
        zipped(idx((1,), b'abcd')),
        zipped(b'\0\0\x0d' + idx((2,))[3:]),
    ],
)
def test_damaged_idx_file(tmp_path, content):
    (tmp_path / 'a.gz').write_bytes(content)
    clear_errors.check(lambda: _read_idx(tmp_path / 'a.gz'), 'a.gz: expected a gzipped IDX file')


def test_subset():
    assert KIND.bincount().tolist() == [200] * 10


# colours and captions


def test_background_fills_the_corner():
    corner = torch.tensor(list(COLOURS.values()))[BACKGROUND] * 2 - 1
    assert torch.allclose(X[:, :, 0, 0], corner, atol=1e-6)


def test_white_pixels_have_the_colour():
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    x = colourise(white, torch.tensor([0]), torch.tensor([2]))
    assert torch.allclose(x[0, :, 16, 16], torch.tensor(COLOURS['red']) * 2 - 1, atol=1e-6)


@pytest.mark.parametrize('garment', GARMENTS)
def test_every_caption_can_be_read_back(garment):
    for c in ('', *COLOURS):
        for b in ('', *COLOURS):
            colours = (_COLOUR_NAMES.index(o) if o else None for o in (c, b))
            assert _parse_prompt(caption(garment, c, b)) == (GARMENTS.index(garment), *colours)


def test_prompts_that_are_known():
    assert _check_prompt('') == ''
    assert _check_prompt('A red bag') == 'A red bag'
    prompt = caption('t-shirt', 'red', 'blue')
    assert _check_prompt(prompt) == prompt == 'a red t-shirt on a blue background'


def test_random_prompts_have_a_seed():
    assert random_prompts(3, 0) == random_prompts(3, torch.Generator().manual_seed(0))
    assert random_prompts(0, 0) == []


def test_captions_for_training():
    args = (o.repeat(5) for o in (KIND, COLOUR, BACKGROUND))
    caps = _draw_captions(*args, torch.Generator().manual_seed(1))
    assert abs(sum(c == '' for c in caps) / len(caps) - 0.1) < 0.01
    assert abs(sum(None not in _parse_prompt(c) for c in caps) / len(caps) - 0.8) < 0.015


def test_each_word_is_a_token(tmp_path):
    tok = _train_tokenizer(tmp_path)
    for w in {*fashion._WORDS} - {'t-shirt'}:
        assert tok.tokenize(w) == [w + '</w>']


def test_a_resumed_training_keeps_its_tokens(tmp_path):
    "The trainer of tokenizers breaks ties at random, so it must run once only."
    first = _train_tokenizer(tmp_path).get_vocab()
    (tmp_path / 'vocab.json').touch()
    again = [_train_tokenizer(tmp_path).get_vocab() for _ in range(3)]
    assert again == [first] * 3


def test_scene_captions_for_training():
    scenes = random_scenes(20_000, 0)
    captions = _draw_scene_captions(scenes, torch.Generator().manual_seed(1))
    said = [_parse_scene(c) for c in captions]
    full = [s == tuple(o) for s, o in zip(said, scenes.tolist(), strict=True)]
    assert abs(sum(c == '' for c in captions) / 20_000 - 0.1) < 0.01
    assert abs(sum(full) / 20_000 - 0.8) < 0.015
    for s, o in zip(said, scenes.tolist(), strict=True):
        assert all(a is None or a == b for a, b in zip(s, o, strict=True))
    assert abs(sum(' right of ' in c for c in captions) / 20_000 - 0.45) < 0.015
    assert abs(sum(c.startswith('on ') for c in captions) / 20_000 - 0.42) < 0.02


def test_latents_of_scenes_are_those_of_their_halves():
    labels = torch.stack([torch.arange(4000) % n for n in (10, 8, 7)], 1)
    latents = torch.arange(4000.0).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
    z, captions = _draw_scenes(latents, labels)(500, torch.Generator().manual_seed(0))
    assert z.shape == (500, 4, 8, 16)
    left, right = z[:, 0, 0, 0].long(), z[:, 0, 0, 8].long()
    assert torch.equal(labels[left, 2], labels[right, 2])
    assert (labels[left, :2] != labels[right, :2]).all()
    for i, j, text in zip(left, right, captions, strict=True):
        parts = (*labels[i, :2].tolist(), *labels[j].tolist())
        said = _parse_scene(text)
        assert all(a is None or a == b for a, b in zip(said, parts, strict=True))


# loading


LOADERS = pytest.mark.parametrize('load', [load_net, load_ddpm, load_weak])


@LOADERS
def test_loading_touches_nothing_global(load):
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


@LOADERS
def test_each_has_its_own_weights(load):
    a, b = load(), load()
    a.bfloat16()
    next(a.parameters()).data.zero_()
    assert next(b.parameters()).abs().sum() > 0
    assert {p.dtype for p in load().parameters()} == {torch.float32}
    assert not load().training


def test_a_file_is_read_once(monkeypatch):
    load_net(), load_ddpm(), adherence(X[:1] / 2 + 0.5, [''])
    monkeypatch.setattr(fashion, '_read_weights', None)
    load_net(), load_ddpm(), adherence(X[:1] / 2 + 0.5, [''])


def test_shared_classifier_is_not_handed_out():
    net = load_net()
    want = adherence(X[:9] / 2 + 0.5, ['a bag'] * 9)
    next(net.parameters()).data.zero_()
    assert torch.equal(adherence(X[:9] / 2 + 0.5, ['a bag'] * 9).nan_to_num(9), want.nan_to_num(9))


def test_adherence_in_threads():
    x, prompts = X[:64] / 2 + 0.5, ['a bag'] * 64
    want = adherence(x, prompts).nan_to_num(9)
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda _: adherence(x, prompts).nan_to_num(9), range(8))]
    assert all(torch.equal(o, want) for o in got)


@LOADERS
def test_damaged_weights(load, tmp_path):
    for name in ('model.safetensors', 'diffusion_pytorch_model.safetensors'):
        (tmp_path / name).write_bytes(b'half')
    (tmp_path / 'config.json').write_text('{}')
    path = tmp_path / 'model.safetensors' if load is load_ddpm else tmp_path
    clear_errors.check(lambda: load(path), 'cannot be read')


def test_weights_of_another_network():
    file = fashion_path('fashion-net') / 'model.safetensors'
    clear_errors.check(lambda: load_ddpm(file), 'UNet2DModel')


# adherence


def test_right_and_wrong():
    real, c = (X + 1) / 2, [_COLOUR_NAMES[o] for o in COLOUR]
    b, g = [_COLOUR_NAMES[o] for o in BACKGROUND], [GARMENTS[o] for o in KIND]
    right = shares(adherence(real, [caption(*o) for o in zip(g, c, b, strict=True)]))
    assert right['garment'][0] > 0.88
    assert min(right['colour'][0], right['background'][0]) > 0.99
    swapped = shares(adherence(real, [caption(*o) for o in zip(g, b, c, strict=True)]))
    assert swapped['all'][0] < 0.01


def test_what_is_left_open_is_nan():
    some = adherence(X[:2] / 2 + 0.5, [caption(GARMENTS[KIND[0]]), ''])
    assert some.isnan().tolist() == [[False, True, True], [True] * 3]
    assert {k: v[-1] for k, v in shares(some).items()} == dict(garment=1, all=2)
    assert adherence(X[:0], []).shape == (0, 3)


def test_own_classifier():
    assert torch.equal(
        adherence(X[:5] / 2 + 0.5, ['a bag'] * 5, load_net())[:, 0].isnan(), KIND[:5] < 0
    )


@pytest.mark.parametrize('k, n, want', [(81, 263, (0.2553, 0.3662)), (0, 20, (0, 0.1611))])
def test_wilson_of_newcombe(k, n, want):
    assert wilson(k, n) == pytest.approx(want, abs=1e-4)


# bad input

REAL = X[:2] / 2 + 0.5
I2 = torch.tensor([0, 1])
BAD = [
    (lambda: fashion_mnist('validation'), "split: expected 'train'"),
    (lambda: fashion_mnist('test', '/nowhere'), 'path'),
    (lambda: fashion_path('sd-turbo'), 'name'),
    (lambda: caption(5), 'garment'),
    (lambda: caption(''), 'garment'),
    (lambda: caption('hat'), 'garment'),
    (lambda: caption('bag', 'pink'), 'colour'),
    (lambda: caption('bag', 'red', 'pink'), 'background'),
    (lambda: caption('bag', None), 'colour'),
    (lambda: caption('bag', ['red']), 'colour'),
    (lambda: _check_prompt('a red hat'), "'hat'"),
    (lambda: _check_prompt('a red bag ' * 4), 'at most 10 words'),
    (lambda: _check_prompt(None), 'prompt'),
    (lambda: _check_prompt(['a']), 'prompt'),
    (lambda: colourise(GREY[:2] / 255, I2, I2), 'grey'),
    (lambda: colourise(GREY[:2, None], I2, I2), 'grey'),
    (lambda: colourise(GREY[:2], torch.tensor([0, 9]), I2), 'colour'),
    (lambda: colourise(GREY[:2], I2, torch.tensor([0, -1])), 'background'),
    (lambda: colourise(GREY[:2], [0, 1], I2), 'colour'),
    (lambda: colourise(GREY[:2], I2, I2[:1]), 'background'),
    (lambda: random_colours(3, 'a'), 'generator'),
    (lambda: load_net('/nope'), '/nope/model.safetensors'),
    (lambda: load_ddpm('/nope'), '/nope'),
    (lambda: load_weak('/nope'), 'folder'),
    (lambda: load_net(5), 'folder'),
    (lambda: load_ddpm(5), 'file'),
    (lambda: load_weak(5), 'folder'),
    (lambda: adherence([[1.0]], ['a bag']), 'x'),
    (lambda: adherence(REAL[:, :, :16], ['a bag'] * 2), '(2, 3, 16, 32)'),
    (lambda: adherence(X[:2], ['a bag'] * 2), 'x: expected images in [0, 1]'),
    (lambda: adherence(REAL * 255, ['a bag'] * 2), 'x: expected images in [0, 1]'),
    (lambda: adherence((REAL * 255).byte(), ['a bag'] * 2), 'uint8'),
    (lambda: adherence(REAL * nan, ['a bag'] * 2), 'NaN or infinity in 2 of 2'),
    (lambda: adherence(REAL, ['a bag']), 'prompts'),
    (lambda: adherence(REAL, 'ab'), 'prompts'),
    (lambda: adherence(REAL, None), 'prompts'),
    (lambda: adherence(REAL, [None, 'a bag']), 'prompt'),
    (lambda: adherence(REAL, ['a hat'] * 2), "'hat'"),
    (lambda: adherence(REAL, ['a bag'] * 2, 5), 'net'),
    (lambda: wilson('a', 1), 'k'),
    (lambda: wilson(1.5, 2), 'k'),
    (lambda: wilson(3, 2), 'k'),
    (lambda: wilson(-1, 2), 'k'),
    (lambda: wilson(0, 0), 'n'),
    (lambda: wilson(True, 2), 'k'),
    (lambda: shares(torch.zeros(3)), 'right'),
    (lambda: shares(torch.full((2, 3), 0.5)), 'right'),
    (lambda: shares([[1, 1, 1]]), 'right'),
    *[(lambda o=o: wilson(1, 2, o), 'z') for o in (nan, -1, 0, inf, 'a', True)],
    *[(lambda o=o: random_colours(o, 0), 'n') for o in (-1, 2.5, 'a', True, None)],
    *[(lambda o=o: random_prompts(o, 0), 'n') for o in (-1, 2.5, 'a', True, None)],
    *[(lambda f=f: f(device='foo'), 'device') for f in (load_net, load_ddpm, load_weak)],
]


@pytest.mark.parametrize('call, argument', BAD)
def test_bad_input(call, argument):
    clear_errors.check(call, argument)


def test_parts():
    assert PARTS == ('garment', 'colour', 'background')


def test_worlds():
    world = fashion.world_of('fashion-sd')
    assert fashion.world_of(fashion.fashion_path('fashion-sd')) is world
    assert fashion.world_of('fashion-sd-weak') is None
    x = torch.rand(2, *world.shape)
    assert world.adherence(x, world.prompts()[:2]).shape == (2, len(world.parts))
    assert world.features(x).shape == (2, 128)
