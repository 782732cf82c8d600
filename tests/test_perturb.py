"Perturbed networks: which rows are changed, and that nobody else can notice."

import copy
import pickle
import sys
import threading

import diffusers
import pytest
import torch
from tiny_networks import MAKE, Case, ids, rand, randomized
from torch import nn
from torch.nn import functional as F

from cf_guidance import perturb
from cf_guidance.denoisers import Denoiser
from cf_guidance.perturb import (
    ADAPTERS,
    Applied,
    Change,
    Layers,
    PerturbedDenoiser,
    find_layers,
    find_time_layers,
    part_of_batch,
    perturbed,
    refuse_caches,
)

NAMES = list(MAKE)
pytestmark = pytest.mark.filterwarnings('ignore:.*FluxPosEmbed:FutureWarning')


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def blind(q, k, v, site):
    "Each token of the image attends to itself, and to text"
    n, image = q.shape[-2], site.image_of(q, k)
    allowed = torch.ones(n, n, dtype=torch.bool)
    allowed[image, image] = torch.eye(image.stop - image.start, dtype=torch.bool)
    return site.attend(q, k, v, allowed)


def skipped(x, run, site):
    return site.given()


def doubled(out, site):
    return out * 2


BLIND = Change(None, blind)
SKIP = Change(None, skipped, 'block')


