"""What a seed is made of: the size of the network, who lies, how bad the weather is."""

from dataclasses import dataclass
from random import Random

from tests.sim.liars import STYLES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a seed is made of. Times are virtual seconds."""

    f: int = 1
    liars: int = 1
    style: str = "mixed"
    clients: int = 2
    changes: int = 2
    restores: int = 0
    chaos_s: float = 16.0
    pause_s: float = 2.0
    channel_s: tuple[float, float] = (1.5, 9.0)
    loss: float = 0.1
    duplicate: float = 0.1
    delay_s: tuple[float, float] = (0.002, 0.25)
    partitions: float = 0.6
    crash_every_s: float = 4.0
    commit_crash: float = 0.01
    skew_ms: int = 1500
    grace_ms: int = 1000
    margin_ms: int = 500
    calm_s: float = 90.0
    issuer_epoch: int = -1
    """In which epoch root names another issuer; -1: in none."""
    metering: bool = False
    """Whether people have work done and pay for it call by call."""
    power: float = 0.0
    """How often a crash is a loss of power: what was not synced is lost."""
    real: bool = False


def plan_of(seed: int) -> Plan:
    """The plan of a seed: most have f = 1 with one liar; some none, some f = 2, some f = 0."""
    random, more = Random(f"plan/{seed}"), Random(f"more/{seed}")
    f = random.choice((1, 1, 1, 1, 1, 1, 1, 1, 2, 0))
    changes = random.choice((0, 1, 2, 2, 2))
    liars = f if random.random() < 0.65 else random.randint(0, f)
    restores = f - liars if changes else 0
    return Plan(
        f=f,
        liars=liars,
        changes=changes,
        restores=restores,
        style=random.choice((*STYLES, "mixed", "yes")),
        loss=random.choice((0.0, 0.05, 0.1, 0.2)),
        duplicate=random.choice((0.0, 0.1, 0.3)),
        partitions=random.choice((0.0, 0.4, 0.7)),
        crash_every_s=random.choice((3.0, 6.0, 12.0)),
        commit_crash=random.choice((0.0, 0.005, 0.02)),
        skew_ms=random.choice((0, 500, 3000)),
        real=seed % 50 == 49,
        # with an older database as well, a mark that lags would hide that
        issuer_epoch=more.randint(0, changes) if seed % 8 == 6 else -1,
        metering=seed % 8 == 2,
        power=0.0 if restores else more.choice((0.0, 0.5, 1.0)),
    )
