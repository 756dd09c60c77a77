"""The settings of ``mae``."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.settings import RunSettings


@dataclass(frozen=True)
class NetSettings:
    """The autoencoder. The source: encoder 256 x 4, decoder 128 x 2.

    Attributes:
        patch: side of a patch in pixels.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth: of the decoder, with as many heads.
    """

    patch: int = 4
    width: int = 64
    depth: int = 3
    heads: int = 4
    decoder_width: int = 32
    decoder_depth: int = 2


@dataclass(frozen=True)
class TrainSettings:
    """A training by AdamW with a cosine schedule.

    Attributes:
        steps, batch: of the training.
        lr, weight_decay: of AdamW.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        data: ``"digits"``, ``"crops"`` or both.
        share: of the patches that are masked.
        net: the autoencoder.
        pretraining: without labels, on the training images.
        tuning: with labels: fine-tuning, and the net from scratch.
        probe: with labels, of a linear layer on frozen features.
        masks: with labels, of masks over the frozen encoder (ours).
        labels: numbers of labelled training images, ascending.
        further: tasks of the masks and of the fine-tuned encoders beside them, of ``"turned"``, ``"inverted"``; on digits.
    """

    seeds: int = 3
    data: tuple[str, ...] = ("digits", "crops")
    share: float = 0.75
    net: NetSettings = NetSettings()
    pretraining: TrainSettings = TrainSettings(1500, 128, 1e-3)
    tuning: TrainSettings = TrainSettings(300, 64, 1e-3)
    probe: TrainSettings = TrainSettings(500, 128, 1e-2, 0.0)
    masks: TrainSettings = TrainSettings(600, 64, 3e-3, 0.0)
    labels: tuple[int, ...] = (100, 1000, 4000)
    further: tuple[str, ...] = ("turned", "inverted")