def far(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


class CaseDenoiser(Denoiser):
    "A denoiser around the network of a case"

    def __init__(self, case):
        super().__init__(case.net)
        self.case = case

    def forward(self, x, sigma, **cond):
        rows = (sigma * 10).round().long()
        first = next(iter(self.case.inputs))
        return self.inner_model(**{**self.case.kwargs(rows), first: x}).sample


def asked(case, rows):
    "x and sigma, from which a CaseDenoiser knows the samples"
    return next(iter(case.inputs.values()))[rows], rows / 10


def state(net):
    return {m: dict(m.__dict__) for m in net.modules()}


# which rows


@pytest.mark.parametrize('name', NAMES)
def test_rows(name):
    case = Case(name)
    plain, every = case(), case(net=perturbed(case.net, BLIND))
    assert min(far(a, b) for a, b in zip(every, plain, strict=True)) > 1e-4
    some = case(net=perturbed(case.net, BLIND, rows=[1, 3]))
    assert torch.equal(some[[0, 2, 4, 5]], plain[[0, 2, 4, 5]])
    assert far(some[[1, 3]], every[[1, 3]]) < 1e-5


@pytest.mark.parametrize('rows', [slice(1, 3), [2, 1], torch.tensor([0, 1, 1, 0, 0, 0]).bool()])
def test_ways_to_name_rows(rows):
    case = Case('sd')
    out, plain = case(net=perturbed(case.net, BLIND, rows=rows)), case()
    changed = [not torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
    assert changed == [False, True, True, False, False, False]


@pytest.mark.parametrize('change', [BLIND, SKIP, Change('time_embedding', doubled, 'output')])
def test_no_sample_depends_on_another(change):
    case = Case('sd')
    net = perturbed(case.net, change)
    every = case(net=net)
    for i in range(6):
        assert far(case(slice(i, i + 1), net), every[i : i + 1]) < 1e-4


def test_two_changes_of_one_layer():
    case = Case('sd3')
    mean = Change(None, lambda q, k, v, site: v.mean(-2, keepdim=True).expand_as(v))
    one, two = case(net=perturbed(case.net, BLIND)), case(net=perturbed(case.net, mean))
    net = perturbed(perturbed(case.net, BLIND, rows=[0, 1]), mean, rows=[3])
    out = case(net=net)
    assert far(out[:2], one[:2]) < 1e-5
    assert far(out[3], two[3]) < 1e-5
    assert torch.equal(out[[2, 4, 5]], case()[[2, 4, 5]])


@pytest.mark.parametrize('name', ['sd', 'sd3', 'flux', 'dit'])
def test_a_block_and_a_layer_inside_it(name):
    case = Case(name)
    both = case(net=perturbed(perturbed(case.net, BLIND, rows=[0]), SKIP, rows=[1]))
    assert far(both[0], case(net=perturbed(case.net, BLIND))[0]) < 1e-5
    assert far(both[1], case(net=perturbed(case.net, SKIP))[1]) < 1e-5
    assert far(both[2:], case()[2:]) < 1e-5


def test_an_observing_change_leaves_all_as_it_is():
    case, seen = Case('sd'), []
    look = Change(None, lambda q, k, v, site: seen.append((site.name, site.rows.tolist(), len(q))))
    assert torch.equal(case(net=perturbed(case.net, look, rows=[4, 2])), case())
    assert seen == [('mid_block.attentions.0.transformer_blocks.0.attn1', [2, 4], 2)]


def test_run_of_a_block_is_for_its_rows():
    case, seen = Case('sd'), []

    def twice(x, run, site):
        seen.append(len(x))
        return run(run(x))

    out = case(net=perturbed(case.net, Change(None, twice, 'block'), rows=[0, 5]))
    assert seen == [2]
    assert torch.equal(out[1:5], case()[1:5])
    assert far(out[0], case()[0]) > 1e-6


# rows that join late


def evaluate(case, change, worth_it, monkeypatch, samples=(0, 1, 2), rows=(0, 1, 2, 3, 0, 1, 2)):
    "The rows of some samples, of which the last are perturbed copies of the first"
    monkeypatch.setattr(perturb, '_MIN_POSITIONS_TO_JOIN', worth_it)
    rows, n = torch.tensor(rows), len(samples)
    last = torch.arange(len(rows) - n, len(rows))
    copy_of = torch.arange(len(rows))
    copy_of[last] = torch.arange(n)
    P = PerturbedDenoiser(CaseDenoiser(case))
    x, sigma = asked(case, rows)
    return P(x, sigma, {}, [Applied(change, last, torch.tensor(samples))], copy_of), P.joins


LATE = dict(
    sd='mid_block',
    pixels='mid_block',
    sd3='transformer_blocks.1',
    flux='single_transformer_blocks.0',
    dit='transformer_blocks.1',
)


@pytest.mark.parametrize('name', NAMES)
def test_late_rows_are_full_rows(name, monkeypatch):
    case = Case(name)
    full, text = evaluate(case, BLIND, 10**9, monkeypatch)
    late, joins = evaluate(case, BLIND, 0, monkeypatch)
    assert far(late, full) < 1e-5
    assert far(late[:4], case()[:4]) < 1e-5
    assert far(late[4:], case(net=perturbed(case.net, BLIND))[:3]) < 1e-5
    assert text.startswith('all rows run in full: ')
    assert joins.startswith(
        f'rows join late, at {LATE[name]}' if name in LATE else 'all rows run in full: '
    )


def test_first_block_of_each_architecture(monkeypatch):
    for name, layer in dict(
        sd='down_blocks.0.*', sd3='transformer_blocks.0.*', dit='transformer_blocks.0.*'
    ).items():
        case, change = Case(name), Change(layer, blind)
        late, joins = evaluate(case, change, 0, monkeypatch)
        assert far(late, evaluate(case, change, 10**9, monkeypatch)[0]) < 1e-5
        assert joins.startswith('rows join late')


def test_late_rows_are_saved():
    "The part before the first changed block sees only the rows that are no copies"
    case, rows = Case('sd'), []
    hook = case.net.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    before = perturb._MIN_POSITIONS_TO_JOIN
    try:
        perturb._MIN_POSITIONS_TO_JOIN = 0
        P = PerturbedDenoiser(CaseDenoiser(case))
        x, sigma = asked(case, torch.tensor([0, 1, 0, 1]))
        change = Applied(BLIND, torch.tensor([2, 3]), torch.arange(2))
        P(x, sigma, {}, [change], torch.tensor([0, 1, 0, 1]))
    finally:
        perturb._MIN_POSITIONS_TO_JOIN = before
        hook.remove()
    assert rows == [2]


@pytest.mark.parametrize('layers', ['down_blocks.*', 'mid_block.*', 'up_blocks.*'])
@pytest.mark.parametrize('kind', ['control', 'adapter'])
def test_residuals_of_other_networks(layers, kind, monkeypatch):
    "ControlNet's and T2I-Adapter's are added between blocks"
    case = Case('sd')
    shapes = [(16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6)]
    down = [rand(6, *s, seed=i) for i, s in enumerate(shapes)]
    forward = case.kwargs

    def kwargs(rows=slice(None)):
        if kind == 'adapter':
            more = dict(down_intrablock_additional_residuals=[down[1][rows], down[3][rows]])
        else:
            more = dict(
                down_block_additional_residuals=[o[rows] for o in down],
                mid_block_additional_residual=down[3][rows],
            )
        return {**forward(rows), **more}

    case.kwargs = kwargs
    change = Change(layers, blind)
    full, _ = evaluate(case, change, 10**9, monkeypatch)
    late, joins = evaluate(case, change, 0, monkeypatch)
    assert far(late, full) < 1e-5
    saved = layers == 'up_blocks.*' or (layers == 'mid_block.*' and kind == 'control')
    assert joins.startswith('rows join late') == saved


def test_ip_adapter(monkeypatch):
    "Its image embeddings are in a list, and go to the blocks in a tuple with the text"
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    case = Case('sd')
    net, attn2 = case.net, find_layers(case.net, lambda n, m: n.endswith('attn2'))
    processors = {}
    for name, m in find_layers(
        net, lambda n, m: n.rpartition('.')[2] in ('attn1', 'attn2')
    ).items():
        width = m.to_q.in_features
        own = IPAdapterAttnProcessor2_0(width, 16, (2,)) if name in attn2 else AttnProcessor2_0()
        processors[f'{name}.processor'] = own
    net.set_attn_processor(processors)
    net.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, 16, 2)])
    net.register_to_config(encoder_hid_dim_type='ip_image_proj')
    randomized(net)
    images, forward = rand(6, 1, 16, seed=5), case.kwargs
    case.kwargs = lambda rows=slice(None): {
        **forward(rows),
        'added_cond_kwargs': dict(image_embeds=[images[rows]]),
    }
    full, _ = evaluate(case, BLIND, 10**9, monkeypatch)
    late, joins = evaluate(case, BLIND, 0, monkeypatch)
    assert joins.startswith('rows join late')
    assert far(late, full) < 1e-5


