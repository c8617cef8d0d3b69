"""What applies where nobody says otherwise."""

PLACEHOLDER = "S"  # the word that stands for the object
LAMBDA = 0.8  # weight of the local branch: 0.8 reproduces the object, 0.6 edits it
GUIDANCE_SCALE = 5.0  # of classifier-free guidance
# Deviation: the release takes 100 steps of LMS. On the small world every score is that of those; of
# its pictures one in fifty differs clearly (small_world/samplers.py).
DEFAULT_SAMPLER, DEFAULT_STEPS = "unipc", 20
