"""Around the build: samples that read each other, graphs that are not their model, models that changed, threads."""

from __future__ import annotations

import contextlib
import math
import threading
import types

import pytest
import torch
from soundness import assert_sound
from torch import nn
from torch.nn import functional as F

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, register, unregister
from lirpa_ext.errors import InvalidInputError, LirpaExtError, TraceError, TrainModeError, UnsupportedNodeError
from lirpa_ext.module.changes import Snapshot
from lirpa_ext.module.samples import check_samples_apart
from lirpa_ext.module.tracing import traceable_copy


def ball(x, eps=0.1, norm=2, **data_range):
    return BoundedTensor(x, PerturbationLpNorm(eps, norm, **data_range))


class Then(nn.Module):
    """A dense layer, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.dense, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.dense(x))


class First(nn.Module):
    """The first output of a layer that takes a sequence, (B, T, 4) if batches come first."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        output = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return output[0] if isinstance(output, tuple) else output


def bound(model, x, method="bcp", eps=0.1, norm=2):
    return BoundedModule(model, x).compute_bounds(x=(ball(x, eps, norm),), method=method)


# --- samples that read each other --------------------------------------------------------------------------------

MIXING = {
    "flip": lambda y: y.flip(0),
    "roll": lambda y: y.roll(1, 0),
    "roll by two": lambda y: y + y.roll(2, 0),
    "cumsum": lambda y: y.cumsum(0),
    "sort": lambda y: y.sort(0)[0],
    "softmax": lambda y: y.softmax(0),
    "log_softmax": lambda y: y.log_softmax(0),
    "mean": lambda y: y - y.mean(0, keepdim=True),
    "max": lambda y: y - y.amax(0, keepdim=True),
    "min": lambda y: y - y.min(0)[0],
    "sum": lambda y: y.sum(0, keepdim=True).expand_as(y),
    "sum of all": lambda y: y * y.sum(),
    "norm": lambda y: y / y.norm(dim=0),
    "first": lambda y: y - y[:1],
    "last": lambda y: y - y[-1],
    "expand": lambda y: y[:1].expand(len(y), -1),
    "index": lambda y: y[torch.arange(len(y) - 1, -1, -1)],
    "order of values": lambda y: y[y[:, 0].argsort()],
    "gram": lambda y: y @ y.t(),
    "transposed": lambda y: y.t(),
    "transposed back by reshape": lambda y: y.t().reshape(y.shape),
    "repeat": lambda y: y.repeat(2, 1),
    "cat": lambda y: torch.cat([y, y], 0),
    "stack": lambda y: torch.stack([y, y], 0),
    "merged and split otherwise": lambda y: y.reshape(2, -1).t().reshape(y.shape),
    "merged with features": lambda y: y.reshape(-1, 2),
    "too few": lambda y: y[:1],
    "a tiny share": lambda y: y - 1e-9 * y.mean(0),
    "a share that is 0 now": lambda y: y + 0.0 * y.flip(0),
    "through a comparison": lambda y: torch.where(y > y.nan_to_num().mean(0), y, 0 * y),
    "a branch on all samples": lambda y: y if y.sum() > 0 else 2 * y,
    "a number read from all samples": lambda y: y * float(y.detach().abs().max()),
    "place in the batch": lambda y: y * torch.arange(1, len(y) + 1).to(y).unsqueeze(1),
}


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 20])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_read_each_other_are_refused(name, batch):
    """Whatever the number of samples in the example, and before any trace."""
    with pytest.raises(TraceError, match=r"samples of a batch read each other|axis is not the batch's|place in the"):
        BoundedModule(Then(MIXING[name]), torch.randn(batch, 4))


@pytest.mark.parametrize("norm", [torch.softmax, torch.log_softmax], ids=["softmax", "log_softmax"])
def test_a_softmax_over_the_batch_is_refused_where_no_output_shows_it(norm):
    x = torch.randn(4, 4)
    with pytest.raises((TraceError, UnsupportedNodeError), match=r"axis 0, the batch's|moves the batch"):
        module = BoundedModule(Then(lambda y: norm(nn.functional.pad(y, (-4, 4)), 0)), x)
        module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.1)),), method="IBP")  # 0.3 transposes


