"""TTUR ratio, GAN weight and guidance: which, with the learning rates, level and average that suit them?"""

from fewstep.sweeps.space import choice, given, loguniform, uniform, zero_or

METRIC = "fd_fashion"
OBJECTIVES = ["fd_fashion", "diversity", "hours"]
SPACE = {
    "method.critic_updates_per_student_update": choice(1, 2, 5, 10),
    "method.gan_weight": zero_or(loguniform(1e-3, 3e-2)),
    "method.guidance": uniform(1.0, 4.0),
    "optim.student.lr": loguniform(2e-5, 5e-4),
    "optim.fake.lr": loguniform(1e-4, 2e-3),
    "optim.disc.lr": given("method.gan_weight", loguniform(1e-4, 2e-3)),
    "method.conditioning": choice(399, 699, 999),
    "train.average_decay": choice(0.95, 0.98, 0.99),
}
WHY = {
    "method.critic_updates_per_student_update": (
        "Published: 5 for ImageNet and SDXL, 10 for SD 1.5; 1 is unstable (appendix C)."
    ),
    "method.gan_weight": "Published: 3e-3 for ImageNet, 1e-3 for SD 1.5, 5e-3 for SDXL; zero is Table 3's ablation.",
    "method.guidance": (
        "Published: none for ImageNet, 1.75 for SD 1.5, 8 for SDXL; a class is a weaker condition than a caption."
    ),
    "optim.student.lr": (
        "Published: 2e-6 for ImageNet, 1e-5 for SD 1.5, over 40,000 updates and more; runs of hundreds of updates on "
        "small networks need some fifty times as much."
    ),
    "optim.fake.lr": "Published: the student's. A critic that learns faster than the student replaces a high ratio.",
    "optim.disc.lr": "Published: the critic's.",
    "method.conditioning": "999 for all but one-step SDXL, which takes 399 against block artefacts (appendix F.4).",
    "train.average_decay": "Published: no average. Short runs gain from one that forgets sooner than the run ends.",
}
