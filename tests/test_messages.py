"""Bad input is answered in one sentence: golden/messages.txt has all of them, no other file does.

An entry of that file is a prompt and the message that answers it. A prompt is a shell command
(`$ sample run=nowhere` of `diffusion-lab`), a training (`train TINY seed=-1`, whose function is
called without the command), `build`, which builds the training objects of a configuration, or
Python (`>>> Euler(0, Uniform())`). Words in capitals are the overrides of tiny runs; run/ is a
finished run, and stage/ a first stage of codes. To add an entry, write its prompt; new and changed
messages are written into the file by

    STORE_MESSAGES=1 python -m pytest tests/test_messages.py
"""

import math
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers.compositions import assembled, composed
from helpers.pages import WRITTEN, changes_a_key
from helpers.paths import TESTS
from helpers.refusals import sentence_of
from helpers.tiny_runs import FAMILIES, PLAIN, TINY, TINY_AUTOENCODER, tiny_first_stage
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.objects import build_model, build_pipeline
from diffusion_lab.backbone.attention import SelfAttention
from diffusion_lab.backbone.conditioning import Attributes, ClassLabel
from diffusion_lab.common.labels import Classes
from diffusion_lab.common.messages import UserError
from diffusion_lab.data.source import ImageFolder, TwoMoons
from diffusion_lab.diffusion import guidance, objective, sampler, schedule
from diffusion_lab.diffusion.objective.loss import weighting
from diffusion_lab.diffusion.sampler import time_grid
from diffusion_lab.estimate.budget import Budget
from diffusion_lab.first_stage.autoencoder import FSQAutoencoder, KLAutoencoder, VQAutoencoder
from diffusion_lab.first_stage.reconstruction import ReconstructionLoss, discriminator, perceptual
from diffusion_lab.training.lr_schedule import ConstantRate
from diffusion_lab.training.train import train

FILE = TESTS / "golden/messages.txt"
PROMPTS = ("$ ", ">>> ", "build ", "train ")