SEQUENCES = {
    "rnn": lambda first: nn.RNN(4, 4, batch_first=first),
    "lstm": lambda first: nn.LSTM(4, 4, batch_first=first),
    "gru": lambda first: nn.GRU(4, 4, batch_first=first),
    "attention": lambda first: nn.MultiheadAttention(4, 2, batch_first=first),
    "encoder": lambda first: nn.TransformerEncoderLayer(4, 2, 8, batch_first=first),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SEQUENCES)
def test_layers_that_take_the_sequence_first_are_refused(name, batch):
    x = torch.randn(batch, 3, 4)
    with pytest.raises(TraceError, match=r"read each other in First, first at .*batch_first=True"):
        BoundedModule(First(SEQUENCES[name](False)).eval(), x)
    check_samples_apart(First(SEQUENCES[name](True)).eval(), (x,))


def test_batch_norm_by_hand_and_without_statistics():
    x = torch.randn(3, 4)
    with pytest.raises(TraceError, match="read each other in Then, first at batch_norm"):
        BoundedModule(Then(lambda y: F.batch_norm(y, None, None, training=True)), x)
    with pytest.raises(TrainModeError):
        BoundedModule(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(), x)


APART = {
    "softmax": lambda y: y.softmax(1),
    "sort": lambda y: y.sort(1)[0],
    "merged and split again": lambda y: torch.relu(y.view(len(y) * 2, 2)).view(len(y), 4),
    "transposed twice": lambda y: torch.relu(y.t()).t(),
    "stacked in front": lambda y: torch.stack([y, 2 * y], 0)[1],
    "one number": lambda y: y.sum(1),
    "undefined": lambda y: y.log(),
    "infinite": lambda y: 1 / (0 * y),
    "cancelling": lambda y: (1e6 * y + 1) - 1e6 * y,
    "rounding alone": lambda y: torch.stack([(y - 1e3).sum(1) - y.sum(1) + 4e3, y.sum(1)], 1),
    "checked for NaN": lambda y: y if y.isfinite().all() else y / 0,
    "whole numbers": lambda y: (y > 0).long(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 5, 20])
@pytest.mark.parametrize("name", APART)
def test_samples_that_are_apart_pass(name, batch, dtype):
    x = torch.randn(batch, 4, dtype=dtype)
    check_samples_apart(Then(APART[name]).to(dtype), (x,))


def test_a_model_of_single_samples_works_as_such():
    model, x = nn.Sequential(Then(lambda y: y.view(1, 2, 2)), nn.Flatten(), nn.Linear(4, 3)), torch.randn(1, 4)
    lower, upper = bound(model, x)
    points = [model(x + 0.1 * F.normalize(torch.randn(1, 4), dim=1)) for _ in range(200)]
    assert all((value >= lower).all() and (value <= upper).all() for value in points)
    with pytest.raises(TraceError):
        BoundedModule(model, torch.randn(2, 4))


def test_a_batch_size_that_is_built_in_is_named():
    with pytest.raises(TraceError, match=r"output of shape \(4, 3\) for a batch of 3.*a batch size is built in"):
        BoundedModule(Then(lambda y: y.reshape(4, -1)), torch.randn(3, 4))


def test_the_check_is_made_once_for_each_batch_size(monkeypatch):
    calls = []
    monkeypatch.setattr("lirpa_ext.module.agreement.check_samples_apart", lambda model, x: calls.append(len(x[0])))
    model, x = Then(torch.relu), torch.randn(4, 4)
    graph = BoundedModule(model, x)
    for batch in (4, 2, 4, 2, 3):
        graph.compute_bounds(x=(ball(x[:batch]),), method="bcp")
    assert calls == [4, 2, 3]


class Two(nn.Module):
    def __init__(self, mixing):
        super().__init__()
        self.dense, self.mixing = nn.Linear(4, 4), mixing

    def forward(self, x, y):
        return self.dense(x) + (y.flip(0) if self.mixing else y)


@pytest.mark.parametrize("batch", [1, 3])
def test_several_inputs(batch):
    """All move at the same time."""
    x, y = torch.randn(batch, 4), torch.randn(batch, 4)
    with pytest.raises(TraceError, match="read each other"):
        BoundedModule(Two(True), (x, y))
    BoundedModule(Two(False), (x, y))


def test_labels_as_a_second_input():
    """As in a loss that is bounded: whole numbers, of which only those that are there make sense."""

    class Loss(nn.Module):
        def forward(self, x, y):
            return F.cross_entropy(x, y, reduction="none")

    check_samples_apart(Loss(), (torch.randn(5, 3), torch.randint(3, (5,))))