def test_a_table_with_as_many_rows_as_samples(monkeypatch):
    "Rotary embeddings of 29 tokens, for 29 rows of which 28 run from the start"
    case = Case('flux')
    case.inputs = {
        k: v if k.endswith('_ids') else v[:1].expand(29, *v.shape[1:])
        for k, v in case.inputs.items()
    }
    rows = [0] * 30
    for n in (29, 30):
        late, joins = evaluate(case, BLIND, 0, monkeypatch, (0,), rows[:n])
        assert far(late, evaluate(case, BLIND, 10**9, monkeypatch, (0,), rows[:n])[0]) < 1e-5
        assert joins.startswith('rows join late')


def test_parts_of_a_batch(monkeypatch):
    case = Case('sd')
    want, _ = evaluate(case, BLIND, 0, monkeypatch)
    whole = CaseDenoiser.forward

    def in_parts(self, x, sigma, **cond):
        out = []
        for s in (slice(0, 3), slice(3, 5), torch.tensor([5, 6])):
            with part_of_batch(s):
                out.append(whole(self, x[s], sigma[s], **cond))
        return torch.cat(out)

    monkeypatch.setattr(CaseDenoiser, 'forward', in_parts)
    for worth_it in (0, 10**9):
        assert far(evaluate(case, BLIND, worth_it, monkeypatch)[0], want) < 1e-5


def test_parts_nobody_has_told_about(monkeypatch):
    case = Case('sd')
    whole = CaseDenoiser.forward
    halves = lambda self, x, sigma: torch.cat([whole(self, x[:3], sigma[:3])] * 2)  # noqa: E731
    monkeypatch.setattr(CaseDenoiser, 'forward', halves)
    with pytest.raises(RuntimeError, match='gave its network 3 rows for 7'):
        evaluate(case, BLIND, 0, monkeypatch)


# nobody can notice


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('change', [BLIND, SKIP])
def test_the_network_is_not_touched(name, change):
    case = Case(name)
    if name == 'pixels' and change is SKIP:  # its attention is not in a block
        return
    own, plain = state(case.net), case()
    net = perturbed(case.net, change)
    out = case(net=net)
    assert state(case.net) == own
    assert torch.equal(case(), plain)
    assert torch.equal(case(net=net), out)
    assert {id(p) for p in net.parameters()} == {id(p) for p in case.net.parameters()}


def test_errors_and_interrupts_leave_nothing():
    for error in (KeyError, KeyboardInterrupt):
        case = Case('sd')
        own, plain = state(case.net), case()

        def breaks(q, k, v, site, error=error):
            raise error('in the middle')

        net = perturbed(case.net, Change(None, breaks))
        with pytest.raises(error):
            case(net=net)
        assert state(case.net) == own
        assert torch.equal(case(), plain)
        assert (perturb._thread.call, perturb._thread.parts) == (None, ())


def test_weights_are_shared_and_live():
    case = Case('sd')
    net = perturbed(case.net, BLIND)
    for p in case.net.parameters():
        p.data = p.data * 1.1
    assert torch.equal(case(net=net), case(net=perturbed(case.net, BLIND)))
    case.net.double()
    case.inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    assert case(net=net).dtype == torch.float64


