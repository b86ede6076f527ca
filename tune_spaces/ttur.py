"""TTUR ratio: how many critic updates does a student update need?"""

from fewstep.sweeps.space import choice

METRIC = "fd_fashion"
OBJECTIVES = ["fd_fashion", "hours"]
SPACE = {
    "method.critic_updates_per_student_update": choice(1, 2, 5, 10),
}
WHY = {
    "method.critic_updates_per_student_update": (
        "DMD2 (arXiv:2405.14867, section 4.2 and appendix C): 5 for ImageNet and SDXL, 10 for SD 1.5; 1 is unstable at "
        "equal rates, 10 stable and slow. 2 stands for the advice to take the least that keeps brightness steady."
    ),
}