def test_random_numbers_are_refused():
    with pytest.raises(TraceError, match="draws random numbers or keeps a state"):
        BoundedModule(Then(lambda y: y + torch.randn_like(y)), torch.randn(2, 4))


@pytest.mark.parametrize("method", ["bcp", "IBP"])
@pytest.mark.parametrize("name", ["flip", "mean", "a tiny share"])
def test_graphs_of_the_engines_own_class(name, method):
    """Through `register`, where the model is not at hand, at the batch of the call."""
    x = torch.randn(3, 4)
    mixing, apart = (engine.EngineBoundedModule(Then(f), x, device="cpu") for f in (MIXING[name], torch.relu))
    register()
    try:
        with pytest.raises(LirpaExtError, match=r"read each other|cannot bound|not known"):
            mixing.compute_bounds(x=(ball(x),), method=method)
        apart.compute_bounds(x=(ball(x),), method=method)
    finally:
        unregister()


# --- graph = model -----------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A function that the engine misreads, beside another output."""

    def __init__(self, function, beside):
        super().__init__()
        self.function, self.beside = function, beside

    def forward(self, x):
        return torch.cat([self.function(x).flatten(1), self.beside(x.flatten(1)[:, :1])], 1)


POOLS = {
    "count_include_pad": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "divisor_override": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
}
BESIDE = {
    "huge": lambda v: v * 1e6,
    "far more": lambda v: v * 1e25,
    "infinite everywhere": lambda v: v.abs() * math.inf,
    "one infinite": torch.log,
    "small": lambda v: v * 1e-12,
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("pool", POOLS)
def test_no_output_hides_another(pool, beside):
    x = torch.rand(2, 1, 6, 6) + 0.5
    x[0, 0, 0, 0] = 0.0
    with pytest.raises(TraceError, match=r"computes something else than the model|cannot build a graph"):
        BoundedModule(Beside(POOLS[pool], BESIDE[beside]), x)


def test_a_small_wrong_output_is_seen_beside_a_large_one(monkeypatch):
    """By the size of that output, in float64 as well."""
    right = engine.bound_ops.BoundSigmoid.forward
    monkeypatch.setattr(engine.bound_ops.BoundSigmoid, "forward", lambda self, x: 1.001 * right(self, x))
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(2, 4, dtype=dtype)
        with pytest.raises(TraceError, match="first at sigmoid in Then"):
            BoundedModule(Then(lambda y: torch.cat([1e-9 * y.sigmoid(), 1e9 * y], 1)).to(dtype), x)


def test_the_error_names_the_first_function_and_its_reason():
    x = torch.rand(2, 1, 6, 6)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten())
    with pytest.raises(TraceError, match=r"first at avg_pool2d in '2' \(AvgPool2d\)\)\. The engine drops a pool's"):
        BoundedModule(nn.Sequential(model, nn.Linear(18, 2)).get_submodule("0"), x)


@pytest.mark.parametrize("broken", ["BoundFlatten", "BoundTanh"])
def test_another_function_has_no_reason_made_up(monkeypatch, broken):
    right = getattr(engine.bound_ops, broken).forward
    monkeypatch.setattr(getattr(engine.bound_ops, broken), "forward", lambda self, x: 1.001 * right(self, x))
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 3), nn.Tanh()).eval()
    function = {"BoundFlatten": "flatten in '1'", "BoundTanh": "tanh in '3'"}[broken]
    with pytest.raises(TraceError, match=rf"first at {function} .*\. The engine computes that function otherwise"):
        BoundedModule(model, torch.rand(2, 1, 6, 6))


def test_an_eps_that_is_dropped_shows_at_small_inputs(monkeypatch):
    """At inputs of size 1 an eps of 1e-5 is hardly more than float32's rounding."""

    class Normalize(nn.Module):
        def forward(self, x):
            return Scaled.apply(x)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()

        @staticmethod
        def symbolic(graph, x):
            return graph.op("lirpa_ext::Scaled", x).setType(x.type())

    class BoundScaled(engine.Bound):
        def forward(self, x):
            return x / x.square().mean(1, keepdim=True).sqrt()

    with pytest.raises(TraceError, match="computes something else"):
        BoundedModule(Normalize(), torch.randn(2, 4), custom_ops={"lirpa_ext::Scaled": BoundScaled})


