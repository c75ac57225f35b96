"""Write the configurations of the source's tables: one file for each network that they report.

    python configs/generate.py

S. Lee's dissertation (2021): Tables 3.2 and B.1 (l2, in configs/), Tables 3.4 and C.2 to C.6 (l-infinity, in
configs/linf/), section 2.2.4 and appendix A (randomized networks, in configs/randomized/). A file that stands in
several tables is written once, and its first line says which.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent

CIFAR = {"source": "data/cifar10", "augmentation": "crop-flip"}
IMAGES = {"mnist": [1, 28, 28], "cifar10": [3, 32, 32], "svhn": [3, 32, 32], "tiny": [3, 64, 64]}


def l2_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Tables 3.2 and B.1. Losses of the same network share schedule and optimizer.

    Table B.1 prints 100 epochs for CIFAR-10, which end before its ramp (10 + 121) does; here they are 200. Batches
    are those of the times in Table 3.1. Training solves the last step exactly, where the source takes 1 or 10
    iterations.
    """
    mnist = {
        "schedule": {"warmup": 1, "ramp": 20},
        "optimizer": {"name": "adam", "lr": 0.0003, "decay": {"milestones": [21, 30, 40], "gamma": 0.1}},
    }
    cifar = {
        "schedule": {"warmup": 10, "ramp": 121},
        "optimizer": {"name": "adam", "lr": 0.001, "decay": {"every": 10, "after": 131, "gamma": 0.5}},
    }
    tiny = {
        "schedule": {"warmup": 2, "ramp": 50},
        "optimizer": {
            "name": "sgd", "lr": 0.001, "momentum": 0.1, "weight_decay": 0.0002,
            "decay": {"milestones": [50, 70, 90], "gamma": 0.1},
        },
    }  # fmt: skip
    rows = [
        ("mnist", "4C3F", "1.58", mnist, {"source": "data/mnist", "batch_size": 50}, 60, "bcp lipschitz cap"),
        ("cifar10", "4C3F", "36/255", cifar, CIFAR | {"batch_size": 50}, 200, "bcp lipschitz ibp cap"),
        ("cifar10", "6C2F", "36/255", cifar, CIFAR | {"batch_size": 50}, 200, "bcp lipschitz ibp cap"),
        ("cifar10", "WRN", "36/255", cifar, CIFAR | {"batch_size": 50}, 200, "bcp lipschitz cap"),
        (
            "tiny", "8C2F", "36/255", tiny,
            {"source": "data/tiny-imagenet-200", "batch_size": 5, "augmentation": "crop-flip"}, 100,
            "bcp lipschitz ibp",
        ),
    ]  # fmt: skip
    configs = {}
    for images, net, eps, recipe, data, epochs, losses in rows:
        for loss in losses.split():
            network = {"name": net, "input_shape": IMAGES[images]} | ({"classes": 200} if images == "tiny" else {})
            model = {
                "network": network,
                "loss": {"name": loss} | _projected(loss),
                "norm": 2,
                "eps": _number(eps),
            } | recipe
            title = f"Tables 3.2 and B.1: {images}, {net}, l2 {eps}, {loss}"
            configs[f"{images}_{loss}_{net.lower()}"] = title, whole(model, data, epochs)
    return configs