def test_threads():
    case = Case('sd')
    nets = [case.net, perturbed(case.net, BLIND), perturbed(case.net, SKIP, rows=[0, 2])]
    want, got = [case(net=net) for net in nets], [[], [], []]

    def work(i):
        with torch.no_grad():
            got[i] += [case(net=nets[i]) for _ in range(10)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    sys.setswitchinterval(before)
    assert [len(o) for o in got] == [10] * 3
    for a, bs in zip(want, got, strict=True):
        assert all(torch.equal(a, b) for b in bs)


def test_one_perturbed_network_in_two_threads():
    case = Case('sd')
    net = perturbed(case.net, BLIND)
    want, got = [case(slice(0, 2), net), case(slice(2, 6), net)], [[], []]

    def work(i, rows):
        with torch.no_grad():
            got[i] += [case(rows, net) for _ in range(10)]

    threads = [
        threading.Thread(target=work, args=(i, [slice(0, 2), slice(2, 6)][i])) for i in (0, 1)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, bs in zip(want, got, strict=True) for b in bs)


def test_copies_and_pickles():
    case = Case('sd')
    net = perturbed(case.net, Change(None, blind))
    out = case(net=net)
    assert torch.equal(case(net=copy.deepcopy(net)), out)
    assert torch.equal(case(net=pickle.loads(pickle.dumps(net))), out)
    P = PerturbedDenoiser(Denoiser(case.net))
    assert copy.deepcopy(P).joins == ''


def test_isinstance_and_attributes():
    case = Case('sd')
    net = perturbed(case.net, BLIND)
    layer = net.mid_block.attentions[0].transformer_blocks[0].attn1
    assert type(net) is type(case.net)
    assert isinstance(layer, type(case.net.mid_block.attentions[0].transformer_blocks[0].attn1))
    assert layer.heads == 2 and net.config is case.net.config
    assert net.conv_in is case.net.conv_in


def test_users_hooks_run():
    case, seen = Case('sd'), []
    layer = case.net.mid_block.attentions[0].transformer_blocks[0]
    for m in (layer.attn1, layer, case.net.mid_block, case.net):
        m.register_forward_hook(lambda m, a, out: seen.append(type(m).__name__))
    case(net=perturbed(case.net, BLIND))
    names = [
        'Attention',
        'BasicTransformerBlock',
        'UNetMidBlock2DCrossAttn',
        'UNet2DConditionModel',
    ]
    assert seen == names


def test_random_state_and_modes():
    case = Case('sd')
    net, before = perturbed(case.net, BLIND), torch.get_rng_state()
    out = case(net=net)
    with torch.inference_mode():
        assert torch.equal(case(net=net), out)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.enable_grad():
        case.inputs['sample'].requires_grad_()
        (g,) = torch.autograd.grad(case(net=net).pow(2).sum(), case.inputs['sample'])
    assert torch.isfinite(g).all()


# hooks, offload, caches, compilers


def test_hooks_of_accelerate():
    from accelerate import cpu_offload, cpu_offload_with_hook

    want = Case('sd')(net=perturbed(Case('sd').net, BLIND))
    for offload in (cpu_offload, cpu_offload_with_hook):
        case = Case('sd')
        offload(case.net, 'cpu')
        own = {m: m.__dict__.get('forward') for m in case.net.modules()}
        for change in (BLIND, Change('mid_block.*', blind)):
            assert torch.equal(case(net=perturbed(case.net, change)), want)
        assert {m: m.__dict__.get('forward') for m in case.net.modules()} == own


def test_hooks_of_diffusers():
    from diffusers.hooks import apply_group_offloading

    want = Case('sd3')(net=perturbed(Case('sd3').net, BLIND))
    for offload in ('block_level', 'leaf_level'):
        case = Case('sd3')
        apply_group_offloading(
            case.net,
            onload_device=torch.device('cpu'),
            offload_device=torch.device('cpu'),
            offload_type=offload,
            num_blocks_per_group=1 if offload == 'block_level' else None,
        )
        assert torch.equal(case(net=perturbed(case.net, BLIND)), want)


def test_layerwise_casting():
    case = Case('sd3')
    case.net.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    plain = case()
    out = case(net=perturbed(case.net, BLIND, rows=[0]))
    assert far(out[1:], plain[1:]) < 1e-5
    assert far(out[0], plain[0]) > 1e-3


def test_caches_are_refused():
    at = dict(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    settings = dict(
        FirstBlockCache=dict(threshold=0.5), PyramidAttentionBroadcast=at, FasterCache=at
    )
    configs = {
        name: getattr(diffusers, f'{name}Config')(**kw)
        for name, kw in settings.items()
        if hasattr(diffusers, f'{name}Config')
    }
    assert configs
    for name, config in configs.items():
        case = Case('flux')
        refuse_caches(case.net)
        case.net.enable_cache(config)
        for f in (refuse_caches, lambda net: perturbed(net, BLIND)):
            with pytest.raises(RuntimeError, match=f'{name} is on.*disable_cache'):
                f(case.net)
        case.net.disable_cache()
        refuse_caches(case.net)


def test_a_forward_that_somebody_replaced():
    case = Case('sd')
    own = case.net.mid_block.forward
    case.net.mid_block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(RuntimeError, match='mid_block: its forward was replaced'):
        perturbed(case.net, BLIND)
    perturbed(case.net, Change('up_blocks.*', blind))


def test_a_changed_layer_with_a_replaced_forward():
    case = Case('sd')
    want = case(net=perturbed(case.net, BLIND))
    layer = case.net.mid_block.attentions[0].transformer_blocks[0].attn1
    own, calls = layer.forward, []
    layer.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    assert torch.equal(case(net=perturbed(case.net, BLIND)), want)
    assert calls == [1]


def test_gradient_checkpointing():
    case = Case('sd')
    case.net.enable_gradient_checkpointing()
    net = perturbed(case.net, BLIND)
    with torch.enable_grad(), pytest.raises(RuntimeError, match='gradient checkpointing'):
        case(net=net)
    assert case(net=net).shape == case.inputs['sample'].shape


@pytest.mark.parametrize('how', ['wrapped', 'in place', 'its blocks', 'fullgraph'])
def test_compiled(how):
    "A compiled network stays compiled, but for the changed layer, and is not compiled again"
    torch._dynamo.reset()
    case = Case('dit')
    want, plain = case(net=perturbed(case.net, BLIND)), case()
    graphs, runs = [], []

    def backend(gm, inputs):
        graphs.append(gm)
        return lambda *args: runs.append(1) or gm.forward(*args)

    net = case.net
    if how == 'in place':
        net.compile(backend=backend)
    elif how == 'its blocks':
        for block in net.transformer_blocks:
            block.compile(backend=backend)
    else:
        net = torch.compile(net, backend=backend, fullgraph=how == 'fullgraph')
    assert far(case(net=net), plain) < 1e-5
    assert runs
    assert far(case(net=perturbed(net, BLIND)), want) < 1e-5
    compiled, evaluated = len(graphs), len(runs)
    for _ in range(2):  # another shadow of the same network
        assert far(case(net=perturbed(net, BLIND)), want) < 1e-5
    assert len(graphs) == compiled
    assert len(runs) > evaluated
    assert far(case(net=net), plain) < 1e-5
    assert len(graphs) == compiled


def test_compiled_from_outside():
    torch._dynamo.reset()
    case = Case('dit')
    net = perturbed(case.net, BLIND)
    with pytest.raises(RuntimeError, match='compile the network, not what guides or perturbs it'):
        case(net=torch.compile(net, backend='eager'))
    assert case(net=net).shape == (6, 4, 8, 8)


# other attention


class SmallAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, context=None):
        q = self.qkv(x).chunk(3, -1)[0]
        _, k, v = self.qkv(x if context is None else context).chunk(3, -1)
        q, k, v = (o.unflatten(-1, (2, 4)).transpose(1, 2) for o in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnNet(nn.Module):
    "A network of one's own: pixels as tokens"

    def __init__(self, attention, context=None):
        super().__init__()
        self.proj, self.attn, self.context = nn.Linear(3, 8), attention, context

    def forward(self, x, t=None):
        h = self.proj(x.flatten(2).mT)
        more = () if self.context is None else (torch.ones(len(x), self.context, 8),)
        h = h + self.attn(h, *more)
        return h.mT.unflatten(2, x.shape[2:])


def test_own_network():
    net, x = randomized(OwnNet(SmallAttention())), rand(3, 3, 2, 5)
    grids = []
    look = Change(None, lambda q, k, v, site: grids.append((site.grid(10), site.image(10))))
    perturbed(net, look)(x)
    assert grids == [((2, 5), slice(0, 10))]
    assert far(perturbed(net, BLIND)(x), net(x)) > 1e-3
    assert 'OwnNet' in PerturbedDenoiser(net)._new_shadow(0, [Applied(BLIND, [0], [0])])[1].why


@pytest.mark.parametrize('tokens', [10, 7])
def test_cross_attention_is_refused(tokens):
    class CrossNet(OwnNet):
        pass

    net = randomized(CrossNet(SmallAttention(), tokens))
    with pytest.raises(ValueError, match=f'10 tokens attend to {tokens} tokens of another seq'):
        perturbed(net, BLIND)(rand(3, 3, 2, 5))


class Encoder(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.proj = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **kw)
        self.first = kw.get('batch_first', False)

    def forward(self, x, t=None):
        h = self.proj(x.flatten(2).mT)
        h = self.layer(h) if self.first else self.layer(h.transpose(0, 1)).transpose(0, 1)
        return h


@pytest.mark.parametrize('batch_first', [True, False])
def test_multihead_attention(batch_first):
    net, x = randomized(Encoder(batch_first=batch_first)), rand(4, 3, 2, 5)
    look = Change('layer.self_attn', lambda q, k, v, site: None)
    assert far(perturbed(net, look)(x), net(x)) < 1e-5
    some = perturbed(net, Change('layer.self_attn', blind), rows=[1])(x)
    assert far(some[[0, 2, 3]], net(x)[[0, 2, 3]]) < 1e-5
    assert far(some[1], net(x)[1]) > 1e-3


def test_attention_that_does_not_call_the_function():
    from diffusers.models.attention_processor import AttnProcessor

    case = Case('sd')
    case.net.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match='AttnProcessor does not call scaled_dot_product_att'):
        case(net=perturbed(case.net, BLIND))


class PlainAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT / 8**0.5).softmax(-1) @ x


