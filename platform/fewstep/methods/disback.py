"""Distribution backtracking builds a faster convergence trajectory for diffusion distillation (DisBack). Zhang et al.
2024, arXiv:2408.15991.

A copy of the teacher first degrades into the score of the untrained student, and its checkpoints are recorded. Then the
student is led back along them, from the nearest to the teacher itself.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, noised
from ..diffusion.level import Level
from ..diffusion.samplers import calls_at, run_calls
from .base import Batch, Index, Make, Method, Nets, Phase, Terms
from .dmd2 import DMD2


class DisBackRecord(Method):
    """Degradation: a copy of the teacher learns the samples of the teacher called once. Its checkpoints are the nodes.

    The trained network is the role "student"; it stays a diffusion model.
    """

    name: Literal["disback_record"] = "disback_record"
    conditioning: Index = INDICES - 1
    """Level at which the untrained student is called, as in the run that follows."""

    needs: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("record/denoise",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("record", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        teacher, net = nets["teacher"], nets["student"]
        calls = calls_at(teacher.schedule, (self.conditioning / (INDICES - 1),), on_ramp=True)
        with torch.no_grad():
            x = run_calls({"student": teacher}, calls, batch.z, batch.cond, batch.draws)
        x_t, level, eps = noised(batch.draws, "record", net.schedule, x)
        raw = net(x_t, level, batch.cond, "raw")
        return {"denoise": F.mse_loss(raw, net.target(level, x, eps))}, {}


class DisBack(DMD2):
    """DMD2 whose critic starts as the last node, and whose teacher is the next node, then the next, then the teacher.

    `nodes` of one is the control that DisBack has to beat: the warm critic alone. Read in the paper: nodes, order and
    losses. Proposed: nodes are not guided, the teacher is. Departs from the published code, which loads no node (its
    keys do not fit) and stops switching after the first.
    """

    name: Literal["disback"] = "disback"
    nodes: tuple[str, ...] = ()
    """Runs or checkpoints of `disback_record`, the most degraded first; () is DMD2, bit for bit."""
    node_steps: Annotated[int, Field(ge=1)] = 100
    """Steps for which a node is the target."""

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make)
        if self.nodes:
            first, *others = (make.run(node) for node in self.nodes)
            nets |= {"fake": first} | {f"node{i}": net for i, net in enumerate(others, 1)}
        return nets

    def target(self, step: int) -> str:
        """The role whose score is the target in a step."""
        i = 1 + step // self.node_steps
        return f"node{i}" if i < len(self.nodes) else "teacher"

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        role = self.target(batch.draws.step)
        if role == "teacher":
            return super().scores(nets, batch, x_t, level)
        return nets[role](x_t, level, batch.cond), nets["fake"](x_t, level, batch.cond)
