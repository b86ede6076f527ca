"""Guidance of the teacher: how strong?"""

from fewstep.sweeps.space import uniform

METRIC = "fd_fashion"
OBJECTIVES = ["fd_fashion", "diversity"]
SPACE = {
    "method.guidance": uniform(1.0, 4.0, points=4),
}
WHY = {
    "method.guidance": (
        "Published: none for ImageNet, 1.75 for SD 1.5, 8 for SDXL (DMD2, arXiv:2405.14867, and its scripts). A class "
        "is a weaker condition than a caption: beyond 4 the samples of a class are nearly one."
    ),
}
