"""Optimisers, and the groups of parameters that they treat differently.

A matrix is the weight of a linear layer or of a convolution over all channels; embedding tables,
norms' gains, biases and everything else are not. Weight decay is for matrices alone. A matrix is
hidden if it is neither at a network's input nor at its output, nor part of the conditioning.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any

from omegaconf import DictConfig, ListConfig
from torch import nn
from torch.optim import Optimizer

from diffusion_lab.assembly.instantiate import Factory, check_keys, instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import BETAS, Range, at_least, optional, settings

GROUPS = "parameter_groups"  # the key of settings by name
RATE = at_least(0)
LIST = Range("a list or null", lambda value: value is None or isinstance(value, ListConfig))
PATTERN = Range("a pattern of names", lambda value: isinstance(value, str), "*.embeddings.*")


@settings
class GroupSettings:
    """The learning rate and weight decay, where given, of parameters whose names match."""

    pattern: Annotated[str, PATTERN]
    lr: Annotated[float | None, optional(RATE)] = None
    weight_decay: Annotated[float | None, optional(RATE)] = None


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes an optimiser for a module, in groups: `make` takes parameters, of one group.

    An optimiser may have an attribute `not_hidden`, the settings of all parameters that are not
    hidden matrices, and `width_power`, the power of a module's `rates` for these matrices. A rate
    that such a factor slows down leaves the decay per step as it is. Of the `overrides` that match
    a parameter, the first one counts, as it is written.
    """

    make: Callable[[list[nn.Parameter]], Optimizer]
    overrides: Sequence[GroupSettings] = ()

    def __call__(
        self, module: nn.Module, trained: list[nn.Parameter], hidden: Iterable[nn.Parameter]
    ) -> Optimizer:
        """The optimiser of `trained`, parameters of the module; `hidden` are its hidden matrices.

        Raises UserError for an override that matches none of them, and for rates by width that
        are not this optimiser's.
        """
        try:
            optimizer = self.make(trained)
        except RuntimeError as error:  # of settings that exclude each other
            raise UserError(f"the values of optimizer do not fit: {error}") from error
        if len(optimizer.param_groups) != 1:  # it already has several groups
            return optimizer
        (base,) = optimizer.param_groups
        names = {parameter: name for name, parameter in module.named_parameters()}
        self._check_patterns([names[parameter] for parameter in trained])
        decayed, inner = set(matrices(module)), set(hidden)
        rates = {p: f for each in module.modules() for p, f in getattr(each, "rates", {}).items()}
        if rates and "betas" not in base:
            raise UserError(
                "backbone.base_width has rates for optimizers like Adam and Muon; "
                "write optimizer=adamw or optimizer=muon, or backbone.base_width=null"
            )
        groups: dict[tuple, list[nn.Parameter]] = {(): []}  # in the order of checkpoints
        for parameter in trained:
            own = {} if parameter in inner else dict(getattr(optimizer, "not_hidden", {}))
            if parameter not in decayed and "weight_decay" in base:
                own["weight_decay"] = 0.0
            if parameter in rates:
                power = getattr(optimizer, "width_power", 1.0) if parameter in inner else 1.0
                factor = rates[parameter] ** power
                settings = base | own
                own["lr"] = settings["lr"] * factor
                if "weight_decay" in base:
                    own["weight_decay"] = settings["weight_decay"] / factor
            own |= self._override(names[parameter])
            changed = {key: value for key, value in own.items() if base.get(key) != value}
            groups.setdefault(tuple(sorted(changed.items())), []).append(parameter)
        optimizer.param_groups.clear()
        for changes, parameters in groups.items():
            if parameters:
                optimizer.add_param_group({**base, **dict(changes), "params": parameters})
        return optimizer

    def _override(self, name: str) -> dict[str, Any]:
        """The settings that the first matching pattern gives to a parameter."""
        found = (each for each in self.overrides if fnmatchcase(name, each.pattern))
        given = next(found, None)
        if given is None:
            return {}
        values = {"lr": given.lr, "weight_decay": given.weight_decay}
        return {key: value for key, value in values.items() if value is not None}

    def _check_patterns(self, names: list[str]) -> None:
        for place, each in enumerate(self.overrides):
            if not any(fnmatchcase(name, each.pattern) for name in names):
                raise UserError(
                    f"{GROUPS}[{place}].pattern={each.pattern!r} matches no parameter; names are "
                    f"as in {names[0]}, and * stands for anything"
                )


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module's linear layers and of its convolutions over all channels."""
    layers = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    return [
        each.get_parameter("weight")
        for each in module.modules()
        if isinstance(each, layers) and getattr(each, "groups", 1) == 1
    ]


def inner_matrices(network: nn.Module, ends: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The matrices of a network, except the ones of its ends."""
    outer = {weight for end in ends for weight in matrices(end)}
    return [weight for weight in matrices(network) if weight not in outer]


def for_training(optimizer: Optimizer, training: bool) -> None:
    """Takes the weights that an optimiser trains, or those that it is judged by, if these differ.

    Schedule-free ones (arXiv:2405.15682) say so by methods `train` and `eval`.
    """
    getattr(optimizer, "train" if training else "eval", lambda: None)()


def build_optimizer(cfg: DictConfig) -> OptimizerFactory:
    """The optimiser that a configuration describes; raises UserError for a wrong setting."""
    known = [key for key in ("lr", "eps", "weight_decay") if key in cfg.optimizer]
    check_keys(cfg, {f"optimizer.{key}": RATE for key in known})
    if "betas" in cfg.optimizer and str(cfg.optimizer._target_).startswith("torch."):
        check_keys(cfg, {"optimizer.betas": BETAS})
    check_keys(cfg, {GROUPS: LIST})
    overrides = []
    for place, node in enumerate(cfg[GROUPS] or []):
        key = f"{GROUPS}[{place}]"
        if not isinstance(node, DictConfig):
            raise UserError(f"{key} must be written {{pattern:'*.embeddings.*',lr:1e-4}}")
        named = {str(name): value for name, value in node.items()}
        overrides.append(Factory(partial(GroupSettings), key, named)())
    return OptimizerFactory(instantiate(cfg, "optimizer"), overrides)