def test_adapters(monkeypatch):
    net, x = randomized(OwnNet(PlainAttention())), rand(2, 3, 2, 5)
    with pytest.raises(RuntimeError, match=r'give ADAPTERS\[PlainAttention\]'):
        perturbed(net, BLIND)(x)
    monkeypatch.setitem(ADAPTERS, PlainAttention, lambda m, attend, x: attend(x, x, x))
    assert far(perturbed(net, Change(None, lambda q, k, v, site: None))(x), net(x)) < 1e-5
    assert far(perturbed(net, Change(None, lambda q, k, v, site: v))(x), net(x)) > 1e-3


# Mochi, whose processor calls the attention for one sample after the other


def mochi():
    "A network, and a function that evaluates some of three samples with texts of 5, 1 and 0 tokens"
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4)
    sizes |= dict(pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4)
    net = randomized(diffusers.MochiTransformer3DModel(**sizes))
    inputs = rand(3, 4, 2, 4, 6), rand(3, 5, 16), torch.tensor([900.0, 500.0, 100.0])
    mask = torch.arange(5) < torch.tensor([[5], [1], [0]])

    def ask(net, rows=slice(None)):
        x, text, t = (o[rows].to(net.dtype) for o in inputs)
        return net(x, text, t, mask[rows]).sample.float()

    return net, ask


