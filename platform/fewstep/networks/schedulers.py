"""diffusers' schedulers, read for what they say of the network: its schedule, its prediction, how it counts time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..diffusion.schedules import DDPM, EDM, STEPS, Flow, Schedule, to_config
from ..texts import quoted

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' name: ours


def from_scheduler(config: dict[str, Any], where: Path, tokens: int | None = None) -> dict[str, Any]:
    """The fields of a Network that a diffusers scheduler's config decides: schedule, prediction, data_std, time_scale.

    The levels at which a network was trained are its own, and so is a flow's shift. A sampler's spacing, order and
    clipping are not, and are left out. where: the file, for errors. tokens: of an image as the network sees it,
    (H / patch) (W / patch), on which a dynamic shift depends; None where it is not known.
    Raises ValueError for a scheduler whose network is none of ours.
    """
    try:
        return _read(config, where, tokens)
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing") from None
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"{where}: a value that gives no schedule ({error})") from None


def to_scheduler(schedule: Schedule, prediction: str) -> dict[str, Any]:
    """The config of the diffusers scheduler that samples a new network: the inverse of `from_scheduler`.

    Raises ValueError for a schedule and a prediction for which diffusers has none.
    """
    types = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    if isinstance(schedule, Flow) and prediction == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": schedule.shift}
    if not isinstance(schedule, DDPM) or prediction not in types:
        raise ValueError(
            f"network.schedule: {schedule.name} with the prediction {prediction}; diffusers has schedulers of ddpm "
            f"with {', '.join(types)} and of flow with flow; leave network.parts out to write the network alone"
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": types[prediction],
        "rescale_betas_zero_snr": schedule.zero_snr,
        "timestep_spacing": "trailing",  # begins at the last step, which is pure noise with a zero SNR
        "clip_sample": False,  # latents exceed 1
        "steps_offset": 1,
    }


def _read(config: dict[str, Any], where: Path, tokens: int | None) -> dict[str, Any]:
    name = config.get("_class_name", "")
    predicts = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    for key, value in (("_class_name", name), ("prediction_type", predicts)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key}: expected text, got {quoted(value)}")
    if type(steps) is not int or not 2 <= steps <= STEPS:
        raise ValueError(f"{where}: num_train_timesteps: expected 2 to {STEPS:,}, got {quoted(steps)}")
    if name.startswith("FlowMatch") or predicts == "flow_prediction":
        if config.get("invert_sigmas"):
            raise ValueError(f"{where}: invert_sigmas counts time from noise to image; known: from image to noise")
        shift = _shift(config, where, tokens)
        # the published grid is i / steps for i = 1 ... steps, shifted
        schedule = _valid(where, lambda: Flow(shift / (steps + shift - 1), 1.0, shift))
        return {"schedule": to_config(schedule), "prediction": "flow", "time_scale": float(steps)}
    if name.startswith("EDM"):
        if predicts != "epsilon":
            raise ValueError(
                f"{where}: prediction_type {predicts!r} of {name}; known with EDM's preconditioning: epsilon"
            )
        schedule = _valid(where, lambda: EDM(config["sigma_min"], config["sigma_max"], config.get("rho", 7.0)))
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
    if predicts not in PREDICTION_TYPES:
        raise ValueError(
            f"{where}: prediction_type {predicts!r} is not one of {', '.join(PREDICTION_TYPES)}, flow_prediction"
        )
    betas = (config[key] for key in ("beta_schedule", "beta_start", "beta_end"))
    schedule = _valid(where, lambda: DDPM(*betas, steps, bool(config.get("rescale_betas_zero_snr", False))))
    return {"schedule": to_config(schedule), "prediction": PREDICTION_TYPES[predicts]}


def _shift(config: dict[str, Any], where: Path, tokens: int | None) -> float:
    """A flow's shift: fixed, or dynamic, a function of the image's size (Esser et al. 2024; diffusers' defaults)."""
    if not config.get("use_dynamic_shifting"):
        return config.get("flow_shift", config.get("shift", 1.0))
    if tokens is None:
        raise ValueError(
            f"{where}: use_dynamic_shifting needs the image's size, and the model's config.json names no sample_size"
        )
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"{where}: time_shift_type {kind!r} is not one of exponential, linear")
    return math.exp(mu) if kind == "exponential" else mu


def _valid(where: Path, build: Any) -> Any:
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
