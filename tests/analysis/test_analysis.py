"""Analyses of tightness, verified accuracy and ReLU activity: closed forms, exact cases, soundness, plots, files."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, worst_case_logits
from lirpa_ext.analysis import (
    TradeOff,
    lower_slopes,
    outer_bound,
    read_trade_off,
    relu_activity,
    tightness,
    verified_curves,
)
from lirpa_ext.analysis.activity import BINS, plot_activity, plot_chords
from lirpa_ext.analysis.curves import plot_curves
from lirpa_ext.analysis.lower_slopes import plot_lower_slopes
from lirpa_ext.analysis.outer import area, half_planes, plot_outer_bound, zonotope
from lirpa_ext.analysis.subject import Subject
from lirpa_ext.analysis.tightness import MEASURES, pair_margins, plot_tightness
from lirpa_ext.errors import InvalidInputError, OptionError, ResultsError, UnknownMethodError
from lirpa_ext.methods import METHODS, register_method
from lirpa_ext.reporting.plots import figure
from lirpa_ext.training.trade_off import plot_trade_off

W = torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.0, -3.0]])
BIAS = torch.tensor([0.1, 0.2, -0.3])


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def linear_model() -> nn.Module:
    return dense(W, BIAS)


def conv_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def images(count: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 8, 8), torch.arange(count) % classes


def inside(points: np.ndarray, polygon: np.ndarray, slack: float = 1e-9) -> bool:
    """Whether a counterclockwise convex polygon contains all the points."""
    edge = np.roll(polygon, -1, 0) - polygon
    to = points[:, None] - polygon[None]
    scale = max(np.abs(polygon).max(), 1.0)
    return bool((edge[:, 0] * to[..., 1] - edge[:, 1] * to[..., 0] >= -slack * scale * np.abs(edge).max()).all())


def drawn():
    """Axes to draw on."""
    return figure("a test")[1][0, 0]


# --- the outer-bound picture ---


class TestOuterBound:
    def test_linear_map_has_the_ellipse_and_the_parallelogram_that_are_known(self):
        """W maps the disc of radius eps to an ellipse, its square to a parallelogram; the disc is both."""
        x, eps, K = torch.tensor([0.3, -0.2]), 0.5, 64
        found = outer_bound(linear_model(), x, 0, eps, other=1, directions=K)
        A, center = W[:2].double().numpy(), (W @ x + BIAS)[:2].double().numpy()
        np.testing.assert_allclose(found.logits, center, atol=1e-6)
        for name in ("lipschitz", "bcp"):
            depth = np.linalg.norm(np.linalg.solve(A, (found.regions[name] - center).T), axis=0)
            assert (depth >= eps * (1 - 1e-6)).all()  # vertices lie on or outside of the ellipse
            angles = 2 * np.pi * np.arange(K) / K
            d = np.stack([np.cos(angles), np.sin(angles)])
            reach = (found.regions[name] @ d).max(0)  # and it touches the ellipse in each direction
            np.testing.assert_allclose(reach, center @ d + eps * np.linalg.norm(A.T @ d, axis=0), atol=1e-6)
            assert math.pi * eps**2 * abs(np.linalg.det(A)) < area(found.regions[name])
            expected = (center @ [1, -1]) - eps * np.linalg.norm(A.T @ [1, -1])
            assert found.margins[name] == pytest.approx(expected, abs=1e-6)
        corners = np.array([center + A @ [eps * a, eps * b] for a in (-1, 1) for b in (-1, 1)])
        box = found.regions["box"]
        assert len(box) == 4
        np.testing.assert_allclose(sorted(map(tuple, box)), sorted(map(tuple, corners)), atol=1e-6)
        assert area(box) == pytest.approx(4 * eps**2 * abs(np.linalg.det(A)), rel=1e-6)
        assert found.margins["box"] == pytest.approx((corners @ [1, -1]).min(), abs=1e-6)

    def test_a_disc_has_the_area_of_its_polygon(self):
        """The identity: a regular polygon around the circle, of area K tan(pi / K) eps^2."""
        K, eps = 32, 0.25
        found = outer_bound(dense(torch.eye(2), torch.zeros(2)), torch.zeros(2), 0, eps, ("lipschitz",), directions=K)
        assert area(found.regions["lipschitz"]) == pytest.approx(K * math.tan(math.pi / K) * eps**2, rel=1e-6)

    def test_ball_intersect_box_is_a_quarter_disc_at_a_corner_of_the_data_range(self):
        model, eps = dense(torch.eye(2), torch.zeros(2)), 0.5
        found = outer_bound(model, torch.zeros(2), 0, eps, x_L=0.0, x_U=1.0, directions=512)
        quarter = math.pi / 4 * eps**2
        assert quarter <= area(found.regions["bcp"]) <= quarter * 1.001
        assert area(found.regions["box"]) == pytest.approx(eps**2, rel=1e-6)
        assert area(found.regions["lipschitz"]) == pytest.approx(4 * quarter, rel=1e-3)
        rows = {row["region"]: row for row in found.rows()}
        assert rows["bcp"]["area %"] == pytest.approx(25, rel=2e-3)

    @pytest.mark.parametrize("norm", [2, math.inf])
    def test_regions_contain_what_the_network_reaches(self, norm):
        model = conv_net()
        x, _ = images(1)
        y, eps = int(model(x).argmax()), 0.05 if norm == math.inf else 0.3
        methods = ("lipschitz", "bcp", "bcp-crown", "sparse-slope", "CROWN")
        found = outer_bound(model, x[0], y, eps, methods, norm=norm, x_L=0.0, x_U=1.0)
        ball = PerturbationLpNorm(eps, norm, 0.0, 1.0)
        noise = torch.randn(500, *x.shape[1:])
        length = torch.linalg.vector_norm(noise.flatten(1), ord=norm, dim=1).view(-1, 1, 1, 1)
        lower, upper = ball.box(x)
        points = torch.minimum(torch.maximum(x + eps * noise / length, lower), upper)
        with torch.no_grad():
            reached = model(points)[:, [y, found.other]].double().numpy()
        for name, region in found.regions.items():
            assert inside(reached, region, 1e-6), name
            assert found.margins[name] <= min(found.reached.values()) + 1e-6
            for attack in found.points.values():
                assert inside(attack, region, 1e-6), name
        assert inside(found.regions["bcp"], found.regions["box"], 2e-3)
        assert area(found.regions["bcp"]) <= min(area(found.regions["box"]) * 1.001, area(found.regions["lipschitz"]))
        assert inside(found.regions["bcp-crown"], found.regions["bcp"])

    def test_without_a_dense_last_layer_there_is_no_box(self):
        model = nn.Sequential(linear_model(), nn.ReLU())
        found = outer_bound(model, torch.tensor([1.0, 0.0]), 0, 0.1)
        assert list(found.regions) == ["lipschitz", "bcp"]

    @pytest.mark.parametrize("sides", [1, 2, 7])
    def test_zonotope_is_the_hull_of_its_corners(self, sides):
        """The maximum in any direction is that over all 2^n corners, and the boundary turns left only."""
        generators = torch.randn(2, sides, dtype=torch.float64).numpy()
        generators[:, 0] = (-1.0, 0.0)  # a horizontal one, downwards in the order
        vertices = zonotope(np.array([1.0, 2.0]), generators)
        signs = np.array(np.meshgrid(*[[-1, 1]] * sides)).reshape(sides, -1)
        corners = np.array([1.0, 2.0]) + (generators @ signs).T
        angles = np.linspace(0, 2 * np.pi, 37)
        d = np.stack([np.cos(angles), np.sin(angles)])
        np.testing.assert_allclose((vertices @ d).max(0), (corners @ d).max(0), atol=1e-12)
        assert len(vertices) == 2 * sides
        if sides > 1:
            edge = np.roll(vertices, -1, 0) - vertices
            turn = edge[:, 0] * np.roll(edge[:, 1], -1) - edge[:, 1] * np.roll(edge[:, 0], -1)
            assert (turn > 0).all()
        assert zonotope(np.zeros(2), np.zeros((2, 3))).tolist() == [[0.0, 0.0]]

    def test_half_planes(self):
        d = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        square = half_planes(d, np.array([-1.0, -1.0, -1.0, -1.0]))
        assert area(square) == pytest.approx(4)
        assert len(half_planes(d, np.array([1.0, 1.0, -1.0, -1.0]))) == 0  # x >= 1 and x <= -1
        with pytest.raises(InvalidInputError, match="NaN"):
            half_planes(d, np.array([np.nan, 0, 0, 0]))

    def test_wrong_input(self):
        model, x = linear_model(), torch.zeros(2)
        with pytest.raises(InvalidInputError, match="8 directions"):
            outer_bound(model, x, 0, 0.1, directions=4)
        with pytest.raises(InvalidInputError, match="class besides 0"):
            outer_bound(model, x, 0, 0.1, other=0)
        with pytest.raises(InvalidInputError, match="class besides 0"):
            outer_bound(model, x, 0, 0.1, other=3)
        with pytest.raises(InvalidInputError, match="labels are outside"):
            outer_bound(model, x, 5, 0.1)
        with pytest.raises(OptionError, match="none of the methods"):
            outer_bound(model, x, 0, 0.1, options={"CROWN": {}})

    def test_files_and_plot(self, tmp_path):
        found = outer_bound(linear_model(), torch.zeros(2), 0, 0.5, attack_starts=4)
        found.save(tmp_path / "outer")
        assert json.loads((tmp_path / "outer.json").read_text())["rows"][0]["region"] == "lipschitz"
        with (tmp_path / "outer_details.csv").open() as file:
            sets = [row["set"] for row in csv.DictReader(file)]
        assert sets.count("box") == 4 and sets.count("PGD, margin") == 4 and sets.count("clean") == 1
        axes = drawn()
        plot_outer_bound(found, axes)
        np.testing.assert_array_equal(axes.patches[0].get_xy()[:-1], found.regions["lipschitz"])
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["lipschitz", "bcp", "box", "decision line", "PGD, margin", "PGD, cross-entropy", "clean"]


# --- tightness ---


def distances(weight: torch.Tensor) -> torch.Tensor:
    """||W_j - W_i||, (c, c)."""
    return torch.linalg.vector_norm(weight.unsqueeze(1) - weight.unsqueeze(0), dim=2)


class TestTightness:
    @pytest.mark.parametrize("method", ["lipschitz", "bcp", "CROWN"])
    def test_linear_model_in_closed_form(self, method):
        """tau = eps sum ||W_i - W_j|| / (c (c - 1)), and the sum of margins and the loss from the same distances."""
        x, y, eps = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]), 0.3
        found = tightness(linear_model(), (x, y), eps, [method])
        apart = distances(W.double())
        np.testing.assert_allclose(found.tau[method], float(eps * apart.sum() / 6), rtol=1e-6)
        z = (x @ W.T + BIAS).double()
        worst = z - z.gather(1, y.unsqueeze(1)) + eps * apart[y]  # max (zeta_m - zeta_y), 0 at m = y
        np.testing.assert_allclose(found.margins[method], worst.sum(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.loss[method], functional.cross_entropy(worst, y, reduction="none"), rtol=1e-5)
        others = ~functional.one_hot(y, 3).bool()
        assert found.verified[method].tolist() == (worst[others].view(5, 2) < 0).all(1).tolist()

    def test_at_a_corner_of_the_range_bcp_in_closed_form(self):
        """Around 0 with inputs >= 0 the minimum of c.v is -eps ||min(c, 0)||: half of the ball falls away."""
        eps = 0.4
        found = tightness(linear_model(), (torch.zeros(1, 2), torch.tensor([0])), eps, x_L=0.0, x_U=1.0)
        c = (W.unsqueeze(1) - W.unsqueeze(0)).double()
        expected = float(eps * torch.linalg.vector_norm(c.clamp(max=0), dim=2).sum() / 6)
        ball = float(eps * distances(W.double()).sum() / 6)
        assert found.tau["bcp"][0] == pytest.approx(expected, rel=1e-6)
        assert found.tightened("bcp") == pytest.approx(100 * (1 - expected / ball), rel=1e-5)
        assert found.tightened("lipschitz") == 0.0

    def test_pairs_are_in_their_places(self):
        x = torch.randn(2, 2)
        subject = Subject(linear_model(), (x, torch.tensor([0, 1])))
        z = (x @ W.T + BIAS).double()
        expected = z.unsqueeze(2) - z.unsqueeze(1) - 0.2 * distances(W.double())
        found = pair_margins(subject, subject.x, 0.2, "lipschitz", {})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_a_radius_of_0_gives_the_clean_values(self):
        model, (x, y) = conv_net(), images()
        found = tightness(model, (x, y), 0.0, ["bcp", "sparse-slope"], norm=math.inf)
        with torch.no_grad():
            z = model.double()(x.double())
        for method in found.tau:
            np.testing.assert_allclose(found.tau[method], 0, atol=1e-9)
            np.testing.assert_allclose(found.loss[method], functional.cross_entropy(z, y, reduction="none"), atol=1e-9)
            assert found.verified[method].tolist() == (z.argmax(1) == y).tolist()

    def test_order_of_methods_and_the_constant_line(self):
        """BCP tightens against the ball, bcp-crown against BCP, sample by sample; the ball's tau is a constant."""
        found = tightness(conv_net(), images(12), 0.2, x_L=0.0, x_U=1.0, batch_size=5)
        assert (found.tau["bcp-crown"] <= found.tau["bcp"] + 1e-9).all()
        assert (found.tau["bcp"] <= found.tau["lipschitz"] + 1e-9).all()
        assert found.tau["lipschitz"].std() < 1e-9 * found.tau["lipschitz"].mean()
        assert found.tightened("bcp") > 10
        assert all(len(values) == 12 for values in found.tau.values())
        rows = {row["method"]: row for row in found.rows()}
        assert rows["bcp"]["tau"] == pytest.approx(found.tau["bcp"].mean())
        assert "bcp-crown" in found.summary() and len(found.details()) == 36

    def test_slopes_are_chosen_for_each_label(self):
        """The rows of the true label are those of the loss that trains, with the same seed."""
        model, (x, y) = conv_net().double(), images()
        y = torch.zeros_like(y)  # one label, and so one draw
        found = tightness(model, (x, y), 0.03, ["sparse-slope"], norm=math.inf, options={"sparse-slope": {"seed": 3}})
        with torch.no_grad():
            worst = worst_case_logits(
                BoundedModule(model, x.double()), x.double(), y, 0.03, "sparse-slope", math.inf, seed=3
            )
        loss = functional.cross_entropy(worst, y, reduction="none")
        np.testing.assert_allclose(found.loss["sparse-slope"], loss, rtol=1e-9)
        again = tightness(model, (x, y), 0.03, ["sparse-slope", "slope:random"], norm=math.inf)
        more = tightness(model, (x, y), 0.03, ["sparse-slope", "slope:random"], norm=math.inf)
        for method in again.tau:  # drawn from a fixed seed
            np.testing.assert_array_equal(again.tau[method], more.tau[method])

    def test_nan_and_ties_are_not_verified(self, tmp_path):
        def broken(problem):
            return torch.full((len(problem.module._inputs[0]), problem.C.shape[1]), math.nan), None

        register_method("test-nan", broken)
        try:
            found = tightness(linear_model(), (torch.randn(3, 2), torch.tensor([0, 1, 2])), 0.1, ["test-nan"])
        finally:
            del METHODS["test-nan"]
        assert not found.verified["test-nan"].any() and np.isnan(found.tau["test-nan"]).all()
        found.save(tmp_path / "nan")
        assert json.loads((tmp_path / "nan.json").read_text())["rows"][0]["tau"] is None
        plot_tightness(found, drawn())
        tie = tightness(dense(torch.zeros(2, 2), torch.zeros(2)), (torch.zeros(1, 2), torch.tensor([0])), 0.1, ["bcp"])
        assert tie.margins["bcp"][0] == pytest.approx(0, abs=1e-12) and not tie.verified["bcp"][0]

    def test_plot(self):
        found = tightness(conv_net(), images(), 0.2, x_L=0.0, x_U=1.0)
        axes = drawn()
        plot_tightness(found, axes)
        assert len(axes.collections) == 2  # a violin each for bcp and bcp-crown; the ball is the line
        assert axes.lines[-1].get_ydata()[0] == pytest.approx(found.tau["lipschitz"].mean())
        for measure in MEASURES:
            plot_tightness(found, drawn(), measure)
        with pytest.raises(InvalidInputError, match="unknown measure"):
            plot_tightness(found, drawn(), "speed")

    def test_wrong_input(self):
        data = (torch.zeros(1, 2), torch.tensor([0]))
        with pytest.raises(InvalidInputError, match="at least one method"):
            tightness(linear_model(), data, 0.1, [])
        with pytest.raises(InvalidInputError, match="at least one method"):
            tightness(linear_model(), data, 0.1, "bcp")
        with pytest.raises(UnknownMethodError):
            tightness(linear_model(), data, 0.1, ["nope"])
        with pytest.raises(InvalidInputError, match="eps"):
            tightness(linear_model(), data, -0.1)
        with pytest.raises(InvalidInputError, match="labels"):
            tightness(linear_model(), (data[0], torch.tensor([7])), 0.1)