def test_a_pool_of_a_text_is_no_self_attention():
    net, _ = mochi()
    assert all(n.startswith('transformer_blocks') for n in find_layers(net, '*'))


def own_values(q, k, v, site):
    "Each token of the image attends to itself alone"
    out, image = site.attend(q, k, v), site.image_of(q, k)
    out[:, :, image] = v[:, :, image]
    return out


ANY_CAST = pytest.mark.filterwarnings('ignore:[\\s\\S]*utocast')


@ANY_CAST
def test_mochi_with_a_change_that_changes_nothing():
    net, ask = mochi()
    change = Change('*.attn1', lambda q, k, v, site: None)
    assert far(ask(perturbed(net, change)), ask(net)) < 1e-5
    half = net.bfloat16()
    assert far(ask(perturbed(half, change)), ask(half)) < 0.02


@ANY_CAST
def test_mochi_attends_to_all_samples_at_once(monkeypatch):
    net, ask = mochi()
    layer = 'transformer_blocks.1.attn1'
    got, plain = ask(perturbed(net, Change(layer, own_values), rows=[0, 2])), ask(net)
    module, own = net.transformer_blocks[1].attn1, F.scaled_dot_product_attention

    def alone(q, k, v, **kwargs):
        out = own(q, k, v, **kwargs)
        if inside:
            out[:, :, :12] = v[:, :, :12]
        return out

    inside = []
    module.register_forward_pre_hook(lambda m, args: inside.append(m))
    module.register_forward_hook(lambda m, args, out: inside.clear())
    monkeypatch.setattr(F, 'scaled_dot_product_attention', alone)
    for i in (0, 2):
        assert far(got[i], ask(net, slice(i, i + 1))[0]) < 1e-5
        assert far(got[i], plain[i]) > 1e-3
    assert far(got[1], plain[1]) < 1e-5


@ANY_CAST
def test_mochi_with_padding_before_the_text_is_refused():
    net, _ = mochi()
    mask = torch.tensor([[False, True, True, True, True]])
    args = rand(1, 4, 2, 4, 6), rand(1, 5, 16), torch.tensor([900.0]), mask
    with pytest.raises(ValueError, match='expected padding after the text only'):
        perturbed(net, Change('*.attn1', own_values))(*args)


@ANY_CAST
def test_mochi_with_a_processor_of_your_own_has_one_row():
    net, ask = mochi()
    attn = net.transformer_blocks[0].attn1
    attn.processor = type('Own', (type(attn.processor),), {})()
    with pytest.raises(RuntimeError, match='expected one row per sample .3., got 1'):
        ask(perturbed(net, Change('*.0.attn1', own_values)))


# tokens of the image


FLUX = dict(
    num_layers=1,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    in_channels=4,
    joint_attention_dim=16,
)
JOINT = dict(
    Flux2Transformer2DModel=dict(
        timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, **FLUX
    ),
    ChromaTransformer2DModel=dict(
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
        **FLUX,
    ),
    AuraFlowTransformer2DModel=dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    CogView4Transformer2DModel=dict(
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    ),
)


def joint_network(name):
    "A network with joint attention, if this version of diffusers has it"
    if not hasattr(diffusers, name):
        pytest.skip(f'diffusers {diffusers.__version__} has no {name}')
    return randomized(getattr(diffusers, name)(**JOINT[name]))


def ask_joint(name, net, n=1):
    "The output for `n` samples with 16 tokens of image and 5 of text"
    h, x, e = rand(n, 16, 4), rand(n, 4, 8, 8), rand(n, 5, 16)
    t, mask = torch.full((n,), 0.5), torch.ones(n, 21, dtype=torch.bool)
    if name == 'CogView4Transformer2DModel':
        one = torch.full((n, 2), 8)
        return net(x, e, t * 1000, one, one, one * 0).sample
    if name == 'AuraFlowTransformer2DModel':
        return net(x, e, t).sample
    four = name == 'Flux2Transformer2DModel'
    more = dict(img_ids=ids(4, 4, axes=3 + four), txt_ids=torch.zeros(5, 3 + four))
    if not four:
        more['attention_mask'] = mask
    return net(hidden_states=h, encoder_hidden_states=e, timestep=t, **more).sample