class Branch(nn.Module):
    """Another function where the first number is above a threshold. Takes one sample."""

    def __init__(self, threshold):
        super().__init__()
        self.dense, self.threshold = nn.Linear(4, 4), threshold

    def forward(self, x):
        x = x.view(1, 4)
        return 2 * self.dense(x) if x[0, 0] > self.threshold else self.dense(x)


def test_a_branch_inside_of_the_set_is_found():
    """At the build where the example has a set, at the first bounds else, and at any later call."""
    x, model = torch.zeros(1, 4), Branch(3.0)
    with pytest.raises(TraceError, match=r"the forward reads values in Python at test_trust_build.py:\d+"):
        BoundedModule(model, ball(x, 10.0, math.inf))
    for sets in ([10.0], [0.1, 10.0]):
        graph = BoundedModule(model, x)
        for eps in sets[:-1]:
            graph.compute_bounds(x=(ball(x, eps, math.inf),), method="bcp")
        with pytest.raises(TraceError, match="computes something else"):
            graph.compute_bounds(x=(ball(x, sets[-1], math.inf),), method="bcp")
    x[0, 0] = 4.0
    with pytest.raises(TraceError, match="computes something else"):
        graph.compute_bounds(x=(ball(x),), method="bcp")


def test_a_set_far_from_the_others_is_looked_at(monkeypatch):
    """A function that the engine misreads beyond where it was compared, without a branch of the model's."""
    right = engine.bound_ops.BoundTanh.forward
    monkeypatch.setattr(engine.bound_ops.BoundTanh, "forward", lambda self, x: right(self, x).where(x < 50, 0 * x))
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), torch.zeros(2, 4)
    graph = BoundedModule(model, x)
    graph.compute_bounds(x=(ball(x),), method="bcp")
    with pytest.raises(TraceError, match="computes something else"):
        graph.compute_bounds(x=(ball(x + 1000),), method="bcp")


@pytest.mark.parametrize("beyond", [lambda y: y.sqrt() / 0, lambda y: (y - 100).log()])
def test_nothing_to_compare_is_a_refusal(beyond):
    with pytest.raises(TraceError, match=r"NaN or infinite .*whether the graph is right cannot be told"):
        BoundedModule(Then(beyond), torch.rand(2, 4))


def test_an_undefined_sample_does_not_keep_the_others_from_bounds():
    x = torch.rand(3, 4) + 0.5
    model = nn.Sequential(Log(), nn.Linear(4, 2))
    x[0, 0] = -1.0
    graph = BoundedModule(model, x)
    bounds = graph.compute_bounds(x=(ball(x, 0.01),), method="bcp")
    assert all(side[0].isnan().any() or side[0].isinf().any() for side in bounds)
    assert_sound(model, x[1:], PerturbationLpNorm(0.01, 2), tuple(side[1:] for side in bounds))


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


def test_rounding_of_the_model_is_no_difference():
    """Outputs that are what is left of large numbers."""
    for dtype in (torch.float32, torch.float64):
        x, size = torch.randn(2, 4, dtype=dtype), 1e5 if dtype == torch.float32 else 1e9
        BoundedModule(Then(lambda y, size=size: F.gelu(size * y + 1, approximate="tanh") - size * y).to(dtype), x)


def test_a_point_of_the_set_where_the_model_fails():
    class Strict(nn.Module):
        def forward(self, x):
            if (x < 0).any():
                raise ValueError("negative")
            return 2 * x

    x = torch.rand(2, 4) + 0.5
    graph = BoundedModule(Strict(), x)
    graph.compute_bounds(x=(ball(x, 0.1),), method="bcp")
    with pytest.raises(TraceError, match="fails at a point of the set: ValueError: negative"):
        graph.compute_bounds(x=(ball(x, 5.0),), method="bcp")


# --- changes after the build -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """With attributes of several kinds that the forward pass reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.factor, self.settings, self.config = 1.0, {"shift": [0.0]}, types.SimpleNamespace(power=1.0)
        self.constant = torch.zeros(4)

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        return y * self.factor * self.config.power + self.settings["shift"][0] + self.constant


def _double_output(module, args, output):
    return 2 * output


def _double_input(module, args):
    return tuple(2 * x for x in args)


def _tie(model):
    model.second.weight = model.first.weight


def _parametrize(model):
    nn.utils.parametrizations.spectral_norm(model.first)


def _without_bias(model):
    model.first.bias = None