def entries(text: str) -> dict[str, str]:
    """The messages in the file by their prompts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(PROMPTS):
            prompt = line
            assert prompt not in found, f"{prompt} stands there twice"
            found[prompt] = ""
        elif line and not line.startswith("# "):
            found[prompt] += line
    return found


def store(prompt: str, message: str) -> None:
    """Writes the message of a prompt into the file."""
    other = "|".join(map(re.escape, ("# ", *PROMPTS)))
    entry = re.compile(rf"^{re.escape(prompt)}\n(?:(?!{other}).+\n)?", re.MULTILINE)
    FILE.write_text(entry.sub(lambda _: f"{prompt}\n{message}\n", FILE.read_text()))


MESSAGES = entries(FILE.read_text())
NETWORK = {"channels": 8, "multipliers": [1, 2, 2], "blocks": 1, "attention": True}
CODES = {"codes": 16, "decay": 0.9, "revive_below": 1.0, "commitment_weight": 0.25}
NO_BUDGET = {
    "reference": None,
    "by": "macs",
    "tolerance": 0.02,
    "images": None,
    "seconds": None,
    "flops": None,
}
SHORT = {
    "TINY": TINY,
    "TINY_AUTOENCODER": TINY_AUTOENCODER,
    "GAN": [*PLAIN, *FAMILIES["gan"]],
    "CODES": [*PLAIN, *FAMILIES["autoregressive"]],
    "PLAIN": PLAIN,
}
NAMES = {  # the names that Python prompts may use
    "Classes": Classes,
    **vars(objective),
    **vars(objective.loss),
    **vars(weighting),
    **vars(guidance),
    **vars(sampler),
    **vars(schedule),
    **vars(time_grid),
    "math": math,
    "perceptual": perceptual,
    "ClassLabel": ClassLabel,
    "Attributes": Attributes,
    "ConstantRate": ConstantRate,
    "SelfAttention": SelfAttention,
    "TwoMoons": TwoMoons,
    "ReconstructionLoss": ReconstructionLoss,
    "kl": partial(KLAutoencoder, (1, 8, 8), **NETWORK | {"latent_channels": 3, "kl_weight": 1.0}),
    "vq": partial(VQAutoencoder, (1, 8, 8), **NETWORK | CODES | {"latent_channels": 3}),
    "fsq": partial(FSQAutoencoder, (1, 8, 8), **NETWORK),
    "discriminator": partial(
        discriminator.PatchDiscriminator, 1, channels=8, layers=1, weight=0.5, start=0
    ),
    "image_folder": partial(ImageFolder, "nowhere"),
    "budget": partial(Budget, **NO_BUDGET, solved=None),
}


SEARCHING = r"^\$ match .*reference=(mlp|unet) |budget=macs budget.reference=mlp"
LONG = r"hparams_search=optuna |backbone=diffusers_model backbone.settings=\{\}"
ALIKE = r"hparams_search=optuna .*(schedule=\w+,|experiment=\S+,|weighting=\w+,|InceptionScore )"


def check(prompt: str, message: str) -> None:
    """Compares a message with the stored one, or stores it if STORE_MESSAGES is set."""
    assert message, "nothing was said"
    assert "\n" not in message
    if os.environ.get("STORE_MESSAGES"):
        store(prompt, message)
    else:
        assert message == MESSAGES[prompt]


def starting(prompt: str) -> pytest.MarkDecorator:
    """Parametrises a test by the prompts that begin so; some are long, or slow.

    Slow ones search for a size, or are answered as another one is.
    """
    marks = ((pytest.mark.slow, f"{SEARCHING}|{ALIKE}"), (pytest.mark.long, LONG))
    prompts = [
        pytest.param(each, id=each, marks=[mark for mark, of in marks if re.search(of, each)])
        for each in MESSAGES
        if each.startswith(prompt)
    ]
    return pytest.mark.parametrize("prompt", prompts)


def files() -> dict[str, int]:
    """The modification times of all files below the current folder, hidden ones too.

    W&B links to a log outside, which other processes write to, so links count as such.
    """
    return {str(path): path.lstat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished_run) -> Path:
    """A folder with a run and a first stage, shared by all prompts, as they may write nothing."""
    folder = shutil.copytree(finished_run.parent, tmp_path_factory.mktemp("place") / "x")
    tiny_first_stage(folder / "stage", "vq")
    return folder


def words_of(prompt: str) -> list[str]:
    """The arguments of a prompt of a command."""
    words = shlex.split(prompt.removeprefix("$ "))
    return [each for word in words for each in SHORT.get(word, [word])]


@starting("$ ")
def test_a_wrong_command_is_answered_in_one_sentence_and_writes_nothing(
    lab, place, monkeypatch, prompt
):
    monkeypatch.chdir(place)
    before = files()
    if "hparams_search=optuna" in prompt:
        # its log goes to the standard error of the first test that loads it
        pytest.importorskip("optuna").logging.disable_default_handler()
    err = lab.done(*words_of(prompt), code=2)
    assert files() == before
    check(prompt, sentence_of(err).replace(str(Path.cwd()), "HERE"))


def configuration(words: list[str]) -> DictConfig:
    """The configuration of a training; Hydra composes what only differs in values once."""
    parsed = OverridesParser.create().parse_overrides(words)
    others = [each.input_line for each in parsed if not changes_a_key(each)]
    cfg = composed("train", "name=x", *others).copy()
    for each in filter(changes_a_key, parsed):
        OmegaConf.update(cfg, each.key_or_group, each.value())
    return cfg


@starting("train ")
def test_a_training_that_makes_no_sense_is_answered_in_one_sentence_and_writes_nothing(
    lab, place, monkeypatch, prompt
):
    monkeypatch.chdir(place)
    before = files()
    cfg = configuration(words_of(prompt)[1:])
    with pytest.raises(UserError) as error:
        train(cfg, [])
    assert files() == before
    check(prompt, str(error.value))


@starting("build ")
def test_a_composition_that_cannot_be_built_is_answered_in_one_sentence(prompt):
    cfg = assembled(*shlex.split(prompt.removeprefix("build ")))
    with pytest.raises(UserError) as error:
        build_pipeline(cfg, build_model(cfg, (1, 8, 8), Classes.numbered(4)), Classes.numbered(4))(
            range(2)
        )
    check(prompt, str(error.value))


@starting(">>> ")
def test_a_value_out_of_its_range_is_answered_in_one_sentence(prompt):
    with pytest.raises(ValueError) as error:  # noqa: PT011, its message is in the file
        eval(prompt.removeprefix(">>> "), dict(NAMES))
    check(prompt, str(error.value))


def test_the_messages_that_pages_quote_are_those_of_the_program():
    said, quoted = set(MESSAGES.values()), set()
    for page in WRITTEN:
        for block in re.findall(r"```text\n(.+?)```", page.read_text(), re.DOTALL):
            for answer in block.split("diffusion-lab: ")[1:]:
                quoted.add(" ".join(answer.split("\n$ ")[0].split()))
    assert quoted
    assert quoted - said == set()
