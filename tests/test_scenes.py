"Scenes of two garments: captions, real scenes, and a judge that must also say no."

import math

import pytest
import torch

from cf_guidance.lab.fashion import COLOURS, GARMENTS, colourise, fashion_mnist, world_of
from cf_guidance.lab.scenes import (
    SCENE_PARTS,
    WORLD,
    _parse_scene,
    random_scene_prompts,
    random_scenes,
    scene_adherence,
    scene_caption,
)

SAID = 'a red sneaker left of a green bag on a white background'


def scene(left, right, background='white', seed=0):
    "A real scene from names, painted here from two photographs: (1, 3, 32, 64) in [0, 1]."
    grey, kind = fashion_mnist()
    colours, halves = list(COLOURS), []
    for i, o in enumerate((left, right)):
        colour, garment = o.split()
        at = (kind == GARMENTS.index(garment)).nonzero()[seed + 10 * i]
        paint = (torch.tensor([colours.index(c)]) for c in (colour, background))
        halves.append(colourise(grey[at], *paint))
    return (torch.cat(halves, -1) + 1) / 2


def judged(x, prompt):
    return dict(zip(SCENE_PARTS, scene_adherence(x, [prompt])[0].tolist(), strict=True))


@pytest.mark.parametrize('right_first', [False, True])
@pytest.mark.parametrize('background_first', [False, True])
def test_every_word_order_says_the_same(right_first, background_first):
    said = scene_caption('red sneaker', 'green bag', 'white', right_first, background_first)
    assert _parse_scene(said) == (7, 0, 8, 1, 6)


def test_caption_word_for_word():
    assert scene_caption('red sneaker', 'green bag', 'white') == SAID
    turned = 'on an orange background, a bag right of a red sneaker'
    assert scene_caption('red sneaker', 'bag', 'orange', True, True) == turned


@pytest.mark.parametrize(
    'prompt,parts',
    [
        ('a sneaker left of a bag', (7, None, 8, None, None)),
        ('A  Red t-shirt right of an orange shirt', (6, 5, 0, 0, None)),
        ('a shirt left of a t-shirt', (6, None, 0, None, None)),
        ('a red sneaker on a blue background', (None, None, None, None, 2)),
        ('', (None,) * 5),
    ],
)
def test_what_a_prompt_leaves_open(prompt, parts):
    assert _parse_scene(prompt) == parts


def test_random_scenes():
    drawn = random_scenes(3000, 1)
    assert (drawn[:, 0] != drawn[:, 2]).all()
    for i, j in ((1, 3), (1, 4), (3, 4)):
        assert (drawn[:, i] != drawn[:, j]).all()
    for column, n in zip(drawn.T, (10, 8, 10, 8, 8), strict=True):
        counts = column.bincount(minlength=n)
        assert counts.min() > 0.8 * 3000 / n
    assert torch.equal(random_scenes(5, 1), random_scenes(5, 1))
    prompts = random_scene_prompts(3000, 1)
    assert [_parse_scene(p) for p in prompts] == [tuple(o) for o in drawn.tolist()]


def test_judge_says_yes():
    right = judged(scene('red sneaker', 'green bag'), SAID)
    assert right == dict.fromkeys(SCENE_PARTS, 1.0)


@pytest.mark.parametrize(
    'left,right,wrong',
    [
        ('red boot', 'green bag', {'left_garment'}),
        ('red sneaker', 'green boot', {'right_garment'}),
        ('blue sneaker', 'green bag', {'left_colour'}),
        ('red sneaker', 'yellow bag', {'right_colour'}),
        ('green sneaker', 'red bag', {'left_colour', 'right_colour', 'binding'}),
        ('red bag', 'green sneaker', {'left_garment', 'right_garment', 'side'}),
    ],
)
def test_judge_says_what_is_wrong(left, right, wrong):
    seen = judged(scene(left, right), SAID)
    assert {k for k, v in seen.items() if v == 0} == wrong


def test_background_must_be_right_in_both_halves():
    half = scene('red sneaker', 'green bag', 'blue')
    mixed = torch.cat([scene('red sneaker', 'green bag')[..., :32], half[..., 32:]], -1)
    assert judged(half, SAID)['background'] == 0
    assert judged(mixed, SAID)['background'] == 0


def test_missing_and_merged():
    real = scene('red sneaker', 'green bag')
    empty, moved = real.clone(), real.roll(16, -1)
    empty[..., 32:] = empty[0, :, 0, 0].view(3, 1, 1)
    assert judged(real, SAID)['apart'] == 1
    assert judged(empty, SAID)['apart'] == 0
    assert judged(moved, SAID)['apart'] == 0


def test_open_parts_are_nan():
    seen = judged(scene('red sneaker', 'green bag'), 'a sneaker left of a green bag')
    assert {k for k, v in seen.items() if math.isnan(v)} == {
        'left_colour',
        'background',
        'binding',
    }


def test_no_verdict_without_two_garments():
    "A picture must not count as right because the prompt was not understood."
    real = scene('red sneaker', 'green bag')
    assert all(math.isnan(o) for o in judged(real, '').values())
    assert all(math.isnan(o) for o in judged(real, 'a red sneaker').values())
    seen = judged(real, 'a red sneaker on a white background')
    assert {k for k, v in seen.items() if not math.isnan(v)} == {'background'}


def test_batch_equals_singles():
    prompts = random_scene_prompts(6, 3)
    x = WORLD.photographs(prompts, 2)
    twice = [p for p in prompts for _ in range(2)]
    single = torch.cat([scene_adherence(x[i : i + 1], twice[i : i + 1]) for i in range(12)])
    assert torch.equal(scene_adherence(x, twice), single)


def test_world():
    assert world_of('fashion-scenes') is WORLD
    x = WORLD.photographs(random_scene_prompts(3, 0), 2)
    assert x.shape == (6, *WORLD.shape)
    assert WORLD.features(x).shape == (6, 256)
    assert len(WORLD.prompts()) == 1000


REAL = scene('red sneaker', 'green bag')


@pytest.mark.parametrize(
    'call,error,message',
    [
        (lambda: scene_adherence(REAL[..., :32], [SAID]), ValueError, r'x: .*\(N, 3, 32, 64\)'),
        (lambda: scene_adherence(REAL, SAID), TypeError, 'prompts: expected a list of 1'),
        (lambda: scene_adherence(REAL, []), ValueError, 'prompts: expected 1, one per image'),
        (lambda: scene_adherence(REAL, [3]), TypeError, 'prompt: expected a text, got 3'),
        (lambda: scene_adherence(REAL * math.nan, [SAID]), ValueError, 'x: expected finite'),
        (lambda: scene_adherence(REAL + 1, [SAID]), ValueError, r'x: expected images in \[0, 1\]'),
        (lambda: scene_adherence(REAL, ['a pink hat']), ValueError, "does not know 'pink'"),
        (lambda: scene_adherence(REAL, ['a ' * 18]), ValueError, 'at most 17 words'),
        (lambda: scene_caption('hat', 'bag'), ValueError, "left: .* got 'hat'"),
        (lambda: scene_caption('bag', 'bag red'), ValueError, "right: .* got 'bag red'"),
        (lambda: scene_caption('bag', 'boot', 'pink'), ValueError, "background: .* got 'pink'"),
        (lambda: random_scenes(-1, 0), ValueError, 'n: expected a whole number from 0'),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
