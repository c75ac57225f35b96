"""Old names of modules that have moved; they work for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Old name -> new name, both relative to lirpa_ext.
MOVED = {
    "analysis.gather": "analysis.collect",
    "importer.fusion": "importer.merging",
    "activations": "nodes.activations",
    "analysis.plots": "reporting.plots",
    "analysis.results": "reporting.results",
    "analysis.task": "cli.task",
    "analyze_cli": "cli.analyze",
    "backward": "passes.backward",
    "batch_axis": "domain.batch_axis",
    "certifier": "certification.certifier",
    "certify": "certification.certify",
    "certify_cli": "cli.certify",
    "engine_methods": "methods.engine_methods",
    "evidence": "verification.evidence",
    "falsify": "verification.falsify",
    "fit_cli": "cli.fit",
    "fusion": "passes.loss_fusion",
    "goals": "verification.goals",
    "guard": "module.guard",
    "identity": "certification.identity",
    "inspect_cli": "cli.inspect",
    "inspection": "importer.inspection",
    "intervals": "passes.intervals",
    "lengths": "domain.lengths",
    "limits": "engine.limits",
    "linear_maps": "domain.linear_maps",
    "lipschitz": "certification.lipschitz",
    "loading": "models.loading",
    "losses": "training.losses",
    "matmul": "nodes.matmul",
    "norm_certificates": "domain.norm_bounds",
    "norms": "domain.norms",
    "operators": "nodes.operators",
    "outcomes": "certification.outcomes",
    "padding": "nodes.padding",
    "patch": "module.register",
    "perturbation": "domain.perturbation",
    "powers": "nodes.powers",
    "precision": "engine.precision",
    "preprocessing": "models.preprocessing",
    "products": "domain.products",
    "propagation": "passes.ball_box",
    "quotients": "rules.quotients",
    "radii": "certification.radii",
    "randomized.evaluation": "certification.robust_accuracy",
    "relaxations": "nodes.relaxations",
    "repairs": "nodes.repairs",
    "report": "certification.report",
    "report_cli": "cli.report",
    "results_file": "certification.results_file",
    "rounding": "domain.rounding",
    "sets": "domain.ball_box",
    "slopes": "passes.slopes",
    "softmax": "nodes.softmax",
    "specifications": "domain.specifications",
    "splitting": "verification.splitting",
    "studies": "analysis.studies",
    "studies.callbacks": "analysis.studies.callbacks",
    "studies.gradients": "analysis.studies.gradients",
    "studies.robustness": "analysis.studies.robustness",
    "studies.training": "analysis.studies.training",
    "study_cli": "cli.study",
    "support": "domain.ball_box_min",
    "torchvision_repair": "_torchvision",
    "tracing": "module.tracing",
    "training.architectures": "models.architectures",
    "transcendental": "nodes.transcendental",
    "verdict": "verification.verdict",
    "verifier": "verification.verifier",
    "verify": "verification.verify",
    "verify_cli": "cli.verify",
    "vnnlib": "verification.vnnlib",
    "vnnlib_terms": "verification.vnnlib_terms",
}

# Further modules that have parts of an old one.
ALSO = {
    "linear_maps": ("domain.convolutions",),
    "perturbation": ("domain.lp_ball",),
    "relaxations": ("domain.scalar_functions",),
    "training.architectures": ("models.zoo",),
}


class _Function(ModuleType):
    """A module under an old name that is also a public function, such as `lirpa_ext.certify`; calls go to it."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Mover(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that finds a module under its old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # so that imports of submodules come here

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        old = spec.name.partition(".")[2]
        moved = f"{__package__}.{MOVED[old]}"
        warnings.warn(f"{spec.name} has moved to {moved}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(moved)
        if old not in sys.modules[str(__package__)].__all__:
            alias = ModuleType(spec.name, module.__doc__)
        else:
            alias = _Function(spec.name, module.__doc__)
        for part in (*(importlib.import_module(f"{__package__}.{more}") for more in ALSO.get(old, ())), module):
            alias.__dict__.update({key: value for key, value in vars(part).items() if not key.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module was executed under its new name."""


def install() -> None:
    """Install the import hook for old names."""
    if not any(isinstance(finder, _Mover) for finder in sys.meta_path):
        sys.meta_path.append(_Mover())
