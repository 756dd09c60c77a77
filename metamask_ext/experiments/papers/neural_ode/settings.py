"""The settings of ``neural-ode``."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.settings import RunSettings


@dataclass(frozen=True)
class FlowSettings:
    """The continuous normalizing flow on two circles.

    Attributes:
        width: of its hidden layer.
        steps, batch, lr: of its training.
        parts: steps of the solver in training.
    """

    width: int = 64
    steps: int = 800
    batch: int = 256
    lr: float = 1e-2
    parts: int = 12


@dataclass(frozen=True)
class SpiralSettings:
    """The latent ODE and the recurrent net on noisy spirals.

    Attributes:
        spirals: for training, and as many for the test.
        seen, later: points of the first part, which is seen, and of the part that is extrapolated to.
        noise: standard deviation on each coordinate.
        latent, field, hidden: numbers of latent coordinates, and of units of the field and of the recurrent encoder.
        steps, lr: of Adam.
    """

    spirals: int = 100
    seen: int = 24
    later: int = 12
    noise: float = 0.1
    latent: int = 4
    field: int = 20
    hidden: int = 25
    steps: int = 800
    lr: float = 1e-2


@dataclass(frozen=True)
class SystemSettings:
    """One masked field for several systems.

    Attributes:
        systems: trained together.
        trajectories: of each system, for training, and as many for the test.
        width: of the two hidden layers.
        steps, lr, mask_lr: of Adam; a new system gets as many.
        parts: steps of the solver between two of the times that are observed.
    """

    systems: int = 8
    trajectories: int = 16
    width: int = 64
    steps: int = 500
    lr: float = 3e-3
    mask_lr: float = 3e-2
    parts: int = 1


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        lengths: numbers of steps between which memory is compared.
        flow, spirals, systems: of its parts.
    """

    seeds: int = 3
    lengths: tuple[int, ...] = (10, 100, 1000)
    flow: FlowSettings = FlowSettings()
    spirals: SpiralSettings = SpiralSettings()
    systems: SystemSettings = SystemSettings()
