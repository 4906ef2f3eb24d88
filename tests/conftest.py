from __future__ import annotations

import torch
from transformers.utils import logging

# Tiny tensors run faster on one thread, and parallel test workers do not fight over cores.
torch.set_num_threads(1)
logging.disable_progress_bar()