# --- accuracy ---


class TestCurves:
    def test_linear_model_is_verified_up_to_its_margin(self):
        """Sample i is robust up to min_j (z_y - z_j) / ||W_y - W_j||, and PGD finds what is not."""
        x = torch.randn(40, 2)
        z = (x @ W.T + BIAS).double()
        y = z.argmax(1)
        ratio = (z.gather(1, y.unsqueeze(1)) - z) / distances(W.double())[y]
        radius = ratio.scatter(1, y.unsqueeze(1), math.inf).amin(1)
        levels = [0.0, 0.1, 0.2, 0.4, 0.8]
        attack = {"attack_steps": 200, "attack_restarts": 4}  # in two dimensions a run may end in a corner of its own
        found = verified_curves({"linear": linear_model()}, (x, y), levels, ["lipschitz", "bcp"], **attack)
        assert found.lines() == [("linear", "lipschitz"), ("linear", "bcp")]
        for method in ("lipschitz", "bcp"):
            eps, verified = found.curve("linear", method)
            assert eps == levels
            assert verified == [float((radius > level).double().mean()) for level in levels]
        assert all(row["clean %"] == 100 and row["pgd %"] == row["verified %"] for row in found.rows())
        assert 0 < found.curve("linear", "bcp")[1][2] < 1

    def test_several_models(self, tmp_path):
        models = {"first": conv_net(0), "second": conv_net(1)}
        found = verified_curves(models, images(), [0.05, 0.2], targets={"first": 0.1}, x_L=0.0, x_U=1.0)
        assert [row["model"] for row in found.rows()] == ["first", "first", "second", "second"]
        assert all(row["verified %"] <= row["pgd %"] <= row["clean %"] and not row["errors"] for row in found.rows())
        axes = drawn()
        plot_curves(found, axes)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * np.array(found.curve("first", "bcp")[1]))
        assert list(axes.lines[-1].get_xdata()) == [0.1, 0.1]  # the target
        found.save(tmp_path / "curves")
        with pytest.raises(InvalidInputError, match="at least one model"):
            verified_curves({}, images(), [0.1])

    def test_trade_off_of_a_sweep(self, tmp_path):
        runs = [
            {"loss": loss, "eps": eps, "seed": 0, "samples": 10, "run": f"{loss}_{eps}", "clean": clean, "pgd": pgd}
            | {"verified": verified}
            for loss, eps, clean, pgd, verified in (
                ("bcp", "30/255", 0.9, 0.8, 0.6), ("bcp", "0.2", 0.8, 0.75, 0.7), ("lipschitz", "0.2", 0.7, None, 0.5),
            )
        ]  # fmt: skip
        with (tmp_path / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(runs[0]))
            writer.writeheader()
            writer.writerows(runs)
        found = read_trade_off(tmp_path)
        assert found == TradeOff(runs)
        assert found.rows()[1] | {"verified %": 70.0} == found.rows()[1] and found.rows()[2]["pgd %"] is None
        axes = drawn()
        plot_trade_off(found, axes)
        np.testing.assert_allclose(axes.lines[0].get_xydata(), [[80, 70], [90, 60]])
        np.testing.assert_allclose(axes.lines[1].get_ydata(), [70, 75])  # from verified to PGD
        assert "bcp trained at eps 0.2" in found.summary()

    @pytest.mark.parametrize(
        "text", [None, "", "loss,eps\nbcp,0.1\n", "loss,eps,seed,samples,clean,pgd,verified,run\n"]
    )
    def test_a_folder_that_is_no_sweep(self, tmp_path, text):
        if text is not None:
            (tmp_path / "sweep.csv").write_text(text)
        with pytest.raises(ResultsError, match="no table of a sweep"):
            read_trade_off(tmp_path)


