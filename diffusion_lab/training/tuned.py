"""The values that a study's tuning chose, which a training reads when it starts."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import updated, verbatim
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.files import COLLAPSED, NON_FINITE
from diffusion_lab.runs.progress import failure_of

FOUND = "tuning.json"  # the file of what was found, in the folder of the trials
FOLDER = "tuning"  # the folder with such files in a published one


def with_tuned(cfg: DictConfig) -> DictConfig:
    """A configuration with what was chosen in the file that `cfg.tuning` names, if it names one.

    Its `tuning` has what was tried, too. Raises UserError if nothing has been chosen.
    """
    tuning = cfg.get("tuning")
    if not tuning or (isinstance(tuning, DictConfig) and tuning.get("chosen")):
        return cfg
    if not isinstance(tuning, DictConfig) or tuning.keys() != {"file", "of"}:
        raise UserError(
            f"tuning={tuning} must name a file of a study and what it tuned, as in "
            "tuning={file:outputs/unet_vs_dit/tune/tuning.json,of:DiT}"
        )
    found = read_json(Path(str(tuning.file))).get(str(tuning.of), {})
    if not found.get("chosen"):
        why = "no trial has a finite metric" if found else "it has not been tuned yet"
        raise UserError(f"{tuning.file} chooses nothing for {tuning.of}: {why}")
    cfg = updated(cfg, {key: verbatim(value) for key, value in found["chosen"].items()})
    OmegaConf.update(cfg, "tuning", {**tuning, **found}, force_add=True)
    return cfg


def has_diverged(folder: Path) -> bool:
    """Whether a run failed because its loss was not finite, or because its samples became alike."""
    # one that went back to a checkpoint has these steps, too, and may have failed otherwise
    not_finite = (folder / NON_FINITE).exists() and "not finite" in (failure_of(folder) or "")
    return not_finite or (folder / COLLAPSED).exists()
