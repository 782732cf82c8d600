"The training loop: kills, devices, snapshots, the state on disk; sets of a model's own pictures."

import contextlib
import io
import math
import os
import subprocess
import sys
import time

import clear_errors
import pytest
import torch
from accelerate import Accelerator
from conftest import ENV
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close

from cf_guidance.continuous import ContinuousDDPM, _to_images, ddim, fashion_unet
from cf_guidance.lab import training
from cf_guidance.lab.fashion import _write_whole, fashion_mnist
from cf_guidance.lab.training import (
    _accelerator,
    _check_data,
    _draw_batch,
    _is_saved,
    _one_cycle,
    _plateau,
    _save_network,
    _shard,
    _stage,
    fine_tune,
    fit,
    synthetic_set,
    train,
)
from cf_guidance.noise import step_generator

GREY, LABELS = fashion_mnist()
X_0 = _to_images(GREY)
QUIET = dict(progress=False)

TINY = """
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds = nn.Embedding(11, 8)
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)])

    def forward(self, x, t, class_labels):
        h = self.convs[0](x) + self.kinds(class_labels)[..., None, None]
        return self.convs[1](F.silu(h + t.view(-1, 1, 1, 1) / 1000))
"""
PROGRAM = f"""
import sys, torch, torch.nn.functional as F
from torch import nn
from accelerate import Accelerator
from cf_guidance.continuous import ContinuousDDPM, train
from cf_guidance.lab.fashion import fashion_mnist
{TINY}
torch.manual_seed(0); torch.set_num_threads(1)
model = ContinuousDDPM(Tiny(), 'v', n_classes=10)
train(model, fashion_mnist(), sys.argv[1], int(sys.argv[2]), batch_size=32, progress=False,
      accelerator=Accelerator(cpu=True), save_every=0.0)
"""


class Tiny(nn.Module):
    "A network of a few hundred weights, as in `TINY`."

    def __init__(self):
        super().__init__()
        self.kinds = nn.Embedding(11, 8)
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)])

    def forward(self, x, t, class_labels):
        h = self.convs[0](x) + self.kinds(class_labels)[..., None, None]
        return self.convs[1](nn.functional.silu(h + t.view(-1, 1, 1, 1) / 1000))


def tiny():
    torch.manual_seed(0)
    return ContinuousDDPM(Tiny(), 'v', n_classes=10)


def few(model, folder, steps=40, data=(GREY, LABELS), **kwargs):
    settings = {**dict(batch_size=32, accelerator=Accelerator(cpu=True), progress=False), **kwargs}
    return train(model, data, folder, steps, **settings)


def weights(folder):
    return load_file(folder / 'model.safetensors')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    return folder, few(tiny(), folder)


def start(folder, steps, *launcher):
    "The program, running."
    file = folder / 'program.py'
    folder.mkdir(exist_ok=True)
    file.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, *launcher, str(file), str(folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENV,
    )


def finished(program):
    out, _ = program.communicate(timeout=300)
    assert program.returncode == 0, out


# kills and devices


def test_killed(tmp_path):
    "Killed as soon as it has saved something, and started again: the same bits."
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    program = start(killed, 200)
    while not (killed / 'state.pt').exists() and program.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    program.kill()
    program.communicate()
    step = torch.load(killed / 'state.pt', weights_only=True)['step']
    assert 0 < step < 200
    again = start(killed, 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few(tiny(), whole, 200)
    torch.set_num_threads(threads)
    finished(again)
    a, b = (torch.load(o / 'state.pt', weights_only=True) for o in (killed, whole))
    assert a['step'] == b['step'] == 200
    for k in ('model', 'avg'):
        assert all(torch.equal(x, y) for x, y in zip(a[k].values(), b[k].values(), strict=True))
    for x, y in zip(a['opt']['state'].values(), b['opt']['state'].values(), strict=True):
        assert all(torch.equal(x[n], y[n]) for n in x)
    assert all(torch.equal(weights(killed)[k], v) for k, v in weights(whole).items())
    # the kill may hit between state and line
    assert len((killed / 'log.csv').read_text().splitlines()) in (199, 200)
    assert len((whole / 'log.csv').read_text().splitlines()) == 1
    assert (whole / 'log.csv').read_text().split(',')[0] == '200'
    assert not list(whole.glob('*.tmp'))


def test_two_processes(tmp_path, trained):
    launcher = ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2']
    launcher += ['--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
    finished(start(tmp_path, 40, *launcher, '--main_process_port', '0'))
    for k, v in weights(trained[0]).items():
        assert_close(weights(tmp_path)[k], v, atol=2e-3, rtol=0)


def rank(i, n):
    return type('', (), dict(process_index=i, num_processes=n, device='cpu'))


def test_each_device_has_its_share():
    (x, t, y), v = whole = tiny().batch(X_0[:8], LABELS[:8], 0)
    assert torch.equal(_shard(whole, rank(0, 1))[1], v)
    shards = [_shard(whole, rank(i, 2)) for i in range(2)]
    inputs = zip((x, t, y), zip(*(a for a, _ in shards), strict=True), strict=True)
    for o, parts in ((v, [b for _, b in shards]), *inputs):
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), o)


