"""Learning rates of the released SPT, GPS and SAM fine-tuning codes, epoch by epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snella.runs.protocol import Protocol

GOLDEN = Path(__file__).parent / "golden" / "spt_gps" / "lr_schedules.npz"


def rates(protocol: Protocol, shift: int = 0) -> np.ndarray:
    """Learning rate of every epoch; shift: epochs by which the schedule runs ahead."""
    return np.array(
        [protocol.lr * protocol.lr_factor(e + shift, 0.0) for e in range(protocol.epochs)]
    )


def test_released_schedules_meet_the_authors_codes() -> None:
    golden = np.load(GOLDEN)
    spt = Protocol(lr=1e-3, epochs=100, schedule="released", warmup_lr=1e-6, min_lr=1e-5)
    np.testing.assert_allclose(rates(spt), golden["spt"], rtol=1e-12)
    # GPS uses the same formula without SPT's delay of one epoch, and cools down at the floor.
    gps = Protocol(lr=2e-3, epochs=100, schedule="released", warmup_lr=1e-7, min_lr=1e-8)
    np.testing.assert_allclose(rates(gps, shift=1), golden["gps"][:100], rtol=1e-12)
    np.testing.assert_allclose(golden["gps"][100:], gps.min_lr, rtol=1e-12)
    sam = Protocol(lr=2e-4, epochs=20, schedule="cosine", warmup_epochs=0, min_lr=1e-7)
    np.testing.assert_allclose(rates(sam), golden["sam"], rtol=1e-12)
