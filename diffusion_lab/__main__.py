"""`python -m diffusion_lab`: the same program as `diffusion-lab`."""

from diffusion_lab.cli import main

if __name__ == "__main__":
    main()
