"""How good pictures of concepts are: what is drawn, what is measured, and on which subjects."""

import os

# `rate` and `compare` import transformers as they start, whose hints are for its developers.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
