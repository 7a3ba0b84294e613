"""The commands of `diffusion-lab` as one function, for scripts and notebooks."""

from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from diffusion_lab.build.configuration import conf_dir
from diffusion_lab.build.sentences import MISTAKES, sentence
from diffusion_lab.cli.arguments import prepare
from diffusion_lab.cli.commands import command_named
from diffusion_lab.cli.ending import STOPPED
from diffusion_lab.cli.job import result_of
from diffusion_lab.common.messages import UserError


def command(name: str, *arguments: str) -> Any:
    """Runs a command of `diffusion-lab` in this process; returns what json=true would print.

    Arguments are written as on the command line, as in `command("train", "backbone=dit")`, and are
    overrides and paths: flags such as -m belong to the command line. A training command returns its
    `optimized_metric`, or None. Raises UserError with the sentence that the command line would
    print, and KeyboardInterrupt once a run that Ctrl-C has stopped is saved.
    """
    chosen, config, before = command_named(name), name.replace("-", "_"), HydraConfig.instance().cfg
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"{flags[0]} is a flag of the command line; write overrides alone here")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            overrides = prepare(chosen, list(arguments))
            whole = compose(config, overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(whole)
            cfg = whole.copy()
            with open_dict(cfg):
                del cfg["hydra"]
            return result_of(chosen, config, cfg)
    except MISTAKES as error:
        raise UserError(sentence(error)) from error
    except SystemExit as end:
        if end.code == STOPPED:
            raise KeyboardInterrupt from end
        raise
    finally:
        HydraConfig.instance().cfg = before
