"Seeds and generators: one convention, and what is not a seed is refused."

import numpy as np
import pytest
import torch

from cf_guidance.noise import randn, split_generator, step_generator


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_sample_does_not_depend_on_the_batch():
    assert torch.equal(randn((5, 2), 0)[:3], randn((3, 2), 0))


def test_a_seed_and_a_generator_with_it_agree():
    assert torch.equal(randn((2, 3), 7), randn((2, 3), seeded(7)))


def test_a_batch_in_pieces_stays_what_it_was():
    g = seeded(1)
    assert torch.equal(torch.cat([randn((2, 3), g), randn((6, 3), g)]), randn((8, 3), 1))


def test_samples_differ():
    a, b = randn((2, 3), 0)
    assert not torch.equal(a, b)


@pytest.mark.parametrize('seeds', [[7, 8], (7, 8), range(7, 9), [seeded(7), 8]])
def test_a_list_gives_each_sample_its_own(seeds):
    assert torch.equal(randn((2, 3), seeds)[1:], randn((1, 3), [8]))


def test_one_seed_repeated_is_the_same_noise():
    a, b = randn((2, 3), [7, 7])
    assert torch.equal(a, b)


def test_no_seed_is_fresh_noise():
    assert not torch.equal(randn((2, 3)), randn((2, 3)))


def test_streams_stay_as_measured():
    "Stored results rest on this: seed 0 draws one seed per sample, and each draws its noise"
    g = seeded(0)
    seeds = [torch.randint(2**62, (), generator=g).item() for _ in range(2)]
    want = torch.stack([torch.randn(2, generator=seeded(s)) for s in seeds])
    assert torch.equal(randn((2, 2), 0), want)


def test_half_precision_is_rounded_float32():
    assert torch.equal(randn((3, 2), 0, dtype=torch.float16), randn((3, 2), 0).half())


def test_double_precision():
    assert randn((3, 2), 0, dtype=torch.float64).dtype == torch.float64


def test_an_empty_batch():
    assert randn((0, 2)).shape == (0, 2)


def test_scalars():
    assert randn((4,), 0).shape == (4,)


def test_device():
    assert randn((2, 3), 0, device='meta').device.type == 'meta'


def test_numpy_seeds():
    assert torch.equal(randn((2, 3), np.int64(7)), randn((2, 3), 7))


def test_the_largest_seed():
    assert randn((1, 2), 2**64 - 1).isfinite().all()


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    randn((2, 3), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_given_generator_of_a_list_is_used_itself():
    g = seeded(0)
    assert split_generator([g], 1)[0] is g


def test_step_generator_repeats():
    assert step_generator(3, 5).initial_seed() == step_generator(3, 5).initial_seed()


def test_step_generator_of_another_step():
    assert step_generator(3, 5).initial_seed() != step_generator(3, 6).initial_seed()


BAD = {
    'bool': (lambda: split_generator(True, 3), TypeError, 'generator: .* got True'),
    'text': (lambda: split_generator('0', 2), TypeError, "generator: .* got '0'"),
    'float': (lambda: split_generator(0.5, 2), TypeError, 'generator: .* got 0.5'),
    'negative': (lambda: split_generator(-1, 3), ValueError, 'generator: .* got -1'),
    'too large': (lambda: split_generator(2**64, 3), ValueError, 'generator: .* got 18446'),
    'bool in a list': (lambda: split_generator([True], 1), TypeError, 'got True'),
    'None in a list': (lambda: split_generator([None, 1], 2), TypeError, 'got None'),
    'float in a list': (lambda: split_generator([1, 0.5], 2), TypeError, 'got 0.5'),
    'negative in a list': (lambda: split_generator([1, -2], 2), ValueError, 'got -2'),
    'short list': (lambda: split_generator([1, 2], 3), ValueError, 'list of 3, got a list of 2'),
    'long list': (lambda: split_generator([1, 2, 3], 2), ValueError, 'list of 2, got a list of 3'),
    'n negative': (lambda: split_generator(0, -1), ValueError, 'n: .* got -1'),
    'n text': (lambda: split_generator(0, 'a'), TypeError, "n: .* got 'a'"),
    'n float': (lambda: split_generator(0, 1.5), TypeError, 'n: .* got 1.5'),
    'n None': (lambda: split_generator(0, None), TypeError, 'n: .* got None'),
    'n bool': (lambda: split_generator(0, True), TypeError, 'n: .* got True'),
    'shape number': (lambda: randn(5), TypeError, 'shape: .* got 5'),
    'shape negative': (lambda: randn((2, -3)), ValueError, 'shape: .* got -3'),
    'shape text': (lambda: randn('ab'), TypeError, "shape: .* got 'ab'"),
    'shape None': (lambda: randn(None), TypeError, 'shape: .* got None'),
    'shape empty': (lambda: randn(()), TypeError, r'shape: .* got \(\)'),
    'shape float': (lambda: randn((2, 3.0)), TypeError, 'shape: .* got 3.0'),
    'dtype': (lambda: randn((2, 3), 0, dtype=torch.int64), TypeError, 'dtype: .* got torch.int64'),
    'dtype text': (lambda: randn((2, 3), 0, dtype='float'), TypeError, 'dtype: .* got float'),
    'device': (lambda: randn((2, 3), 0, device='foo'), ValueError, "device: .* got 'foo'"),
}


@pytest.mark.parametrize('call,error,message', BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as e:
        call()
    assert len(str(e.value)) < 160


def test_a_step_generator_wants_whole_numbers():
    with pytest.raises(TypeError, match="seed: expected a whole number from 0, got 'a'"):
        step_generator('a', 0)
    with pytest.raises(ValueError, match='i: expected the number of the step, 0 or more, got -1'):
        step_generator(0, -1)


def test_more_generators_than_fit():
    with pytest.raises(ValueError, match='n: expected at most 16777216 samples'):
        split_generator(0, 2**70)


def test_an_error_is_one_line():
    with pytest.raises(TypeError) as e:
        split_generator(torch.zeros(3, 3), 1)
    assert '\n' not in str(e.value)
