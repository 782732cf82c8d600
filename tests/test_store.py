"The store: keys, parts of many writers, damaged files, merged stores."

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing import forkserver

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet as pq

from cf_guidance.lab import store as module
from cf_guidance.lab.metrics import Stats
from cf_guidance.lab.store import Store, canonical, footnote, key_of, stored_rows


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
    keys = [key_of(request(i)) for i in (20, 3, 20)]
    assert np.array_equal(store.features(keys), x[[20, 3, 20]])
    with pytest.raises(ValueError, match='expected results with features, got 1 without'):
        store.features([*keys, key_of(request(31))])


def assert_same(stats, features):
    assert stats.keys() == features.keys()
    for k, x in features.items():
        want = Stats(torch.from_numpy(x))
        assert stats[k].n == want.n
        assert torch.allclose(stats[k].mean, want.mean, atol=1e-12)
        assert torch.allclose(stats[k].scatter, want.scatter, atol=1e-10)


def test_rows_that_cannot_be_written_are_refused_before_anything_is(tmp_path):
    store = Store(tmp_path)
    bad = [
        (dict(request=request(1), hue=[1]), 'hue: expected a number or a text, got list'),
        (dict(request=request(1), nfe='4'), 'nfe'),
        (dict(request=request(1), picture=b'GIF89a'), 'picture: expected a PIL image'),
        (dict(request=request(1), features=[1e5]), 'features: expected a 1-d array'),
        (dict(request=request(1), features=[[1.0]]), 'features: expected a 1-d array'),
        (dict(request=request(1), _part=1), 'names that do not begin with _'),
        (dict(picture=picture(1)), "expected dicts with 'request'"),
    ]
    for wrong, message in bad:
        with pytest.raises((TypeError, ValueError)) as e:
            store.add([row(0), wrong])
        assert message in str(e.value)
    with pytest.raises(TypeError, match='hue: expected numbers or texts, got both'):
        store.add([row(0, hue=1), row(1, hue='red')])
    with pytest.raises(ValueError, match='features: expected as many in each row'):
        store.add([row(0, features=[1.0]), row(1, features=[1.0, 2.0])])
    with pytest.raises(ValueError, match='labels: expected 1, one per request, got 2'):
        store.plan([request(0)], [{}, {}])
    with pytest.raises(ValueError, match="names other than those of results, got 'seconds'"):
        store.plan([request(0)], [dict(seconds=1)])
    with pytest.raises(TypeError, match="a number or a text for 'interval', got list"):
        store.plan([request(0)], [dict(interval=[0, 1])])
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='folder: cannot make .*file'):
        Store(tmp_path / 'file')
    with pytest.raises(ValueError, match='others: expected stores or folders of stores'):
        Store(tmp_path / 'a').merge(tmp_path / 'typo')
    assert not (tmp_path / 'typo').exists()


def test_unknown_keys_and_missing_pictures(tmp_path):
    store = Store(tmp_path)
    store.add([row(0), dict(request=request(1), error='NaN')])
    with pytest.raises(ValueError, match='key: expected one of 2 results, got str'):
        store.picture('abc')
    with pytest.raises(ValueError, match='has no picture'):
        store.picture(key_of(request(1)))


# damaged files


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def empty(file):
    file.write_bytes(b'')


def foreign(file):
    pq.write_table(pa.table(dict(a=[1])), file)


def other_types(file):
    names = [*module._FIXED.names]
    pq.write_table(pa.table({o: [1] for o in names}), file)


@pytest.mark.parametrize('damage', [truncate, empty, foreign, other_types])
def test_damaged_parts_are_set_aside_and_named(tmp_path, damage):
    store = Store(tmp_path)
    store.plan([request(i) for i in range(2)])
    store.add([row(0)])
    part = store.add([row(1)])
    damage(part)
    content = part.read_bytes()
    with pytest.warns(UserWarning, match=part.name):
        assert store.missing() == [request(1)]
    (aside,) = (tmp_path / 'set_aside').iterdir()
    assert aside.read_bytes() == content
    assert not part.exists()
    assert store.status()['set_aside'] == 1
    store.add([row(1)])
    assert store.missing() == []


