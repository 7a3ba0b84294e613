"""The real-or-drawn test: how often a small network tells samples from training images.

It is a classifier two-sample test (arXiv:1610.06545): half of the images train the network, and its
accuracy is that on the other half. No feature of another network, and no class, has a part in it.
"""

import torch
from torch import Tensor

from diffusion_lab.common.randomness import random_places
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, accuracy_on, fit
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.quantity import named

EPOCHS = 10
SEED = 0  # of the network and of the order of its batches


class RealOrDrawn(Metric):
    """The accuracy of a network on equally many samples and real images that it has not seen.

    0.5 means that it cannot tell them apart. The value of test images is 0.5 up to chance.
    """

    quantities = named("real_or_drawn")

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        if generated.images is None or reference.images is None:
            return {}
        count = min(len(generated), len(reference)) // 2  # to learn from, and to be asked about
        drawn = generated.images[: 2 * count]
        real = reference.images[random_places(len(reference), 2 * count)]
        learned, asked = ((drawn[half], real[half]) for half in (slice(count), slice(count, None)))
        return {"real_or_drawn": told_apart(learned, asked, generated.extractor.device)}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"cnn/{reference.name}-{short_count(len(generated))}"


def told_apart(
    learned: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], device: torch.device
) -> float:
    """The accuracy on the pair `asked` of a network that is trained on the pair `learned`.

    The four sets of images are uint8 (n, C, H, W). The caller switches gradients off, or does not.
    """
    labels = torch.arange(2).repeat_interleave(len(learned[0]))
    # gradients, as samples are measured where there are none
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(SEED)
        _, channels, height, width = learned[0].shape
        network = SmallClassifier((channels, height, width), 2).to(device)
        fit(network, torch.cat(learned).clone(), labels, EPOCHS)
    return accuracy_on(network.eval(), torch.cat(asked), labels)
