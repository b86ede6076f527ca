"""The adversarial term: does it help, and at what weight?"""

from fewstep.sweeps.space import given, loguniform, zero_or

METRIC = "fd_fashion"
OBJECTIVES = ["fd_fashion", "diversity"]
SPACE = {
    "method.gan_weight": zero_or(loguniform(1e-3, 3e-2, points=4)),
    "method.critic_gan_weight": given("method.gan_weight", loguniform(3e-3, 3e-2, points=3)),
    "optim.disc.lr": given("method.gan_weight", loguniform(1e-4, 1.6e-3, points=3)),
}
WHY = {
    "method.gan_weight": (
        "Published: 3e-3 for ImageNet, 1e-3 for SD 1.5, 5e-3 for SDXL (DMD2's training scripts); zero is Table 3's "
        "ablation. The balance depends on image size, since matching is a mean over pixels and this term is not."
    ),
    "method.critic_gan_weight": "1e-2 in all published settings; half a decade to either side.",
    "optim.disc.lr": "Published: that of the critic. From an eighth of this recipe's 8e-4 to twice as much.",
}
