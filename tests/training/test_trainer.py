"""The trainer: how seldom its ranks wait for one another; and schedules of learning rates."""

from collections import OrderedDict
from types import SimpleNamespace

import lightning
import pytest
import torch
from helpers.compositions import composed
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer import call

from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.distributed import PATIENCE_WITH_ONE
from diffusion_lab.compute.sharding import strategy_options
from diffusion_lab.training.callbacks import Throughput, throughput
from diffusion_lab.training.lr_schedule import ConstantRate, CosineDecay, InverseSqrt
from diffusion_lab.training.module import ENDLESS, VOTES
from diffusion_lab.training.trainer import STEP_HOOKS, TRAINER, TimeLimit, build_trainer


def trainer_of(*overrides: str, callbacks=()) -> lightning.Trainer:
    """The trainer of one process on the CPU."""
    cfg = composed("train", "trainer.accelerator=cpu", *overrides)
    return build_trainer(cfg, solve_batch(4, 1, None), torch.device("cpu"), [*callbacks])


class Counting:
    """A strategy that counts its broadcasts."""

    def __init__(self):
        self.asked = 0

    def broadcast(self, value):
        self.asked += 1
        return value


@pytest.mark.parametrize(("ranks", "asked"), [(1, 3 * VOTES), (2, 3)])
def test_a_time_limit_is_asked_for_when_ranks_vote(ranks, asked):
    limit, strategy = TimeLimit("00:01:00:00"), Counting()
    assert limit.state_key == Timer("00:01:00:00").state_key  # of earlier checkpoints
    for step in range(1, 3 * VOTES + 1):
        trainer = SimpleNamespace(
            world_size=ranks,
            global_step=step,
            strategy=strategy,
            should_stop=False,
            accumulate_grad_batches=2,
        )
        for batch_idx in (2 * step - 2, 2 * step - 1):
            limit.on_train_batch_end(trainer, None, None, None, batch_idx)
    assert strategy.asked == asked


@pytest.mark.parametrize(("steps", "shown"), [(8, "3/8 "), (ENDLESS, "3 ")])
def test_a_line_of_progress_has_no_total_of_a_run_that_the_clock_ends(
    monkeypatch, capsys, steps, shown
):
    monkeypatch.setattr(throughput, "SECONDS_BETWEEN_LINES", -1)
    lines = throughput.ProgressLines()
    trainer = SimpleNamespace(
        global_step=2, max_steps=steps, callbacks=[], accumulate_grad_batches=1
    )
    lines.on_train_start(trainer, None)
    trainer.global_step = 3
    module = SimpleNamespace(batch_size=8)
    lines.on_train_batch_end(trainer, module, {"loss": torch.ones(())}, None, 2)
    assert f"step {shown}" in capsys.readouterr().err


def test_a_time_limit_ends_a_run_after_a_whole_step():
    limit, ended = TimeLimit("00:00:00:00"), []
    for batch_idx in range(3):
        trainer = SimpleNamespace(
            world_size=1,
            global_step=batch_idx // 2,
            strategy=Counting(),
            should_stop=False,
            accumulate_grad_batches=2,
        )
        limit.on_train_batch_end(trainer, None, None, None, batch_idx)
        ended.append(trainer.should_stop)
    assert ended == [False, True, False]


def test_lightning_calls_the_hooks_that_callbacks_have_and_no_others():
    class Own(Throughput):
        def on_before_backward(self, *_):
            called.append("backward")

    called: list[str] = []
    own = Own()
    trainer = trainer_of(callbacks=[own])
    assert own.on_before_zero_grad is own.on_after_backward is None
    assert own.on_train_batch_end.__func__ is Throughput.on_train_batch_end
    for hook in STEP_HOOKS[2:]:
        call._call_callback_hooks(trainer, hook, torch.zeros(()))
    assert called == ["backward"]


@pytest.mark.parametrize(
    ("overrides", "tries"),
    [
        ([], True),
        (["~trainer.benchmark"], True),  # of earlier runs
        (["trainer.benchmark=false"], False),
        (["trainer.deterministic=true"], False),
    ],
)
def test_kernels_are_tried_unless_a_run_is_deterministic(monkeypatch, overrides, tries):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tries)
    check_keys(composed("train", "trainer.accelerator=cpu", *overrides), TRAINER)
    trainer_of(*overrides)
    assert torch.backends.cudnn.benchmark == tries
    torch.use_deterministic_algorithms(False)


def test_ranks_do_not_ask_for_a_signal_at_each_micro_batch(monkeypatch):
    def asks(*_, **__):
        raise KeyboardInterrupt  # Lightning passes over an Exception

    monkeypatch.setattr(torch.distributed, "broadcast", asks)
    trainer = trainer_of("trainer.max_time=00:00:10:00")
    assert isinstance(trainer, lightning.Trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    given = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), "images", 3)
    assert given == {"batch": "images", "batch_idx": 3}
    assert [type(each) for each in trainer.callbacks if isinstance(each, Timer)] == [TimeLimit]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], ["DDP", "gradient_as_bucket_view"]),
        (["trainer.strategy=ddp"], ["DDP", "gradient_as_bucket_view"]),  # of earlier runs
        (
            ["trainer=ddp", "trainer.strategy.static_graph=true"],
            ["DDP", "gradient_as_bucket_view", "static_graph"],
        ),
        (
            ["trainer=fsdp", "trainer.strategy.gather_bf16=true", "trainer.precision=bf16-mixed"],
            ["FSDP", "gather_bf16"],
        ),
    ],
)
def test_several_ranks_have_a_strategy_with_the_options_that_are_told(overrides, options):
    cfg = composed("train", "trainer.accelerator=cpu", "trainer.devices=2", *overrides)
    assert strategy_options(cfg.trainer) == options
    strategy = build_trainer(cfg, solve_batch(4, 2, None), torch.device("cpu"), []).strategy
    assert type(strategy).__name__ == options[0]
    if options[0] == "DDP":
        given = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        assert strategy._ddp_kwargs == given | {"static_graph": "static_graph" in options}
    else:
        assert strategy.layers_policy.param_dtype == torch.bfloat16
        strategy.gather_bf16 = False
        assert strategy.layers_policy.param_dtype is None


def test_ranks_wait_long_for_the_first_step_and_for_what_the_first_computes():
    dist = torch.distributed
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=launch.PATIENCE_AT_START
    )
    try:
        patient = dist.new_group(timeout=PATIENCE_WITH_ONE)

        def patience(group):
            return group._get_backend(torch.device("cpu")).options._timeout

        assert patience(dist.group.WORLD) == launch.PATIENCE_AT_START > launch.PATIENCE
        launch.expect_steps()
        assert patience(dist.group.WORLD) == launch.PATIENCE
        assert patience(patient) == PATIENCE_WITH_ONE
    finally:
        dist.destroy_process_group()


def test_rates_warm_up_by_images_and_fall_by_the_share_of_the_run():
    warm_up, cooldown = ConstantRate(warmup_images=1000), ConstantRate(cooldown=0.2)
    assert [warm_up(n, 0.0) for n in (0, 250, 1000, 5000)] == [0.0, 0.25, 1.0, 1.0]
    assert [cooldown(1, share) for share in (0.8, 0.9, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    cosine = CosineDecay(final=0.1)
    assert [cosine(1, share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])


def test_the_inverse_square_root_counts_images_and_not_the_share_of_the_run():
    schedule = InverseSqrt(warmup_images=100, reference_images=1000)
    for progress in (0.0, 0.3, 1.0):
        rates = [schedule(images, progress) for images in (50, 100, 1000, 4000, 100_000)]
        assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.1])