# what is kept


def test_files(trained):
    folder, model = trained
    names = {o.name for o in folder.iterdir()}
    snapshots = {f'model{o}.safetensors' for o in ('', '-10', '-25', '-50')}
    assert names == {'state.pt', 'log.csv', *snapshots}
    assert not torch.equal(
        weights(folder)['convs.0.weight'], tiny().net.convs[0].weight.detach().half()
    )
    assert {*weights(folder)} == {*model.net.state_dict()}
    for k, v in weights(folder).items():
        assert v.dtype == torch.float16
        assert torch.equal(v, model.net.state_dict()[k].half())
    assert not model.training
    assert not model.net.convs[0].weight.requires_grad


def test_finished_already(trained):
    folder, model = trained
    assert torch.equal(few(tiny(), folder).net.convs[0].weight, model.net.convs[0].weight)


@pytest.mark.parametrize(
    'settings, was', [(dict(seed=1), 'seed=0'), (dict(batch_size=64), 'batch_size=32')]
)
def test_other_settings(trained, settings, was):
    clear_errors.check(lambda: few(tiny(), trained[0], **settings), was)


def test_other_length(trained):
    clear_errors.check(lambda: few(tiny(), trained[0], steps=80), 'steps=40')


def test_images_instead_of_photographs(trained, tmp_path):
    same = few(tiny(), tmp_path / 'a', data=(X_0, LABELS.tolist()))
    first = same.net.convs[0].weight
    assert torch.equal(first, trained[1].net.convs[0].weight)
    on = few(same, tmp_path / 'b', steps=1)  # what was trained can be trained further
    assert not torch.equal(on.net.convs[0].weight, first)


def test_snapshots_and_schedules(tmp_path, monkeypatch):
    first = tiny().net.convs[0].weight.detach().clone()
    averages, decays, rates, avg = {}, [], [], first.clone()
    update = training._Run.update

    def spy(self, loss, settings, decay):
        nonlocal avg
        update(self, loss, settings, decay)
        avg = avg + (1 - decay) * (self.model.net.convs[0].weight.detach() - avg)
        averages[self.step] = avg.clone()
        decays.append(decay)
        rates.append(self.opt.param_groups[0]['lr'])

    monkeypatch.setattr(training._Run, 'update', spy)
    few(tiny(), tmp_path, 20, ema=0.5, lr=3e-3)
    for name, i in (('model-10', 2), ('model-25', 5), ('model-50', 10), ('model', 20)):
        got = load_file(tmp_path / f'{name}.safetensors')['convs.0.weight']
        assert_close(got, averages[i].half(), atol=1e-3, rtol=1e-3)
    assert decays == pytest.approx([min(0.5, (1 + i) / (10 + i)) for i in range(20)])
    assert [o / 3e-3 for o in rates] == pytest.approx([0.5] + [1.0] * 16 + [0.9, 0.6, 0.3])