def linf_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Tables 3.4 and C.2 to C.6."""
    configs: dict[str, tuple[str, dict[str, Any]]] = {}
    tables: dict[str, list[str]] = {}

    def add(table: str, images: str, loss: str, test: str, train: str, **changes: Any) -> None:
        name, config = linf_config(images, loss, test, train, **changes)
        tables.setdefault(name, [])
        if table not in tables[name]:
            tables[name].append(table)
        configs[name] = f"{', '.join(tables[name])}: {images}, l-infinity {test}, {loss}", config

    trained = {eps: f"{min(0.4, float(eps) + 0.1):.1f}" for eps in ("0.1", "0.2", "0.3", "0.4")}
    cifar = [f"{gray}/255" for gray in (2, 4, 6, 8, 16)]
    pairs = [("mnist", eps, train) for eps, train in trained.items()]
    pairs += [("cifar10", eps, eps) for eps in cifar] + [("svhn", "0.01", "0.01")]
    for images, test, train in pairs:
        for loss in ("ibp", "crown-ibp", "sparse-slope"):
            add("Table 3.4", images, loss, test, train)
            add("Table C.2", images, loss, test, train, kappa=0)
        for table in ("Table 3.4", "Table C.2"):
            if test != "0.4":  # where CAP cannot be trained
                add(table, images, "cap", test, test, kappa=0)
    for images, test, train in pairs:
        if images == "mnist" or test in ("2/255", "8/255", "16/255"):
            for kappa in (1, 0):
                for beta in (1, 0):
                    add("Table C.3", images, "sparse-slope", test, train, kappa=kappa, beta=beta)
    for test in ("2/255", "8/255"):
        add("Table C.4", "cifar10", "sparse-slope", test, test, kappa=0)
        add("Table C.4", "cifar10", "sparse-slope", test, test, kappa=0, steps=7)
    margins = [("mnist", "0.2", eps) for eps in ("0.2", "0.3", "0.4")] + [("mnist", "0.3", e) for e in ("0.3", "0.4")]
    margins += [("cifar10", f"{gray}/255", f"{more}/255") for gray in (2, 8) for more in (gray, f"{1.1 * gray:.1f}")]
    for images, test, train in margins:
        table = "Table C.5" if images == "mnist" else "Table C.6"
        for loss, beta in (("ibp", 1), ("crown-ibp", 1), ("sparse-slope", 1), ("crown-ibp", 0)):
            add(table, images, loss, test, train, kappa=0, beta=beta)
    return configs


def _projected(loss: str) -> dict[str, Any]:
    """CAP trains by random projections, 50 as in C.1.2."""
    return {"options": {"projections": 50}} if loss == "cap" else {}


def linf_config(
    images: str, loss: str, test: str, train: str, kappa: int = 1, beta: int = 1, steps: int = 1
) -> tuple[str, dict[str, Any]]:
    """Name and content. kappa and beta are the weights before (kappa) and after (beta) the ramp."""
    network: dict[str, Any]
    if images == "mnist":
        network, epochs, batch = {"name": "Large*" if loss == "cap" else "Large"}, 200, 100
        schedule = {"warmup": 10, "ramp": 50}
        optimizer = {"name": "adam", "lr": 0.0005, "decay": {"milestones": [130, 190], "gamma": 0.1}}
        data = {"source": "data/mnist"}
    elif images == "cifar10":
        network, epochs, batch = {"name": "Medium"}, 400, 128
        schedule = {"warmup": 20, "ramp": 240}
        optimizer = {"name": "adam", "lr": 0.003, "decay": {"every": 10, "after": 260, "gamma": 0.5}}
        data = dict(CIFAR)
    else:
        network, epochs, batch = {"name": "Large"}, 200, 80 if loss == "sparse-slope" else 128
        network |= {"mean": [0.438, 0.444, 0.473], "std": [0.198, 0.201, 0.197]}
        if loss == "cap":
            network = {"name": "Small*"}
        schedule = {"warmup": 10, "ramp": 120}
        optimizer = {"name": "adam", "lr": 0.0003, "decay": {"every": 10, "after": 130, "gamma": 0.5}}
        data = {"source": "data/svhn"}
    options = {"steps": 7, "alpha": 0.1} if steps == 7 else {}
    model = {
        "network": {**network, "input_shape": IMAGES[images]},
        "loss": {"name": loss} | ({"options": options} if options else _projected(loss)),
        "norm": ".inf",
        "eps": _number(train),
        "schedule": schedule | {"kappa": [kappa, 0], "beta": [1, beta]},
        "optimizer": optimizer,
    }
    if test != train:
        model["evaluation"] = {"eps": _number(test)}
    name = f"{images}_{loss}_{test.replace('/', '-')}"
    name += "" if test == train or (images == "mnist" and train == _usual(test)) else f"_train{train.replace('/', '-')}"
    name += "_train" + train if images == "mnist" and test == train and loss != "cap" and train != _usual(test) else ""
    name += "_kappa0" if kappa == 0 and loss != "cap" else ""
    name += "_beta0" if beta == 0 else ""
    name += "_7steps" if steps == 7 else ""
    return name, whole(model, data | {"batch_size": 32 if loss == "cap" else batch}, epochs)


def randomized_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Section 2.2.4, Table A.1 and A.6: the networks of A.1 as RSE and Adv-BNN, without GradDiv and with the best one.

    RSE is trained on clean images, as its authors do; Adv-BNN on PGD's of 10 steps of eps / 4 from the clean image. The
    source takes the last training images for validation, here they are drawn.
    """
    rows: list[tuple[str, dict[str, Any], float, str, dict[str, Any], tuple[str, float], int, int]] = [
        (
            "mnist", {"name": "3C2F", "input_shape": IMAGES["mnist"]}, 0.05, "0.3",
            {"warmup": 3, "ramp": 20, "milestones": [30]}, ("kappa", 1), 60, 5000,
        ),
        (
            "cifar10", {"name": "VGG16", "input_shape": IMAGES["cifar10"]}, 0.1, "8/255",
            {"warmup": 6, "ramp": 90, "milestones": [80, 140, 180]}, ("dpp", 1), 200, 5000,
        ),
        (
            "stl10", {"name": "6C1F", "input_shape": [3, 96, 96]}, 0.15, "0.03",
            {"warmup": 6, "ramp": 60, "milestones": [60, 100]}, ("mean", 0.7), 120, 500,
        ),
    ]  # fmt: skip
    configs = {}
    for images, network, prior_std, eps, table, best, epochs, validation in rows:
        data = dict(CIFAR) if images == "cifar10" else {"source": f"data/{images}"}
        for kind in ("rse", "adv-bnn"):
            for regularizer, weight in ((None, 0), ("kappa", 1) if kind == "rse" else best):
                if kind == "rse" and weight and images != "cifar10":
                    continue
                natural = int(kind == "rse")
                options = {} if natural else {"options": {"prior_std": prior_std}}
                decay = {"milestones": table["milestones"], "gamma": 0.1}
                model = {
                    "network": network | {"randomized": kind} | options,
                    "loss": {"name": kind, "attack_steps": 10, "step_size": 0.25}
                    | ({"graddiv": regularizer, "graddiv_draws": 3} if weight else {}),
                    "norm": ".inf",
                    "eps": _number(eps),
                    "schedule": {
                        "warmup": table["warmup"], "ramp": table["ramp"], "eps_start": float(Fraction(eps)),
                        "kappa": [natural, natural], "graddiv": [0, weight],
                    },
                    "optimizer": {"name": "adam", "lr": 0.001, "decay": decay},
                    "evaluation": {"final_attack_steps": 20},
                }  # fmt: skip
                name = f"{images}_{kind}" + ("_graddiv" if weight else "")
                what = kind + (f" with GradDiv-{regularizer}, lambda {weight}" if weight else "")
                content = whole(model, data | {"batch_size": 128, "validation": validation}, epochs)
                configs[name] = f"2.2.4, Table A.1: {images}, l-infinity {eps}, {what}", content
    return configs


def _usual(test: str) -> str:
    return f"{min(0.4, float(test) + 0.1):.1f}"


def _number(text: str) -> float | str:
    return text if "/" in text else float(text)


def whole(model: dict[str, Any], data: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Model, data and trainer."""
    return {
        "model": model,
        "data": {"class_path": "lirpa_ext.training.ImageData", "init_args": data},
        "trainer": {"max_epochs": epochs},
    }


def texts() -> dict[Path, str]:
    """Every file and its content."""
    found = {}
    folders = ((HERE, l2_configs()), (HERE / "linf", linf_configs()), (HERE / "randomized", randomized_configs()))
    for folder, configs in folders:
        for name, (title, config) in configs.items():
            body = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
            found[folder / f"{name}.yaml"] = f"# {title}\n{body.replace(chr(39) + '.inf' + chr(39), '.inf')}"
    return found


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
