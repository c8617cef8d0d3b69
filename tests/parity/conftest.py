"""The golden numbers are float32 on the CPU; one thread keeps sums in one order."""

import torch

torch.set_num_threads(1)