@pytest.mark.parametrize('steps', [1, 2, 3, 12, 40, 100, 5000])
def test_one_cycle_is_that_of_torch(steps):
    opt = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], 1e-2)
    scheduler = OneCycleLR(opt, 1e-2, total_steps=steps, pct_start=0.1)
    for i in range(steps):
        group, ours = opt.param_groups[0], _one_cycle(i, steps, 1e-2)
        assert ours['lr'] == pytest.approx(group['lr'], rel=1e-9)
        assert ours['betas'][0] == pytest.approx(group['betas'][0], rel=1e-9)
        opt.step()
        if i < steps - 1:
            scheduler.step()


def test_plateau():
    rates = [_plateau(i, 5000, 1.0)['lr'] for i in (0, 50, 99, 2000, 4500)]
    assert rates == pytest.approx([0.01, 0.51, 1.0, 1.0, 0.6])


def test_average_of_fit_begins_after_the_first_step(tmp_path):
    seen = []

    def loss(m, generator):
        seen.append(m.weight.detach().clone())
        return (m(torch.randn(8, 3, generator=generator)) - 1).square().mean()

    torch.manual_seed(0)
    m = nn.Linear(3, 1)
    avg = fit(m, loss, 3, tmp_path, 0.1, ema=0.5, **QUIET)
    after = [*seen[1:], m.weight.detach()]
    assert_close(avg.weight, ((after[0] + after[1]) / 2 + after[2]) / 2)


def test_what_goes_through_the_accelerator(tmp_path):
    class Counts(Accelerator):
        def prepare(self, loss, opt):
            def counted(*args):
                self.losses += 1
                return loss(*args)

            self.losses, self.norms, self.opt = 0, [], opt
            return counted, opt

        def clip_grad_norm_(self, ps, norm):
            self.norms.append(norm)
            return super().clip_grad_norm_(ps, norm)

    counts = Counts(cpu=True)
    few(tiny(), tmp_path, 4, accelerator=counts)
    assert (counts.losses, counts.norms) == (4, [1.0] * 4)
    assert counts.opt.defaults['betas'] == (0.9, 0.99)
    assert counts.opt.defaults['weight_decay'] == 0.01
    assert _accelerator().device.type == 'cpu'  # what was told before holds


def test_bar(tmp_path):
    shown, silent = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(shown):
        few(tiny(), tmp_path / 'a', progress=True)
    with contextlib.redirect_stderr(silent):
        few(tiny(), tmp_path / 'b', 1)
    for text in ('loss=', 'images/s', '1.28k'):
        assert text in shown.getvalue()
    assert silent.getvalue() == ''


def test_network_of_the_lesson(tmp_path):
    unet = ContinuousDDPM(fashion_unet(10, small=True), 'v', n_classes=10)
    net = few(unet, tmp_path, 3, batch_size=8).net
    loaded = fashion_unet(10, small=True)
    loaded.load_state_dict(weights(tmp_path))
    assert_close(loaded.conv_in.weight, net.conv_in.weight, atol=1e-3, rtol=1e-3)
    assert (tmp_path / 'model.safetensors').stat().st_size < 8e6


class Half(nn.Module):
    "A network without classes, with buffers."

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x, t):
        return self.norm(self.conv(x))


def test_buffers_are_averaged_too(tmp_path):
    m = ContinuousDDPM(Half())
    avg = few(m, tmp_path, 2, (GREY, None)).net.norm
    assert not torch.equal(avg.running_var, torch.ones(1))
    assert (avg.running_var - m.net.norm.running_var).abs() < 0.1
    assert torch.equal(avg.num_batches_tracked, m.net.norm.num_batches_tracked)


