"""`CertifiedClassifier`: a LightningModule that trains with a certified loss, and validates with sound bounds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ..attacks import Attack, make_attack
from ..certification.certifier import Certifier
from ..domain.perturbation import PerturbationLpNorm
from ..errors import ConfigError, LirpaExtError
from ..models.architectures import Network, build
from ..module.bounded_module import BoundedModule
from .batchnorm import differs_in_training, fixed_statistics, population_statistics, recorded_statistics
from .objectives import Loss, Step, step_loss
from .optimizer import Optimizer, change_rate
from .randomized import check_randomized, ensemble_report, randomized_loss
from .schedules import Schedule, Values, number

__all__ = ["CertifiedClassifier", "Evaluation", "Optimizer"]

_LOOK_EVERY = 50  # steps between two checks of the loss on a GPU


@dataclass
class Evaluation:
    """Settings of the evaluation, in the validation after each epoch and in the commands ``validate`` and ``test``.

    Args:
        eps: Radius, default that of training.
        method: Bound method that verifies, default the method of the loss with sound norms.
        options: Options of the method, default none.
        attack_steps: Steps of the attack in validation, default 10; 0 for none.
        final_attack_steps: Steps of the attack in the commands, default 100, as in Lee (2021).
        draws: Networks in the ensemble that predicts for a randomized network, default 20.
        attack_draws: Networks over which EOT-PGD averages gradients in validation, default 5.
        final_attack_draws: Networks over which EOT-PGD averages gradients in the commands, default 20.
        step_size: Step size of EOT-PGD as a fraction of eps, default 1/4, as in Lee (2021).
        attack: Attack on a deterministic network, one of `lirpa_ext.attacks.ATTACKS`, default Auto-PGD.
    """

    eps: float | str | None = None
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    attack_steps: int = 10
    final_attack_steps: int = 100
    draws: int = 20
    attack_draws: int = 5
    final_attack_draws: int = 20
    step_size: float = 0.25
    attack: str = "apgd"


class CertifiedClassifier(LightningModule):
    """A network with its certified loss, its optimizer, and the schedules of eps and of the weights in the loss.

    Args:
        network: Architecture and input of the network.
        loss: The loss, by name.
        eps: Radius at the end of the ramp, in units of the raw image; a number or a fraction such as ``8/255``.
        norm: p of the lp ball, a number from 1 on or ``inf``, default 2.
        schedule: Schedules of eps, kappa and beta.
        optimizer: Optimizer and learning rate.
        evaluation: Settings of the evaluation.
        data_range: Lower and upper end of every pixel, default 0 and 1; None for no range.
        initialization: "default" (torch's) or "ibp" (Z. Shi et al., Fast certified robust training with short warmup,
            NeurIPS 2021).
        seed: Seed of what a step draws (random slopes, attacks, dropout), default 0.

    Attributes:
        model: The network, a plain torch module.
        bounded: Graph of the network, None before the first step.
        resume_lr: Learning rate from which to resume, in place of the optimizer's; default None for no change.
        rates: [step, learning rate] of each change by `resume_lr`.

    Raises:
        ConfigError: A setting is out of range, or two settings contradict each other.
    """

    def __init__(
        self,
        network: Network,
        loss: Loss,
        eps: float | str,
        norm: float | str = 2,
        schedule: Schedule = Schedule(),  # noqa: B008 (never changed; the command line shows the defaults)
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        data_range: list[float] | None = [0.0, 1.0],  # noqa: B006
        initialization: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.schedule, self.optimizer_config = schedule, optimizer
        self.evaluation = evaluation
        self.eps, self.norm = number(eps, "model.eps"), number(norm, "model.norm")
        self.data_range = _check_range(data_range)
        evaluated = self.evaluation.eps
        self.evaluation_eps = self.eps if evaluated is None else number(evaluated, "model.evaluation.eps")
        for name, value in (("model.eps", self.eps), ("model.evaluation.eps", self.evaluation_eps)):
            _check_radius(name, value, self.norm, network.input_shape, self.data_range)
        self.loss.check()
        self.schedule.check(self.eps, None)
        self.optimizer_config.check()
        check_randomized(network, loss, schedule, evaluation)
        if optimizer.std_factor != 1 and network.randomized != "adv-bnn":
            raise ConfigError("optimizer.std_factor is of standard deviations, which only adv-bnn networks train")
        if loss.fused and list(self.schedule.beta) != [1.0, 1.0]:
            raise ConfigError("loss.fused bounds the loss itself, which beta cannot mix: set schedule.beta to [1, 1]")
        if loss.objective.attack and self.norm == 1:
            raise ConfigError(f"loss {loss.name} attacks lp balls with p > 1 only: set model.norm")
        self.seed = seed
        self.model = build(network)
        _initialize(self.model, initialization)
        object.__setattr__(self, "bounded", None)
        self._graph_shape: torch.Size | None = None
        self._saved_iterations: dict[str, Tensor] = {}
        self._losses: list[float | Tensor] = [0.0, 0]
        self._counts = torch.zeros(4)
        self._batch_size = 0  # the largest batch of this process so far: the last one of an epoch may be smaller
        self._certifier: Certifier | None = None
        self._never_finite = _not_finite(self.model)  # infinite from the start, such as a user's mask
        self.resume_lr: float | None = None
        self.rates: list[list[float]] = []

    bounded: BoundedModule | None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images, (B, C, H, W) -> (B, classes)."""
        return self.model(x)

    # --- training ---

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        batches = self.trainer.num_training_batches
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    def values(self) -> Values:
        """Radius and weights of the loss at the next step."""
        return self.schedule.at(self.global_step, self.steps_per_epoch, self.eps)

    @property
    def ramp_done(self) -> bool:
        """Whether the last step was at the end of all schedules, hence at the full eps."""
        return self.schedule.done(self.global_step, self.steps_per_epoch)

    def on_fit_start(self) -> None:
        """Check that the schedule ends before the training does, and that bounds work with the trainer's settings."""
        self.check_trainer(self.trainer)
        self.schedule.check(self.eps, self.trainer.max_epochs if self.trainer.max_epochs != -1 else None)

    def check_trainer(self, trainer: Trainer, synchronize: bool = False) -> None:
        """Raise ConfigError for settings of the trainer with which bounds do not work.

        Args:
            trainer: Its precision must be 32 or 64 bits.
            synchronize: Whether the trainer synchronizes batch norms, which must not be; default False.
        """
        kind = nn.modules.batchnorm._BatchNorm if synchronize else nn.SyncBatchNorm
        if any(isinstance(layer, kind) for layer in self.model.modules()):
            raise ConfigError(
                "trainer.sync_batchnorm takes statistics of all processes, the bounds those of one: set it to false"
            )
        if trainer.precision not in ("32-true", "64-true"):
            raise ConfigError(
                f"trainer.precision {trainer.precision} rounds the bounds to fewer digits than they are compared with, "
                "and a loss of such bounds turns to NaN: set it to 32 or 64"
            )

    def on_train_start(self) -> None:
        """Change the learning rate to `resume_lr`, if it is set."""
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        if self.resume_lr is not None and change_rate(optimizer, scheduler, self.resume_lr):
            self.rates.append([self.global_step, self.resume_lr])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's generator from seed, step and process, so that a resumed run draws the same."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + step) * 4096 + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a training batch, a pair of images and labels, at the scheduled eps; 0-dim.

        Raises:
            ConfigError: The batch is no such pair, or the loss is not finite.
        """
        if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(p, Tensor) for p in batch)):
            raise ConfigError(f"a batch is (images, labels), two tensors; the training data gave a {_told(batch)}")
        x, y = batch
        try:
            loss = self.batch_loss(x, y, self.values())
        except ValueError as error:
            if len(x) > 1 or isinstance(error, LirpaExtError):
                raise
            raise ConfigError(
                f"this batch has one sample, of which batch norm takes no variance ({error}): leave a last batch of "
                "one out, by drop_last=True of the DataLoader"
            ) from error
        self._losses = [self._losses[0] + loss.detach() * len(x), self._losses[1] + len(x)]
        # Reading a number from a GPU waits for all queued work, so the loss is checked every 50 steps; the sum keeps a
        # NaN until then. Several processes must stop together, so they check at the end of an epoch, or when the shared
        # weights are saved.
        if self.trainer.world_size == 1 and (self.device.type == "cpu" or self.global_step % _LOOK_EVERY == 0):
            self._check_loss(float(self._losses[0]))
        return loss

    def _check_loss(self, total: float) -> None:
        if not math.isfinite(total):
            raise self._diverged(f"the loss is {total}")

    def _diverged(self, found: str) -> ConfigError:
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        return ConfigError(
            f"{found} at step {self.global_step}, in epoch {self.current_epoch}, and training ends here. last.ckpt "
            "keeps the last state that was saved before (there is none in the first epoch, unless --checkpoint_every "
            f"is set): go on from there with a lower learning rate, such as --resume_lr {rate / 10:.1g}. Or start anew "
            "(--resume false), with a longer schedule.ramp or with trainer.gradient_clip_val. (A bound that a sample "
            "refutes is NaN, too: see docs/trust.md.)"
        )

    def batch_loss(self, x: Tensor, y: Tensor, values: Values) -> Tensor:
        """Loss of a batch at given values of the schedule.

        Args:
            x: Images, (B, C, H, W).
            y: Labels, (B,).
            values: eps, kappa, beta and the weight of GradDiv.

        Returns:
            Mean over the batch, 0-dim.
        """
        if self.randomized:
            ball = PerturbationLpNorm(values.eps, self.norm, *self.data_range)
            self._batch_size = max(self._batch_size, len(x))
            samples = self.trainer.num_training_batches * self._batch_size * self.trainer.world_size
            return randomized_loss(self.loss, self.model, x, y, ball, values, int(samples))
        bounded = self._graph(x)
        with recorded_statistics(self.model) as statistics:
            logits = self.model(x) if differs_in_training(self.model) else None
        with fixed_statistics(statistics):
            return step_loss(self.loss, Step(bounded, x, y, logits, values, self.norm, *self.data_range))

    @property
    def randomized(self) -> bool:
        """Whether the network is randomized: then nothing is bounded, and an ensemble is attacked in validation."""
        return bool(self.network.randomized)

    def _graph(self, x: Tensor) -> BoundedModule:
        """The graph for inputs of this shape; a new one keeps the vectors of the power iterations.

        It must be built before the logits are computed from the weights, because building it touches the weights.
        """
        if self.bounded is not None and self._graph_shape == x.shape:
            return self.bounded
        iterations = self._iterations()
        with population_statistics(self.model):
            bounded = BoundedModule(self.model, x)
        for name, u in iterations.items():
            if name in bounded.power_iterations:
                bounded.power_iterations[name].load_state_dict({"u": u})
        object.__setattr__(self, "bounded", bounded)  # not a submodule, because its parameters are those of the model
        self._graph_shape = x.shape
        return bounded

    def _iterations(self) -> dict[str, Tensor]:
        """Node -> vector of its power iteration."""
        if self.bounded is None:
            return self._saved_iterations
        return {name: iteration.u.detach().clone() for name, iteration in self.bounded.power_iterations.items()}

    def on_train_epoch_end(self) -> None:
        """Log the mean loss over all processes, and eps, weights and learning rate of the last step.

        Raises:
            ConfigError: The loss is not finite.
        """
        total, count = (float(part) for part in self._reduced(torch.tensor([float(part) for part in self._losses])))
        self._losses = [0.0, 0]
        self._check_loss(total)
        values = self.schedule.at(self.global_step - 1, self.steps_per_epoch, self.eps)
        self.log_dict(
            {"loss": total / max(count, 1), "eps": values.eps, "kappa": values.kappa, "beta": values.beta}
            | ({"graddiv": values.graddiv} if self.randomized else {})
            | {"lr": self.optimizers().param_groups[0]["lr"]},  # type: ignore[union-attr]
            rank_zero_only=False,
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler that sets the learning rate at each epoch."""
        optimizer, scheduler = self.optimizer_config.make(self.model)
        return [optimizer], [scheduler]

    # --- validation ---

    @property
    def verifier(self) -> str:
        """Bound method that verifies in validation."""
        return self.evaluation.method or self.loss.objective.verifier(self.norm)

    def verifier_options(self) -> dict[str, Any]:
        """Options of `verifier`; random slopes get a fixed seed."""
        drawn = {"seed": 0} if self.verifier == "sparse-slope" else {}
        same = self.loss.options if self.verifier == self.loss.objective.verify else {}
        return drawn | same | self.evaluation.options

    def on_validation_epoch_start(self) -> None:
        """Copy the current network in float64, to certify the validation samples."""
        self._counts = torch.zeros(4)
        if self.randomized:
            return
        self._certifier = Certifier(
            self.model, self.verifier, self.verifier_options(), self.norm, self.data_range,
            torch.float64, None,
        )  # fmt: skip

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the samples of a batch that are classified correctly, withstand the attack, and are certified.

        Bounds are computed in float64, with sound norms. For a randomized network, accuracies are those of an ensemble.
        """
        x, y = batch
        if self.randomized:
            with torch.inference_mode(False):
                (row,) = ensemble_report(self, (x.clone(), y.clone()), final=False, seed=batch_idx).summary
            self._counts += torch.tensor([1.0, row["clean"], row["pgd"], 0.0]) * len(x)
            return
        assert self._certifier is not None
        attack = self.attack(self.evaluation.attack_steps)
        with torch.inference_mode(False), torch.enable_grad():
            x = self._certifier.place(x.clone())
            records = self._certifier.certify(range(len(x)), x, y.clone(), [self.evaluation_eps], attack, batch_idx)
        found = [record["levels"][0]["status"] for record in records]
        clean = sum((record["clean_margin"] or 0) > 0 for record in records)
        robust = found.count("certified") + found.count("unknown")
        self._counts += torch.tensor([len(x), clean, robust, found.count("certified")])

    def on_validation_epoch_end(self) -> None:
        """Log ``val_clean``, ``val_pgd`` and ``val_verified``, as fractions of the samples of all processes."""
        self._certifier = None
        total, *counts = self._reduced(self._counts).tolist()
        names = ("val_clean", "val_pgd", "val_verified")
        found = {name: count / max(total, 1) for name, count in zip(names, counts, strict=True)}
        if self.randomized:
            del found["val_verified"]
        elif not self._attacks:
            del found["val_pgd"]
        self.log_dict(found)

    @property
    def _attacks(self) -> bool:
        """Whether validation runs an attack."""
        return self.attack(self.evaluation.attack_steps) is not None

    def attack(self, steps: int) -> Attack | None:
        """The attack of the evaluation with a number of steps; None for 0 steps, and for l1 balls."""
        return make_attack(self.evaluation.attack, steps=steps) if steps and self.norm != 1 else None

    def _reduced(self, values: Tensor) -> Tensor:
        """Sum of the values (K,) over all processes."""
        gathered = self.all_gather(values.to(self.device, torch.float32))
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, len(values)).sum(0)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's configuration, the vectors of the power iterations and the running loss to a checkpoint.

        Raises:
            ConfigError: A weight is not finite.
        """
        bad = [name for name in _not_finite(self.model) if name not in self._never_finite]
        if bad:
            raise self._diverged(f"{bad[0]} is not finite")
        checkpoint["lirpa_ext"] = {
            "network": asdict(self.network),
            "power_iterations": self._iterations(),
            "losses": [float(part) for part in self._losses],
            "batch_size": self._batch_size,
            "rates": self.rates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added.

        Raises:
            ConfigError: The checkpoint is of another network, or of another program.
        """
        self.check_checkpoint(checkpoint)
        own = checkpoint["lirpa_ext"]
        self._saved_iterations = dict(own["power_iterations"])
        self._losses = list(own["losses"])
        self._batch_size = own.get("batch_size", 0)
        self.rates = list(own.get("rates", []))
        object.__setattr__(self, "bounded", None)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ConfigError for a checkpoint of another network, or of another program."""
        own = checkpoint.get("lirpa_ext")
        if own is None:
            raise ConfigError("the checkpoint was not written by this trainer")
        if own["network"] != asdict(self.network):
            different = {key: (value, asdict(self.network).get(key)) for key, value in own["network"].items()}
            told = "; ".join(f"{key} is {a} there, {b} here" for key, (a, b) in different.items() if a != b)
            raise ConfigError(f"the checkpoint is of another network: {told}. Pass its own configuration")


def _told(batch: Any) -> str:
    parts = f" of {', '.join(type(part).__name__ for part in batch)}" if isinstance(batch, list | tuple) else ""
    return f"{type(batch).__name__}{parts}"


def _not_finite(model: nn.Module) -> list[str]:
    """Names of parameters and buffers with a NaN or an infinity."""
    return [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def _check_range(data_range: list[float] | None) -> tuple[float | None, float | None]:
    if data_range is None:
        return None, None
    if len(data_range) != 2 or not data_range[0] < data_range[1]:
        raise ConfigError(f"model.data_range is [lowest, highest] pixel value, or null for none; got {data_range}")
    return data_range[0], data_range[1]


def _check_radius(
    name: str, eps: float, norm: float, shape: list[int], data_range: tuple[float | None, float | None]
) -> None:
    """Raise ConfigError for a radius or norm out of range, or one at which the balls of all images intersect."""
    if not norm >= 1:
        raise ConfigError(f"model.norm must be 1 or more, got {norm}")
    if not 0 <= eps < math.inf:
        raise ConfigError(f"{name} must be 0 or more, got {eps}")
    lower, upper = data_range
    if lower is None or upper is None:
        return
    half = (upper - lower) / 2 * math.prod(shape) ** (0 if norm == math.inf else 1 / norm)
    if eps >= half:
        raise ConfigError(
            f"{name} = {eps:g} is not below {half:g}, where all images of shape {shape} and range [{lower:g}, "
            f"{upper:g}] have a common point in their l{norm:g} balls: nothing can be certified. It is in units of "
            f"the raw image: for {eps:g} of 255 gray levels write {eps:g}/255"
        )


def _initialize(model: nn.Module, name: str) -> None:
    """Initialize the weights; "ibp" draws from N(0, 2 pi / fan_in^2), so that boxes keep their width over layers."""
    if name not in ("default", "ibp"):
        raise ConfigError(f"unknown initialization {name!r}: known are default and ibp")
    if name == "ibp":
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