CHANGES = {
    "layer replaced": lambda model: setattr(model, "second", nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    "layer of the same kind": lambda model: setattr(model, "second", nn.Linear(4, 4)),
    "layer of another size": lambda model: setattr(model, "first", nn.Linear(4, 4, bias=False)),
    "number": lambda model: setattr(model, "factor", -3.0),
    "inside of a container": lambda model: model.settings["shift"].__setitem__(0, 5.0),
    "inside of an object": lambda model: setattr(model.config, "power", 2.0),
    "constant replaced": lambda model: setattr(model, "constant", torch.ones(4)),
    "constant in place": lambda model: model.constant.add_(1.0),
    "hook": lambda model: model.first.register_forward_hook(_double_output),
    "hook before": lambda model: model.second.register_forward_pre_hook(_double_input),
    "own forward": lambda model: setattr(model.first, "forward", lambda x: 2 * F.linear(x, model.first.weight)),
    "tied weights": _tie,
    "parametrization": _parametrize,
    "bias removed": _without_bias,
    "weight replaced": lambda model: setattr(model.first, "weight", nn.Parameter(torch.randn(4, 4))),
    "weight in place": lambda model: model.first.weight.data.normal_(),
    "loaded": lambda model: model.load_state_dict(Scaled().state_dict()),
}


@pytest.mark.parametrize("method", ["bcp", "IBP"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_the_build_is_in_the_bounds(name, method):
    torch.manual_seed(1)
    model, x = Scaled().eval(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    before = graph.compute_bounds(x=(ball(x),), method=method)
    torch.manual_seed(2)
    CHANGES[name](model)
    model.eval()
    bounds = graph.compute_bounds(x=(ball(x),), method=method)
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), bounds)
    assert not torch.equal(bounds[0], before[0]), "the change did not show"
    fresh = BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method)
    torch.testing.assert_close(bounds, fresh)


LAYERS = {
    "stride": (nn.Conv2d(1, 2, 3, padding=1), "stride", (2, 2)),
    "padding": (nn.Conv2d(1, 2, 3, padding=1), "padding", (0, 0)),
    "kernel": (nn.MaxPool2d(2), "kernel_size", 3),
    "slope": (nn.LeakyReLU(0.1), "negative_slope", 0.5),
    "eps": (nn.BatchNorm2d(1), "eps", 1.0),
    "axis": (nn.Flatten(2), "start_dim", 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_of_layers_are_followed(name):
    layer, attribute, value = LAYERS[name]
    before, x = getattr(layer, attribute), torch.randn(2, 1, 6, 6)
    model = nn.Sequential(layer, nn.Flatten()).eval()
    graph = BoundedModule(model, x)
    graph.compute_bounds(x=(ball(x),), method="bcp")
    try:
        setattr(layer, attribute, value)
        bounds = graph.compute_bounds(x=(ball(x),), method="bcp")
        assert_sound(model, x, PerturbationLpNorm(0.1, 2), bounds)
    finally:
        setattr(layer, attribute, before)


def test_a_change_that_cannot_be_traced_is_named():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    model[1] = Then(lambda y: y.flip(0))
    for _ in range(2):  # and the graph of before does not come back
        with pytest.raises(TraceError, match="read each other"):
            graph.compute_bounds(x=(ball(x),), method="bcp")
    model[1] = nn.Tanh()
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), graph.compute_bounds(x=(ball(x),), method="bcp"))
    model[1] = Then(lambda y: y.cumsum(0))
    with pytest.raises(TraceError, match=r"has changed since its graph was built .'1' is Then, was Tanh"):
        graph.compute_bounds(x=(ball(x),), method="bcp")


def test_a_batch_that_was_refused_is_refused_again():
    """The graph of the batch before is no graph of this one."""
    model, x = Then(lambda y: y.flip(0) if len(y) == 5 else y), torch.randn(5, 4)
    graph = BoundedModule(model, x[:3])
    for _ in range(2):
        with pytest.raises(TraceError, match="read each other"):
            graph.compute_bounds(x=(ball(x),), method="bcp")
    assert_sound(model, x[:3], PerturbationLpNorm(0.1, 2), graph.compute_bounds(x=(ball(x[:3]),), method="bcp"))


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        y = F.dropout(self.drop(self.dense(x)), 0.3, self.training)
        return self.mood(y) if self.training else y

    def mood(self, y):
        return 2 * y


class Steady(Moody):
    def mood(self, y):
        return y


def test_a_mode_in_which_the_model_is_another_function():
    model, x = Moody().eval(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    for mode in (True, False, True):
        model.train(mode)
        if mode:
            with pytest.raises(TrainModeError, match=r"something else in train mode.*model.eval\(\)"):
                graph.compute_bounds(x=(ball(x),), method="bcp")
            with pytest.raises(TrainModeError):
                BoundedModule(model, x)
        else:
            graph.compute_bounds(x=(ball(x),), method="bcp")


def test_dropout_is_the_identity_in_both_modes():
    model, x = Steady().train(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    trained = graph.compute_bounds(x=(ball(x),), method="bcp")
    model.eval()
    torch.testing.assert_close(graph.compute_bounds(x=(ball(x),), method="bcp"), trained)
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), trained)


class Counting(nn.Module):
    """Writes to itself as it runs."""

    def __init__(self):
        super().__init__()
        self.dense, self.calls, self.last = nn.Linear(4, 4), 0, None

    def forward(self, x):
        self.calls += 1
        self.last = self.dense(x).detach()
        return self.dense(x)


def test_nothing_is_built_anew_without_a_change(monkeypatch):
    """Not for new weights, other inputs, another mode, nor what the forward pass writes itself."""
    builds, real = [], BoundedModule._build
    monkeypatch.setattr(BoundedModule, "_build", lambda self, x: (builds.append(1), real(self, x)))
    model, x = Counting(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        model.train(step % 2 == 0)
        lower, _ = graph.compute_bounds(x=(ball(x + step),), method="bcp")
        (model(x).sum() - lower.sum()).backward()
        optimizer.step()
    assert len(builds) == 1
    model.train()
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), graph.compute_bounds(x=(ball(x),), method="bcp"))


