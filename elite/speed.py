"""How much exactness is given up for time: knobs of the denoising loop, and rungs that set them
together.

Nothing is trained for them. `guidance_stop`: late in the denoising, guidance changes little
(Castillo et al. 2023, arXiv 2312.12487; Kynkäänniemi et al. 2024, arXiv 2404.07724).
`deep_every`: the features of the UNet's inner blocks change slowly from step to step (Ma et al.
2023, arXiv 2312.00858), at first, where the layout of the picture is found, least slowly
(`deep_first`); see `deep_features.py`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from elite.kinds import is_number, is_whole
from elite.wording import brief


@dataclass(frozen=True)
class Speed:
    """Knobs; at their defaults the picture is exact.

    Args:
        guidance_stop: share of the steps, above 0 to 1, after which only the conditional rows run,
            so without guidance.
        deep_every: the UNet's inner blocks run at every so many steps, its outermost layer at each.
        deep_first: over so many of the first steps the distance between such steps grows to
            `deep_every`, linearly from 1; at 1 it is the same from the first step on.

    Raises:
        ValueError: out of range.
    """

    guidance_stop: float = 1.0
    deep_every: int = 1
    deep_first: int = 1

    def __post_init__(self) -> None:
        if not is_number(self.guidance_stop) or not 0 < self.guidance_stop <= 1:
            raise ValueError(
                f"guidance_stop {brief(self.guidance_stop)}: expected a share of the steps, more "
                "than 0 and at most 1"
            )
        for name in ("deep_every", "deep_first"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ValueError(
                    f"{name} {brief(value)}: expected a whole number of steps, 1 or more"
                )

    def guided_steps(self, steps: int) -> int:
        """How many of the steps have guidance, 1 at least."""
        return max(1, round(self.guidance_stop * steps))

    def runs_whole(self, step: int) -> bool:
        """Whether all of the UNet runs at a step, counted from 0. From such a step s the next is
        1 + (deep_every - 1) min((s + 1) / deep_first, 1) away, rounded down: with deep_every 5 and
        deep_first 12 they are 0, 1, 2, 4, 6, 9, 13, 18, 23, ..."""
        whole = 0
        while whole < step:
            grown = min(whole + 1, self.deep_first)
            whole += 1 + (self.deep_every - 1) * grown // self.deep_first
        return whole == step

    def __str__(self) -> str:
        """The knobs that do something, for metadata; empty for none."""
        knobs = ((item, getattr(self, item.name)) for item in fields(self))
        return ", ".join(f"{item.name} {value:g}" for item, value in knobs if value != item.default)


RUNGS = {
    "exact": Speed(),
    "balanced": Speed(deep_every=5, deep_first=12),
    "fast": Speed(guidance_stop=0.7, deep_every=5),
}
EXACT = RUNGS["exact"]


def single_knobs() -> dict[str, Speed]:
    """Each knob of the rungs alone, where no rung is just that, by what it is. `deep_first` alone
    does nothing."""
    alone = [Speed(deep_every=rung.deep_every) for rung in RUNGS.values()]
    alone += [Speed(guidance_stop=rung.guidance_stop) for rung in RUNGS.values()]
    return {str(speed): speed for speed in alone if speed not in RUNGS.values()}


def speed_of(
    rung: str | Speed,
    guidance_stop: float | None = None,
    deep_every: int | None = None,
    deep_first: int | None = None,
) -> Speed:
    """A rung by its name, or a speed, with single knobs set otherwise; None leaves a knob as it is.

    Raises:
        ValueError: unknown name, or a knob out of range.
    """
    speed = rung if isinstance(rung, Speed) else RUNGS.get(str(rung))
    if speed is None:
        raise ValueError(f"speed is {brief(rung)}; choose one of {', '.join(RUNGS)}")
    knobs: dict[str, Any] = {
        "guidance_stop": guidance_stop,
        "deep_every": deep_every,
        "deep_first": deep_first,
    }
    return replace(speed, **{name: value for name, value in knobs.items() if value is not None})
