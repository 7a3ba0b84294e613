"""Writes the images that a run trains on into a zip, in a smaller size.

    python experiments/speedrun/smaller_images.py 20 outputs/fashion_mnist_20.zip

makes images of 20 x 20 pixels of FashionMNIST's, without those for validation, with a tenth of them
as the zip's test images. Train on them with data=image_zip data.source.path=FILE.
"""

import argparse
import io
import json
import zipfile

import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from diffusion_lab.assembly.objects import build_images
from diffusion_lab.assembly.sentences import conf_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("side", type=int, help="in pixels")
    parser.add_argument("output", help="the zip")
    parser.add_argument("overrides", nargs="*", help="overrides of the data, as in data=cifar10")
    chosen = parser.parse_args()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        data = build_images(compose("train", ["data=fashion_mnist", *chosen.overrides]))
    data.prepare_data()
    images = data.train_images().to(torch.float32)
    images = interpolate(images, size=chosen.side, mode="area").round().to(torch.uint8)
    classes, labels = data.train_labels(), []
    with zipfile.ZipFile(chosen.output, "w") as file:
        for i, image in enumerate(images):
            labels.append((name := f"{i // 1000:05}/img{i:08}.png", int(classes[i])))
            png = io.BytesIO()
            to_pil_image(image).save(png, "PNG")
            file.writestr(name, png.getvalue())
        file.writestr("dataset.json", json.dumps({"labels": labels}))


if __name__ == "__main__":
    main()
