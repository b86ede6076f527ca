"""TTUR ratio and GAN weight: which, at equal images?"""

from fewstep.sweeps.space import choice

METRIC = "fd_fashion"
OBJECTIVES = ["fd_fashion", "diversity"]
SPACE = {
    "method.critic_updates_per_student_update": choice(1, 2, 5, 10),
    "method.gan_weight": choice(0, 1e-3, 3e-3, 1e-2, 3e-2),
}
WHY = {
    "method.critic_updates_per_student_update": (
        "DMD2 (arXiv:2405.14867, section 4.2 and appendix C): 1 is unstable, 5 best for the cost, 10 stable and slow."
    ),
    "method.gan_weight": (
        "The published 1e-3 (SD 1.5), 3e-3 (ImageNet) and 5e-3 (SDXL) with half a decade beyond; zero is Table 3's "
        "ablation, which the GAN improves on (FID 2.61 to 1.51)."
    ),
}
