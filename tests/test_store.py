"The store: keys, parts of many writers, damaged files, merged stores."

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cf_guidance.lab.metrics import Stats
from cf_guidance.lab.store import Store, canonical, key_of


def picture(seed, size=8):
    "A picture of noise."
    g = np.random.default_rng(seed)
    return Image.fromarray(g.integers(0, 255, (size, size, 3), dtype=np.uint8))


def request(seed, **others):
    return dict(prompt='a red sneaker', seed=seed, weights=[7.5, 1.0], **others)


def row(seed, **others):
    return dict(request=request(seed), picture=picture(seed), nfe=4, **others)


TEXT = st.text(st.characters(codec='utf-8'), max_size=5)
NUMBER = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
LEAF = st.none() | st.booleans() | NUMBER | TEXT
VALUE = st.recursive(
    LEAF, lambda o: st.lists(o, max_size=4) | st.dictionaries(TEXT, o, max_size=4), max_leaves=12
)
REQUEST = st.dictionaries(TEXT, VALUE, max_size=5)


@settings(max_examples=200, deadline=None)
@given(REQUEST)
def test_canonical_text_is_a_fixed_point_and_keeps_every_value(r):
    text = canonical(r)
    assert text.isascii()
    assert json.loads(text) == r
    assert canonical(json.loads(text)) == text
    assert canonical(dict(reversed(r.items()))) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_exactly(x):
    back = json.loads(canonical({'x': x}))['x']
    assert back == x
    assert math.copysign(1, back) == (math.copysign(1, x) if x else 1)


def test_different_requests_have_different_keys():
    values = [1, 1.0, True, '1', None, [1], [[1]], {'1': 1}, 'a', 'A', '', [], {}]
    assert len({key_of({'x': v}) for v in values}) == len(values)
    assert key_of({'x': (1, 2)}) == key_of({'x': [1, 2]})
    assert key_of({'x': -0.0}) == key_of({'x': 0.0})


@pytest.mark.parametrize(
    'value, place',
    [
        ({'a': [0, {'b': math.inf}]}, "request['a'][1]['b']: expected a finite number, got inf"),
        ({'a': math.nan}, "request['a']: expected a finite number"),
        ({'a': {1: 2}}, "request['a']: expected names that are texts, got int 1"),
        ({'a': b'x'}, "request['a']: expected a text, number, "),
        ({'a': np.int64(1)}, "request['a']: expected a text, number, "),
        ({'a': torch.ones(2)}, 'got Tensor'),
        ({'a': {1}}, 'got set'),
        ([1], 'request: expected a dict, got list'),
    ],
)
def test_what_has_no_exact_text_is_named(value, place):
    with pytest.raises((TypeError, ValueError)) as e:
        canonical(value)
    assert place in str(e.value)


def test_plan_add_missing_table_picture(tmp_path):
    store = Store(tmp_path / 'new' / 'store')
    wanted = [request(i) for i in range(5)]
    keys = store.plan(wanted, [dict(seed=i, w='a' if i else None) for i in range(5)])
    assert keys == [key_of(o) for o in wanted]
    store.plan(wanted, [dict(seed=i, w='a' if i else None) for i in range(5)])
    assert len(list(store.folder.iterdir())) == 1
    assert list(store.requests().index) == keys
    assert list(store.requests()) == ['request', 'seed', 'w']
    assert store.missing() == wanted
    part = store.add([row(3, hue=0.5), row(1, hue=True)])
    assert part.is_file()
    store.add([dict(request=wanted[0], error='NaN at step 3')])
    assert store.missing() == [wanted[2], wanted[4]]
    assert store.missing(retry=True) == [wanted[0], wanted[2], wanted[4]]
    table = store.table()
    assert list(table.index) == [keys[0], keys[1], keys[3]]
    assert list(table.seed) == [0, 1, 3]
    assert list(table.hue.fillna(-1)) == [-1, 1, 0.5]
    assert store.picture(keys[3]).tobytes() == picture(3).tobytes()
    pictures = store.pictures([keys[3], keys[1], keys[3]])
    assert [o.tobytes() for o in pictures] == [picture(i).tobytes() for i in (3, 1, 3)]
    counts = dict(planned=5, done=2, failed=1, missing=2, parts=2, set_aside=0)
    assert {k: store.status()[k] for k in counts} == counts


def test_empty_store(tmp_path):
    store = Store(tmp_path)
    assert store.missing() == []
    assert len(store.table()) == len(store.requests()) == 0
    assert store.stats() == {}
    assert store.add([]) is None
    assert store.plan([]) == []
    assert set(store.status().values()) == {0}
    assert list(tmp_path.iterdir()) == []


def test_a_good_result_wins_and_the_first_of_two(tmp_path):
    store = Store(tmp_path)
    store.add([dict(request=request(0), error='out of memory')])
    store.add([row(0, mark='first')])
    store.add([row(0, mark='second')])
    store.add([dict(request=request(0), error='again')])
    assert list(store.table().mark) == ['first']
    assert store.table().error.isna().all()
    assert store.status()['done'] == 1


def test_stats_equal_those_of_all_features(tmp_path):
    store, g = Store(tmp_path), np.random.default_rng(0)
    x = g.normal(size=(30, 6)).astype(np.float16)
    store.plan([request(i) for i in range(30)], [dict(w=i % 3, odd=bool(i % 2)) for i in range(30)])
    for i in range(0, 30, 7):
        store.add([row(j, features=x[j]) for j in range(i, min(i + 7, 30))])
    store.add([row(4, features=x[4]), row(31)])
    assert_same(store.stats(), {'all': x})
    assert_same(store.stats('w'), {i: x[i::3] for i in range(3)})
    odd = {
        (i, o): x[[j for j in range(30) if j % 3 == i and j % 2 == o]]
        for i in range(3)
        for o in (0, 1)
    }
    assert_same(store.stats(['w', 'odd']), odd)
    with pytest.raises(ValueError, match='by: expected one of w, odd, nfe'):
        store.stats('seed')


def assert_same(stats, features):
    assert stats.keys() == features.keys()
    for k, x in features.items():
        want = Stats(torch.from_numpy(x))
        assert stats[k].n == want.n
        assert torch.allclose(stats[k].mean, want.mean, atol=1e-12)
        assert torch.allclose(stats[k].scatter, want.scatter, atol=1e-10)
