"""A stand-in for torch_tpu without a TPU, for tests of scheduling: it has the device's name and computes nothing."""

import torch

torch.utils.rename_privateuse1_backend("tpu")