@pytest.mark.parametrize('name', JOINT)
def test_text_is_not_taken_for_image(name):
    net, count, seen = joint_network(name), 16, []

    def spy(q, k, v, site):
        n = q.shape[-2]
        seen.append((n, site.image(n), site.grid(n)))
        return blind(q, k, v, site)

    out = ask_joint(name, perturbed(net, Change(None, spy)))
    n, image, grid = seen[0]
    assert n > count and image == slice(n - count, n) and grid == (4, 4)
    told = Change(None, blind, tokens=lambda n: (slice(n - count, n), (4, 4)))
    assert torch.equal(out, ask_joint(name, perturbed(net, told)))


def test_unknown_joint_attention():
    case = Case('sd3')
    case.net.__class__ = type('MyTransformer', (type(case.net),), {})
    with pytest.raises(
        ValueError, match='which of the 29 tokens are the image is not known for My'
    ):
        case(net=perturbed(case.net, BLIND))
    told = Change(None, blind, tokens=lambda n: (slice(0, 24), (4, 6)))
    assert case(net=perturbed(case.net, told)).shape == (6, 4, 8, 12)


@pytest.mark.parametrize('name,image', [('sd3', slice(0, 24)), ('flux', slice(5, 29))])
def test_known_joint_attention(name, image):
    case, seen = Case(name), []
    layers = ['transformer_blocks.0.attn']
    layers += ['single_transformer_blocks.1.attn'] if name == 'flux' else []
    look = Change(layers, lambda q, k, v, site: seen.append((site.image(29), site.grid(29))))
    case(net=perturbed(case.net, look))
    assert seen == [(image, (4, 6))] * len(layers)


# skipped blocks


SKIPPED = [
    ('CogView4Transformer2DModel', 'transformer_blocks.1'),
    ('AuraFlowTransformer2DModel', 'joint_transformer_blocks.0'),
    ('sd3', 'transformer_blocks.0'),
    ('flux', 'transformer_blocks.0'),
    ('flux', 'single_transformer_blocks.0'),
    ('Flux2Transformer2DModel', 'transformer_blocks.0'),
    ('ChromaTransformer2DModel', 'transformer_blocks.0'),
]


@pytest.mark.parametrize('what,layer', SKIPPED)
def test_a_skipped_block_gives_back_what_it_was_given(what, layer):
    case = None if what in JOINT else Case(what)
    net = joint_network(what) if case is None else case.net

    def ask(net):
        return ask_joint(what, net, 3) if case is None else case(slice(0, 3), net)

    ((name, block),) = find_layers(net, layer, 'block').items()
    given = []

    def passes(*args, **kwargs):
        "The block by hand: its inputs in the order of its outputs"
        out = own(*args, **kwargs)
        named = perturb._named_arguments(block, args, kwargs)
        given.append(name)
        if torch.is_tensor(out):  # single blocks of the oldest diffusers
            return named['hidden_states']
        both = named['hidden_states'], named['encoder_hidden_states']
        first = [o.shape == both[0].shape for o in out]
        assert sorted(first) == [False, True]
        return both if first[0] else both[::-1]

    own = block.forward
    block.forward = passes
    want = ask(net)
    del block.forward
    change = Change(layer, skipped, 'block')
    assert torch.equal(ask(perturbed(net, change)), want)
    some = ask(perturbed(net, change, rows=[1]))
    assert far(some[1], want[1]) < 1e-5
    assert far(some[[0, 2]], ask(net)[[0, 2]]) < 1e-5
    assert given == [name]


class TwoOutputs(nn.Module):
    "A block of its own kind"

    def __init__(self):
        super().__init__()
        self.attn = SmallAttention()

    def forward(self, x):
        return self.attn(x), x


class TupleNet(nn.Module):
    def __init__(self, shape=False):
        super().__init__()
        self.block, self.proj = TwoOutputs(), nn.Linear(3, 8)

    def forward(self, x, t=None):
        a, b = self.block(self.proj(x.flatten(2).mT))
        return a + b


def test_an_unknown_tuple_is_refused():
    with pytest.raises(ValueError, match='which inputs a skipped TwoOutputs returns'):
        perturbed(randomized(TupleNet()), Change('block', skipped, 'block'))(rand(2, 3, 2, 5))


# bad input