# --- activity and slopes ---


def four_neurons(biases: tuple[float, ...] = (2.0, -2.0, 0.5, 0.0)) -> nn.Module:
    """x -> relu(x + b), two outputs: on |x| <= 1 the boxes are b - 1, b + 1."""
    count = len(biases)
    second = torch.arange(2.0 * count).view(2, count) - count
    return nn.Sequential(dense(torch.ones(count, 1), torch.tensor(biases)), nn.ReLU(), dense(second, torch.zeros(2)))


ONE = (torch.zeros(1, 1), torch.tensor([0]))


class TestActivity:
    @pytest.mark.parametrize("intermediate", ["ibp", "bcp"])
    @pytest.mark.parametrize("norm", [2, math.inf])
    def test_known_counts(self, intermediate, norm):
        """Boxes [1, 3] active, [-3, -1] dead, [-0.5, 1.5] unstable with chord 3/4, [-1, 1] with 1/2."""
        found = relu_activity(four_neurons(), ONE, 1.0, intermediate, norm=norm)
        assert found.counts == {"ReLU 1": (1.0, 2.0, 1.0)} and found.total == (1.0, 2.0, 1.0)
        assert found.chords["ReLU 1"].nonzero()[0].tolist() == [BINS // 2, 3 * BINS // 4]
        assert found.mean_chord == pytest.approx(0.625)
        assert found.rows()[-1]["unstable %"] == 50
        assert sum(row["unstable"] for row in found.details()) == 2

    def test_a_box_that_ends_at_0_is_stable(self):
        found = relu_activity(four_neurons((1.0, -1.0)), ONE, 1.0)  # [0, 2] and [-2, 0]
        assert found.total == (1.0, 0.0, 1.0) and math.isnan(found.mean_chord)
        plot_chords(found, drawn())

    def test_means_over_samples_and_batches(self):
        x = torch.tensor([[0.0], [10.0], [-10.0]])
        found = relu_activity(four_neurons(), (x, torch.zeros(3).long()), 1.0, batch_size=2)
        assert found.counts["ReLU 1"] == pytest.approx(((1 + 4 + 0) / 3, 2 / 3, (1 + 0 + 4) / 3))

    def test_leaky_relus_count_too(self):
        model = four_neurons()
        model[1] = nn.LeakyReLU(0.1)
        assert relu_activity(model, ONE, 1.0).total == (1.0, 2.0, 1.0)

    def test_stable_neurons_are_stable_and_bcp_has_no_more_unstable_ones(self):
        model, (x, y) = conv_net(), images()
        eps = 0.3
        boxes = {name: relu_activity(model, (x, y), eps, name, x_L=0.0, x_U=1.0) for name in ("ibp", "bcp")}
        for layer, (active, unstable, dead) in boxes["bcp"].counts.items():
            loose = boxes["ibp"].counts[layer]
            assert active >= loose[0] and dead >= loose[2] and unstable <= loose[1]
        assert boxes["bcp"].total[1] < boxes["ibp"].total[1]
        ball = BoundedTensor(x, PerturbationLpNorm(eps, 2, 0.0, 1.0))
        lower, upper = BoundedModule(model, x).activation_bounds(ball, "bcp").popitem()[1]
        noise = torch.randn(200, *x.shape[1:])
        points = x[:1] + eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        reached = model[:6](points.clamp(0, 1))
        assert (reached >= lower[:1] - 1e-5).all() and (reached <= upper[:1] + 1e-5).all()

    def test_plots(self):
        found = relu_activity(conv_net(), images(), 0.1)
        axes = drawn()
        plot_activity(found, axes)
        widths = np.array([bar.get_width() for bar in axes.patches]).reshape(3, -1)  # state, layer
        np.testing.assert_allclose(widths.sum(0), 100)
        np.testing.assert_allclose(widths[1], [row["unstable %"] for row in found.rows()])
        axes = drawn()
        plot_chords(found, axes)
        assert len(axes.patches) == 3

    def test_wrong_input(self):
        with pytest.raises(InvalidInputError, match="no ReLU"):
            relu_activity(linear_model(), (torch.zeros(1, 2), torch.tensor([0])), 0.1)
        with pytest.raises(OptionError, match="intermediate"):
            relu_activity(four_neurons(), ONE, 0.1, "crown")


class TestLowerSlopes:
    @pytest.mark.parametrize(
        ("method", "shares"),
        [
            ("slope:crown", (0.5, 0.0, 0.5)),  # [-0.5, 1.5] takes 1, [-1, 1] a tie and 0
            ("slope:cap", (0.0, 1.0, 0.0)),  # 3/4 and 1/2
            ("slope:0,0", (1.0, 0.0, 0.0)),
            ("slope:1,1", (0.0, 0.0, 1.0)),
            ("slope:random", (0.0, 1.0, 0.0)),
        ],
    )
    def test_known_slopes(self, method, shares):
        (found,) = lower_slopes(four_neurons(), ONE, [1.0], [method]).shares
        assert (found["zero"], found["between"], found["one"]) == shares
        assert found["unstable"] == 2 and found["idle"] is None

    def test_the_step_gives_what_the_method_keeps(self):
        model, (x, y) = conv_net().double(), images()
        found = lower_slopes(model, (x, y), [0.02, 0.1], ["sparse-slope"])
        bounded = BoundedModule(model, x.double())
        for row in found.shares:
            ball = BoundedTensor(x.double(), PerturbationLpNorm(row["eps"]))
            bounded.compute_bounds(x=(ball,), method="sparse-slope", labels=y, seed=0)
            assert row["zero"] == pytest.approx(bounded.last_result.relaxation.sparsity)
            assert row["idle"] == pytest.approx(bounded.last_result.relaxation.zero_gradients)
            # A slope strictly between 0 and 1 is one that no step has moved.
            assert row["between"] <= row["idle"] + 1e-12
            assert row["zero"] + row["between"] + row["one"] == pytest.approx(1)

    def test_batches_add_up(self):
        whole, parts = (lower_slopes(conv_net(), images(), [0.05], ["slope:crown"], batch_size=b) for b in (8, 3))
        assert whole == parts

    def test_no_unstable_neuron(self, tmp_path):
        found = lower_slopes(four_neurons(), ONE, [0.0], ["slope:crown", "sparse-slope"])
        assert all(row["unstable"] == 0 and math.isnan(row["zero"]) for row in found.shares)
        found.save(tmp_path / "slopes")
        assert json.loads((tmp_path / "slopes.json").read_text())["rows"][0]["zero %"] is None

    def test_plot_and_table(self):
        found = lower_slopes(conv_net(), images(), [0.02, 0.1])
        axes = drawn()
        plot_lower_slopes(found, axes)
        assert len(axes.lines) == 4
        _, zero = found.sparsity("slope:crown")
        np.testing.assert_allclose(axes.lines[1].get_ydata(), [100 * (1 - share) for share in zero])
        assert found.rows()[0]["non-zero %"] == pytest.approx(100 - found.rows()[0]["zero %"])

    def test_wrong_input(self):
        for method in ("bcp", "IBP", "slope:ibp", "slope:same"):
            with pytest.raises(OptionError, match="no lower slopes"):
                lower_slopes(four_neurons(), ONE, [0.1], [method])
        with pytest.raises(InvalidInputError, match="one eps"):
            lower_slopes(four_neurons(), ONE, [])
