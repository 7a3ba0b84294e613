"""Seeds: a sample depends on its id and the seed alone."""

import torch

from diffusion_lab.common.randomness import SampleNoise, mix_seed, seed_device


def test_a_sample_is_the_same_in_any_batch():
    together = SampleNoise(3, range(8))
    first, second = together((2, 4)), together((2, 4))
    for i in (0, 5, 7):
        alone = SampleNoise(3, [i])
        assert torch.equal(alone((2, 4))[0], first[i])
        assert torch.equal(alone.randn_like(torch.zeros(1, 2, 4))[0], second[i])


def test_samples_steps_and_seeds_differ():
    noise = SampleNoise(0, range(100))
    flat = torch.cat([noise((64,)), noise((64,)), SampleNoise(1, range(100))((64,))])  # (300, 64)
    similarity = (flat @ flat.T / 64 - torch.eye(300)).abs()
    similarity.fill_diagonal_(0)
    assert similarity.max() < 0.8


def test_the_noise_is_unit_gaussian():
    draws = SampleNoise(0, range(1000))((100,))
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01


def test_mixed_seeds_do_not_collide_and_stay_the_same():
    seeds = {mix_seed(a, b) for a in range(100) for b in range(100)}
    assert len(seeds) == 10_000
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(0, 0) == 2547805098422156800  # a stored run must mean the same tomorrow


def test_a_device_is_seeded_as_torch_seeds_all():
    torch.manual_seed(2**40 + 7)
    expected = torch.rand(5)
    torch.rand(3)
    seed_device(2**40 + 7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
