"""Settings every test needs: one compute thread, so that tests beside each other do not starve."""

import torch

torch.set_num_threads(1)
