"""The README's example: does the prediction stay the same on all of an l2 ball of radius 0.1?"""

import torch

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.domain.specifications import margin_rows

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
images = torch.rand(8, 1, 8, 8)
labels = model(images).argmax(1)

ball = BoundedTensor(images, PerturbationLpNorm(norm=2, eps=0.1, x_L=0.0, x_U=1.0))
C = margin_rows(labels, classes=10, dtype=images.dtype)  # rows z_label - z_other
lower, _ = BoundedModule(model, images).compute_bounds(x=(ball,), C=C, method="bcp", bound_upper=False)
certified = (lower > 0).all(dim=1)  # a tie or a NaN never certifies
print(certified.tolist())