def test_unregistered_layers_are_followed():
    """Their weights are constants of the trace."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4).requires_grad_(False)]

        def forward(self, x):
            return self.layers[0](x)

    model, x = Hidden(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    graph.compute_bounds(x=(ball(x),), method="bcp")
    with torch.no_grad():
        model.layers[0].weight.mul_(2)
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), graph.compute_bounds(x=(ball(x),), method="bcp"))


def test_changes_are_described():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.LeakyReLU(0.1))
    snapshot = Snapshot(model)
    assert snapshot.changes(model) == ""
    model[2].negative_slope = 0.2
    assert snapshot.changes(model) == "negative_slope of '2' is 0.2, was 0.1"
    model[1] = nn.Tanh()
    assert "'1' is Tanh, was ReLU" in snapshot.changes(model)


def test_sizes_and_constants_may_be_read():
    """Nothing is compared at every call for them."""

    class Reshape(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shape", torch.tensor([-1, 2, 2]))

        def forward(self, x):
            y = x.reshape(tuple(self.shape.tolist())) * float(torch.tensor(x.shape)[0] > 0)
            return y.reshape(torch.tensor([len(x), 4]).tolist())

    graph = BoundedModule(Reshape(), torch.randn(3, 4))
    assert graph._agreement.reads == []
    assert BoundedModule(Branch(3.0), torch.zeros(1, 4))._agreement.reads


def test_a_model_that_overwrites_its_input():
    class Overwrites(nn.Module):
        def forward(self, x):
            return 2 * x.add_(1)

    x = torch.randn(3, 4)
    before = x.clone()
    check_samples_apart(Overwrites(), (x,))
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [lambda y: (y > 0).long(), lambda y: y.argmax(1, keepdim=True)])
def test_outputs_that_are_whole_numbers(function):
    """Compared as well, or refused; no raw error."""
    with contextlib.suppress(LirpaExtError):
        BoundedModule(Then(function), torch.randn(3, 4))


def test_a_number_that_is_read_from_a_weight():
    """A trace keeps it, though weights are followed."""

    class Item(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.scale.item()

    model, x = Item(), torch.randn(3, 4)
    graph = BoundedModule(model, x)
    graph.compute_bounds(x=(ball(x),), method="bcp")
    with torch.no_grad():
        model.scale.mul_(3)
    with pytest.raises(TraceError, match="reads values in Python"):
        graph.compute_bounds(x=(ball(x),), method="bcp")


# --- inputs and outputs that have no bounds ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    with pytest.raises(InvalidInputError, match=r"float32 or torch.float64"):
        BoundedModule(nn.Linear(4, 4).to(dtype), torch.rand(2, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_no_real_numbers(dtype):
    x = torch.ones(2, 4).to(dtype)
    with pytest.raises(InvalidInputError, match="only real floating-point numbers can be perturbed"):
        BoundedModule(nn.Linear(4, 4), ball(x))


def test_autocast():
    model, x = nn.Linear(4, 4), torch.rand(2, 4)
    graph = BoundedModule(model, x)
    with torch.autocast("cpu"):
        with pytest.raises(InvalidInputError, match="autocast is on"):
            graph.compute_bounds(x=(ball(x),), method="bcp")
        with pytest.raises(InvalidInputError, match="autocast is on"):
            BoundedModule(model, x)
        with torch.autocast("cpu", enabled=False):
            graph.compute_bounds(x=(ball(x),), method="bcp")


@pytest.mark.parametrize(
    "output", [lambda y: {"a": y}, lambda y: (y, y), lambda y: [y], lambda y: 3.0, lambda y: None, lambda y: y.mean()]
)
def test_outputs_that_are_not_one_tensor_of_a_batch(output):
    with pytest.raises(TraceError):
        BoundedModule(Then(output), torch.rand(2, 4))


# --- threads -----------------------------------------------------------------------------------------------------


def in_threads(*tasks, rounds=4):
    """Run the tasks at the same time, again and again; what they raised."""
    errors, start = [], threading.Barrier(len(tasks))

    def run(task):
        start.wait()
        try:
            for _ in range(rounds):
                task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def task_of(dtype, method, seed):
    """Builds a graph and bounds, of other inputs and another batch each time, held against those of one thread."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3))
    model = model.to(dtype).eval()
    x = torch.rand(4, 1, 6, 6, dtype=dtype)

    def work(batch=3):
        graph = BoundedModule(model, x[:batch])
        return [graph.compute_bounds(x=(ball(x[:size]),), method=method) for size in (batch, 2)]

    expected = work()

    def task():
        for found, right in zip(work(), expected, strict=True):
            assert all(side.dtype == dtype for side in found)
            torch.testing.assert_close(found, right, rtol=0, atol=0)

    return task


