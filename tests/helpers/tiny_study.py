"""A study of two tiny networks: one is tuned, both are trained for two seeds and compared."""

DIT = {
    "data.source._target_": "helpers.tiny_data.TinyData",
    "data.validation_size": 20,
    "backbone": "dit",
    "backbone.heads": 2,
    "backbone.depth": 1,
    "backbone.patch": 4,
    "trainer.accelerator": "cpu",
    "logger": "none",
    "compile": False,
    "batch_size": 8,
    "sampler.steps": 1,
    "metrics.num_samples": 8,
    "metrics.reference_size": 16,
    "callbacks.sample_grid": None,
    "callbacks.denoising": None,
}
STUDY = {
    "question": "Is a wider network better?",
    "protocol": {"metric": "fid", "test": "welch", "seeds": [0, 1], "stop": "two seeds"},
    "common": DIT,
    "arms": {"Narrow": {"backbone.width": 16}, "Wide": {"backbone.width": 32}},
    "budget": {"images": 16},
    "stages": {
        "tune": {
            "train": {"optimizer.lr": [1e-3, 2e-3]},
            "choose": "val/loss",
            "grow": 0,
            "over": {"arms": ["Wide"]},
        },
        "train": {"train": {}, "needs": {"tuning": "tune"}},
        "page": {"compare": {}, "needs": "train"},
    },
}
