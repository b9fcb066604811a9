"""A stand-in for torch_tpu where there is no TPU, for tests of scheduling: the name of the device, and nothing that computes on it."""

import torch

torch.utils.rename_privateuse1_backend("tpu")