@pytest.mark.parametrize("methods", [("bcp", "bcp"), ("IBP", "bcp-crown"), ("slope:crown", "lipschitz")])
def test_threads_with_models_of_their_own(methods):
    before = torch.get_default_dtype()
    tasks = [task_of(dtype, method, 7) for dtype, method in zip((torch.float32, torch.float64), methods, strict=True)]
    errors = in_threads(*tasks)
    assert not errors, errors[0]
    assert torch.get_default_dtype() == before


def test_threads_that_register():
    original = engine.EngineBoundedModule.compute_bounds
    try:
        assert not in_threads(register, register, register, rounds=50)
        unregister()
        assert engine.EngineBoundedModule.compute_bounds is original
    finally:
        unregister()


def test_a_graph_that_two_threads_use():
    """Each call has its own inputs from beginning to end."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.rand(3, 4)
    graph = BoundedModule(model, x)
    sets = [x, x + 1]
    expected = [graph.compute_bounds(x=(ball(some),), method="bcp") for some in sets]

    def task(i):
        found = graph.compute_bounds(x=(ball(sets[i]),), method="bcp")
        torch.testing.assert_close(found, expected[i], rtol=0, atol=0)

    errors = in_threads(lambda: task(0), lambda: task(1), rounds=30)
    assert not errors, errors[0]


def test_refusals_are_the_packages_own():
    assert all(issubclass(kind, LirpaExtError) for kind in (TraceError, TrainModeError, InvalidInputError))
    assert traceable_copy(nn.Linear(2, 2)).training is False


class Picked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(torch.gather(x, 1, torch.zeros_like(x, dtype=torch.long)))


@pytest.mark.parametrize("method", ["cap", "bcp", "IBP", "CROWN"])
def test_weights_that_change_after_a_refusal(method):
    """A call that fails half way leaves views on the nodes, and a change in place of their bases does no harm."""
    model, x = Picked().eval(), torch.zeros(1, 1, 1, 1)
    graph = BoundedModule(model, x)
    for _ in range(2):
        with contextlib.suppress(LirpaExtError):
            bounds = graph.compute_bounds(x=(ball(x),), method=method)
            assert_sound(model, x, PerturbationLpNorm(0.1, 2), bounds)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
