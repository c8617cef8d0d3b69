"""How much exactness is given up for time: knobs of the denoising loop, and rungs that set them
together.

Nothing is trained for them. `guidance_stop`: late in the denoising, guidance changes little
(Castillo et al. 2023, arXiv 2312.12487; Kynkäänniemi et al. 2024, arXiv 2404.07724).
`deep_every`: the features of the UNet's inner blocks change slowly from step to step (Ma et al.
2023, arXiv 2312.00858); see `deep_features.py`.
"""

from dataclasses import dataclass, fields

from elite.wording import brief


@dataclass(frozen=True)
class Speed:
    """Independent knobs; by default none does anything.

    Args:
        guidance_stop: share of the steps, above 0 to 1, after which only the conditional rows run,
            so without guidance.
        deep_every: the UNet's inner blocks run at every so many steps, its outermost layer at each.

    Raises:
        ValueError: out of range.
    """

    guidance_stop: float = 1.0
    deep_every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.guidance_stop <= 1:
            raise ValueError(
                f"guidance_stop {brief(self.guidance_stop)}: expected a share of the steps, more "
                "than 0 and at most 1"
            )
        if not isinstance(self.deep_every, int) or self.deep_every < 1:
            raise ValueError(
                f"deep_every {brief(self.deep_every)}: expected a whole number of steps, 1 or more"
            )

    def guided_steps(self, steps: int) -> int:
        """How many of the steps have guidance, 1 at least."""
        return max(1, round(self.guidance_stop * steps))

    def __str__(self) -> str:
        """The knobs that do something, for metadata; empty for none."""
        knobs = ((item, getattr(self, item.name)) for item in fields(self))
        return ", ".join(f"{item.name} {value:g}" for item, value in knobs if value != item.default)


RUNGS = {
    "exact": Speed(),
    "balanced": Speed(deep_every=3),
    "fast": Speed(guidance_stop=0.7, deep_every=5),
}
EXACT = RUNGS["exact"]


def single_knobs() -> dict[str, Speed]:
    """Each knob of the rungs alone, where no rung is just that, by what it is."""
    knobs = [knob for rung in RUNGS.values() for knob in vars(rung).items()]
    alone = [Speed(**{name: value}) for name, value in sorted(knobs)]
    return {str(speed): speed for speed in alone if speed not in RUNGS.values()}


def speed_of(
    rung: str | Speed, guidance_stop: float | None = None, deep_every: int | None = None
) -> Speed:
    """A rung by its name, or a speed, with single knobs set otherwise; None leaves a knob as it is.

    Raises:
        ValueError: unknown name, or a knob out of range.
    """
    speed = rung if isinstance(rung, Speed) else RUNGS.get(str(rung))
    if speed is None:
        raise ValueError(f"speed is {brief(rung)}; choose one of {', '.join(RUNGS)}")
    stop = speed.guidance_stop if guidance_stop is None else guidance_stop
    return Speed(stop, speed.deep_every if deep_every is None else deep_every)
