"""The error for what diffusers does not have."""

from diffusion_lab.common.messages import UserError


def without_counterpart(option: str, reason: str, remedy: str = "") -> UserError:
    """The error for an option, as written in a command, of a run that diffusers cannot hold."""
    return UserError(
        f"{option} cannot be exported with format=diffusers: {reason}; "
        f"{remedy or 'leave format out'}"
    )
