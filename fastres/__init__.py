"""fastres: ResNets made fast without changing their answers.

    model = fastres.resnet18(fused=True)   # in the place of torchvision.models.resnet18()

    model = fastres.fuse_model(model)      # the same for a model that others wrote

`fastres.ops` are the fused ops, `fastres.backends.cpu` says which algorithms may compute them,
`fastres.cuda_graph` captures a model for fixed shapes, `fastres.train.fit` is the standard CIFAR-10
recipe, and `python -m fastres.env` tells which kernels are live on this machine.
"""

from fastres import backends, cuda_graph, ops
from fastres.fuse import fuse_model
from fastres.library import library_path
from fastres.models import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152, summary
from fastres.version import __version__

__all__ = [
    "ResNet",
    "__version__",
    "backends",
    "cuda_graph",
    "fuse_model",
    "library_path",
    "ops",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "summary",
]