def test_each_step_has_its_own_batch(tmp_path):
    told = []

    class Hears(Half):
        def forward(self, x, t):
            told.append(t)
            return super().forward(x, t)

    for seed in (0, 7):
        few(ContinuousDDPM(Hears()), tmp_path / str(seed), 3, (GREY, None), seed=seed, batch_size=4)
    for k, t in enumerate(told):
        g = step_generator(k // 3 * 7, k % 3)
        (_, want, _), _ = _draw_batch(ContinuousDDPM(Half()), GREY, None, 4, g)
        assert_close(t, 1000 * want)
    assert len({t[0].item() for t in told}) == 6


# faults


def test_a_file_is_whole_or_not_there(tmp_path):
    def dies(o, file):
        file.write_bytes(b'half a st')
        raise KeyboardInterrupt

    file = tmp_path / 'state.pt'
    _write_whole(torch.save, dict(step=1), file)
    with pytest.raises(KeyboardInterrupt):
        _write_whole(dies, 0, file)
    assert torch.load(file, weights_only=True) == dict(step=1)
    assert os.listdir(tmp_path) == ['state.pt']


def test_two_writers_have_names_of_their_own(tmp_path):
    names = []
    for _ in range(2):
        _write_whole(lambda o, f: (names.append(f.name), f.write_text(o)), 'a', tmp_path / 'a.json')
    assert len({*names}) == 2


@pytest.mark.parametrize('content', [b'', b'half a st', b'PK\x03\x04' + bytes(100)])
def test_damaged_state_is_named(tmp_path, content):
    (tmp_path / 'state.pt').write_bytes(content)
    clear_errors.check(lambda: few(tiny(), tmp_path), 'state.pt cannot be read: delete it')


def test_nan_is_never_saved(tmp_path):
    class Breaks(Tiny):
        def forward(self, x, t, class_labels):
            return super().forward(x, t, class_labels) * math.inf

    model = ContinuousDDPM(Breaks(), 'v', n_classes=10)
    clear_errors.check(lambda: few(model, tmp_path, 3), 'NaN or infinity in the weights')
    assert not list(tmp_path.glob('*.pt')) + list(tmp_path.glob('*.safetensors'))


def test_stage_that_died_while_saving(tmp_path):
    "Half a file is never taken for a finished training, and a damaged one is named."

    def loss(m, g):
        return m(torch.randn(4, 3, generator=g)).square().mean()

    torch.manual_seed(0)
    (tmp_path / 'final.safetensors.1-ab.tmp').write_bytes(b'half')
    first = _stage(nn.Linear(3, 1), loss, tmp_path, steps=3, lr=0.1, **QUIET).weight
    again = _stage(nn.Linear(3, 1), loss, tmp_path, steps=3, lr=0.1, **QUIET).weight
    assert torch.equal(first, again)
    (tmp_path / 'final.safetensors').write_bytes(b'half')

    def call():
        _stage(nn.Linear(3, 1), loss, tmp_path, steps=3, lr=0.1, **QUIET)

    clear_errors.check(call, 'final.safetensors cannot be read')


def test_network_is_finished_when_it_can_be_read(tmp_path):
    assert not _is_saved(tmp_path)
    _save_network(fashion_unet(small=True), tmp_path)
    assert _is_saved(tmp_path)
    assert {o.name for o in tmp_path.iterdir()} == {
        'config.json',
        'diffusion_pytorch_model.safetensors',
    }
    file = tmp_path / 'diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    assert not _is_saved(tmp_path)
    file.unlink()
    assert not _is_saved(tmp_path)


# a model's own pictures


def draw(generators, model):
    labels = torch.cat([torch.randint(10, (1,), generator=g) for g in generators])
    x = ddim(model.guided(labels), (len(labels), 1, 32, 32), n_steps=2, generator=generators)
    x = ((x[:, 0, 2:-2, 2:-2].clamp(-1, 1) + 1) * 127.5).round().byte()
    return dict(images=x, labels=labels)


@pytest.fixture(scope='module')
def base():
    return tiny().eval().requires_grad_(False)


@pytest.fixture(scope='module')
def own(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp('own')
    return synthetic_set(lambda g: draw(g, base), 24, folder, base, 10, **QUIET)


def test_set_goes_on_after_a_kill(base, own, tmp_path):
    counts = []

    def killed(generators):
        counts.append(len(generators))
        if len(counts) == 2:
            raise KeyboardInterrupt
        return draw(generators, base)

    def go(n=24):
        return synthetic_set(killed, n, tmp_path, base, 10, **QUIET)

    with pytest.raises(KeyboardInterrupt):
        go()
    assert sorted(os.listdir(tmp_path)) == ['0000000-0000010.safetensors', 'plan.json']
    got = go()
    assert counts == [10, 10, 10, 4]
    assert all(torch.equal(got[k], v) for k, v in own.items())
    assert len(own['labels'].unique()) > 4
    go()
    assert len(counts) == 4
    assert torch.equal(go(27)['labels'][:24], own['labels'])
    assert counts[4:] == [7]


def test_set_does_not_depend_on_batches(base, own, tmp_path):
    other = synthetic_set(lambda g: draw(g, base), 24, tmp_path, base, 7, **QUIET)
    assert torch.equal(other['labels'], own['labels'])
    assert (other['images'].int() - own['images'].int()).abs().max() <= 1


def test_set_belongs_to_its_model(base, own, tmp_path):
    def go(model, **kwargs):
        return synthetic_set(lambda g: draw(g, model), 3, tmp_path, model, **QUIET, **kwargs)

    go(base)
    other = ContinuousDDPM(Tiny(), 'v', n_classes=10)
    clear_errors.check(lambda: go(other), 'name another folder')
    clear_errors.check(lambda: go(base, seed=1), 'name another folder')


def test_set_with_a_damaged_batch(base, tmp_path):
    def go():
        return synthetic_set(lambda g: draw(g, base), 3, tmp_path, base, **QUIET)

    go()
    (tmp_path / '0000000-0000003.safetensors').write_bytes(b'half')
    clear_errors.check(go, '0000000-0000003.safetensors cannot be read')
    (tmp_path / 'plan.json').write_text('{')
    clear_errors.check(go, 'plan.json cannot be read')


def test_fine_tuning(base, own, tmp_path, monkeypatch):
    data = own['images'], own['labels']

    def go(folder='a', model=base, data=data, **kwargs):
        settings = {**dict(steps=8, batch_size=8, accelerator=Accelerator(cpu=True)), **kwargs}
        return fine_tune(model, data, tmp_path / folder, **settings, **QUIET)

    def states(copies):
        return [v for m in copies.values() for v in m.state_dict().values()]

    copies = go()
    assert [*copies] == [1, 2, 4, 8]
    assert not any(p.requires_grad for m in (base, copies[8]) for p in m.parameters())
    firsts = [m.net.convs[0].weight for m in (base, *copies.values())]
    pairs = [(a, b) for i, a in enumerate(firsts) for b in firsts[:i]]
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(states(copies), states(go()), strict=True))
    for kwargs in (dict(lr=1e-3), dict(seed=1), dict(model=copies[8])):
        clear_errors.check(lambda kwargs=kwargs: go(**kwargs), 'name another folder')
    clear_errors.check(lambda: go(data=(data[0], data[1].roll(1))), 'name another folder')

    loss, calls = ContinuousDDPM.loss, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(ContinuousDDPM, 'loss', dies)
    with pytest.raises(KeyboardInterrupt):
        go('killed', save_every=0.0)
    resumed = go('killed', save_every=0.0)
    assert len(calls) == 6 + 3
    for a, b in zip(states(copies), states(resumed), strict=True):
        assert_close(a, b, atol=1e-6, rtol=0)


# bad input


def mean(m, g):
    return m(torch.ones(1, 2)).mean()


NET = nn.Linear(2, 2)
WRONG_DATA = [
    (None, 'data'),
    ((GREY, LABELS, LABELS), 'data'),
    ((GREY, None), 'data'),
    ((GREY, LABELS + 1), 'data'),
    ((GREY, LABELS[:5]), 'data'),
    ((GREY, 'abc'), 'labels'),
    ((GREY.float(), LABELS), 'data'),
    ((GREY.numpy(), LABELS), 'data'),
    ((GREY[:0], LABELS[:0]), 'data'),
    (('abc', LABELS), 'data'),
    ((X_0[:, 0, None, None], LABELS), '(2000, 1, 1, 32, 32)'),
    ((X_0 * 127.5 + 127.5, LABELS), 'data: expected images in [-1, 1]'),
    ((X_0 * math.nan, LABELS), 'data'),
]
BAD = [(lambda f, o=o: few(tiny(), f, 1, o), name) for o, name in WRONG_DATA]
for k, values in dict(
    steps=(0, -1, 1.5, True, 'a', None),
    batch_size=(0, -1, 1.5, True, 'a'),
    lr=(0, -1.0, math.inf, math.nan, 'a', True),
    ema=(1.0, -0.1, 2, math.nan, 'a', True),
    seed=('x', -1, 1.5, True),
).items():
    BAD += [(lambda f, k=k, o=o: few(tiny(), f, **{'steps': 1, k: o}), k) for o in values]
for k, values in dict(steps=(0, 1.5), lr=(-1, 0), ema=(2,), weight_decay=(-1, 'a')).items():
    BAD += [
        (lambda f, k=k, o=o: fit(NET, mean, folder=f, **QUIET, **{'steps': 1, 'lr': 0.1, k: o}), k)
        for o in values
    ]
BAD += [
    (lambda f: few(tiny().half(), f, 1), 'float16'),
    (lambda f: few(Tiny(), f, 1), 'model'),
    (lambda f: few(tiny(), None, 1), 'folder'),
    (lambda f: few(tiny(), '/proc/x', 1), 'folder'),
    (lambda f: few(tiny(), 'a\0b', 1), 'folder'),
    (lambda f: fit(NET, None, 1, f, 0.1), 'loss'),
    (lambda f: fit(NET, mean, 1, None, 0.1), 'folder'),
    (lambda f: fit(None, mean, 1, f, 0.1), 'model'),
    (lambda f: fit(NET, lambda m, g: 1.0, 1, f, 0.1, **QUIET), 'loss'),
    (lambda f: fit(NET, lambda m, g: m.weight, 1, f, 0.1, **QUIET), 'loss'),
    (lambda f: fit(NET, lambda m, g: m.weight.sum() * math.nan, 1, f, 0.1, **QUIET), 'the loss'),
    (lambda f: _check_data(tiny(), (GREY, LABELS), 33, rank(0, 2)), 'batch_size'),
    (lambda f: synthetic_set(draw, 3, f, None), 'model'),
    (lambda f: synthetic_set(lambda g: torch.zeros(len(g)), 3, f, NET, **QUIET), 'draw'),
    (lambda f: synthetic_set(lambda g: {}, 3, f, NET, **QUIET), 'draw'),
    (lambda f: synthetic_set(lambda g: dict(a=torch.zeros(7)), 3, f, NET, **QUIET), 'draw'),
    (lambda f: synthetic_set(lambda g: dict(a=torch.rand(3) / 0), 3, f, NET, **QUIET), 'draw'),
    (lambda f: fine_tune(tiny(), None, f, 1), 'data'),
    (lambda f: fine_tune(tiny(), (GREY, LABELS), f, 1, lr=X_0), 'lr'),
    (lambda f: fine_tune(tiny(), (GREY, LABELS), f, 1, b'x'), 'batch_size'),
    (lambda f: synthetic_set(None, 3, f, NET), 'draw'),
    (lambda f: few(tiny(), f, 1, accelerator='a'), 'accelerator'),
    (lambda f: few(tiny(), f, 1, save_every=math.nan), 'save_every'),
    (lambda f: few(tiny(), f, 1, save_every=-1), 'save_every'),
    (lambda f: fine_tune(None, (GREY, LABELS), f, 1), 'model'),
]
for o in (0, -1, 1.5, True, 'a'):
    BAD += [
        (lambda f, o=o: synthetic_set(draw, o, f, NET), 'n'),
        (lambda f, o=o: synthetic_set(draw, 3, f, NET, o), 'batch_size'),
        (lambda f, o=o: fine_tune(tiny(), (GREY, LABELS), f, o), 'steps'),
    ]


@pytest.mark.parametrize('call, argument', BAD)
def test_bad_input(tmp_path, call, argument):
    clear_errors.check(lambda: call(tmp_path), argument)


def test_fit_with_other_steps_in_the_same_folder(tmp_path):
    fit(nn.Linear(2, 2), mean, 2, tmp_path, 0.1, **QUIET)
    clear_errors.check(
        lambda: fit(nn.Linear(2, 2), mean, 3, tmp_path, 0.1, **QUIET), 'steps=2, not 3'
    )