def test_a_damaged_plan_is_set_aside(tmp_path):
    store = Store(tmp_path)
    store.plan([request(0)])
    (plan,) = tmp_path.iterdir()
    truncate(plan)
    with pytest.warns(UserWarning, match=plan.name):
        assert store.missing() == []
    store.plan([request(0)])
    assert store.missing() == [request(0)]


def test_a_flipped_byte_in_a_picture_is_noticed(tmp_path):
    store = Store(tmp_path)
    part = store.add([row(0)])
    data = bytearray(part.read_bytes())
    data[data.index(b'\x89PNG') + 60] ^= 1
    part.write_bytes(data)
    with pytest.warns(UserWarning, match='moved'), pytest.raises(ValueError, match='draw it again'):
        store.picture(key_of(request(0)))
    assert store.status()['set_aside'] == 1


def test_a_failing_disk_sets_nothing_aside(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add([row(0)])

    def fails(*_, **__):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(module.pq, 'ParquetFile', fails)
    with pytest.raises(OSError, match='Input/output'):
        store.table()
    assert len(list(tmp_path.glob('part-*'))) == 1


# full disks


def test_a_full_disk_is_a_clear_error_and_leaves_whole_parts(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add([row(0)])

    def full(table, file, **_):
        file.write_bytes(b'PAR1 half a part')
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(module.pq, 'write_table', full)
        with pytest.raises(OSError, match='the disk is full; what was written before is whole'):
            store.add([row(1)])
    assert len(list(tmp_path.iterdir())) == 1
    assert len(store.table()) == 1


def test_a_small_disk(tmp_path):
    command = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(tmp_path)]
    if not shutil.which('mount') or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('mounting a small disk is not allowed here')
    try:
        store, n = Store(tmp_path), 0
        with pytest.raises(OSError, match='disk is full'):
            for n in range(100):
                store.add([dict(request=request(n), picture=picture(n, 64))])
        assert 5 < n < 50
        assert len(store.table()) == n
        assert [o.name for o in tmp_path.iterdir() if not o.name.startswith('part-')] == []
        assert not list(tmp_path.glob('*.tmp'))
    finally:
        subprocess.run(['umount', str(tmp_path)], check=True)


# several processes


def write_parts(folder, seeds, said=None):
    "Add one part of two rows after the other; say so after each."
    store = Store(folder)
    for seed in seeds:
        store.add([row(2 * seed), row(2 * seed + 1)])
        if said:
            said.send(seed)


@pytest.fixture(scope='module')
def processes():
    "Starts processes that have already imported what they need, where there is fork."
    if 'forkserver' not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_two_processes_write_at_once(tmp_path, processes):
    jobs = [range(0, 20), range(15, 35)]
    jobs = [processes.Process(target=write_parts, args=(tmp_path, o)) for o in jobs]
    for job in jobs:
        job.start()
    store, seen = Store(tmp_path), 0
    while any(o.is_alive() for o in jobs):
        now = store.status()['done']
        assert now >= seen
        seen = now
    assert [o.exitcode for o in jobs] == [0, 0]
    assert set(store.table().index) == {key_of(request(i)) for i in range(70)}
    assert store.status()['parts'] == 40


def test_kill_at_random_moments_loses_no_part(tmp_path, processes):
    rng, told, store = random.Random(0), [], Store(tmp_path)
    for first in range(0, 2000, 100):
        heard, said = processes.Pipe(duplex=False)
        job = processes.Process(target=write_parts, args=(tmp_path, itertools.count(first), said))
        job.start()
        told.append(heard.recv())  # it is at work
        time.sleep(rng.random() / 20)
        job.kill()
        job.join()
        said.close()
        with pytest.raises(EOFError):
            while True:
                told.append(heard.recv())
    keys = {key_of(request(2 * i + j)) for i in told for j in (0, 1)}
    found = set(store.table().index)
    assert keys <= found
    assert len(found) <= len(keys) + 2 * 20  # what was written but not yet said
    assert len(found) == 2 * store.status()['parts']
    assert store.status()['set_aside'] == 0
    assert sum(1 for _ in store.pictures(found)) == len(found)


def test_a_store_reads_each_part_once_and_sees_those_of_others(tmp_path, monkeypatch):
    mine, other = Store(tmp_path), Store(tmp_path)
    wanted = [request(i) for i in range(4)]
    first = mine.add([row(0)])
    other.add([dict(request=wanted[1], error='NaN')])
    assert mine.missing(wanted) == wanted[2:]
    read, store_read = [], Store._read
    monkeypatch.setattr(Store, '_read', lambda s, f, *a: read.append(f) or store_read(s, f, *a))
    second = other.add([row(2), row(1)])
    assert mine.missing(wanted) == wanted[3:]
    assert mine.missing(wanted, retry=True) == wanted[3:]
    assert read == [second]
    assert len(mine.table()) == 3
    third = other.add([row(3)])
    assert len(mine.table()) == 4
    assert read.count(second) == 2  # once for the outcomes, once for the table
    assert read.count(third) == 1
    (tmp_path / 'set_aside').mkdir()
    first.rename(tmp_path / 'set_aside' / first.name)
    assert mine.missing(wanted) == wanted[:1]
    assert mine.status()['done'] == 3


def test_unfinished_files_are_cleaned_when_they_are_old(tmp_path):
    store = Store(tmp_path)
    part = store.add([row(0)])
    old, new, other = (
        tmp_path / o for o in ('a.parquet.7-0123abcd.tmp', 'b.7-4567cdef.tmp', 'c.tmp')
    )
    for o in (old, new, other):
        o.touch()
    for o in (old, other):
        os.utime(o, (0, 0))
    assert store.clean() == [old.name]
    assert sorted(tmp_path.iterdir()) == sorted([new, other, part])


def test_names_are_on_the_disk_too(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, 'fsync', lambda o: synced.append(os.readlink(f'/proc/self/fd/{o}')) or fsync(o)
    )
    part = Store(tmp_path).add([row(0)])
    assert synced[0].startswith(str(part))
    assert synced[1] == str(tmp_path)


# several stores


def test_merge_has_each_key_once(tmp_path):
    a, b, c = (Store(tmp_path / o) for o in 'abc')
    a.plan([request(i) for i in range(4)], [dict(w=i) for i in range(4)])
    b.plan([request(i) for i in range(2, 6)], [dict(w=i, b=True) for i in range(2, 6)])
    a.add([row(i, mark='a') for i in range(3)] + [dict(request=request(3), error='NaN')])
    b.add([row(2, mark='b'), row(3, mark='b', hue=1)])
    b.add([dict(request=request(i), error='memory') for i in (4, 0)])
    assert c.merge(a, tmp_path / 'b') == 4 + 2
    table = c.table()
    assert list(table.w) == [0, 1, 2, 3, 4]
    assert list(table.mark.fillna('-')) == ['a', 'a', 'a', 'b', '-']
    assert list(table.error.notna()) == [False] * 4 + [True]
    assert c.status()['missing'] == 1
    assert c.merge(a, b, c) == 0
    fresh = Store(tmp_path / 'fresh')
    fresh.merge(c)
    rows = pa.concat_tables([pq.read_table(o) for o in fresh.folder.glob('part-*')])
    assert sorted(rows['key'].to_pylist()) == sorted(table.index)
    assert fresh.picture(table.index[3]).tobytes() == picture(3).tobytes()
    for store in (a, b):
        assert store.status()['parts'] in (1, 2)


def test_big_stores_merge_into_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_PART_BYTES', 2000)
    a, b = Store(tmp_path / 'a'), Store(tmp_path / 'b')
    for i in range(9):
        a.add([row(2 * i), row(2 * i + 1, mark='x')] if i else [row(0), row(1)])
    b.merge(a)
    assert 1 < b.status()['parts'] < 9
    assert b.table().drop(columns='written').equals(a.table().drop(columns='written'))


# other programs


def test_datasets_shows_the_pictures(tmp_path):
    datasets = pytest.importorskip('datasets')
    store = Store(tmp_path / 'store')
    store.add([row(0, hue=1.0, features=[1.0, 2.0]), dict(request=request(1), error='NaN')])
    store.add([row(2)])
    files = str(store.folder / 'part-*.parquet')
    cache = str(tmp_path / 'cache')
    data = datasets.load_dataset('parquet', data_files=files, split='train', cache_dir=cache)
    assert data[0]['picture'].tobytes() == picture(0).tobytes()
    assert data[1]['picture'] is None
    assert data[2]['picture'].tobytes() == picture(2).tobytes()
    assert data[0]['features'] == [1.0, 2.0]
    assert data['key'] == [key_of(request(i)) for i in range(3)]
    assert data['hue'] == [1.0, None, None]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    store = Store(tmp_path)
    store.add([row(0)])
    (tmp_path / 'part-notes.txt').write_text('mine')
    (tmp_path / 'part-folder.parquet').mkdir()
    foreign(tmp_path / 'results.parquet')
    assert store.status()['parts'] == 1
    assert len(store.table()) == 1
    assert len(list(tmp_path.iterdir())) == 4


def powers(*exponents):
    return [dict(base=2, exponent=k) for k in exponents]


def power(requests):
    for o in requests:
        yield dict(power=o['base'] ** o['exponent'])


def unmeasured(requests):
    raise AssertionError('it was measured')


def test_rows_are_measured_once_and_come_in_order(tmp_path):
    store = Store(tmp_path)
    assert store.rows(powers(1, 2), power).power.tolist() == [2, 4]
    df = store.rows(powers(2, 1, 2), unmeasured)
    assert df.power.tolist() == [4, 2, 4]
    assert df.index.tolist() == [key_of(o) for o in powers(2, 1, 2)]
    assert df.columns.tolist()[:2] == ['base', 'exponent']
    assert df.torch.tolist() == [torch.__version__] * 3
    assert df.written.notna().all()


def test_all_rows_of_a_store(tmp_path):
    store = Store(tmp_path)
    assert len(store.rows()) == len(store.rows([])) == 0
    store.rows(powers(1, 2), power)
    assert store.rows().power.tolist() == [2, 4]


def test_rows_without_a_result_are_empty(tmp_path):
    store = Store(tmp_path)
    assert store.rows(powers(3)).exponent.tolist() == [3]
    store.rows(powers(1), power)
    assert store.rows(powers(1, 3)).power.fillna(-1).tolist() == [2, -1]


def test_rows_before_an_interrupt_are_kept(tmp_path):
    def interrupted(requests):
        yield from power(requests[:2])
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.rows(powers(1, 2, 3), interrupted)
    assert store.missing(powers(1, 2, 3)) == powers(3)


def test_a_slow_row_is_written_before_the_next(tmp_path, monkeypatch):
    seconds = itertools.count(0, 2)
    monkeypatch.setattr(module.time, 'monotonic', lambda: next(seconds))
    store = Store(tmp_path)

    def measure(requests):
        for i, row in enumerate(power(requests)):
            assert len(store.rows()) == i
            yield row

    store.rows(powers(1, 2, 3), measure)


def test_failed_rows_are_measured_again(tmp_path):
    store = Store(tmp_path)
    failed = store.rows(powers(1), lambda requests: [dict(error='out of memory')])
    assert failed.error.tolist() == ['out of memory']
    assert store.rows(powers(1), power).power.tolist() == [2]


@pytest.mark.parametrize('rows', [[], [dict(power=2)] * 2], ids=['too few', 'too many'])
def test_as_many_rows_as_requests(tmp_path, rows):
    with pytest.raises(ValueError, match='shorter|longer'):
        Store(tmp_path).rows(powers(1), lambda requests: rows)


def test_results_named_as_the_request(tmp_path):
    df = Store(tmp_path).rows(powers(1), lambda requests: [dict(base=3)])
    assert (df.base.item(), df.base_measured.item()) == (2, 3)


def test_request_of_a_key(tmp_path):
    store = Store(tmp_path)
    df = store.rows(powers(1, 2), power)
    assert [store.request(k) for k in df.index] == powers(1, 2)
    with pytest.raises(ValueError, match="key: expected one of 2 results, got str 'nothing'"):
        store.request('nothing')


def test_drop_deletes_rows_and_joins_parts(tmp_path):
    store = Store(tmp_path)
    store.rows(powers(1, 2), power)
    before = store.rows(powers(3, 4), power)
    assert store.status()['parts'] == 2
    store.drop(before.index[:1])
    assert store.status()['parts'] == 1
    assert store.rows().power.tolist() == [2, 4, 16]
    assert store.missing(powers(1, 2, 3, 4)) == powers(3)
    pd.testing.assert_frame_equal(store.rows(powers(4)), before.iloc[1:])
    with pytest.raises(ValueError, match='expected one of 3 results'):
        store.drop(before.index[:1])
    assert len(store.rows()) == 3
    store.drop(store.rows().index)
    assert store.status()['parts'] == len(store.rows()) == 0


def test_stored_rows_are_read_or_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'RESULTS', tmp_path / 'package')
    monkeypatch.chdir(tmp_path)
    Store(tmp_path / 'package/powers').rows(powers(1, 2), power)
    assert stored_rows('powers', powers(2)).power.tolist() == [4]
    with pytest.raises(ValueError, match="1 of 2 rows of 'powers' are not stored: measure them"):
        stored_rows('powers', powers(2, 3))
    with pytest.raises(ValueError, match="name: expected one of powers, got str 'roots'"):
        stored_rows('roots', powers(2))
    for folder in ('runs/results', 'mine'):
        own = None if folder.startswith('runs') else folder
        assert stored_rows('powers', powers(2, 3), power, own).power.tolist() == [4, 8]
        assert stored_rows('powers', powers(2, 3), unmeasured, own).power.tolist() == [4, 8]
        assert len([*(tmp_path / folder / 'powers').iterdir()]) == 1
    assert len(Store(tmp_path / 'package/powers').rows()) == 2


