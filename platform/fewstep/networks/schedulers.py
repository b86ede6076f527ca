"""diffusers' schedulers, read as what they say of the network: its schedule, its prediction, how it counts time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..diffusion.schedules import DDPM, EDM, Flow, to_config

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' word: ours


def from_scheduler(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The fields of a Network that a diffusers scheduler's config decides: schedule, prediction, data_std, time_scale.

    How the scheduler would step (its spacing, order, clipping) is not the network's and is left out. where: the file,
    for errors. Raises ValueError for a scheduler whose network is none of ours.
    """
    name = config.get("_class_name", "")
    word = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    if name.startswith("FlowMatch") or word == "flow_prediction":
        return {"schedule": to_config(Flow()), "prediction": "flow", "time_scale": float(steps)}
    if name.startswith("EDM"):
        if word != "epsilon":
            raise ValueError(f"{where}: prediction_type {word!r} of {name}; known with EDM's preconditioning: epsilon")
        schedule = EDM(config["sigma_min"], config["sigma_max"], config.get("rho", 7.0))
        return {"schedule": to_config(schedule), "prediction": "edm", "data_std": config["sigma_data"]}
    if "beta_schedule" not in config:
        raise ValueError(
            f"{where}: {name or 'a scheduler'} has no beta schedule; put a fewstep.json that names schedule and "
            "prediction into the pipeline's folder"
        )
    if config.get("trained_betas") is not None or config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{where}: trained_betas and continuous timesteps name no schedule; known: a beta_schedule by name"
        )
    if word not in PREDICTION_TYPES:
        raise ValueError(
            f"{where}: prediction_type {word!r} is not one of {', '.join(PREDICTION_TYPES)}, flow_prediction"
        )
    schedule = DDPM(
        config["beta_schedule"],
        config["beta_start"],
        config["beta_end"],
        steps,
        bool(config.get("rescale_betas_zero_snr", False)),
    )
    try:
        schedule.angles()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {"schedule": to_config(schedule), "prediction": PREDICTION_TYPES[word]}