SD = Case('sd')
X = torch.zeros(2, 1, 8, 12)
BAD = {
    'no network': (lambda: find_layers(lambda x: x), TypeError, 'net: expected an nn.Module'),
    'a class': (lambda: find_layers(nn.Linear), TypeError, 'got the class Linear'),
    'kind': (lambda: find_layers(SD.net, kind='head'), ValueError, 'kind: expected one of att'),
    'nothing': (lambda: find_layers(SD.net, 'mid'), ValueError, "'mid' matches nothing in UNet2D"),
    'no attention': (lambda: find_layers(nn.Linear(1, 1)), ValueError, 'it has no attentions'),
    'empty': (lambda: find_layers(SD.net, []), ValueError, 'expected at least one layer'),
    'number': (lambda: find_layers(SD.net, 7), TypeError, 'layers: expected a name.*got 7'),
    'one of two': (
        lambda: find_layers(SD.net, ['mid_block.*', 'nope']),
        ValueError,
        "layers='nope' matches nothing",
    ),
    'other kind': (
        lambda: find_layers(SD.net, find_layers(SD.net), 'block'),
        ValueError,
        "expected layers of kind 'block', got 'attention'",
    ),
    'time': (lambda: find_time_layers(nn.Linear(1, 1)), ValueError, 'matches nothing in Linear'),
    'time number': (lambda: find_time_layers(SD.net, [3]), TypeError, 'layers: expected a name'),
    'no change': (lambda: perturbed(SD.net), TypeError, 'expected one Change or more, got none'),
    'a function': (lambda: perturbed(SD.net, blind), TypeError, 'got function'),
    'fn': (lambda: Change(None, None), TypeError, 'fn: expected a function, got NoneType'),
    'fn text': (lambda: Change(None, 'a'), TypeError, 'fn: expected a function, got str'),
    'change kind': (lambda: Change(None, blind, 'a'), ValueError, 'kind: expected one of'),
    'tokens': (lambda: Change(None, blind, tokens=5), TypeError, 'tokens: expected a function'),
    'other network': (
        lambda: perturbed(
            SD.net, Change(find_layers(Case('sd').net), blind), Change(find_layers(SD.net), blind)
        ),
        ValueError,
        'layers: expected layers of the UNet2DConditionModel inside',
    ),
    'rows text': (
        lambda: SD(net=perturbed(SD.net, BLIND, rows='a')),
        ValueError,
        'rows: expected a sl',
    ),
    'rows bools': (lambda: SD(net=perturbed(SD.net, BLIND, rows=[True])), ValueError, 'for 6 rows'),
    'rows number': (lambda: SD(net=perturbed(SD.net, BLIND, rows=5.5)), ValueError, 'got 5.5'),
    'rows beyond': (
        lambda: SD(net=perturbed(SD.net, BLIND, rows=[9])),
        ValueError,
        'rows: expected',
    ),
    'shape': (
        lambda: SD(net=perturbed(SD.net, Change(None, lambda q, k, v, site: v[..., :1]))),
        ValueError,
        r'expected fn to return \(6, 2, 24, 16\), got \(6, 2, 24, 1\)',
    ),
    'no tensor': (
        lambda: SD(net=perturbed(SD.net, Change(None, lambda q, k, v, site: 3))),
        ValueError,
        'expected fn to return .* got int',
    ),
    'block gives nothing': (
        lambda: SD(net=perturbed(SD.net, Change(None, lambda x, run, site: None, 'block'))),
        ValueError,
        'expected fn to return .* got NoneType',
    ),
    'nan': (
        lambda: SD(net=perturbed(SD.net, Change(None, lambda q, k, v, site: v * float('nan')))),
        FloatingPointError,
        'not finite',
    ),
    'output': (
        lambda: SD(net=perturbed(SD.net, Change('mid_block', lambda o, site: o[:1], 'output'))),
        ValueError,
        'mid_block: expected fn to return',
    ),
    'output of a tuple': (
        lambda: SD(net=perturbed(SD.net, Change('down_blocks.0', doubled, 'output'))),
        ValueError,
        'down_blocks.0: expected an output with one row per sample, got tuple',
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, error, says = BAD[what]
    with pytest.raises(error, match=says) as e:
        f()
    assert len(str(e.value)) < 200


def test_a_layer_that_does_not_run():
    class Lazy(OwnNet):
        def forward(self, x, t=None):
            return x

    with pytest.raises(RuntimeError, match='attn: did not run'):
        perturbed(Lazy(SmallAttention()), BLIND)(rand(2, 3, 2, 5))


def test_names():
    case = Case('sd')
    one = find_layers(case.net)
    assert isinstance(one, Layers)
    assert list(one) == ['mid_block.attentions.0.transformer_blocks.0.attn1']
    assert repr(one) == 'mid_block.attentions.0.transformer_blocks.0.attn1: Attention'
    assert find_layers(case.net, one) is one
    assert list(pickle.loads(pickle.dumps(one))) == list(one)
    both = find_layers(case.net, lambda n, m: n.endswith('attn2') and 'mid' in n)
    assert list(both) == ['mid_block.attentions.0.transformer_blocks.0.attn2']
    assert list(find_layers(Case('sd3').net)) == ['transformer_blocks.1.attn']
    assert list(find_time_layers(case.net)) == ['time_embedding']
    assert list(find_time_layers(Case('dit').net)) == [
        f'transformer_blocks.{i}.norm1.emb.timestep_embedder' for i in range(3)
    ]


@pytest.mark.parametrize('rows', ['a', 5.5, [0.5], [None], {}])
def test_rows_that_cannot_be_chosen(rows):
    "They are refused at once, not at the first call."
    with pytest.raises(ValueError, match='rows: expected a slice, numbers of rows or one bool'):
        perturbed(Case('sd').net, BLIND, rows=rows)