def test_footnote_says_when_and_what():
    days = pd.to_datetime(['2026-11-21', '2026-11-21', '2026-11-28'], utc=True)
    rows = pd.DataFrame(dict(written=days, n=[144, 144, 10_000], seeds=[[0, 1, 2], [900], [0]]))
    text = 'Measured on 2026-11-21 and 2026-11-28; n = 144 and 10,000; seeds 0 to 2, 900'
    assert footnote(rows).data == f'<small>{text}.</small>'
    rows = pd.DataFrame(dict(written=days, seed=[0, 1, 5], torch=['2.13.0', '2.13.0', None]))
    text = 'Measured on 2026-11-21 and 2026-11-28; seeds 0, 1, 5; torch 2.13.0'
    assert footnote(rows).data == f'<small>{text}.</small>'
    assert footnote(rows.assign(written=pd.NaT)).data == 'Not measured yet.'


def test_a_store_that_is_only_read_is_not_changed(tmp_path):
    with pytest.raises(ValueError, match='folder: expected one that exists'):
        Store(tmp_path / 'none', write=False)
    assert not (tmp_path / 'none').exists()
    own, other = Store(tmp_path / 'own'), tmp_path / 'other'
    other.mkdir()
    (other / 'part-damaged.parquet').write_bytes(b'no parquet')
    with pytest.warns(UserWarning, match='left out part-damaged.parquet'):
        own.merge(other)
    assert [o.name for o in other.iterdir()] == ['part-damaged.parquet']


def test_too_little_memory_does_not_set_a_good_part_aside(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add([dict(request=dict(a=1), score=1.0)])

    def fail(*args, **kwargs):
        raise pa.ArrowMemoryError('malloc of size 64 failed')

    monkeypatch.setattr(pq.ParquetFile, 'read', fail)
    with pytest.raises(pa.ArrowMemoryError):
        Store(tmp_path).table()
    assert not (tmp_path / 'set_aside').exists()


def test_drop_deletes_nothing_if_a_part_cannot_be_read(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add([dict(request=dict(a=1), score=1.0)])
    before, read = sorted(tmp_path.glob('part-*')), Store._read

    def without_pictures(self, file, fixed, keep):
        return None if keep('picture') else read(self, file, fixed, keep)

    monkeypatch.setattr(Store, '_read', without_pictures)
    with pytest.raises(ValueError, match='cannot be read; nothing was deleted'):
        store.drop()
    assert sorted(tmp_path.glob('part-*')) == before
